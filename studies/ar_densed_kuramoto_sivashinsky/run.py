"""Trains emulators of the 1D Kuramoto–Sivashinsky equation for the test of a published one,
AR-DenseED. All of them are trained on the residual of a Crank–Nicolson step, without data.

    ∂u/∂t + ½ ∂(u²)/∂x + ∂²u/∂x² + ∂⁴u/∂x⁴ = 0,   x in [0, 22π) periodic

N. Geneva, N. Zabaras: Modeling the dynamics of PDE systems with physics-constrained deep
auto-regressive networks. J. Comput. Phys. 403, 109056 (2020), arXiv 1906.05747.

In the ablation, these choices helped most, in this order: spectral derivatives rather than
second-order differences; initial conditions that are not periodic within the domain, unlike
those of the original training; a network that multiplies channels, because the equation is
quadratic; and many updates on small batches, with a short memory of Adam. The training states
come from a replay buffer, which is refilled with the final states of the emulator's own
rollouts (`Rollout.final_state`), so even one-step rollouts visit the attractor. The solver is
used only to evaluate the emulators. The numbers are in docs/published_emulator.md.

    python -m studies.ar_densed_kuramoto_sivashinsky.run                  one seed
    python -m studies.ar_densed_kuramoto_sivashinsky.run --seed 0 1 2     median, least and most
    python -m studies.ar_densed_kuramoto_sivashinsky.run --ablation       one change at a time
    python -m studies.ar_densed_kuramoto_sivashinsky.run --quick          to see that it runs
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from common import COLORS, error_over_time, LINES, minimise, rollout, save_figure, show

from benchmarks import machine, tables
from residuum import Cuts
from studies import train_and_tabulate
from studies.ar_densed_kuramoto_sivashinsky.problem import (
    ConvNet,
    crank_nicolson,
    crank_nicolson_step,
    DIFFERENCES,
    DOMAIN_EXTENT,
    DT,
    initial_conditions,
    NUM_POINTS,
    NUM_TEST,
    preconditioned_crank_nicolson,
    published_test,
    TEST_STEPS,
)


BUFFER_SIZE = 512
REPORT_TIMES = (1, 5, 10, 20)


class Recipe(NamedTuple):
    """Says what is trained, and on what. The ablation changes one item at a time."""

    num_rollout_steps: int = 4
    cuts: Cuts = Cuts()
    relative_updates: float = 1.0
    residuum_fn: Callable = preconditioned_crank_nicolson
    long: float = 0.1  # amplitude of the long waves in the initial conditions
    batch_size: int = 8
    b2: float = 0.99  # decay rate of Adam
    network: Callable = ConvNet


def train_emulator(case):
    """Trains the case (model, recipe, seed, number of updates). Returns the case, the emulator,
    and the training time in seconds."""
    model, recipe, seed, num_updates = case
    init_key, buffer_key, updates_key = jax.random.split(jax.random.key(seed), 3)
    fresh = partial(initial_conditions, long=recipe.long)
    loss_fn = train_and_tabulate.on_replayed_states(
        recipe.residuum_fn,
        fresh,
        batch_size=recipe.batch_size,
        fresh_share=0.001,
        bound=10,
        num_rollout_steps=recipe.num_rollout_steps,
        cuts=recipe.cuts,
    )
    emulator, seconds = minimise(
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
    """Computes the error `[time]`, a mean over samples and space."""
    return jnp.mean((u - reference) ** 2, axis=(0, 2, 3))


def spectrum(u):
    """Computes the mean of |û|², `[mode]`, which is 1/4 for cos x."""
    return jnp.mean(jnp.abs(jnp.fft.rfft(u) / NUM_POINTS) ** 2, axis=(0, 1, 2))


class Scores(NamedTuple):
    """Holds the scores of one emulator. `numbers` are the columns of its row in the CSV
    file."""

    mse: np.ndarray  # [time]
    energy: np.ndarray  # [mode], of `MODES`, relative to the solver's energy
    numbers: dict[str, float]


# Each heading comes with the column's name in the CSV file, and a format. The error of the
# spectrum is the largest error of all `MODES`.
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
MODES = slice(2, 25)  # the longest wave has too few samples
STATISTICS_FROM = 200  # step


def evaluate(u, reference):
    mse, error = (np.asarray(f(u, reference)) for f in (mean_squared_error, error_over_time))
    energy, solver = (spectrum(v[:, STATISTICS_FROM:])[MODES] for v in (u, reference))
    too_large = np.append(~(error < 0.3), True)
    numbers = {f"mse_{t}": mse[round(t / DT)] for t in REPORT_TIMES}
    numbers["time_of_nrmse_0.3"] = DT * np.argmax(too_large)
    numbers |= {"std": np.std(u), "spectrum": np.max(np.abs(energy / solver - 1))}
    # If the emulator diverged, the errors are infinite.
    numbers = {name: float(np.nan_to_num(x, nan=np.inf)) for name, x in numbers.items()}
    return Scores(mse, energy / solver, numbers)


def make_row(model, numbers, seed="", emulator=None, updates="", seconds=""):
    """Returns a row of the CSV file."""
    numbers = {name: f"{x:.6g}" for name, x in numbers.items()}
    columns = train_and_tabulate.training_columns(emulator, updates, seconds)
    return {"model": model, "seed": seed, **numbers, **columns}


#
# Models, rows, figure
#

EXACT = "exact step, Crank–Nicolson"
# studies/ar_densed_burgers/published_weights.py measured these numbers, with the weights of
# commit adeb9f313d70.
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


def train_and_evaluate(cases, reference, workers):
    """Yields (row of the CSV file, scores, first trajectory) for each case."""
    for (model, _, seed, updates), emulator, seconds in machine.on_single_cores(
        train_emulator, cases, workers
    ):
        u = rollout(emulator, reference[:, 0], TEST_STEPS)
        scores = evaluate(u, reference)
        yield make_row(model, scores.numbers, seed, emulator, updates, seconds), scores, u[0]


def draw(reference, emulated, scores):
    """Draws one trajectory in space and time, and the errors over time and the spectra of all
    emulators."""
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
    parser = tables.make_parser(__doc__, quick="20 updates, 8 trajectories")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    parser.add_argument("--updates", type=int, help="of each emulator: 30000, or 6000")
    parser.add_argument("--ablation", action="store_true", help="on other trajectories")
    parser.add_argument(
        "--workers", type=int, help="training runs at a time; one for each core"
    )
    args = parser.parse_args()
    folder, figures = tables.output_folders(args, __file__)
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
    rows = [row for row, _, _ in results]
    if args.ablation:
        train_and_tabulate.write(folder, rows, ABLATION_COLUMNS, "ablation")
        return

    u = rollout(crank_nicolson_step, reference[:, 0], TEST_STEPS)
    exact = evaluate(u, reference)
    persistence = evaluate(jnp.broadcast_to(u[:, :1], u.shape), reference)
    first = make_row("persistence", persistence.numbers)
    ar_densed = make_row(PUBLISHED, PUBLISHED_NUMBERS) | dict(parameters=4820)
    solver = dict.fromkeys(first, "") | dict(model="solver", std=f"{np.std(reference):.6g}")
    rows = [first, ar_densed, *rows, make_row(EXACT, exact.numbers), solver]
    train_and_tabulate.write(folder, rows, COLUMNS)
    scores = {EXACT: exact}
    for row, score, u in results:
        if row["seed"] == args.seed[0]:
            scores[row["model"].replace("`", "")], emulated = score, u
    at_report_times = np.array([PUBLISHED_NUMBERS[f"mse_{t}"] for t in REPORT_TIMES])
    scores[PUBLISHED] = Scores(at_report_times, PUBLISHED_ENERGY, PUBLISHED_NUMBERS)
    save_figure(figures / "kuramoto_sivashinsky.png", draw(reference[0], emulated, scores))


if __name__ == "__main__":
    main()
