"""Draws assets/accelerators.png from the rows of run.py.

python -m benchmarks.accelerators.draw
"""

import math
import pathlib

import matplotlib.pyplot as plt

from benchmarks import tables
from benchmarks.accelerators.programs import TARGETS
from benchmarks.accelerators.run import STEPS
from benchmarks.labels import label_ends, OUTLINE, SIZE


LINES = {  # loss, cut and options, in colours of Okabe and Ito; thick lines are residuum
    "plain scan": (("plain scan", "no cut", ""), dict(color="#009E73")),
    "checkpoint=True": (("residuum", "no cut", "checkpoint=True"), dict(color="#D55E00")),
    "checkpoint=k": (("residuum", "no cut", "checkpoint=*"), dict(color="#CC79A7")),
    "bptt=5": (("residuum", "bptt=5", ""), dict(color="#56B4E9")),
    "bptt=1": (("residuum", "bptt=1", ""), dict(color="#0072B2", linewidth=3)),
}


def draw(rows, target_name):
    titles = {
        "MLP": "MLP",
        "conv 2D": "2D convolutions, 256²",
        "FNO": "2D FNO, 256²",
        "conv 3D": "3D convolutions, 128³",
    }
    names = {row["network"] for row in rows if row["target"] == target_name}
    titles = {name: title for name, title in titles.items() if name in names}
    columns = min(2, len(titles))
    shape = (math.ceil(len(titles) / columns), columns)
    width, height = 5.2 * shape[1], 0.6 + 3.2 * shape[0]
    figure, axes = plt.subplots(*shape, figsize=(width, height), sharex=True, squeeze=False)
    edges = (0.8 / width, 0.5 / height, 1 - 1.45 / width, 1 - 0.35 / height)
    figure.subplots_adjust(*edges, 0.8, 0.2)
    limit = TARGETS[target_name].memory_gib * 2**30
    for (name, title), axis in zip(titles.items(), axes.flat, strict=False):
        ends = {}
        for label, (key, style) in LINES.items():
            points = [
                (int(row["num_rollout_steps"]), float(row["needed_bytes"]), row["fits"])
                for row in rows
                if row["target"] == target_name and row["network"] == name
                if row["way"] in ("shard_map", "one chip") and is_of_line(row, key)
            ]
            if not points:
                continue
            x, y, fits = zip(*sorted(points), strict=True)
            axis.plot(x, y, **(dict(linewidth=1.5) | style), zorder=3)
            for point in zip(x, y, fits, strict=True):
                face = style["color"] if point[2] == "yes" else "white"
                marks = dict(markersize=4.5, color=style["color"], markerfacecolor=face)
                axis.plot(*point[:2], marker="o", **marks, zorder=4)
            end = f"{label}: {tables.with_prefix(y[-1], 'B')}"
            ends[end] = (x[-1], y[-1], style["color"], label == "bptt=1")
        axis.set(xscale="log", yscale="log", title=title)
        axis.axhline(limit, color="#444444", linewidth=1, linestyle=(0, (5, 3)))
        axis.annotate(
            f"{TARGETS[target_name].kind}: {TARGETS[target_name].memory_gib} GB",
            (10, limit),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=SIZE,
            color="#444444",
            path_effects=OUTLINE,
        )
        low, high = axis.get_ylim()
        axis.set_ylim(low / 1.3, max(high, 2 * limit))
        axis.set_xticks(STEPS, [str(n) for n in STEPS])
        exponents = range(math.ceil(math.log10(axis.get_ylim()[0])), 15)
        ticks = [10.0**n for n in exponents if 10.0**n <= axis.get_ylim()[1]]
        axis.set_yticks(ticks, [tables.with_prefix(tick, "B") for tick in ticks])
        axis.minorticks_off()
        axis.set_xlim(8, 1250)
        axis.tick_params(labelsize=SIZE)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        label_ends(axis, ends)
    for axis in axes[-1]:
        axis.set_xlabel("rollout steps T", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("memory of a chip", fontsize=9)
    return figure


def is_of_line(row, key):
    loss, cut, options = key
    if (row["loss"], row["cut"]) != (loss, cut):
        return False
    if options.endswith("*"):
        return row["options"] not in ("", "checkpoint=True")
    return row["options"] == options


def main():
    parser = tables.make_parser(__doc__, quick="to see that it draws")
    folder = pathlib.Path(__file__).parent
    parser.add_argument("--input", type=pathlib.Path, default=folder, help="folder of rows.csv")
    parser.add_argument("--target", default="H100:1", choices=tuple(TARGETS))
    args = parser.parse_args()
    _, figures = tables.output_folders(args, __file__)
    figure = draw(tables.read_csv(args.input / "rows.csv"), args.target)
    figure.savefig(figures / "accelerators.png", dpi=130)
    print(f"Figure: {figures / 'accelerators.png'}")


if __name__ == "__main__":
    main()
