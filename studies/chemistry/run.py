"""Does an emulator of air-pollution chemistry pay, compared with good solvers?

The emulator is that of examples/chemistry.py, and the solvers are in solvers.py. All of them
advance 1000 cells in compiled float32. The emulator's step is five minutes; each solver has
shorter and longer steps. An error is the largest one among eight species: ‖error‖ / ‖solution‖
over 64 cells that are unseen in training. Errors over further sets of 64 cells show how much
depends on the set. The study also measures whether atoms are conserved, whether any of 1000
cells diverges in 30 days, and what it costs to hand the cells with a large estimated error over
to a solver.

    python -m studies.chemistry.run --seed 0 1 2     everything; needs diffrax as well
    python -m studies.chemistry.run --draw           the figure, from the rows
    python -m studies.chemistry.run --quick          to see that it runs
"""

import time
from functools import partial

import chemistry
import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pollu
from pollu import DT, nrmse, REPORTED, SPECIES

from benchmarks import machine, tables
from studies import train_and_tabulate
from studies.chemistry import solvers


NUM_CELLS, NUM_TEST, NUM_SETS = 1000, 64, 5
HOUR, MONTH = 12, 30 * 288  # in steps of the emulator
OURS, CHEAP, QUICK = "emulator", "scheme that it corrects", "EBI, 2 sweeps"
MINUTES = {"QSSA": (0.1, 0.025)}  # other solvers: STEPS
STEPS = (60, 30, 15, DT, DT / 2, DT / 4, DT / 8)
KVAERNO = {"Kvaerno3": 1e-1, "Kvaerno5": 1e-1}  # and their relative tolerances
THRESHOLD, SWITCH_SOLVER, SWITCH_STEP = 0.02, "EBI, extrapolated", DT / 4


#
# Rollouts
#


def test_cells(num_cells=NUM_CELLS):
    """Returns states `[20, num_cells]` and days that are unseen in training."""
    keys = jax.random.split(jax.random.key(2211))
    return pollu.random_cells(keys[0], num_cells), pollu.random_days(keys[1], num_cells)


def solution(num_steps):
    """Returns the refined solution `[num_steps, 20, NUM_SETS * NUM_TEST]`."""
    cells = jax.tree.map(lambda x: x[..., : NUM_SETS * NUM_TEST], test_cells())
    with train_and_tabulate.float64():
        y, days = common.to_float64(cells)
        refined = jax.jit(lambda y: pollu.rollout(pollu.refined_solution, y, days, num_steps))
        return np.asarray(refined(y))


@partial(jax.jit, static_argnums=0)
def advance(step, y, days, duration, h, *args):
    """Advances y by a duration, in steps `step(y, day, h, *args)` of h minutes."""

    def advance_once(n, y):
        return step(y, days._replace(minute=days.minute + h * n), h, *args)

    num_steps = jnp.round(duration / h).astype(int)
    return jax.lax.fori_loop(0, num_steps, advance_once, y)


def emulator_step(y, day, h, emulator):
    return emulator.stages(y, day)[1]


def cheap_step(y, day, h):
    return pollu.conserve(pollu.cheap_stages(y, day)[1], y)


def persistence(y, day, h):
    return y


def largest_error(y, expected, cells=slice(NUM_TEST)):
    """Returns the largest error of eight species."""
    error = np.max(nrmse(np.asarray(y)[None, :, cells], expected[None, :, cells]))
    return error if np.isfinite(error) else np.inf


def cpu_seconds(programs, num_calls):
    """Returns the median CPU time [s] of each program in `{name: function of no arguments}`."""
    calls = {
        name: lambda program=program: jax.block_until_ready(program())
        for name, program in programs.items()
    }
    is_measured = lambda times: len(times) >= num_calls
    return machine.medians_in_turns(calls, is_measured, time.process_time)


#
# Work and precision
#


def work_rows(emulators, expected, num_steps, quick):
    """Yields a row for each method and step size, with the errors, and the CPU time."""
    y, days = test_cells()
    cases = {}
    for name, step in solvers.SOLVERS.items():
        for h in MINUTES.get(name, STEPS) if not quick else (DT,) * (name == QUICK):
            cases[name, h, ""] = step, ()
    cases[CHEAP, DT, ""] = cheap_step, ()
    for seed, emulator in emulators.items():
        cases[OURS, DT, seed] = emulator_step, (emulator,)
    calls = {
        (name, h, seed): partial(advance, step, y, days, 60, h, *args)
        for (name, h, seed), (step, args) in cases.items()
    }
    medians = cpu_seconds(calls, num_calls=3 if quick else 21)
    for (name, h, seed), (step, args) in cases.items():
        row = {"model": name, "minutes": h, "seed": seed}
        lowest = 0
        for text, n in {"5_min": 1, "1_h": HOUR, "24_h": num_steps}.items():
            if h > n * DT:
                row[f"after_{text}"] = ""
                continue
            u = np.asarray(advance(step, y, days, n * DT, h, *args))
            row[f"after_{text}"] = f"{largest_error(u, expected[n - 1]):.3g}"
            lowest = np.minimum(lowest, np.min(u / pollu.TYPICAL[:, None]))
        row["negative"] = "no" if lowest > -1e-3 else "yes"  # yes for NaN
        row["ns"] = f"{1e9 * medians[name, h, seed] / HOUR / NUM_CELLS:.3g}"
        yield row | {"machine": machine.describe("one core")}


