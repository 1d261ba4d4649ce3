"""Draws what each cut does to the gradients of a rollout.

A rollout is a chain of states uₜ, made by the stepper f, with a residual r between consecutive
states. Values flow along the solid arrows, gradients flow back along the dashed arrows, and
scissors mark where a cut stops them. The program finds the dashed arrows by asking
`residuum_loss`: it gives f and r separate copies of each state, and a gradient flows along an
edge of the graph if the loss depends on a perturbation of that copy.

    python examples/cuts.py     writes assets/cuts_*.svg
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from residuum import Cuts, residuum_loss


NUM_STEPS = 3
FIGURES = {
    "none": Cuts(),
    "bptt": Cuts(bptt=True),
    "bptt_every_2": Cuts(bptt=2),
    "prev": Cuts(prev=True),
    "next": Cuts(next=True),
}


def gradient_arrows(cuts):
    """Returns whether a gradient flows back along each edge of step t, `{edge:
    bool[NUM_STEPS]}`. The edges are `chain` from f to uₜ, `prev` from r to uₜ, `next` from r to
    uₜ₊₁, and `made` from uₜ₊₁ to f."""

    def loss(perturbations):
        chain, prev, next = (jnp.append(perturbations[e], 0) for e in ("chain", "prev", "next"))

        def stepper(state):
            t, u = state["t"], jnp.sin(1 + state["chain"])
            return {
                "chain": u + chain[t + 1],
                "prev": u + prev[t + 1],
                "next": u + next[t],
                "t": t + 1,
            }

        def residuum_fn(u_next, u_prev):
            return u_next["next"] + 0.5 * u_prev["prev"]

        u_0 = {"chain": chain[0], "prev": prev[0], "next": 0.0, "t": 0}
        data = jax.tree.map(lambda leaf: jnp.reshape(leaf, (1, 1)), u_0)
        options = dict(num_rollout_steps=NUM_STEPS, cuts=cuts)
        return residuum_loss(stepper, data, residuum_fn, **options)

    zeros = {edge: jnp.zeros(NUM_STEPS) for edge in ("chain", "prev", "next")}
    arrows = {edge: np.asarray(grad) != 0 for edge, grad in jax.grad(loss)(zeros).items()}
    onwards = np.append(arrows["chain"] | arrows["prev"], False)[1:]
    return {**arrows, "made": arrows["next"] | onwards}


#
# The diagram, in SVG and in colours that are legible on white and on black
#

VALUE, GRADIENT = "#8b949e", "#e8730c"
STEP, LEFT, CHAIN, RESIDUA, RADIUS = 200, 40, 130, 40, 20
FONT = "font-family='Helvetica, Arial, sans-serif' font-size='17' text-anchor='middle'"


def node(x, y, label, *, square):
    size = 2 * RADIUS
    shape = (
        f"<rect x='{x - RADIUS}' y='{y - RADIUS}' width='{size}' height='{size}' rx='6'"
        if square
        else f"<circle cx='{x}' cy='{y}' r='{RADIUS}'"
    )
    text = f"<text x='{x}' y='{y + 6}' fill='{VALUE}' {FONT}>{label}</text>"
    return f"{shape} fill='none' stroke='{VALUE}' stroke-width='2'/>{text}"


def arrow(start, end, color, *, dashed, side=0):
    """Draws an arrow between two nodes, moved sideways by some points, as seen along the
    arrow."""
    start, end = np.array(start, float), np.array(end, float)
    along = (end - start) / np.linalg.norm(end - start)
    across = side * np.array([-along[1], along[0]])
    (x1, y1), (x2, y2) = start + 26 * along + across, end - 28 * along + across
    dash = "stroke-dasharray='6 4'" if dashed else ""
    tip = f"marker-end='url(#{'gradient' if dashed else 'value'})'"
    line = f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}'"
    return f"{line} stroke='{color}' stroke-width='2' {dash} {tip}/>"


def scissors(start, end):
    x, y = np.mean([start, end], axis=0) + np.array([0, 6])
    return f"<text x='{x:.1f}' y='{y:.1f}' fill='{GRADIENT}' {FONT}>✂</text>"


def picture(cuts):
    state = lambda t: (LEFT + STEP * t, CHAIN)
    stepper = lambda t: (LEFT + STEP * t + STEP // 2, CHAIN)
    residuum = lambda t: (LEFT + STEP * t + STEP // 2, RESIDUA)
    arrows = gradient_arrows(cuts)
    tips = "".join(
        f"<marker id='{name}' viewBox='0 0 8 8' refX='6' refY='4' markerWidth='5'"
        f" markerHeight='5' orient='auto'><path d='M0 0L8 4L0 8z' fill='{color}'/></marker>"
        for name, color in (("value", VALUE), ("gradient", GRADIENT))
    )
    parts = [f"<defs>{tips}</defs>"]
    for t in range(NUM_STEPS):
        edges = {
            "chain": (state(t), stepper(t)),
            "made": (stepper(t), state(t + 1)),
            "prev": (state(t), residuum(t)),
            "next": (state(t + 1), residuum(t)),
        }
        for edge, (start, end) in edges.items():
            parts.append(arrow(start, end, VALUE, dashed=False, side=-5))
            arrives = True if edge in ("prev", "next") else arrows["made"][t]
            if arrows[edge][t]:
                parts.append(arrow(end, start, GRADIENT, dashed=True, side=-5))
            elif arrives:
                parts.append(scissors(start, end))
        parts.append(node(*stepper(t), "f", square=True))
        parts.append(node(*residuum(t), "r", square=True))
    subscripts = "₀₁₂₃"
    parts += [node(*state(t), f"u{subscripts[t]}", square=False) for t in range(NUM_STEPS + 1)]
    width, height = 2 * LEFT + STEP * NUM_STEPS, CHAIN + 40
    body = "\n".join(parts)
    size = f"viewBox='0 0 {width} {height}' width='{width}' height='{height}'"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size}>\n{body}\n</svg>\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, default="assets", help="a folder")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, cuts in FIGURES.items():
        (args.output / f"cuts_{name}.svg").write_text(picture(cuts))
        print(args.output / f"cuts_{name}.svg", cuts)


if __name__ == "__main__":
    main()
