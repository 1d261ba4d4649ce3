"""Draws assets/rollout_cost.png from the CSV file of rollout_cost.py, and prints the table of
docs/cost.md.

    python benchmarks/draw.py
"""

import argparse
import collections
import csv
import pathlib

import matplotlib.pyplot as plt


# Okabe and Ito, colour-blind safe; ours is the thick line.
STYLES = {
    "residuum": dict(color="#0072B2", linewidth=3.5, zorder=3),
    "residuum, checkpoint": dict(color="#0072B2", linewidth=2, linestyle=":", zorder=3),
    "residuum, unroll=5": dict(color="#0072B2", linewidth=2, linestyle="--", zorder=3),
    "residuum, unroll=True": dict(color="#0072B2", linewidth=2, linestyle="-.", zorder=3),
    "trainax": dict(color="#D55E00"),
    "scan": dict(color="#009E73"),
    "equinox": dict(color="#CC79A7"),
    "torch": dict(color="#777777"),
    "limit": dict(color="#777777", linestyle=":"),
}
MARKERS = dict(trainax="s", scan="^", equinox="v", torch="x", limit="None")


def read(path):
    rows = []
    with path.open() as file:
        for row in csv.DictReader(file):
            row["num_rollout_steps"] = int(row["num_rollout_steps"])
            number = lambda name, row=row: float(row[name]) if row[name] else None
            row["run_s"], row["temp_bytes"] = number("run_s"), number("temp_bytes")
            row["compile_s"] = row["compile_s"] and (number("trace_s") + number("compile_s"))
            rows.append(row)
    return rows


def draw(rows, networks, cut, path):
    columns = {
        "compile_s": ("trace and compile time [s]", 1),
        "temp_bytes": ("temporary memory [MB]", 1e-6),
        "run_s": ("run time of one gradient [s]", 1),
    }
    figure, axes = plt.subplots(
        nrows=len(networks),
        ncols=3,
        figsize=(10, 2.6 * len(networks)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for network, line in zip(networks, axes, strict=True):
        for (column, (label, scale)), axis in zip(columns.items(), line, strict=True):
            for peer, style in STYLES.items():
                points = [
                    (row["num_rollout_steps"], row[column] * scale)
                    for row in rows
                    if (row["network"], row["cut"], row["peer"]) == (network, cut, peer)
                    and row[column]
                ]
                if points:
                    marker = MARKERS.get(peer, "o")
                    x, y = zip(*points, strict=True)
                    axis.loglog(x, y, marker=marker, markersize=4, label=peer, **style)
            axis.grid(alpha=0.3)
            axis.set_title(f"{network}, {cut}: {label}", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("rollout steps T")
    handles = {}
    for axis in axes.flat:
        handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=7)
    figure.savefig(path, dpi=130)


PEERS = ("trainax", "scan", "equinox", "torch", "limit")


def print_table(rows, cuts, num_steps):
    """A line for each network, cut, and choice of our options; each cell has compile time,
    memory and run time, in bold where a peer is ahead of all that we offer."""
    groups = collections.defaultdict(dict)
    for row in rows:
        if row["num_rollout_steps"] == num_steps and row["cut"] in cuts:
            groups[row["network"], row["cut"]][row["peer"]] = row
    print("| network, cut | options | residuum | " + " | ".join(PEERS) + " |")
    print("| --- | --- |" + " ---: |" * (1 + len(PEERS)))
    for (network, cut), group in groups.items():
        ours = [row for peer, row in group.items() if peer not in PEERS]
        best = {column: min(row[column] for row in ours) for column in UNITS}
        for i, row in enumerate(ours):
            options = row["peer"].removeprefix("residuum").lstrip(", ").replace("=", " = ")
            cells = [f"{network}, {cut}" if i == 0 else "", options, cell(row)]
            for peer in PEERS:
                cells.append(cell(group[peer], best) if i == 0 and peer in group else "")
            print("| " + " | ".join(cells) + " |")


UNITS = {
    "compile_s": lambda x: f"{x:.2f} s",
    "temp_bytes": lambda x: f"{x / 1e6:.2f} MB",
    "run_s": lambda x: f"{x * 1e3:.1f} ms",
}


def cell(row, best=None):
    numbers = []
    for column, unit in UNITS.items():
        if row[column]:
            ahead = best is not None and row[column] < best[column]
            numbers.append(f"**{unit(row[column])}**" if ahead else unit(row[column]))
    return " / ".join(numbers)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input", type=pathlib.Path, default=pathlib.Path("benchmarks/rollout_cost.csv")
    )
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("assets/rollout_cost.png")
    )
    parser.add_argument("--cut", default="bptt=1", help="the cut that the figure is about")
    parser.add_argument("--table-cuts", nargs="+", default=["no cut", "bptt=1", "bptt=5"])
    parser.add_argument("--steps", type=int, default=50, help="the table's rollout length")
    args = parser.parse_args()
    rows = read(args.input)
    print(rows[0]["machine"] + "\n")
    print_table(rows, args.table_cuts, args.steps)
    networks = list(dict.fromkeys(row["network"] for row in rows))
    draw(rows, networks, args.cut, args.output)


if __name__ == "__main__":
    main()