def kvaerno_rows(expected, num_cells=NUM_TEST):
    """Yields rows for the stiff solvers of diffrax: one hour, and fewer cells."""
    cells = jax.tree.map(lambda x: x[..., :num_cells], test_cells())
    with train_and_tabulate.float64():
        y, days = common.to_float64(cells)
        for name, rtol in KVAERNO.items():
            step = partial(solvers.diffrax_step, name, rtol)
            advance = jax.jit(lambda y, step=step: step(y, days, DT * HOUR))
            error = largest_error(advance(y), expected[HOUR - 1])
            seconds = cpu_seconds({name: partial(advance, y)}, num_calls=3)[name]
            yield {
                "model": f"{name}, diffrax",
                "minutes": "adaptive",
                "after_1_h": f"{error:.3g}",
                "negative": "",
                "ns": f"{1e9 * seconds / HOUR / num_cells:.3g}",
                "machine": machine.describe("one core"),
            }


WORK_COLUMNS = {
    "minutes": "step [min]",
    "seed": "seed",
    "after_5_min": "error after 5 min",
    "after_1_h": "after 1 h",
    "after_24_h": "after 24 h",
    "negative": "negative values",
    "ns": "ns per cell and five minutes",
}


def work_table(rows):
    lines = [[row["model"], *(row.get(c, "") for c in WORK_COLUMNS)] for row in rows]
    return tables.markdown(["", *WORK_COLUMNS.values()], lines)


