"""How slow are convolutions in a loop on a CPU, and what do the remedies gain?

A rollout is compiled in three ways: as a loop, as a loop with canonical convolutions, i.e.,
convolutions rewritten to the layout that XLA's CPU kernels need
(examples/canonical_convolutions.py), and unrolled (`unroll=True`). The benchmark measures
compile time, memory and run time of the loss and of its gradients, for convolutional networks
in 1D and 2D. It prints the table from the rows of the CSV file. docs/cost.md shows the table.

    python -m benchmarks.convolutions_on_cpu.run             on an idle machine
    python -m benchmarks.convolutions_on_cpu.run --quick     a selection, to see that it runs
"""

import itertools
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from canonical_convolutions import canonical_convolutions
from common import COLORS, ConvNet as Layers, save_figure
from tqdm import tqdm

from benchmarks import losses, machine, tables


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
    """Has two levels in 2D: a strided convolution down, and a transposed convolution up."""

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
    """Returns networks, and initial conditions `[batch, 1, channels, *space]`."""
    keys = jax.random.split(jax.random.key(0), 3)
    draw = lambda *space: jax.random.normal(keys[2], (BATCH_SIZE, 1, 1, *space))
    return {
        "1D": (ConvNet(1, key=keys[0]), draw(128)),
        "2D": (ConvNet(2, key=keys[0]), draw(32, 32)),
        "U-Net 2D": (UNet(key=keys[1]), draw(32, 32)),
    }


def heat_residuum(u_next, u_prev):
    return losses.heat_residuum(u_next, u_prev, axes=range(1, u_next.ndim))


# Each case is a transformation of the loss, and a cut.
CASES = {
    "forward": (lambda f: f, False),
    "gradient": (jax.grad, False),
    "gradient, bptt=1": (jax.grad, 1),
}
# Each way of computing a case is a transformation, and options of `residuum_loss`.
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
        return losses.with_residuum(stepper, data, heat_residuum, num_steps, bptt, **options)

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
    medians = machine.medians_in_turns(
        {way: program for way, (program, *_) in programs.items()},
        lambda times: len(times) >= rounds,
    )
    return {way: (*programs[way][1:], medians[way]) for way in WAYS}, difference


def csv_rows(name, case, num_steps, row, difference):
    """Yields one row for each way. `difference` is the same in all of them."""
    for way, (compile_time, memory, run_time) in row.items():
        yield dict(
            network=name,
            case=case,
            num_rollout_steps=num_steps,
            way=way,
            compile_s=compile_time,
            temp_bytes=memory,
            run_s=run_time,
            difference=difference,
            machine=machine.describe(machine.all_cores()),
        )


def table_of(rows):
    """Returns `{(network, case): {way: row}}`."""
    table = {}
    for row in rows:
        table.setdefault((row["network"], row["case"]), {})[row["way"]] = row
    return table


def markdown(rows):
    """Makes the table, with compile time, memory and run time in each cell."""
    lines = []
    for (name, case), ways in table_of(rows).items():
        cells = [
            f"{float(row['compile_s']):.1f} s / {float(row['temp_bytes']) / 1e6:.1f} MB / "
            f"{1e3 * float(row['run_s']):.0f} ms"
            for row in ways.values()
        ]
        difference = float(next(iter(ways.values()))["difference"])
        lines.append([f"{name}, {case}", *cells, f"{difference:.0e}" if difference else "0"])
    return tables.markdown(["network, what", *WAYS, "difference"], lines)


def draw(rows):
    table = table_of(rows)
    colors = dict(zip(WAYS, (COLORS[1], COLORS[2], COLORS[0]), strict=True))
    names = list(dict.fromkeys(name for name, _ in table))
    figure, axes = plt.subplots(1, len(names), figsize=(11, 3), layout="constrained")
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        for i, (case, (j, way)) in enumerate(itertools.product(CASES, enumerate(WAYS))):
            run_time = 1e3 * float(table[name, case][way]["run_s"])
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
    parser = tables.make_parser(__doc__, quick="1D, two steps")
    parser.add_argument("--rollout-steps", type=int, default=NUM_STEPS)
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    args = parser.parse_args()
    folder, figures = tables.output_folders(args, __file__)
    path = folder / "rows.csv"
    chosen = problems()
    if args.quick:
        chosen, args.rollout_steps, args.rounds = {"1D": chosen["1D"]}, 2, 2

    rows = []
    with tqdm(total=len(chosen) * len(CASES)) as progress:
        for (name, problem), case in itertools.product(chosen.items(), CASES):
            network, data = problem
            progress.set_description(f"{name}, {case}")
            row, difference = measure(case, network, data, args.rollout_steps, args.rounds)
            rows += csv_rows(name, case, args.rollout_steps, row, difference)
            tables.write_csv(path, rows)
            progress.update()
    rows = tables.read_csv(path)
    tables.write_table(folder / "table.md", markdown(rows))
    print(f"{args.rollout_steps} steps; each cell: compile time / memory / run time\n")
    print(markdown(rows))
    save_figure(figures / "convolutions_on_cpu.png", draw(rows))


if __name__ == "__main__":
    main()
