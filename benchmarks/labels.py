"""Draws labels at the right ends of the lines of a figure."""

import matplotlib.patheffects


SIZE = 8  # points
OUTLINE = [matplotlib.patheffects.withStroke(linewidth=2, foreground="white")]


def label_ends(axis, ends):
    """Draws labels `{label: (x, y, colour, is_bold)}`. Labels with the same x are moved up and
    down if they would touch. Call this function when the limits of the axis are final."""
    axis.figure.canvas.draw()
    all_x = {x for x, *_ in ends.values()}
    for x in all_x:
        # If other lines continue, a label is below them rather than in between.
        below = 9 if x < max(all_x) else 0
        spread(axis, {label: end for label, end in ends.items() if end[0] == x}, below)


def spread(axis, ends, below):
    to_pixels, points = axis.transData.transform, axis.figure.dpi / 72
    height = {label: to_pixels(end[:2])[1] / points for label, end in ends.items()}
    labels = sorted(ends, key=height.get)
    positions = [height[label] for label in labels]
    for _ in range(100):
        for i in range(len(positions) - 1):
            overlap = SIZE + 2 - (positions[i + 1] - positions[i])
            if overlap > 0:
                positions[i] -= overlap / 2
                positions[i + 1] += overlap / 2
    for label, position in zip(labels, positions, strict=True):
        x, y, color, is_bold = ends[label]
        axis.annotate(
            label,
            (x, y),
            xytext=(8, position - height[label] - below),
            textcoords="offset points",
            va="center",
            fontsize=SIZE,
            color=color,
            fontweight="bold" if is_bold else None,
            path_effects=OUTLINE,
            annotation_clip=False,
        )
