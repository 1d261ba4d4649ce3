"""Trains emulators of the 1D Burgers equation for a published test of *superiority*: is an
emulator closer to a fine solver than a coarse solver is?

    u_next − u_prev = ν ∂²u_next/∂x² − b u_next ∂u_next/∂x,   x in [0, 1) periodic, upwind

F. Koehler, N. Thuerey: Neural Emulator Superiority: When Machine Learning for PDEs Surpasses
its Training Data. NeurIPS 2025, arXiv 2510.23111.

Both solvers take this implicit step of first order. The fine solver iterates until the step is
solved, and the coarse solver iterates only once. The superiority of an emulator is its error
divided by the error of the coarse solver, both relative to the fine solver. The authors ask
what training on *coarse data* can achieve. Two of the models answer that question, for coarse
data and for *fine data*. The third model answers another question: it is trained on the
residual of the fine step, which needs no solver at all. The numbers are in
docs/published_emulator.md.

    python -m studies.superiority.run --seed 0 1 2     median, least and most
    python -m studies.superiority.run --quick          to see that it runs
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from common import (
    COLORS,
    ConvNet,
    error_over_time,
    gated,
    LINES,
    minimise,
    rollout,
    save_figure,
)

from benchmarks import machine, tables
from residuum import residuum_loss
from studies import train_and_tabulate


NUM_POINTS = 60
NUM_TRAIN, NUM_TEST, TEST_STEPS = 500, 20, 10
TEST_SEED = 2025
DIFFUSION = 0.1  # viscosity · step / mesh width²
COURANT = 8.0  # step / mesh width, for a wind of 1
BUFFER_SIZE, BATCH_SIZE = 64, 8


#
# The equation, for states `[1, NUM_POINTS]` on [0, 1), with a time step of 1
#


def change(v, wind):
    """Computes the change of v in one step by diffusion and a wind, by upwind differences of
    first order. The wind at a face is the mean of its two neighbours."""
    left, right = jnp.roll(v, 1, -1), jnp.roll(v, -1, -1)
    from_left = jnp.maximum((jnp.roll(wind, 1, -1) + wind) / 2, 0)
    from_right = jnp.minimum((jnp.roll(wind, -1, -1) + wind) / 2, 0)
    advection = from_left * (v - left) + from_right * (right - v)
    return DIFFUSION * (left - 2 * v + right) - COURANT * advection


def implicit_euler(u_next, u_prev):
    """Returns zero if `u_next` is the step of the fine solver after `u_prev`."""
    return u_next - u_prev - change(u_next, wind=u_next)


WAVENUMBERS = 2 * np.pi / NUM_POINTS * np.arange(NUM_POINTS // 2 + 1)
AMPLIFICATION = 1 + COURANT * np.abs(1 - np.exp(1j * WAVENUMBERS))


def preconditioned(u_next, u_prev):
    """Computes the residual of `implicit_euler` without its amplification of short waves: with
    a wind of 1, an error of `u_next` enters the residual multiplied by up to `AMPLIFICATION`.
    The residual is divided by the RMS of the residual of persistence, so that all states count
    alike."""
    scaled = lambda r: jnp.fft.irfft(jnp.fft.rfft(r) / AMPLIFICATION)
    size = jnp.mean(scaled(implicit_euler(u_prev, u_prev)) ** 2)
    return scaled(implicit_euler(u_next, u_prev)) / jnp.sqrt(size + 1e-8)


def picard(u_prev, num_iterations):
    """Solves the implicit step with the wind of the last iteration, or of `u_prev` at first."""

    def iterate(_, u):
        matrix = jnp.eye(NUM_POINTS) - jax.jacfwd(lambda v: change(v, wind=u[0]))(u[0])
        return jnp.linalg.solve(matrix, u_prev[0])[None]

    return jax.lax.fori_loop(0, num_iterations, iterate, u_prev)


def coarse(u_prev):
    return picard(u_prev, 1)


def fine(u_prev):
    return picard(u_prev, 100)


def initial_conditions(num_samples, key):
    """Draws a random wave plus an offset in ±½, scaled to a maximum of 1, `[num_samples, 1,
    x]`."""
    keys = jax.random.split(key, 3)
    shape = (num_samples, 1, 1)
    amplitude = jax.random.uniform(keys[0], shape, minval=-1.0)
    phase = 2 * jnp.pi * jax.random.uniform(keys[1], shape)
    offset = jax.random.uniform(keys[2], shape, minval=-0.5, maxval=0.5)
    x = 2 * np.pi * np.arange(NUM_POINTS) / NUM_POINTS
    u = amplitude * jnp.cos(x + phase) + offset
    return u / jnp.max(jnp.abs(u), axis=-1, keepdims=True)


#
# The emulators
#


RESIDUAL = "residual of the fine step"
DATA = {"data of the coarse solver": coarse, "data of the fine solver": fine}


class Emulator(eqx.Module):
    """Advances a state `[1, NUM_POINTS]` by the output of a ConvNet, which is 0 before
    training."""

    network: ConvNet

    def __init__(self, *, width=16, depth=5, kernel_size=11, key):
        channels = (1, *(depth - 1) * [width], 1)
        options = dict(activation=gated, gain=3**0.5, zero_last=True, key=key)
        self.network = ConvNet(1, channels, depth * [kernel_size], **options)

    def __call__(self, u):
        return u + self.network(u)


def on_data(solver, key):
    """Returns the loss of one-step pairs from trajectories of a solver, for `minimise`. The
    loss is the distance to the solver's next state, divided by the distance between the
    solver's two states."""
    start = initial_conditions(NUM_TRAIN, key)
    u = rollout(solver, start, TEST_STEPS)
    u_prev, u_next = (x.reshape(-1, 1, 1, NUM_POINTS) for x in (u[:, :-1], u[:, 1:]))

    def distance(u_next, u_prev, solution):
        size = jnp.mean((solution - u_prev) ** 2)
        return (u_next - solution) / jnp.sqrt(size + 1e-8)

    def loss_fn(stepper, memory, key):
        pairs = jax.random.randint(key, (BATCH_SIZE,), 0, len(u_prev))
        step = lambda u_prev, solution: stepper(u_prev)
        return residuum_loss(step, u_prev[pairs], distance, inputs=u_next[pairs]), memory

    return loss_fn


