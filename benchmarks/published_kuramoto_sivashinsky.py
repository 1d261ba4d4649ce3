"""Emulators of the 1D Kuramoto–Sivashinsky equation on the test of a published one, AR-DenseED.
All of them were trained on the residual of a Crank–Nicolson step, without data.

    ∂u/∂t + ½ ∂(u²)/∂x + ∂²u/∂x² + ∂⁴u/∂x⁴ = 0,   x in [0, 22π) periodic

N. Geneva, N. Zabaras: Modeling the dynamics of PDE systems with physics-constrained deep
auto-regressive networks. J. Comput. Phys. 403, 109056 (2020), arXiv 1906.05747.

In the ablation, these choices helped most, in this order: spectral derivatives rather than
differences of second order; initial conditions that are not periodic within the domain, unlike
those of the original training; a network that multiplies channels, because the equation is
quadratic; and many updates on small batches, with a short memory of Adam. The training states
come from a replay buffer, which is refilled with the final states of the emulator's own
rollouts (`Rollout.final_state`), so even one-step rollouts visit the attractor. The solver is
used only to evaluate the emulators. The numbers are in docs/published_emulator.md.

    python benchmarks/published_kuramoto_sivashinsky.py                  one seed
    python benchmarks/published_kuramoto_sivashinsky.py --seed 0 1 2     median, least and most
    python benchmarks/published_kuramoto_sivashinsky.py --ablation       one change at a time
    python benchmarks/published_kuramoto_sivashinsky.py --quick          to see that it runs
"""

import pathlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import exponax as ex
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import published
import study


# isort: split
from common import (
    bilinear,
    COLORS,
    error_over_time as relative_error,
    LINES,
    rollout,
    save_figure,
    show,
)

from residuum import Cuts


NUM_POINTS = 96
DOMAIN_EXTENT = 22 * np.pi
DT = 0.1
BUFFER_SIZE = 512
NUM_TEST, TRANSIENT_STEPS, TEST_STEPS = 200, 1000, 1000
REPORT_TIMES = (1, 5, 10, 20)


#
# The equation
#

