"""Convolutions in loops on a CPU, as fast as outside: `canonical_convolutions`, to be copied.

A rollout is a loop, and on a CPU a convolution in a loop is slow: 2 to 35 times as slow as the
same convolution outside (https://github.com/jax-ml/jax/issues/12868). `unroll=True` leaves no
loop, but its compile time grows with the rollout. This file is the other remedy. Apply it to
the function that is compiled, after differentiation:

    update = jax.jit(canonical_convolutions(jax.value_and_grad(loss)))

The cause. XLA's CPU backend has fast code for convolutions in float16 and float32 (to which it
widens bfloat16) in one layout only: batch, space, features for input and output; space, input
features, output features for the kernel. JAX's default is another, and the two gradients of a
convolution come in yet others, whatever the layout of the convolution was. XLA has a pass that
puts transposes around such convolutions, `ConvCanonicalization`
(xla/service/cpu/conv_canonicalization.cc), but this pass visits the instructions of
`module->entry_computation()` alone. The body of a loop is another computation. What is left
there is compiled to naive loops.

The remedy. Nobody says that XLA has to write these transposes. `canonical_convolutions` traces
a function to a jaxpr, and puts every convolution in it, and in the jaxprs inside (of scan,
while, cond, jit, remat, custom rules), between transposes. XLA leaves them alone: on a CPU it
folds no transpose into a convolution. It has to be done after differentiation, since the
gradients of a convolution in the fast layout are not in it.

What upstream would have to change: in `ConvCanonicalization::Run`, iterate over
`module->MakeNonfusionComputations(execution_threads)` instead of the entry computation, and
add the new instructions to the convolution's own computation, `hlo->parent()`. Nothing in the
pass depends on where the convolution stands. That would make this file superfluous.

Left as they are: convolutions in float64 and of complex numbers, for which XLA has no fast code
in any layout; and grouped ones (depthwise, or vmapped over kernels), whose fast code is slower
than the naive loops. 3D gains little. It is for a CPU: on an accelerator the transposes are in
the way.

    python examples/convolutions_on_cpu.py             measures, prints a table, draws a figure
    python examples/convolutions_on_cpu.py --quick     in seconds, to see that it runs
"""

import argparse
import functools
import itertools
import pathlib
import statistics
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.core import eval_jaxpr
from tqdm import tqdm

from residuum import Cuts, residuum_loss


#
# The transform: copy from here ...
#


def canonical_convolutions(fun):
    """`fun`, with its convolutions in the layout for which XLA has fast code on a CPU.

    **Arguments:**

    - `fun`: any function that JAX can trace, with arguments and results of any PyTrees. Only
        arrays count: other leaves go through as they are. Gradients have to be taken inside,
        `canonical_convolutions(jax.grad(f))`; from outside they are right, but as slow as ever.

    **Returns:**

    A function of the same arguments and results, equal up to rounding. It may be called inside
    of `jax.jit`, and should be, since it traces `fun` at every call; it may be vmapped.
    """

    @functools.wraps(fun)
    def canonical(*args, **kwargs):
        structure: Any = None
        others: list[Any] = []

        def arrays():
            nonlocal structure, others
            leaves, structure = jax.tree.flatten(fun(*args, **kwargs))
            is_traced = [isinstance(x, jax.core.Tracer) for x in leaves]
            others = [None if t else x for t, x in zip(is_traced, leaves, strict=True)]
            return [x for t, x in zip(is_traced, leaves, strict=True) if t]

        # The arguments are closed over, so that what is no array stays what it is.
        jaxpr = jax.make_jaxpr(arrays)()
        results = iter(eval_jaxpr(_canonical(jaxpr.jaxpr), jaxpr.consts))
        leaves = [next(results) if x is None else x for x in others]
        return jax.tree.unflatten(structure, leaves)

    return canonical


def _canonical(x):
    """A jaxpr with canonical convolutions; all else as it is."""
    if not hasattr(x, "eqns"):
        return x
    inner = getattr(x, "jaxpr", x)  # of a closed jaxpr; from JAX 0.12 on, there is one kind
    if inner is not x:
        return x.replace(jaxpr=_canonical(inner))
    return x.replace(eqns=[new for eqn in x.eqns for new in _canonical_eqns(eqn)])