def train_emulator(case):
    """Trains the case (model, seed, number of updates). Returns the case, the emulator, and the
    training time in seconds."""
    model, seed, num_updates = case
    keys = jax.random.split(jax.random.key(seed), 3)
    if model == RESIDUAL:
        loss_fn = train_and_tabulate.on_replayed_states(
            preconditioned,
            initial_conditions,
            batch_size=BATCH_SIZE,
            fresh_share=np.geomspace(0.3, 0.95, BUFFER_SIZE),
            bound=5,
        )
        memory = initial_conditions(BUFFER_SIZE, keys[1])
    else:
        loss_fn, memory = on_data(DATA[model], keys[1]), ()
    options = dict(num_updates=num_updates, learning_rate=3e-3)
    emulator, seconds = minimise(
        model, Emulator(key=keys[0]), loss_fn, memory, keys[2], **options
    )
    return case, emulator, seconds


#
# The evaluation
#

PUBLISHED = {  # medians of 30 seeds, by step, for the paper's network and training
    "UNet of the paper, coarse data": (1, 0.91, 0.85, 0.88, 0.92, 0.96, 1, 1.05, 1.09, 1.14)
}
REPORT_STEPS = (1, 2, 5, 10)
SHOWN_STEP = 3  # in the figure
COLUMNS = {
    **{f"ξ step {n}": (f"superiority_{n}", "{:.3f}") for n in REPORT_STEPS},
    "largest": ("superiority_largest", "{:.3f}"),
    "parameters": ("parameters", "{:.0f}"),
    "updates": ("updates", "{:.0f}"),
    "training": ("seconds", "{:.0f} s"),
}


