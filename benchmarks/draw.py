"""Draws assets/rollout_cost.png from the CSV file of rollout_cost.py, and prints README's
table.

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
        len(networks), 3, figsize=(10, 2.6 * len(networks)), sharex=True, layout="constrained"
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


def print_table(rows, num_steps):
    groups = collections.defaultdict(list)
    for row in rows:
        if row["num_rollout_steps"] == num_steps:
            groups[row["network"], row["cut"]].append(row)
    print("| network, cut | | compile | memory | run | run, of residuum |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for (network, cut), group in groups.items():
        ours = next(row["run_s"] for row in group if row["peer"] == "residuum")
        for i, row in enumerate(group):
            name = f"{network}, {cut}" if i == 0 else ""
            peer = f"**{row['peer']}**" if "residuum" in row["peer"] else row["peer"]
            compile_ = f"{row['compile_s']:.2f} s" if row["compile_s"] else ""
            memory = f"{row['temp_bytes'] / 1e6:.2f} MB" if row["temp_bytes"] else ""
            run = f"{row['run_s'] * 1e3:.1f} ms" if row["run_s"] else ""
            ratio = f"{row['run_s'] / ours:.2f}" if row["run_s"] else ""
            print(f"| {name} | {peer} | {compile_} | {memory} | {run} | {ratio} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input", type=pathlib.Path, default=pathlib.Path("benchmarks/rollout_cost.csv")
    )
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("assets/rollout_cost.png")
    )
    parser.add_argument("--cut", default="bptt=1", help="the cut that the figure is about")
    parser.add_argument("--steps", type=int, default=50, help="the table's rollout length")
    args = parser.parse_args()
    rows = read(args.input)
    print(rows[0]["machine"] + "\n")
    print_table(rows, args.steps)
    networks = list(dict.fromkeys(row["network"] for row in rows))
    draw(rows, networks, args.cut, args.output)


if __name__ == "__main__":
    main()
