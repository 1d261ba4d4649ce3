"""Trains emulators of the 1D Burgers equation for the test of a published one, AR-DenseED. All
of them are trained on the residual of an implicit step, without data.

    ∂u/∂t + ½ ∂(u²)/∂x = ν ∂²u/∂x²,   x in [0, 1) periodic, ν = 0.0025

N. Geneva, N. Zabaras: Modeling the dynamics of PDE systems with physics-constrained deep
auto-regressive networks. J. Comput. Phys. 403, 109056 (2020), arXiv 1906.05747.

Three choices helped most. A replay buffer holds states of all ages, i.e., after few and many
steps of the emulator, because the error is largest where shocks form. The emulator runs in the
frame that moves with the mean of u. In long training runs, a residual of fourth order in time
from two states alone (Hermite) also helps. The solver is used only to evaluate the emulators.
The numbers are in docs/published_emulator.md.

    python -m studies.ar_densed_burgers.run --seed 0 1 2     median, least and most
    python -m studies.ar_densed_burgers.run --ablation       one change at a time
    python -m studies.ar_densed_burgers.run --quick          to see that it runs
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from common import bilinear, COLORS, ConvNet, gated, LINES, minimise, rollout, save_figure, show

from benchmarks import machine, tables
from residuum import Cuts
from studies import train_and_tabulate
from studies.ar_densed_burgers.problem import (
    crank_nicolson,
    DT,
    hermite,
    in_moving_frame,
    initial_conditions,
    published_residual,
    published_states,
    reference,
    scaled,
    solved_exactly,
    TEST_STEPS,
)


NUM_TEST = 200
BUFFER_SIZE, BATCH_SIZE = 128, 8
REPORT_TIMES = (0.25, 0.5, 1, 1.5, 2)


#
# The emulator
#


class Recipe(NamedTuple):
    """Says what is trained, and on what. The ablation changes one item at a time."""

    residuum_fn: Callable = hermite
    relative: bool = True  # else divided by a typical RMS for all states
    moving_frame: bool = True  # else the emulator sees u with its mean
    fresh_shares: tuple[float, float] = (0.02, 0.5)  # over the buffer; 1 means no buffer
    num_rollout_steps: int = 1
    cuts: Cuts = Cuts()
    activation: Callable = gated
    width: int = 18


class Emulator(eqx.Module):
    """Advances a state `[1, NUM_POINTS]` by differences of a flux, which preserve its mean."""

    network: ConvNet

    def __init__(self, recipe, key):
        options = dict(activation=recipe.activation, gain=3**0.5, zero_last=True, key=key)
        self.network = ConvNet(1, (1, *3 * [recipe.width], 1), 4 * [9], **options)

    def __call__(self, u):
        flux = self.network(u)
        return u - 0.05 * (flux - jnp.roll(flux, 1, -1))


def train_emulator(case):
    """Trains the case (model, recipe, seed, number of updates). Returns the case, the emulator,
    and the training time in seconds."""
    model, recipe, seed, num_updates = case
    init_key, buffer_key, updates_key = jax.random.split(jax.random.key(seed), 3)
    fresh = partial(initial_conditions, with_mean=not recipe.moving_frame)
    loss_fn = train_and_tabulate.on_replayed_states(
        scaled(recipe.residuum_fn, recipe.relative),
        fresh,
        batch_size=BATCH_SIZE,
        fresh_share=np.geomspace(*recipe.fresh_shares, BUFFER_SIZE),
        bound=10,
        num_rollout_steps=recipe.num_rollout_steps,
        cuts=recipe.cuts,
    )
    emulator, seconds = minimise(
        model,
        Emulator(recipe, init_key),
        loss_fn,
        fresh(BUFFER_SIZE, buffer_key),
        updates_key,
        num_updates=num_updates,
        learning_rate=3e-3,
    )
    return case, emulator, seconds


def trajectories(stepper, states, moving_frame=True):
    """Rolls out `[run, TEST_STEPS + 1, 1, NUM_POINTS]` in float32."""
    states = jnp.asarray(states, jnp.float32)[:, None]
    advance = lambda u: rollout(stepper, u[:, 0], TEST_STEPS)
    return in_moving_frame(advance, states) if moving_frame else advance(states)


#
# The evaluation
#

COLUMNS = {
    **{f"t = {t:g}": (f"mse_{t:g}", "{:.1e}") for t in REPORT_TIMES},
    "largest": ("mse_largest", "{:.1e}"),
    "parameters": ("parameters", "{:.0f}"),
    "updates": ("updates", "{:.0f}"),
    "training": ("seconds", "{:.0f} s"),
}
# All rows of the ablation share these columns, apart from the row of the GELU.
SHARED = ("parameters", "training")
ABLATION_COLUMNS = {name: x for name, x in COLUMNS.items() if name not in SHARED}


def mean_squared_error(u, reference):
    """Computes the error `[time]`, a mean over runs and space."""
    return np.mean((np.asarray(u, np.float64) - reference) ** 2, axis=(0, 2, 3))


def make_row(model, mse, seed="", emulator=None, updates="", seconds=""):
    """Returns a row of the CSV file."""
    mse = np.nan_to_num(mse, nan=np.inf)  # where the emulator diverged
    row = {"model": model, "seed": seed}
    row |= {f"mse_{t:g}": f"{mse[round(t / DT)]:.3g}" for t in REPORT_TIMES}
    row["mse_largest"] = f"{np.max(mse):.3g}"
    return row | train_and_tabulate.training_columns(emulator, updates, seconds)


#
# Models, rows, figure
#

OURS = "residuum"
PUBLISHED = "AR-DenseED"
PUBLISHED_ERROR = tables.ROOT / "studies" / "ar_densed_burgers" / "published_error.csv"
EXACT = {  # residual, and whether the step is solved in the moving frame
    "exact step, published residual": (published_residual, False),
    "exact step, Crank–Nicolson": (crank_nicolson, False),
    "exact step, Hermite": (hermite, False),
    "exact step, Crank–Nicolson, moving frame": (crank_nicolson, True),
    "exact step, Hermite, moving frame": (hermite, True),
}
ABLATION = {
    "nothing": Recipe(),
    "Crank–Nicolson, differences of sixth order": Recipe(residuum_fn=crank_nicolson),
    "the published residual": Recipe(residuum_fn=published_residual),
    "divided by a constant, not by the size of the change": Recipe(relative=False),
    "4 steps": Recipe(num_rollout_steps=4),
    "4 steps, `bptt=1`": Recipe(num_rollout_steps=4, cuts=Cuts(bptt=1)),
    "the same share of fresh states throughout, 10 %": Recipe(fresh_shares=(0.1, 0.1)),
    "older states, 2 %": Recipe(fresh_shares=(0.02, 0.02)),
    "younger states, 50 %": Recipe(fresh_shares=(0.5, 0.5)),
    "no replay buffer": Recipe(fresh_shares=(1, 1)),
    "no replay buffer, 4 steps": Recipe(fresh_shares=(1, 1), num_rollout_steps=4),
    "no replay buffer, 16 steps, `bptt=1`": Recipe(
        fresh_shares=(1, 1), num_rollout_steps=16, cuts=Cuts(bptt=1)
    ),
    "the frame at rest, u with its mean": Recipe(moving_frame=False),
    "products that are not bounded": Recipe(activation=bilinear),
    "GELU, of 26 channels": Recipe(activation=jax.nn.gelu, width=26),
}


def train_and_evaluate(cases, reference, workers):
    """Yields (row of the CSV file, MSE over time, trajectories) for each case."""
    start = reference[:, 0]
    for (model, recipe, seed, updates), emulator, seconds in machine.on_single_cores(
        train_emulator, cases, workers
    ):
        u = trajectories(emulator, start, recipe.moving_frame)
        mse = mean_squared_error(u, reference)
        yield make_row(model, mse, seed, emulator, updates, seconds), mse, u


def draw(pictures, errors):
    """Draws one run in space and time, and the errors over time `{column: [time]}`."""
    figure = plt.figure(figsize=(11, 6.2), layout="constrained")
    axes = figure.subplot_mosaic([[*pictures], 3 * ["error"]])
    for title, u in pictures.items():
        image = show(axes[title], title, u[:, 0], (DT * TEST_STEPS, 1), vmin=-2.5, vmax=2.5)
        axes[title].set(xlabel="time t", ylabel="position x")
    figure.colorbar(image, ax=axes[title], label="u")
    axis = axes["error"]
    exact = [model for model, (_, moving_frame) in EXACT.items() if not moving_frame]
    models = ("persistence", PUBLISHED, *exact, OURS)
    styles = zip(models, (*COLORS, "#E69F00"), (*LINES, (0, (5, 1))), strict=True)
    for model, color, line in styles:
        axis.semilogy(errors["time"], errors[model], color=color, linestyle=line, label=model)
    least, most = (errors[f"{OURS}, {which}"] for which in ("least", "most"))
    axis.fill_between(errors["time"], least, most, color=color, alpha=0.3)
    axis.set(title="error on the published test", xlabel="time t", xlim=(0, 2))
    axis.set(ylabel="mean squared error", ylim=(1e-13, 10))
    axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def exact_errors(solver):
    """Returns the mean squared error over time of each exact step, and of persistence."""
    persistence = np.broadcast_to(solver[:, :1], solver.shape)
    errors = {"persistence": mean_squared_error(persistence, solver)}
    for model, (residuum_fn, moving_frame) in EXACT.items():
        advance = partial(solved_exactly, residuum_fn)
        with train_and_tabulate.float64():
            u = in_moving_frame(advance, solver) if moving_frame else advance(solver)
        errors[model] = mean_squared_error(u, solver)
    return errors


def main():
    parser = tables.make_parser(__doc__, quick="20 updates, 2 runs")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    parser.add_argument("--updates", type=int, help="of each emulator: 20000, or 3000")
    parser.add_argument("--ablation", action="store_true", help="on runs of other seeds")
    parser.add_argument(
        "--workers", type=int, help="training runs at a time; one for each core"
    )
    args = parser.parse_args()
    folder, figures = tables.output_folders(args, __file__)
    num_updates = 20 if args.quick else args.updates or (3000 if args.ablation else 20_000)

    runs = range(1000, 1048) if args.ablation else range(NUM_TEST)
    solver = reference(published_states(runs[:2] if args.quick else runs, 1024))
    models = ABLATION if args.ablation else {OURS: Recipe()}
    cases = [  # in the ablation, fewer updates for longer rollouts keep the time the same
        (model, recipe, seed, max(20, num_updates // recipe.num_rollout_steps))
        for model, recipe in models.items()
        for seed in args.seed
    ]
    results = list(train_and_evaluate(cases[:2] if args.quick else cases, solver, args.workers))
    rows = [row for row, _, _ in results]
    if args.ablation:
        train_and_tabulate.write(folder, rows, ABLATION_COLUMNS, "ablation")
        return

    published_error = tables.read_csv(PUBLISHED_ERROR)
    errors = {"time": DT * np.arange(TEST_STEPS + 1), **exact_errors(solver)}
    errors[PUBLISHED] = np.array([float(row["mse"]) for row in published_error])
    curves = np.array([mse for _, mse, _ in results])
    for which, f in {"": np.median, ", least": np.min, ", most": np.max}.items():
        errors[OURS + which] = f(curves, axis=0)
    rows = [
        make_row("persistence", errors["persistence"]),
        make_row(PUBLISHED, errors[PUBLISHED]) | dict(parameters=13_441),
        *rows,
        *(make_row(model, errors[model]) for model in EXACT),
    ]
    train_and_tabulate.write(folder, rows, COLUMNS)
    columns = [[f"{x:.4g}" for x in column] for column in errors.values()]
    table = [dict(zip(errors, x, strict=True)) for x in zip(*columns, strict=True)]
    tables.write_csv(folder / "error.csv", table)
    shown = np.argmax(np.std(solver[:, TEST_STEPS // 4, 0], axis=-1))  # with strong shocks
    u, ours = solver[shown], np.asarray(results[0][2][shown])
    pictures = {"solver": u, "emulator": ours, "difference × 100": 100 * (ours - u)}
    save_figure(figures / "published_burgers.png", draw(pictures, errors))


if __name__ == "__main__":
    main()
