"""Work against precision: how long does each method take to reach a given error?

For each problem, the emulator competes with what a practitioner would try first: explicit and
exponential Runge–Kutta methods with different numbers of substeps, exponential ones also on a
coarser grid, and the implicit step with a few iterations, from persistence or extrapolation.
One iteration from persistence is the preconditioner as a stepper. McGreivy and Hakim
(doi.org/10.1038/s42256-024-00897-5) found that most comparisons of emulators with solvers have
baselines that are too weak. This study follows their rules: compare at equal accuracy or at
equal time, with the best method of all.

The error is the nRMSE at a fixed time against a resolved solution of the *equation*, as a mean
over 64 unseen samples, or 16 for Burgers in 2D. The time is that of a step of one sample, on
one core, in a batch of 1 and in a batch of 64, as the median of runs in turns.

    python -m studies.work_precision.run             everything, about an hour on one core
    python -m studies.work_precision.run --draw      tables and figures, from the rows
    python -m studies.work_precision.run --quick     Burgers in 1D, hardly trained
"""

import common
import jax
import matplotlib.pyplot as plt
import numpy as np
from canonical_convolutions import canonical_convolutions
from exponax import map_between_resolutions
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks import machine, tables
from studies.work_precision import problems


BATCHES = (1, 64)
TIMED_STEPS = {1: 10, 64: 3}
NUM_RUNS = {1: 15, 64: 5}
STYLES = {
    problems.EMULATOR: ("*", "#D55E00"),
    problems.CORRECTED: ("P", "#E69F00"),
    problems.EXPLICIT: ("o", "#0072B2"),
    problems.EXPONENTIAL: ("s", "#009E73"),
    problems.COARSER: ("D", "#56B4E9"),
    problems.PERSISTENCE: ("v", "#777777"),
    problems.EXTRAPOLATION: ("^", "#CC79A7"),
}

#
# Errors and times
#


def last_states(method, num_steps, batched=jax.vmap):
    """Returns a function of states and inputs of several samples, on the method's own grid."""

    def of_one(state, inputs):
        def step(states, inputs_t):
            u_prev, before = states
            return (method.step(u_prev, before, inputs_t), u_prev), None

        (last, _), _ = jax.lax.scan(step, (state, state), inputs, length=num_steps)
        return last

    return jax.jit(canonical_convolutions(batched(of_one)))


def one_by_one(of_one):
    """Maps like `jax.vmap`, but over one sample after the other. On a CPU, all samples at once
    may not fit into the caches."""
    return lambda states, inputs: jax.lax.map(lambda x: of_one(*x), (states, inputs))


def resample(states, num_points):
    if num_points is None or num_points == states.shape[-1]:
        return states
    return jax.vmap(lambda u: map_between_resolutions(u, num_points))(states)


def error(method, problem):
    """Returns the mean nRMSE over the samples, and the largest."""
    states = resample(problem.states, method.num_points)
    last = last_states(method, problem.num_steps)(states, problem.inputs)
    if method.num_points:
        last = resample(last, problem.reference.shape[-1])
    fields = np.asarray(jax.vmap(problem.fields)(last))
    norm = lambda u: np.sqrt(np.sum(u**2, axis=tuple(range(1, u.ndim))))
    errors = norm(fields - problem.reference) / norm(problem.reference)
    errors = np.nan_to_num(errors, nan=np.inf)
    return np.mean(errors), np.max(errors)


def times(methods, problem, batch_size, num_runs):
    """Returns the seconds for a step of one sample by each method, measured in turns. For a
    batch, the faster of two ways counts: all samples at once, or one after the other."""
    num_steps = TIMED_STEPS[batch_size]
    samples = np.arange(batch_size) % len(problem.reference)
    inputs = jax.tree.map(lambda x: x[samples, :num_steps], problem.inputs)
    programs = {}
    for i, method in enumerate(methods):
        states = jax.tree.map(lambda x: x[samples], problem.states)
        states = resample(states, method.num_points)
        for batched in (jax.vmap, one_by_one)[:batch_size]:
            compiled = last_states(method, num_steps, batched).lower(states, inputs).compile()
            run = lambda f=compiled, x=states: jax.block_until_ready(f(x, inputs))
            run()
            programs[i, batched] = run
    medians = machine.medians_in_turns(programs, lambda times: len(times) >= num_runs)
    fastest = [min(t for (i, _), t in medians.items() if i == n) for n in range(len(methods))]
    return [seconds / (num_steps * batch_size) for seconds in fastest]