def make_row(model, superiority, seed="", emulator=None, updates="", seconds=""):
    """Makes a row of the CSV file from the superiority `[step]`, from step 1 on."""
    row = {"model": model, "seed": seed}
    row |= {f"superiority_{n}": f"{x:.4g}" for n, x in enumerate(superiority, 1)}
    row["superiority_largest"] = f"{np.max(superiority):.4g}"
    return row | train_and_tabulate.training_columns(emulator, updates, seconds)


def draw(rows, states):
    """Draws the superiority over steps, from the rows of the CSV file, and the states of one
    test run."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    steps = range(1, TEST_STEPS + 1)
    models = (*PUBLISHED, *DATA, RESIDUAL, "persistence")
    for model, color, line in zip(models, COLORS[::-1], LINES[::-1], strict=True):
        scores = [train_and_tabulate.medians(rows, f"superiority_{n}")[model] for n in steps]
        median, least, most = zip(*scores, strict=True)
        left.semilogy(steps, median, color=color, linestyle=line, label=model)
        left.fill_between(steps, least, most, color=color, alpha=0.3)
    left.axhline(1, color="black", linewidth=0.8)
    left.set(title="error over the coarse solver's", xlabel="step", ylabel="superiority ξ")
    left.grid(alpha=0.3)
    left.legend(frameon=False, fontsize="small")
    x = np.arange(NUM_POINTS) / NUM_POINTS
    for (name, u), color, line in zip(states.items(), COLORS[2::-1], "-:-", strict=True):
        wide = dict(linewidth=4, alpha=0.4) if name == "fine solver" else {}
        right.plot(x, u[0], color=color, linestyle=line, label=name, **wide)
    right.set(title=f"one test run after {SHOWN_STEP} steps", xlabel="position x", ylabel="u")
    right.legend(frameon=False, fontsize="small")
    return figure


def main():
    parser = tables.make_parser(__doc__, quick="20 updates, 4 runs")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    parser.add_argument("--updates", type=int, default=100_000, help="of each emulator")
    parser.add_argument(
        "--workers", type=int, help="training runs at a time; one for each core"
    )
    args = parser.parse_args()
    folder, figures = tables.output_folders(args, __file__)
    num_updates = 20 if args.quick else args.updates

    start = initial_conditions(4 if args.quick else NUM_TEST, jax.random.key(TEST_SEED))
    solution, baseline = (rollout(solver, start, TEST_STEPS) for solver in (fine, coarse))
    of_coarse = error_over_time(baseline, solution)
    superiority = lambda u: np.asarray((error_over_time(u, solution) / of_coarse)[1:])
    persistence = jnp.broadcast_to(start[:, None], solution.shape)
    print("nRMSE of the coarse solver:", *(f"{x:.3f}" for x in of_coarse[1:]))

    cases = [(m, seed, num_updates) for m in (*DATA, RESIDUAL) for seed in args.seed]
    solved = rollout(lambda u: picard(u, 200), start, TEST_STEPS)
    rows = [make_row("persistence", superiority(persistence))]
    rows.append(make_row("exact step: the fine solver, 200 iterations", superiority(solved)))
    rows += [make_row(model, x) | dict(parameters=27_193) for model, x in PUBLISHED.items()]
    shown = jnp.argmax(jnp.std(solution[:, SHOWN_STEP, 0], axis=-1)), SHOWN_STEP
    states = {"fine solver": solution[shown], "coarse solver": baseline[shown]}
    trained = machine.on_single_cores(train_emulator, cases, args.workers)
    for (model, seed, _), emulator, seconds in trained:
        u = rollout(emulator, start, TEST_STEPS)
        rows.append(make_row(model, superiority(u), seed, emulator, num_updates, seconds))
        if model == RESIDUAL and seed == args.seed[0]:
            states["emulator"] = u[shown]
    train_and_tabulate.write(folder, rows, COLUMNS)
    save_figure(figures / "published_superiority.png", draw(rows, states))


if __name__ == "__main__":
    main()
