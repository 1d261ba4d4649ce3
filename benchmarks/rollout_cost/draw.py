"""Draws assets/rollout_cost.png and writes table.md, from the rows of run.py.

python -m benchmarks.rollout_cost.draw
"""

import collections
import math
import pathlib

import matplotlib.pyplot as plt

from benchmarks import tables
from benchmarks.labels import label_ends, SIZE


COLUMNS = {  # the columns of the figure, and their units
    "compile_s": ("trace and compile time", "s"),
    "temp_bytes": ("temporary memory", "B"),
    "step_s": ("run time per step", "s"),
}
BASELINES = ("trainax", "scan", "segments", "equinox", "torch", "torch.compile", "limit")
# The colours of Okabe and Ito are safe for colour-blind people. The thick line is residuum.
STYLES = {
    "trainax": dict(color="#D55E00"),
    "scan": dict(color="#009E73"),
    "segments": dict(color="#E69F00"),
    "equinox": dict(color="#CC79A7"),
    "torch": dict(color="#777777"),
    "torch.compile": dict(color="#777777"),
    "plain loop": dict(color="#0072B2", linestyle=":"),
    "residuum": dict(color="#0072B2", linewidth=3.5, markersize=5),
}


def as_numbers(rows):
    """Converts rows of `tables.read_csv` to numbers, and adds the run time per step."""
    for row in rows:
        row["num_rollout_steps"] = int(row["num_rollout_steps"])
        for name in ("trace_s", "compile_s", "temp_bytes", "run_s"):
            row[name] = float(row[name]) if row[name] else None
        if row["compile_s"]:
            row["compile_s"] += row["trace_s"] or 0
        row["step_s"] = row["run_s"] and row["run_s"] / row["num_rollout_steps"]
    return rows


#
# The figure
#


def select_lines(rows, network, cut):
    """Returns the rows of each line. A network with canonical convolutions is shown with
    them."""
    lines = collections.defaultdict(list)
    for row in rows:
        if (row["network"], row["cut"], row["derivative"]) == (network, cut, "gradient"):
            lines[row["baseline"]].append(row)
    shown = {}
    for baseline in STYLES:
        if baseline in lines:
            shown[baseline] = lines.get(f"{baseline}, canonical", lines[baseline])
    if "residuum, canonical" in lines:
        shown["plain loop"] = lines["residuum"]
    if "torch" in shown and "torch.compile" in shown:  # keeps the faster one
        last = lambda baseline: shown[baseline][-1]["run_s"]
        del shown["torch" if last("torch.compile") < last("torch") else "torch.compile"]
    return shown


def draw(rows, networks, cut, path):
    height = 0.9 + 1.75 * len(networks)
    figure, axes = plt.subplots(
        nrows=len(networks),
        ncols=len(COLUMNS),
        figsize=(10.5, height),
        sharex=True,
        squeeze=False,
    )
    figure.subplots_adjust(0.15, 0.55 / height, 0.94, 1 - 0.35 / height, 0.55, 0.2)
    ends = {}
    for network, row_of_axes in zip(networks, axes, strict=True):
        lines = select_lines(rows, network, cut)
        name = dict(
            xycoords="axes fraction", textcoords="offset points", va="center", ha="left"
        )
        row_of_axes[0].annotate(network, (0, 0.5), xytext=(-108, 10), weight="bold", **name)
        if "plain loop" in lines:
            text = "canonical\nconvolutions"
            row_of_axes[0].annotate(text, (0, 0.5), xytext=(-108, -8), size=8, **name)
        for column, axis in zip(COLUMNS, row_of_axes, strict=True):
            # The plain loop differs in run time only.
            shown = {x: y for x, y in lines.items() if x != "plain loop" or column == "step_s"}
            ends[axis] = draw_panel(axis, shown, column)
    for (title, _), axis in zip(COLUMNS.values(), axes[0], strict=True):
        axis.set_title(title, fontsize=11, loc="left")
    steps = sorted({row["num_rollout_steps"] for row in rows if row["cut"] == cut})
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.set_xticks(steps, [str(x) for x in steps])
        axis.set_xlim(steps[0] / 1.3, steps[-1] * 1.3)
        axis.minorticks_off()
    for axis in axes[-1]:
        axis.set_xlabel("rollout steps T")
    for axis in axes.flat:
        label_ends(axis, ends[axis])
    figure.savefig(path, dpi=130)