WAVENUMBERS = 2 * np.pi / DOMAIN_EXTENT * np.arange(NUM_POINTS // 2 + 1)
WAVENUMBERS[-1] = 0  # the shortest wave has no derivative on this grid
SPECTRAL = WAVENUMBERS, WAVENUMBERS**2  # symbols of -i ∂/∂x and -∂²/∂x²
MESH_WIDTH = DOMAIN_EXTENT / NUM_POINTS
DIFFERENCES = (  # the same, of second order
    np.sin(WAVENUMBERS * MESH_WIDTH) / MESH_WIDTH,
    (2 - 2 * np.cos(WAVENUMBERS * MESH_WIDTH)) / MESH_WIDTH**2,
)


def crank_nicolson(u_next, u_prev, symbols=SPECTRAL, precondition=False):
    """Zero if `u_next` is one Crank–Nicolson step of length `DT` after `u_prev`; states are
    `[1, NUM_POINTS]`."""
    first, second = symbols
    linear = second - second**2  # of -∂²/∂x² - ∂⁴/∂x⁴
    slope = lambda u: linear * jnp.fft.rfft(u) - 0.5j * first * jnp.fft.rfft(u**2)
    residual = jnp.fft.rfft(u_next - u_prev) - DT / 2 * (slope(u_next) + slope(u_prev))
    return jnp.fft.irfft(residual / (1 - DT / 2 * linear) if precondition else residual)


def preconditioned_crank_nicolson(u_next, u_prev, symbols=SPECTRAL):
    """The same with the linear part of the step inverted: to first order, the error of
    `u_next`."""
    return crank_nicolson(u_next, u_prev, symbols, precondition=True)


def crank_nicolson_step(u_prev):
    """Solves that step; each iteration reduces the error to a fifth."""
    correct = lambda _, u: u - preconditioned_crank_nicolson(u, u_prev)
    return jax.lax.fori_loop(0, 12, correct, u_prev)


def reference_solver():
    """Fourth order in time and, like that of the authors, without dealiasing."""
    return ex.stepper.KuramotoSivashinskyConservative(
        1, DOMAIN_EXTENT, NUM_POINTS, DT, order=4, dealiasing_fraction=1.0
    )


#
# Initial conditions of training and test, `[num_samples, 1, NUM_POINTS]`
#


def long_waves(num_samples, key):
    """The two longest waves, with random coefficients, as in the published test."""
    real, imaginary = jax.random.uniform(key, (2, num_samples, 1, 2))
    u_hat = jnp.zeros((num_samples, 1, NUM_POINTS // 2 + 1), complex)
    return jnp.fft.irfft(u_hat.at[..., 1:3].set(NUM_POINTS * (real - 1j * imaginary)))


def initial_conditions(num_samples, key, long=0.1):
    """The random waves of the published training. Their period is about a seventh of the
    domain, and a convolutional emulator preserves it: adding `long` times `long_waves` breaks
    the symmetry."""
    keys = jax.random.split(key, 5)
    shape = (num_samples, 1, 1)
    amplitude = 2.5 + jax.random.uniform(keys[0], shape)
    mode = jnp.round(jnp.abs(7 + 0.5 * jax.random.normal(keys[1], shape)))
    phase = 2 * jnp.pi * jax.random.uniform(keys[2], shape)
    second = jax.random.normal(keys[3], shape)
    x = 2 * jnp.pi * mode * jnp.arange(NUM_POINTS) / NUM_POINTS
    u = jnp.sin(x + phase) + second * jnp.sin(2 * x + phase) + jnp.sin(3 * x + phase) / 3
    lowest, highest = (f(u, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
    waves = amplitude * (2 * (u - lowest) / (highest - lowest) - 1)
    return waves + long * long_waves(num_samples, keys[4])


def published_test(num_samples=NUM_TEST, seed=0):
    """The solver's trajectories `[num_samples, TEST_STEPS + 1, 1, NUM_POINTS]` from t = 100 on,
    after the transient. The emulators start from their first states."""
    solver = reference_solver()
    start = long_waves(num_samples, jax.random.key(seed))
    start = rollout(solver, start, TRANSIENT_STEPS)[:, -1]
    return rollout(solver, start, TEST_STEPS)


#
# The emulator
#


class ConvNet(eqx.Module):
    """Advances a state `[1, NUM_POINTS]`: adds the output of a periodic ConvNet with dense
    connections. Its activations are products of channels, because the equation is quadratic."""

    layers: list[eqx.nn.Conv1d]
    activation: Callable = eqx.field(static=True)

    def __init__(self, *, width=16, depth=3, kernel_size=9, activation=bilinear, key):
        self.activation = activation
        hidden_width = 2 * width if activation is bilinear else width
        layers = [
            eqx.nn.Conv1d(
                1 + i * width,
                hidden_width if i < depth - 1 else 1,
                kernel_size,
                padding="SAME",
                padding_mode="CIRCULAR",
                key=layer_key,
            )
            for i, layer_key in enumerate(jax.random.split(key, depth))
        ]
        # Equinox initialises with a third of the variance 1 / fan_in, which trains more slowly.
        self.layers = jax.tree.map(lambda x: 3**0.5 * x, layers[:-1])
        # With these zeros, the emulator starts as the identity.
        self.layers += jax.tree.map(jnp.zeros_like, layers[-1:])

    def __call__(self, u):
        hidden = jnp.clip(u, -5, 5) / 2  # so that no rollout can overflow
        for layer in self.layers[:-1]:
            hidden = jnp.concatenate([hidden, self.activation(layer(hidden))])
        return u + self.layers[-1](hidden)


class Recipe(NamedTuple):
    """What is trained, and on what. The ablation changes one item at a time."""

    num_rollout_steps: int = 4
    cuts: Cuts = Cuts()
    relative_updates: float = 1.0
    residuum_fn: Callable = preconditioned_crank_nicolson
    long: float = 0.1  # of the long waves among the initial conditions
    batch_size: int = 8
    b2: float = 0.99  # of Adam
    network: Callable = ConvNet


def train_emulator(case):
    """Of the case (model, recipe, seed, number of updates). Returns the case, the emulator, and
    the seconds that its training took."""
    model, recipe, seed, num_updates = case
    init_key, buffer_key, updates_key = jax.random.split(jax.random.key(seed), 3)
    fresh = partial(initial_conditions, long=recipe.long)
    loss_fn = published.on_replayed_states(
        recipe.residuum_fn,
        fresh,
        batch_size=recipe.batch_size,
        fresh_share=0.001,
        bound=10,
        num_rollout_steps=recipe.num_rollout_steps,
        cuts=recipe.cuts,
    )
    emulator, seconds = published.minimise(
        model,
        recipe.network(key=init_key),
        loss_fn,
        fresh(BUFFER_SIZE, buffer_key),
        updates_key,
        num_updates=num_updates,
        learning_rate=5e-3,
        b2=recipe.b2,
    )
    return case, emulator, seconds


#
# The evaluation
#


def mean_squared_error(u, reference):
    """`[time]`, the mean over samples and space."""
    return jnp.mean((u - reference) ** 2, axis=(0, 2, 3))


def spectrum(u):
    """The mean of |û|² `[mode]`; that of cos x is 1/4."""
    return jnp.mean(jnp.abs(jnp.fft.rfft(u) / NUM_POINTS) ** 2, axis=(0, 1, 2))


class Scores(NamedTuple):
    """Of one emulator. `numbers` are the columns of its row in the CSV file."""

    mse: np.ndarray  # [time]
    energy: np.ndarray  # of the modes of `MODES`, relative to the solver's
    numbers: dict[str, float]


# Heading of each column: name in the CSV file, format. The error of the spectrum is the
# largest one of all `MODES`.
COLUMNS = {
    **{f"t = {t}": (f"mse_{t}", "{:.1e}") for t in REPORT_TIMES},
    "nRMSE 0.3": ("time_of_nrmse_0.3", "{:.1f}"),
    "std u": ("std", "{:.3f}"),
    "spectrum": ("spectrum", "{:.1%}"),
    "parameters": ("parameters", "{:.0f}"),
    "training": ("seconds", "{:.0f} s"),
}
ABLATION_COLUMNS = {
    **{name: column for name, column in COLUMNS.items() if name.startswith("t = ")},
    "parameters": ("parameters", "{:.0f}"),
    "updates": ("updates", "{:.0f}"),
    "training": ("seconds", "{:.0f} s"),
}
MODES = slice(2, 25)  # without the longest wave, of which there are too few samples
STATISTICS_FROM = 200  # steps


def evaluate(u, reference):
    mse, error = (np.asarray(f(u, reference)) for f in (mean_squared_error, relative_error))
    energy, solver = (spectrum(v[:, STATISTICS_FROM:])[MODES] for v in (u, reference))
    too_large = np.append(~(error < 0.3), True)
    numbers = {f"mse_{t}": mse[round(t / DT)] for t in REPORT_TIMES}
    numbers["time_of_nrmse_0.3"] = DT * np.argmax(too_large)
    numbers |= {"std": np.std(u), "spectrum": np.max(np.abs(energy / solver - 1))}
    # Where the emulator diverged, errors are infinite.
    numbers = {name: float(np.nan_to_num(x, nan=np.inf)) for name, x in numbers.items()}
    return Scores(mse, energy / solver, numbers)


def make_row(model, numbers, seed="", emulator=None, updates="", seconds=""):
    """A row of the CSV file."""
    numbers = {name: f"{x:.6g}" for name, x in numbers.items()}
    columns = published.training_columns(emulator, updates, seconds)
    return {"model": model, "seed": seed, **numbers, **columns}


#
# Models, rows, figure
#

EXACT = "exact step, Crank–Nicolson"
# Measured by benchmarks/ar_densed.py from the published weights, commit adeb9f313d70.
PUBLISHED = "AR-DenseED"
PUBLISHED_NUMBERS = {
    **{"mse_1": 6.0e-4, "mse_5": 8.8e-3, "mse_10": 6.6e-2, "mse_20": 0.56},
    **{"time_of_nrmse_0.3": 13.9, "std": 1.275, "spectrum": 0.133},
}
PUBLISHED_ENERGY = np.fromstring(
    "0.910 0.951 0.953 0.988 0.961 0.938 0.968 0.937 0.978 0.938 0.922 0.937 "
    "0.989 0.910 0.908 0.939 0.902 0.872 0.890 0.911 0.889 0.872 0.867",
    sep=" ",
)
MODELS = {
    "1 step": Recipe(num_rollout_steps=1),
    "4 steps": Recipe(),
    "8 steps, `bptt=1`": Recipe(num_rollout_steps=8, cuts=Cuts(bptt=1)),
}
ABLATION = {
    "nothing": Recipe(),
    "the waves alone, without long ones": Recipe(long=0.0),
    "differences of second order": Recipe(
        residuum_fn=partial(preconditioned_crank_nicolson, symbols=DIFFERENCES)
    ),
    "not preconditioned": Recipe(residuum_fn=crank_nicolson),
    "24 channels": Recipe(network=partial(ConvNet, width=24)),
    "GELU, four convolutions": Recipe(
        network=partial(ConvNet, depth=4, activation=jax.nn.gelu)
    ),
    "batches of 32": Recipe(batch_size=32),
    "batches of 32, a quarter of the updates": Recipe(batch_size=32, relative_updates=0.25),
    "Adam with `b2=0.999`, not 0.99": Recipe(b2=0.999),
    "1 step": Recipe(num_rollout_steps=1),
    "1 step, 3.5 times the updates": Recipe(num_rollout_steps=1, relative_updates=3.5),
    "4 steps, `bptt=1`": Recipe(cuts=Cuts(bptt=1)),
    "8 steps": Recipe(num_rollout_steps=8),
    "8 steps, `bptt=1`": Recipe(num_rollout_steps=8, cuts=Cuts(bptt=1)),
}
FOLDER = pathlib.Path("benchmarks")
CSV, ABLATION_CSV = (
    FOLDER / f"published_kuramoto_sivashinsky{which}.csv" for which in ("", "_ablation")
)


def train_and_evaluate(cases, reference, workers):
    """Yields (row of the CSV file, scores, first trajectory) of each case."""
    for (model, _, seed, updates), emulator, seconds in study.on_single_cores(
        train_emulator, cases, workers
    ):
        u = rollout(emulator, reference[:, 0], TEST_STEPS)
        scores = evaluate(u, reference)
        yield make_row(model, scores.numbers, seed, emulator, updates, seconds), scores, u[0]


def draw(reference, emulated, scores):
    """One trajectory in space and time; errors over time and spectra of all emulators."""
    pictures = {"solver": reference, "emulator": emulated, "difference": emulated - reference}
    figure = plt.figure(figsize=(11, 6.2), layout="constrained")
    axes = figure.subplot_mosaic([[*pictures], ["mse", "mse", "energy"]])
    extent = (DT * TEST_STEPS, DOMAIN_EXTENT)
    for title, u in pictures.items():
        image = show(axes[title], title, u[:, 0], extent, vmin=-3.5, vmax=3.5)
        axes[title].set(xlabel="time t", ylabel="position x")
    figure.colorbar(image, ax=axes[title], label="u")

    for color, line, (name, score) in zip(COLORS, LINES, scores.items(), strict=True):
        style = dict(color=color, linestyle=line)
        published_times = name == PUBLISHED
        times = REPORT_TIMES if published_times else DT * np.arange(len(score.mse))
        marker = "o" if published_times else None
        axes["mse"].semilogy(times, score.mse, marker=marker, label=name, **style)
        axes["energy"].plot(np.arange(50)[MODES], score.energy, **style)
    axes["mse"].set(title="error on the published test", xlabel="time t")
    axes["mse"].set(ylabel="mean squared error", ylim=(1e-9, 10))
    axes["energy"].set(title="spectrum over the solver's", xlabel="mode", ylim=(0.8, 1.2))
    for axis in (axes["mse"], axes["energy"]):
        axis.grid(alpha=0.3)
    axes["mse"].legend(frameon=False)
    return figure


def main():
    figure = "assets/kuramoto_sivashinsky.png"
    parser = study.make_parser(__doc__, figure, CSV, quick="20 updates, 8 trajectories")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    parser.add_argument("--updates", type=int, help="of each emulator: 30000, or 6000")
    parser.add_argument("--ablation", action="store_true", help="on other trajectories")
    parser.add_argument("--workers", type=int, help="trainings at a time; one for each core")
    args = parser.parse_args()
    num_updates = 20 if args.quick else args.updates or (6000 if args.ablation else 30_000)

    num_samples = 8 if args.quick else 100 if args.ablation else NUM_TEST
    reference = published_test(num_samples, seed=1 if args.ablation else 0)
    models = ABLATION if args.ablation else MODELS
    cases = [
        (model, recipe, seed, max(20, round(recipe.relative_updates * num_updates)))
        for model, recipe in models.items()
        for seed in args.seed
    ]
    cases = cases[:2] if args.quick and args.ablation else cases
    results = list(train_and_evaluate(cases, reference, args.workers))
    order = {(model, seed): i for i, (model, _, seed, _) in enumerate(cases)}
    results.sort(key=lambda result: order[result[0]["model"], result[0]["seed"]])
    rows = [row for row, _, _ in results]
    path = args.csv or (ABLATION_CSV if args.ablation else CSV)
    if not args.ablation:
        u = rollout(crank_nicolson_step, reference[:, 0], TEST_STEPS)
        exact = evaluate(u, reference)
        persistence = evaluate(jnp.broadcast_to(u[:, :1], u.shape), reference)
        first = make_row("persistence", persistence.numbers)
        ar_densed = make_row(PUBLISHED, PUBLISHED_NUMBERS) | dict(parameters=4820)
        rows = [first, ar_densed, *rows, make_row(EXACT, exact.numbers)]
        solver = dict.fromkeys(first, "") | dict(model="solver", std=f"{np.std(reference):.6g}")
        rows.append(solver)
    table = published.markdown(rows, ABLATION_COLUMNS if args.ablation else COLUMNS)
    print(table)
    if args.csv or not args.quick:
        study.write_csv(path, rows)
        study.write_table(path, table)
    if args.ablation:
        return

    scores = {EXACT: exact}
    for row, score, u in results:
        if row["seed"] == args.seed[0]:
            scores[row["model"].replace("`", "")], emulated = score, u
    at_report_times = np.array([PUBLISHED_NUMBERS[f"mse_{t}"] for t in REPORT_TIMES])
    scores[PUBLISHED] = Scores(at_report_times, PUBLISHED_ENERGY, PUBLISHED_NUMBERS)
    save_figure(args.output, draw(reference[0], emulated, scores))


if __name__ == "__main__":
    main()
