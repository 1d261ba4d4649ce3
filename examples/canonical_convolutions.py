"""A function to copy: it makes convolutions in loops on a CPU as fast as outside of loops.

A rollout is a loop. On a CPU, XLA compiles a convolution in a loop to code that takes 2 to 35
times as long as outside (https://github.com/jax-ml/jax/issues/12868), because its fast kernels
need one layout: batch, space, features for the data; space, input features, output features for
the kernel. JAX has another layout, and the two gradients of a convolution have yet others.
XLA's pass that converts them, `ConvCanonicalization`, visits the entry computation of a program
and not the bodies of its loops. `canonical_convolutions` does the work of that pass: it traces
a function and puts every convolution in it between transposes.

    update = jax.jit(canonical_convolutions(jax.value_and_grad(loss)))

Convolutions for which XLA has no fast kernels stay as they are: float64, complex numbers, and
grouped ones (depthwise, or vmapped over kernels), where its kernels are slower than the loops.
On an accelerator the transposes are in the way. Measured by benchmarks/convolutions_on_cpu.py.
"""

import copy
import functools
from typing import Any

import jax
import numpy as np
from jax.core import eval_jaxpr


def canonical_convolutions(fun):
    """`fun`, with its convolutions in the layout of XLA's fast kernels for a CPU.

    **Arguments:**

    - `fun`: any function that JAX can trace. Leaves that are not arrays go through as they are.
        Take gradients inside, `canonical_convolutions(jax.grad(f))`: outside they are right,
        but slow.

    **Returns:**

    A function with the same arguments and results, up to rounding. Call it inside `jax.jit`,
    since each call traces `fun`. It may be vmapped.
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

        # The arguments are closed over, so that what is not an array stays what it is.
        jaxpr = jax.make_jaxpr(arrays)()
        results = iter(eval_jaxpr(_canonical(jaxpr.jaxpr), jaxpr.consts))
        return jax.tree.unflatten(
            structure, [next(results) if x is None else x for x in others]
        )

    return canonical


def _canonical(x):
    """A jaxpr, or what holds jaxprs, with canonical convolutions; all else as it is."""
    if isinstance(x, dict):
        return jax.tree.map(_canonical, x, is_leaf=lambda leaf: hasattr(leaf, "eqns"))
    if hasattr(x, "eqns"):
        inner = getattr(x, "jaxpr", x)  # of a closed jaxpr; from JAX 0.12 on, there is one kind
        if inner is not x:
            return x.replace(jaxpr=_canonical(inner))
        return x.replace(eqns=[new for eqn in x.eqns for new in _canonical_eqns(eqn)])
    # A primitive that lowers a jaxpr of its own (JAX_REMAT3, JAX_CUSTOM_JVP3, JAX_CUSTOM_VJP3)
    # has it, or a traced function with it, among its parameters, which are attributes as well.
    for name in ("params", "_params"):
        if type(x).__module__.startswith("jax.") and isinstance(getattr(x, name, None), dict):
            x, params = copy.copy(x), _canonical(getattr(x, name))
            setattr(x, name, params)
            vars(x).update(params if name == "params" else {})
    return x


def _canonical_eqns(eqn):
    """The equations in place of one: of a convolution, with transposes before and after it."""
    if eqn.primitive is not jax.lax.conv_general_dilated_p:
        return [eqn.replace(params=_canonical(eqn.params))]
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
        x.aval = eqn.outvars[0].aval.update(**{k: getattr(x.aval, k, None) for k in kept})
    names = dict(zip(jaxpr.invars + jaxpr.outvars, eqn.invars + eqn.outvars, strict=True))
    renamed = lambda xs: [names.get(x, x) for x in xs]
    return [
        eqn.replace(primitive=new.primitive, params=new.params, invars=invars, outvars=outvars)
        for new in jaxpr.eqns
        for invars, outvars in [(renamed(new.invars), renamed(new.outvars))]
    ]


def _convolve(lhs, rhs, *, dimension_numbers, **params):
    """The convolution primitive in the canonical layout, between transposes."""
    lhs_spec, rhs_spec, out_spec = dimension_numbers  # (batch, features, *space) of data
    *space, last = range(lhs.ndim)
    data, kernel = (0, last, *space[1:]), (last, last - 1, *space[:-1])
    features_last = lambda spec: (spec[0], *spec[2:], spec[1])
    out = jax.lax.conv_general_dilated_p.bind(
        lhs.transpose(features_last(lhs_spec)),
        rhs.transpose((*rhs_spec[2:], rhs_spec[1], rhs_spec[0])),
        dimension_numbers=jax.lax.ConvDimensionNumbers(data, kernel, data),
        **params,
    )
    return out.transpose(np.argsort(features_last(out_spec)))