def draw_panel(axis, lines, column):
    """Returns the ends of the lines, for `label_ends`."""
    _, unit = COLUMNS[column]
    values, ends = [], {}
    for baseline, rows in lines.items():
        points = [(row["num_rollout_steps"], row[column]) for row in rows if row[column]]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        values.extend(y)
        style = dict(linewidth=1.3, marker="o", markersize=3) | STYLES[baseline]
        axis.loglog(x, y, **style, zorder=3 if baseline == "residuum" else 2)
        ends[baseline] = (x[-1], y[-1], style["color"], baseline == "residuum")
    if values:
        low, high = min(values), max(values)
        # An axis spans at least a factor of four, so that small fluctuations do not look like
        # hills.
        room = max(4 / (high / low), 1.8) ** 0.5
        axis.set_ylim(low / room, high * room)
        axis.set_yticks(select_ticks(*axis.get_ylim()))
        axis.yaxis.set_major_formatter(lambda y, _: tables.with_prefix(y, unit))
    axis.tick_params(labelsize=SIZE)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return ends


def select_ticks(low, high):
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    for digits in ((1, 2, 5), (1,)):
        ticks = [digit * 10.0**n for n in exponents for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 5:
            break
    return ticks


#
# The tables
#


CELL = {
    "compile_s": lambda x: f"{x:.2f} s",
    "temp_bytes": lambda x: tables.with_prefix(x, "B"),
    "run_s": lambda x: tables.with_prefix(x, "s"),
}


def markdown(rows, header, name):
    """Makes a table with a line for each group of rows of the same `name(row)` and each choice
    of residuum's options.

    Each cell has compile time, memory and run time, in bold where a baseline is ahead of all
    options of residuum in the group by more than 5 %.
    """
    groups = collections.defaultdict(dict)
    for row in rows:
        groups[name(row)][row["baseline"]] = row
    baselines = [
        baseline
        for baseline in BASELINES
        if any(baseline in group for group in groups.values())
    ]
    lines = []
    for title, group in groups.items():
        ours = {x: row for x, row in group.items() if x.startswith("residuum")}
        best = {
            column: min((row[column] for row in ours.values() if row[column]), default=0)
            for column in CELL
        }
        for baseline, row in ours.items():
            options = baseline.removeprefix("residuum").removeprefix(", ")
            # Canonical convolutions are the only option that the baselines have.
            suffix = {"": "", "canonical": ", canonical"}.get(options)
            options = options.replace("=", " = ").replace("canonical", "canonical convolutions")
            cells = [write_cell(row)]
            for x in baselines:
                found = suffix is not None and group.get(x + suffix)
                cells.append(write_cell(found, best) if found else "")
            lines.append([title, options, *cells])
            title = ""
    columns = [header, "options", "residuum", *baselines]
    return tables.markdown(columns, lines, num_names=2)


def write_cell(row, best=None):
    numbers = []
    for column, write in CELL.items():
        number = write(row[column]) if row[column] else "–"
        is_ahead = best is not None and row[column] and row[column] * 1.05 < best[column]
        numbers.append(f"**{number}**" if is_ahead else number)
    return " / ".join(numbers)


def all_tables(rows, cuts=("no cut", "bptt=1", "bptt=5"), num_steps=50):
    """Makes the table of the gradient, and the table of the other derivatives if there are
    any."""
    selected = [row for row in rows if row["num_rollout_steps"] == num_steps]
    selected = [row for row in selected if row["cut"] in cuts]
    gradients = [row for row in selected if row["derivative"] == "gradient"]
    others = [row for row in selected if row["derivative"] != "gradient"]
    case = lambda row: f"{row['network']}, {row['cut']}"
    found = [markdown(gradients, "network, cut", case)]
    if others:
        of = lambda row: f"{row['derivative']}, {case(row)}"
        found.append(markdown(others, "derivative, network, cut", of))
    return "\n\n".join(found)


def main():
    parser = tables.make_parser(__doc__, quick="10 steps, one cut")
    folder = pathlib.Path(__file__).parent
    parser.add_argument("--input", type=pathlib.Path, default=folder, help="folder of rows.csv")
    parser.add_argument("--cut", default="bptt=1", help="the cut that the figure is about")
    args = parser.parse_args()
    folder, figures = tables.output_folders(args, __file__)
    rows = as_numbers(tables.read_csv(args.input / "rows.csv"))
    networks = list(dict.fromkeys(row["network"] for row in rows))
    table = all_tables(rows, num_steps=10 if args.quick else 50)
    print(f"{rows[0]['machine']}\n\n{table}")
    tables.write_table(folder / "table.md", table)
    draw(rows, networks, args.cut, figures / "rollout_cost.png")


if __name__ == "__main__":
    main()