def make_rows(name, problem, quick):
    errors = [error(method, problem) for method in problem.methods]
    # Methods that diverge, or have an error of 100 % or more, are not timed.
    kept = [i for i, (mean, _) in enumerate(errors) if quick or mean < 1]
    methods = [problem.methods[i] for i in kept]
    seconds = [
        times(methods, problem, size, 2 if quick else NUM_RUNS[size]) for size in BATCHES
    ]
    for i, method, *each in zip(kept, methods, *seconds, strict=True):
        mean, worst = errors[i]
        row = {"problem": name, "family": method.family, "variant": method.variant}
        row |= {"error": f"{mean:.3g}", "worst": f"{worst:.3g}"}
        row |= {f"us_{n}": f"{1e6 * x:.4g}" for n, x in zip(BATCHES, each, strict=True)}
        yield row | {"machine": machine.describe("one core")}


#
# Tables and figures
#


def pareto(rows, column):
    """Returns the rows that no other row beats in error and time, from fast to accurate."""
    front = []
    for row in sorted(rows, key=lambda row: float(row[column])):
        if not front or float(row["error"]) < float(front[-1]["error"]):
            front.append(row)
    return front


def best_without_emulator(rows, column, limit):
    """Returns the fastest row without an emulator, with an error up to the limit, or `None`."""
    fast = [
        row
        for row in rows
        if float(row["error"]) <= limit
        and row["family"] not in (problems.EMULATOR, problems.CORRECTED)
    ]
    return min(fast, key=lambda row: float(row[column]), default=None)


def markdown(rows):
    """Returns a table with a line for each problem and batch: the emulator, and the fastest
    other method that is as accurate."""
    lines = []
    for name in dict.fromkeys(row["problem"] for row in rows):
        of_problem = [row for row in rows if row["problem"] == name]
        [emulator] = [row for row in of_problem if row["family"] == problems.EMULATOR]
        for batch in BATCHES:
            column = f"us_{batch}"
            best = best_without_emulator(of_problem, column, 1.02 * float(emulator["error"]))
            time = float(emulator[column])
            line = [name, batch, emulator["error"], f"{time:.3g} µs"]
            if best is None:
                lines.append([*line, "none", "", "", ""])
                continue
            method = f"{best['family']}, {best['variant']}"
            ratio = float(best[column]) / time
            best_time = f"{float(best[column]):.3g} µs"
            lines.append([*line, method, best["error"], best_time, f"{ratio:.2g}"])
    columns = ["problem", "batch", "error of the emulator", "time", "fastest as accurate",
               "its error", "its time", "its time / emulator's"]  # fmt: skip
    return tables.markdown(columns, lines, num_names=1)


def draw(rows):
    """Draws one row of plots for each problem, and one column for each batch size."""
    names = list(dict.fromkeys(row["problem"] for row in rows))
    size = (11, 3.6 * len(names))
    figure, axes = plt.subplots(len(names), 2, figsize=size, squeeze=False)
    for name, pair in zip(names, axes, strict=True):
        of_problem = [row for row in rows if row["problem"] == name]
        for axis, batch in zip(pair, BATCHES, strict=True):
            column = f"us_{batch}"
            for family, (marker, color) in STYLES.items():
                points = [
                    (float(row[column]), float(row["error"]))
                    for row in of_problem
                    if row["family"] == family
                ]
                size = 14 if family == problems.EMULATOR else 7
                style = dict(marker=marker, color=color, markersize=size, linestyle="none")
                axis.plot(*zip(*points, strict=True) if points else ([], []), **style,
                          label=family, zorder=3)  # fmt: skip
            front = pareto(of_problem, column)
            x, y = ([float(row[c]) for row in front] for c in (column, "error"))
            axis.plot(x, y, color="black", linewidth=1, label="Pareto front")
            axis.set(xscale="log", yscale="log", title=f"{name}, batch of {batch}")
            axis.set(xlabel="time for a step of one sample [µs]", ylabel="nRMSE")
            axis.grid(alpha=0.3, which="both")
            for one in (axis.xaxis, axis.yaxis):
                one.set_major_locator(LogLocator(subs=(1, 2, 5)))
                one.set_major_formatter("{x:g}")
                one.set_minor_formatter(NullFormatter())
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.set_layout_engine("constrained")
    return figure


def main():
    parser = tables.make_parser(__doc__, quick="Burgers in 1D, hardly trained")
    parser.add_argument("--problems", nargs="+", choices=problems.PROBLEMS)
    parser.add_argument("--draw", action="store_true", help="from the rows, without a run")
    args = parser.parse_args()
    folder, figures = tables.output_folders(args, __file__)
    path = folder / "rows.csv"
    names = ["burgers"] if args.quick else args.problems or list(problems.PROBLEMS)
    rows = tables.read_csv(path) if path.exists() else []
    for name in [] if args.draw else names:
        problem = problems.PROBLEMS[name](args.quick)
        rows = [row for row in rows if row["problem"] != problem.title]
        rows += make_rows(problem.title, problem, args.quick)
        tables.write_csv(path, rows)
    print(markdown(rows))
    tables.write_table(folder / "table.md", markdown(rows))
    common.save_figure(figures / "work_precision.png", draw(rows))


if __name__ == "__main__":
    main()
