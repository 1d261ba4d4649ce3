"""How much faster is a plain scan if there is almost nothing to compute?

The benchmark measures one gradient of a rollout at batch 1, of an MLP so small that the
overhead of a loop counts. The loss is computed by `residuum_loss`, by `residuum_loss` with
`unroll=k`, and by a `jax.lax.scan` of a few lines with the same cuts. The three programs run in
turns in one process, on one core. The CSV file has the median of each run time, and
docs/cost.md the largest ratio.

    python -m benchmarks.tiny_networks.run             two minutes
    python -m benchmarks.tiny_networks.run --quick     one network, 20 steps
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks import losses, machine, tables


SIZES = {3: 8, 8: 8, 16: 16, 32: 32}  # state size: hidden size
NUM_STEPS = (20, 100, 1000)
BPTT = (1, 2, 3, 4, 8)
heat_residuum = partial(losses.heat_residuum, axes=[0])


def emulate(params, u):
    return u + params["out"] @ jnp.tanh(params["in"] @ u)


def loss_in(way, params, data, num_steps, bptt):
    return way(partial(emulate, params), data, heat_residuum, num_steps, bptt)


def ways(bptt):
    unrolled = partial(losses.with_residuum, unroll=bptt)
    return {
        "residuum": losses.with_residuum,
        "residuum_unrolled": unrolled,
        "scan": losses.with_plain_scan,
    }


def measure(case, rounds):
    """Measures the median run time [s] of a gradient in each of the three ways."""
    size, num_steps, bptt = case
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (SIZES[size], size)
    params = {"in": 0.1 * jax.random.normal(keys[0], shape)}
    params["out"] = 0.1 * jax.random.normal(keys[1], shape[::-1])
    data = jax.random.normal(keys[2], (1, 1, size))
    programs = {
        name: jax.jit(jax.grad(partial(loss_in, way, num_steps=num_steps, bptt=bptt)))
        for name, way in ways(bptt).items()
    }
    calls = {
        name: lambda f=program: jax.block_until_ready(f(params, data))
        for name, program in programs.items()
    }
    # The first runs compile the programs and let the processor's clock settle.
    machine.medians_in_turns(calls, lambda times: len(times) >= 10)
    medians = machine.medians_in_turns(calls, lambda times: len(times) >= rounds)
    seconds = {f"{name}_s": median for name, median in medians.items()}
    names = dict(size=size, num_rollout_steps=num_steps, bptt=bptt)
    return {**names, **seconds, "machine": machine.describe("1 core")}


def main():
    parser = tables.make_parser(__doc__, quick="one network, 20 steps")
    parser.add_argument("--rounds", type=int, default=200, help="of which the median counts")
    args = parser.parse_args()
    folder, _ = tables.output_folders(args, __file__)
    cases = [*itertools.product(SIZES, NUM_STEPS, BPTT)]
    cases = cases[:2] if args.quick else cases
    rows = []
    # There is one worker, so nothing else runs.
    for row in machine.on_single_cores(partial(measure, rounds=args.rounds), cases, 1):
        ratios = [row[way] / row["scan_s"] for way in ("residuum_s", "residuum_unrolled_s")]
        print(*list(row.values())[:3], *(f"{ratio:.2f}" for ratio in ratios), flush=True)
        rows.append(row)
        tables.write_csv(folder / "rows.csv", rows)


if __name__ == "__main__":
    main()