def draw(rows):
    """Draws the errors over the time, with a line for the step sizes of each solver."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    models = dict.fromkeys(row["model"] for row in rows if row["minutes"] != "adaptive")
    for axis, (column, title) in zip(
        axes, {"1_h": "an hour", "24_h": "a day"}.items(), strict=True
    ):
        for i, model in enumerate(models):
            points = [
                (float(row["ns"]), float(row[f"after_{column}"]))
                for row in rows
                if row["model"] == model and float(row[f"after_{column}"]) < 1
            ]
            style = dict(marker="o", color=f"C{i}", markersize=5, linewidth=1)
            if model == OURS:
                style = dict(marker="*", color="black", markersize=12, linestyle="none")
            axis.plot(*zip(*sorted(points), strict=True), label=model, **style)
        axis.set(xscale="log", yscale="log", title=f"after {title}")
        axis.set(xlabel="time per cell and five minutes [ns]")
        axis.grid(alpha=0.3, which="both")
    axes[0].set(ylabel="error of the worst species")
    axes[0].legend(fontsize="x-small")
    return figure


#
# Accuracy
#


def accuracy_row(model, seed, step, args, expected, num_steps, training):
    """Returns the errors of eight species after 1 and 24 hours, the largest of them in several
    sets of cells, how many of 1000 cells diverge in 30 days, and the largest relative change of
    their atoms."""
    y, days = test_cells()
    row = {"model": model, "seed": seed}
    for text, n in (("1_h", HOUR), ("24_h", num_steps)):
        u = np.asarray(advance(step, y, days, n * DT, DT, *args))
        errors = nrmse(u[None, :, :NUM_TEST], expected[n - 1 : n, :, :NUM_TEST])[0]
        row |= {f"{name}_{text}": f"{x:.3g}" for name, x in zip(REPORTED, errors, strict=True)}
        sets = [slice(i * NUM_TEST, (i + 1) * NUM_TEST) for i in range(NUM_SETS)]
        largest = [largest_error(u, expected[n - 1], cells) for cells in sets]
        row |= {f"sets_{text}": f"{max(largest):.3g}"}
    long = MONTH if num_steps > HOUR else HOUR
    last = np.asarray(advance(step, y, days, long * DT, DT, *args), np.float64)
    atoms = [pollu.ATOMS @ np.asarray(x, np.float64) for x in (y, last)]
    is_lost = ~np.all(np.isfinite(last) & (last >= 0) & (last < 10), axis=0)
    row["diverged"] = int(np.sum(is_lost))
    row["drift"] = f"{np.max(np.abs(atoms[1] / atoms[0] - 1)):.1e}"
    return row | training


ERRORS = {f"{name}, {text.replace('_', ' ')}": (f"{name}_{text}", "{:.4f}")
          for text in ("1_h", "24_h") for name in REPORTED}  # fmt: skip
OTHER = {
    f"worst species of {NUM_SETS} sets, 1 h": ("sets_1_h", "{:.4f}"),
    f"worst species of {NUM_SETS} sets, 24 h": ("sets_24_h", "{:.4f}"),
    "of 1000 cells diverged in 30 days": ("diverged", "{:.0f}"),
    "drift of atoms in 30 days": ("drift", "{:.0e}"),
    "training [s]": ("seconds", "{:.0f}"),
}


#
# The estimated error as a switch
#


@partial(jax.jit, static_argnums=3)
def estimated_error(emulator, y, days, num_steps):
    """Returns the emulator's states and their estimated errors, `[num_steps, 20, cells]`. For a
    step that solves stages from the state before, `estimate_error` (examples/error_estimate.py)
    becomes one Newton correction: (∂r/∂stages) e⁺ = r + (e, e)."""

    def step(carry, n):
        y, error = carry
        day = pollu.later(days, n)
        stages = jnp.stack(emulator.stages(y, day))
        residual = pollu.radau_residual(stages, y, day)
        residual = [r + error[i % len(SPECIES)] for i, r in enumerate(residual)]
        y, error = stages[1], pollu.newton_correction(residual, stages, day)[1]
        return (y, error), (y, error)

    return jax.lax.scan(step, (y, jnp.zeros_like(y)), jnp.arange(num_steps))[1]


def switch_row(seed, emulator, expected):
    """Hands the cells whose estimated error after an hour exceeds the threshold to a solver,
    which starts again from the initial states."""
    y, days = test_cells()
    states, errors = estimated_error(emulator, y, days, HOUR)
    indices = np.array([SPECIES.index(name) for name in REPORTED])
    last = np.asarray(states[-1])
    relative = lambda error, y: np.max(
        (np.abs(error) / (y + pollu.FLOOR[:, None]))[indices], axis=0
    )
    chosen = relative(np.asarray(errors[-1]), last) > THRESHOLD
    tested = last[:, :NUM_TEST]
    tested_solution = expected[HOUR - 1, :, :NUM_TEST]
    is_bad = relative(tested - tested_solution, tested_solution) > THRESHOLD
    case = solvers.SOLVERS[SWITCH_SOLVER], y, days, 60, SWITCH_STEP
    mixed = np.where(chosen, advance(*case), last)
    calls = {
        "emulator": partial(advance, emulator_step, y, days, 60, DT, emulator),
        "estimate": partial(estimated_error, emulator, y, days, HOUR),
        "solver": partial(advance, *case),
    }
    medians = cpu_seconds(calls, num_calls=21)
    ns = {name: 1e9 * x / HOUR / NUM_CELLS for name, x in medians.items()}
    return {
        "seed": seed,
        "share": f"{np.mean(chosen):.3g}",
        "above_in_the_test": int(np.sum(is_bad)),
        "recognised": int(np.sum(is_bad & chosen[:NUM_TEST])),
        "false_alarms": int(np.sum(~is_bad & chosen[:NUM_TEST])),
        "error_before": f"{largest_error(last, expected[HOUR - 1]):.3g}",
        "error_after": f"{largest_error(mixed, expected[HOUR - 1]):.3g}",
        "error_of_solver": f"{largest_error(calls['solver'](), expected[HOUR - 1]):.3g}",
        "ns_emulator": f"{ns['emulator']:.3g}",
        "ns_with_estimate": f"{ns['estimate']:.3g}",
        "ns_solver": f"{ns['solver']:.3g}",
        "ns_switched": f"{ns['estimate'] + np.mean(chosen) * ns['solver']:.3g}",
    }


def main():
    parser = tables.make_parser(__doc__, quick="20 updates, an hour, and one solver")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    parser.add_argument("--updates", type=int, default=chemistry.NUM_UPDATES)
    parser.add_argument("--draw", action="store_true", help="the figure, from the rows")
    args = parser.parse_args()
    folder, figures = tables.output_folders(args, __file__)
    figure_path = figures / "chemistry_work.png"
    if args.draw:
        common.save_figure(figure_path, draw(tables.read_csv(folder / "work.csv")))
        return
    num_updates = 20 if args.quick else args.updates
    num_steps = HOUR if args.quick else 288
    expected = solution(num_steps)
    training = train_and_tabulate.training_columns
    rows = []
    for name, step in {"persistence": persistence, CHEAP: cheap_step}.items():
        row = accuracy_row(name, "", step, (), expected, num_steps, training(None, 0, 0))
        rows.append(row)
    emulators = {}
    for seed in args.seed:
        emulator, seconds = chemistry.train_emulator(seed, num_updates)
        emulators[seed] = emulator
        columns = training(emulator, num_updates, seconds)
        case = OURS, seed, emulator_step, (emulator,)
        rows.append(accuracy_row(*case, expected, num_steps, columns))
        train_and_tabulate.write(folder, rows, ERRORS | OTHER)
    switch = []
    for seed, emulator in emulators.items():
        switch.append(switch_row(seed, emulator, expected))
        tables.write_csv(folder / "switch.csv", switch)
    work = list(work_rows(emulators, expected, num_steps, args.quick))
    if not args.quick:
        work += kvaerno_rows(expected)
    tables.write_csv(folder / "work.csv", work)
    common.save_figure(figure_path, draw(tables.read_csv(folder / "work.csv")))
    print(work_table(work))
    tables.write_table(folder / "work.md", work_table(work))


if __name__ == "__main__":
    main()
