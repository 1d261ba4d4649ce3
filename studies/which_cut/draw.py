"""Draws assets/which_cut.png and writes table.md, from the rows of run.py.

python -m studies.which_cut.draw
"""

import argparse
import itertools
import pathlib
import statistics

import matplotlib.pyplot as plt

from benchmarks import tables
from studies.which_cut.run import PROBLEMS, same_program


DIVERGED = 10.0  # times the norm of the solution


def errors_of(rows, problem, cut, num_rollout_steps):
    """Returns the errors of all seeds, sorted. An error is infinite if the emulator diverged.
    An entry that was not trained has the errors of the same program under another name."""
    trained = same_program(cut, num_rollout_steps)
    key = (problem, trained, str(num_rollout_steps))
    fields = ("problem", "cut", "num_rollout_steps")
    errors = [float(x["error"]) for x in rows if tuple(x[f] for f in fields) == key]
    return sorted(x if x < DIVERGED else float("inf") for x in errors)


#
# The table
#

ROWS = {  # some of `CUTS`, and their names in the table
    "no cut": "`Cuts()`",
    "bptt=4": "`Cuts(bptt=4)`",
    "bptt=2": "`Cuts(bptt=2)`",
    "bptt=1": "`Cuts(bptt=1)`, with `prev=True` or not",
    "prev": "`Cuts(prev=True)`",
    "next": "`Cuts(next=True)`",
}


def markdown(all_rows):
    """Makes a table for each problem."""
    found = []
    steps = sorted({int(row["num_rollout_steps"]) for row in all_rows})
    for problem in PROBLEMS:
        rows = [row for row in all_rows if row["problem"] == problem]
        if not rows:
            continue
        medians = {
            (cut, n): statistics.median(errors)
            for cut, n in itertools.product(ROWS, steps)
            if (errors := errors_of(rows, problem, cut, n))
        }
        best = min(medians.values())
        lines = [
            [title, *(write_error(medians.get((cut, n)), best) for n in steps)]
            for cut, title in ROWS.items()
        ]
        updates = [
            statistics.median(
                int(row["updates"]) for row in rows if int(row["num_rollout_steps"]) == n
            )
            for n in steps
        ]
        lines.append(["*updates*", *(f"{float(f'{x:.2g}'):.0f}" for x in updates)])
        found.append(tables.markdown([problem, f"T = {steps[0]}", *steps[1:]], lines))
    return "\n\n".join(found)


def write_error(error, best):
    if error is None:
        return "no gradient"
    if error == float("inf"):
        return "diverged"
    text = write_plainly(error)
    return f"**{text}**" if error == best else text


def write_plainly(x):
    """Writes two digits, without an exponent."""
    x, digits = float(f"{x:.2g}"), 2
    while x < 10 ** (1 - digits) and digits < 6:
        digits += 1
    return f"{x:.{digits}f}"


#
# The figure
#

STYLES = {  # colours of Okabe and Ito, which are safe for colour-blind people
    "no cut": dict(color="#000000", marker="o"),
    "bptt=4": dict(color="#009E73", marker="^"),
    "bptt=2": dict(color="#56B4E9", marker="v"),
    "bptt=1": dict(color="#0072B2", marker="s", linewidth=2.5),
    "prev": dict(color="#D55E00", marker="D", linestyle="--"),
    "next": dict(color="#CC79A7", marker="x", linestyle=":"),
}


def draw(rows):
    names = [name for name in PROBLEMS if any(row["problem"] == name for row in rows)]
    size = (1.4 + 3.1 * len(names), 3.6)
    figure, axes = plt.subplots(
        1, len(names), figsize=size, squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], names, strict=True):
        draw_panel(axis, rows, name)
    axes[0, 0].set_ylabel("relative error", fontsize=9)
    labels = {"bptt=1": "bptt=1,\nprev or not"}
    figure.legend(
        axes[0, 0].lines[::2],  # every other line has markers only
        [labels.get(cut, cut) for cut in STYLES],
        loc="outside right center",
        frameon=False,
        fontsize=9,
    )
    return figure


def draw_panel(axis, rows, name):
    """Draws the median and the range of the seeds. A hollow marker at the upper edge means that
    the emulator diverged."""
    steps = sorted({int(row["num_rollout_steps"]) for row in rows if row["problem"] == name})
    finite = [float(row["error"]) for row in rows if row["problem"] == name]
    finite = [x for x in finite if x < DIVERGED]
    low, high = min(finite, default=1) / 1.3, 1.3 * max(finite, default=1)
    top = 1.4 * high if len(finite) < sum(row["problem"] == name for row in rows) else high
    for i, (cut, style) in enumerate(STYLES.items()):
        errors = {n: errors_of(rows, name, cut, n) for n in steps}
        medians = {n: statistics.median(e) for n, e in errors.items() if e}
        line = [min(y, top) for y in medians.values()]
        axis.plot(list(medians), line, markersize=5, zorder=3, **style)
        for n in medians:
            if same_program(cut, n) == cut:
                x = n * 1.03 ** (i - len(STYLES) / 2)  # so that no bar hides another
                bounds = [min(y, top) for y in (errors[n][0], errors[n][-1])]
                axis.vlines(x, *bounds, color=style["color"], alpha=0.5, zorder=2)
        lost = [n for n, y in medians.items() if y == float("inf")]
        marks = dict(marker=style["marker"], markersize=7, color=style["color"])
        marks |= dict(linestyle="", markerfacecolor="white", clip_on=False, zorder=4)
        axis.plot(lost, [top] * len(lost), in_layout=False, **marks)
    axis.set(xscale="log", yscale="log", xlabel="rollout steps T", ylim=(low, top))
    axis.set_title(f"{name}, {PROBLEMS[name].evaluated_at}", fontsize=10)
    axis.set_xticks(steps, [str(n) for n in steps])
    ticks = [digit * 10.0**n for n in range(-7, 2) for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = pathlib.Path(__file__).parent
    parser.add_argument("--input", type=pathlib.Path, default=folder, help="folder of rows.csv")
    parser.add_argument("--output", type=pathlib.Path, metavar="FOLDER")
    parser.set_defaults(quick=False)
    args = parser.parse_args()
    folder, figures = tables.output_folders(args, __file__)
    rows = tables.read_csv(args.input / "rows.csv")
    tables.write_table(folder / "table.md", markdown(rows))
    path = figures / "which_cut.png"
    draw(rows).savefig(path, dpi=130)
    print(f"{markdown(rows)}\n\nFigure: {path}")


if __name__ == "__main__":
    main()