def _canonical_eqns(eqn):
    """The equations in place of one: of a convolution, transposes before it and behind it."""
    if eqn.primitive is not jax.lax.conv_general_dilated_p:
        is_jaxpr = lambda x: hasattr(x, "eqns")
        return [eqn.replace(params=jax.tree.map(_canonical, eqn.params, is_leaf=is_jaxpr))]
    groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
    dtypes = {x.aval.dtype.name for x in eqn.invars}
    if groups > 1 or not dtypes <= {"float32", "float16", "bfloat16"}:
        return [eqn]
    with eqn.ctx.manager:  # the mesh, inside of a `shard_map`
        f = functools.partial(_convolve, **eqn.params)
        jaxpr = jax.make_jaxpr(f)(*[x.aval for x in eqn.invars]).jaxpr
    # Traced here, the new values do not know over which axes of the mesh they vary; the result
    # of the old convolution does. All else of their types is right (no sharding in old JAX).
    kept = ("shape", "dtype", "weak_type", "sharding")
    for x in [x for new in jaxpr.eqns for x in new.outvars]:
        own = {name: getattr(x.aval, name, None) for name in kept}
        x.aval = eqn.outvars[0].aval.update(**own)
    names = dict(zip(jaxpr.invars + jaxpr.outvars, eqn.invars + eqn.outvars, strict=True))
    renamed = lambda xs: [names.get(x, x) for x in xs]
    return [
        eqn.replace(
            primitive=new.primitive,
            params=new.params,
            invars=renamed(new.invars),
            outvars=renamed(new.outvars),
        )
        for new in jaxpr.eqns
    ]


def _convolve(lhs, rhs, *, dimension_numbers, **params):
    """The convolution primitive in the canonical layout, between transposes."""
    # Where batch, features and space are; of the kernel output and input features, and space.
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    *space, last = range(lhs.ndim)
    canonical = jax.lax.ConvDimensionNumbers(
        lhs_spec=(0, last, *space[1:]),
        rhs_spec=(last, last - 1, *space[:-1]),
        out_spec=(0, last, *space[1:]),
    )
    features_last = lambda spec: (spec[0], *spec[2:], spec[1])
    out = jax.lax.conv_general_dilated_p.bind(
        lhs.transpose(features_last(lhs_spec)),
        rhs.transpose((*rhs_spec[2:], rhs_spec[1], rhs_spec[0])),
        dimension_numbers=canonical,
        **params,
    )
    return out.transpose(np.argsort(features_last(out_spec)))


#
# ... to here. What follows measures it
#

NUM_STEPS, BATCH_SIZE, WIDTH = 20, 16, 16


class ConvNet(eqx.Module):
    layers: list[eqx.nn.Conv]

    def __init__(self, num_spatial_dims, *, key):
        channels = [(1, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, 1)]
        self.layers = [
            eqx.nn.Conv(num_spatial_dims, *c, 3, padding="SAME", padding_mode="CIRCULAR", key=k)
            for c, k in zip(channels, jax.random.split(key, 4), strict=True)
        ]

    def __call__(self, u):
        hidden = u
        for layer in self.layers[:-1]:
            hidden = jax.nn.relu(layer(hidden))
        return u + self.layers[-1](hidden)


class UNet(eqx.Module):
    """Two levels in 2D: down by a stride, up by a transposed convolution."""

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


# What is computed: its transform, and the cut
CASES = {
    "forward": (lambda f: f, False),
    "gradient": (jax.grad, False),
    "gradient, bptt=1": (jax.grad, 1),
}
# How it is computed: a transform, and the options of `residuum_loss`
WAYS = {
    "loop": (lambda f: f, {}),
    "canonical": (canonical_convolutions, {}),
    "straight": (lambda f: f, dict(unroll=True)),
}


def compile_way(way, case, network, data, num_steps):
    """Returns a program of no arguments, its compile time in s, its temporaries in bytes."""
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
    """`{way: (compile time in s, memory in bytes, run time in s)}`, and how far the results
    are apart, relative to their size."""
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


def save_figure(path, table):
    colors = dict(zip(WAYS, ("#D55E00", "#0072B2", "#999999"), strict=True))
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


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
    save_figure(args.output, table)
    print(f"\nFigure: {args.output}")


if __name__ == "__main__":
    main()
