"""How much faster is a plain scan where there is almost nothing to compute?

One gradient of a rollout at batch 1, of an MLP so small that the overhead of a loop counts: by
`residuum_loss`, by the same with `unroll=k`, and by a `jax.lax.scan` of a few lines with the
same cuts. The three run in turn in one process, on one core. The CSV file has the median of
each run time, docs/cost.md the largest ratio.

    python benchmarks/tiny_networks.py             two minutes
    python benchmarks/tiny_networks.py --quick     one network, 20 steps
"""

import argparse
import itertools
import pathlib
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import study

from residuum import Cuts, mse, residuum_loss


SIZES = {3: 8, 8: 8, 16: 16, 32: 32}  # of the state, and of the hidden layer
NUM_STEPS = (20, 100, 1000)
BPTT = (1, 2, 3, 4, 8)
heat_residuum = partial(study.heat_residuum, axes=[0], roll=jnp.roll)


def emulate(params, u):
    return u + params["out"] @ jnp.tanh(params["in"] @ u)


def with_residuum(params, data, num_steps, bptt, unroll=1):
    options = dict(num_rollout_steps=num_steps, cuts=Cuts(bptt=bptt), unroll=unroll)
    return residuum_loss(partial(emulate, params), data, heat_residuum, **options)


def with_scan(params, data, num_steps, bptt):
    def step(u_prev, is_cut):
        u_next = jax.vmap(partial(emulate, params))(u_prev)
        loss = mse(jax.vmap(heat_residuum)(u_next, u_prev))
        return jnp.where(is_cut, jax.lax.stop_gradient(u_next), u_next), loss

    is_cut = (jnp.arange(num_steps) + 1) % bptt == 0
    return jnp.sum(jax.lax.scan(step, data[:, 0], is_cut)[1])


def measure(case, rounds):
    """The median run time [s] of a gradient in each of the three ways."""
    size, num_steps, bptt = case
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (SIZES[size], size)
    params = {"in": 0.1 * jax.random.normal(keys[0], shape)}
    params["out"] = 0.1 * jax.random.normal(keys[1], shape[::-1])
    data = jax.random.normal(keys[2], (1, 1, size))
    ways = {
        "residuum": with_residuum,
        "residuum_unrolled": partial(with_residuum, unroll=bptt),
        "scan": with_scan,
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    programs = {
        way: jax.jit(jax.grad(partial(loss, num_steps=num_steps, bptt=bptt)))
        for way, loss in ways.items()
    }
    for i in range(rounds + 10):
        for way, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(params, data))
            if i >= 10:  # the first compiles, and the processor's clock settles
                times[way].append(time.perf_counter() - start)
    seconds = {f"{way}_s": statistics.median(times[way]) for way in ways}
    names = dict(size=size, num_rollout_steps=num_steps, bptt=bptt)
    return {**names, **seconds, "machine": study.machine("1 core")}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=pathlib.Path, default="benchmarks/tiny_networks.csv")
    parser.add_argument("--rounds", type=int, default=200, help="of which the median counts")
    parser.add_argument("--quick", action="store_true", help="one network, 20 steps")
    args = parser.parse_args()
    cases = [*itertools.product(SIZES, NUM_STEPS, BPTT)]
    cases = cases[:2] if args.quick else cases
    rows = []
    # One worker: nothing else runs.
    for row in study.on_single_cores(partial(measure, rounds=args.rounds), cases, 1):
        ratios = [row[way] / row["scan_s"] for way in ("residuum_s", "residuum_unrolled_s")]
        print(*list(row.values())[:3], *(f"{ratio:.2f}" for ratio in ratios), flush=True)
        rows.append(row)
        study.write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
