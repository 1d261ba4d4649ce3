"""How slow are convolutions in a loop on a CPU, and what do the remedies gain?

A rollout is compiled in three ways: as a loop, as a loop with canonical convolutions
(examples/canonical_convolutions.py), and unrolled (`unroll=True`). Compile time, memory and run
time are those of the loss and of its gradients, for convolutional networks in 1D and 2D. The
results are in docs/cost.md.

    python benchmarks/convolutions_on_cpu.py             on a machine with nothing else to do
    python benchmarks/convolutions_on_cpu.py --quick     a selection, to see that it runs
"""

import argparse
import itertools
import pathlib
import statistics
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import study  # noqa: F401, for the modules of the examples
from canonical_convolutions import canonical_convolutions
from common import COLORS, ConvNet as Layers, save_figure
from tqdm import tqdm

from residuum import Cuts, residuum_loss


NUM_STEPS, BATCH_SIZE, WIDTH = 20, 16, 16


class ConvNet(eqx.Module):
    layers: Layers

    def __init__(self, num_spatial_dims, *, key):
        channels = (1, WIDTH, WIDTH, WIDTH, 1)
        options = dict(activation=jax.nn.relu, key=key)
        self.layers = Layers(num_spatial_dims, channels, kernel_sizes=4 * [3], **options)

    def __call__(self, u):
        return u + self.layers(u)


class UNet(eqx.Module):
    """Two levels in 2D: a strided convolution down, a transposed convolution up."""

    first: eqx.nn.Conv2d
    down: eqx.nn.Conv2d
    bottom: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose2d
    last: eqx.nn.Conv2d

    def __init__(self, *, key):
        keys = jax.random.split(key, 5)
        self.first = eqx.nn.Conv2d(1, WIDTH, 3, padding=1, key=keys[0])
        self.down = eqx.nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1, key=keys[1])
        self.bottom = eqx.nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1, key=keys[2])
        self.up = eqx.nn.ConvTranspose2d(2 * WIDTH, WIDTH, 2, stride=2, key=keys[3])
        self.last = eqx.nn.Conv2d(2 * WIDTH, 1, 3, padding=1, key=keys[4])

    def __call__(self, u):
        fine = jax.nn.relu(self.first(u))
        coarse = jax.nn.relu(self.bottom(jax.nn.relu(self.down(fine))))
        return u + self.last(jnp.concatenate([fine, jax.nn.relu(self.up(coarse))]))


def problems():
    """Networks, and initial conditions `[batch, 1, channels, *space]`."""
    keys = jax.random.split(jax.random.key(0), 3)
    draw = lambda *space: jax.random.normal(keys[2], (BATCH_SIZE, 1, 1, *space))
    return {
        "1D": (ConvNet(1, key=keys[0]), draw(128)),
        "2D": (ConvNet(2, key=keys[0]), draw(32, 32)),
        "U-Net 2D": (UNet(key=keys[1]), draw(32, 32)),
    }


def heat_residuum(u_next, u_prev):  # one implicit Euler step of the heat equation
    laplacian = sum(
        jnp.roll(u_next, 1, axis) - 2 * u_next + jnp.roll(u_next, -1, axis)
        for axis in range(1, u_next.ndim)
    )
    return u_next - u_prev - 0.01 * laplacian


# What is computed: a transform of the loss, and the cut
CASES = {
    "forward": (lambda f: f, False),
    "gradient": (jax.grad, False),
    "gradient, bptt=1": (jax.grad, 1),
}
# How it is computed: a transform, and the options of `residuum_loss`
WAYS = {
    "loop": (lambda f: f, {}),
    "canonical": (canonical_convolutions, {}),
    "unrolled": (lambda f: f, dict(unroll=True)),
}


def compile_way(way, case, network, data, num_steps):
    """Returns a program without arguments, its compile time [s] and its temporaries [bytes]."""
    remedy, options = WAYS[way]
    transform, bptt = CASES[case]
    params, static = eqx.partition(network, eqx.is_array)

    def loss(params, data):
        stepper = eqx.combine(params, static)
        options_ = dict(num_rollout_steps=num_steps, cuts=Cuts(bptt=bptt), **options)
        return residuum_loss(stepper, data, heat_residuum, **options_)

    start = time.perf_counter()
    compiled = jax.jit(remedy(transform(loss))).lower(params, data).compile()
    compile_time = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    assert analysis is not None
    program = lambda: jax.block_until_ready(compiled(params, data))
    return program, compile_time, analysis.temp_size_in_bytes


def measure(case, network, data, num_steps, rounds):
    """Returns `{way: (compile time [s], memory [bytes], run time [s])}`, and the largest
    relative difference between the results."""
    programs = {way: compile_way(way, case, network, data, num_steps) for way in WAYS}
    results = {way: program() for way, (program, *_) in programs.items()}
    difference = max(
        float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))
        for way in WAYS
        for x, y in zip(*map(jax.tree.leaves, (results[way], results["loop"])), strict=True)
    )
    times: dict[str, list[float]] = {way: [] for way in programs}
    for _ in range(rounds):
        for way, (program, *_) in programs.items():
            start = time.perf_counter()
            program()
            times[way].append(time.perf_counter() - start)
    return {w: (*programs[w][1:], statistics.median(times[w])) for w in WAYS}, difference


def print_row(name, case, row, difference):
    cells = "".join(
        f"{f'{compile_time:.1f} s {memory / 1e6:.1f} MB {1e3 * run_time:.0f} ms':>26}"
        for compile_time, memory, run_time in row.values()
    )
    tqdm.write(f"{f'{name}, {case}':<27}{cells}{difference:>12.0e}")


def draw(table):
    colors = dict(zip(WAYS, (COLORS[1], COLORS[2], COLORS[0]), strict=True))
    names = list(dict.fromkeys(name for name, _ in table))
    figure, axes = plt.subplots(1, len(names), figsize=(11, 3), layout="constrained")
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        for i, (case, (j, way)) in enumerate(itertools.product(CASES, enumerate(WAYS))):
            run_time = 1e3 * table[name, case][way][-1]
            y = i + 0.8 * (i // len(WAYS))
            axis.barh(y, run_time, height=0.9, color=colors[way])
            axis.text(run_time, y, f" {way}, {run_time:.0f} ms", va="center", fontsize=8)
            if j == 0:
                axis.text(0, y - 0.55, f"{case}", va="bottom", fontsize=8, weight="bold")
        axis.set(title=name, xlabel="run time [ms]", yticks=[])
        axis.set_xlim(right=1.45 * axis.get_xlim()[1])
        axis.margins(y=0.04)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rollout-steps", type=int, default=NUM_STEPS)
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("assets/convolutions_on_cpu.png")
    )
    parser.add_argument("--quick", action="store_true", help="1D, two steps")
    args = parser.parse_args()
    chosen = problems()
    if args.quick:
        chosen, args.rollout_steps, args.rounds = {"1D": chosen["1D"]}, 2, 2

    print(f"{args.rollout_steps} steps; each cell: compile time, memory, run time")
    print(f"{'':<27}" + "".join(f"{way:>26}" for way in WAYS) + f"{'difference':>12}")
    table = {}
    with tqdm(total=len(chosen) * len(CASES)) as progress:
        for (name, problem), case in itertools.product(chosen.items(), CASES):
            network, data = problem
            row, difference = measure(case, network, data, args.rollout_steps, args.rounds)
            table[name, case] = row
            print_row(name, case, row, difference)
            progress.update()
    save_figure(args.output, draw(table))


if __name__ == "__main__":
    main()
