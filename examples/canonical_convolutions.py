"""A function to copy: convolutions in loops on a CPU become about as fast as outside of loops.

On a CPU, XLA compiles most convolutions in a loop, such as a rollout, to code that takes many
times as long as outside (https://github.com/jax-ml/jax/issues/12868). A rollout of 1D
convolutions without a gradient is an exception: leave it as it is. The fast kernels of XLA need
one layout: batch, space, features for the data; space, input and output features for the
kernel. JAX has another, and the gradients of a convolution have yet others. XLA's pass that
converts them, `ConvCanonicalization`, visits a program's entry computation and not the bodies
of loops. `canonical_convolutions` does its work: it puts every convolution between transposes.

    update = jax.jit(canonical_convolutions(jax.value_and_grad(loss)))

It leaves alone what XLA has no fast kernels for (float64, complex numbers), and grouped
convolutions, for which the kernels are slower than the loops. On an accelerator the transposes
are in the way. benchmarks/convolutions_on_cpu/run.py measures it.
"""

import contextlib
import copy
import functools
from typing import Any

import jax
import numpy as np
from jax.core import eval_jaxpr


def canonical_convolutions(fun):
    """`fun`, with its convolutions in the layout of XLA's fast kernels for a CPU.

    - `fun`: any function that JAX can trace. Take gradients inside, as above: outside they are
        right, but slow. Leaves that are not arrays go through as they are.

    Returns a function with the same arguments and results, up to rounding. Call it inside
    `jax.jit`, since each call traces `fun`. It may be vmapped.
    """

    @functools.wraps(fun)
    def canonical(*args, **kwargs):
        structure: Any = None
        others: list[Any] = []  # results that are not traced, None for those that are
        is_traced = lambda x: isinstance(x, jax.core.Tracer)

        def arrays():
            nonlocal structure, others
            leaves, structure = jax.tree.flatten(fun(*args, **kwargs))
            others = [None if is_traced(x) else x for x in leaves]
            return [x for x in leaves if is_traced(x)]

        # The arguments are closed over, so that what is not an array stays what it is.
        jaxpr = jax.make_jaxpr(arrays)()
        results = iter(eval_jaxpr(_canonical(jaxpr.jaxpr), jaxpr.consts))
        leaves = [next(results) if x is None else x for x in others]
        return jax.tree.unflatten(structure, leaves)

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
    name = "params" if hasattr(x, "params") else "_params"
    if type(x).__module__.startswith("jax.") and isinstance(getattr(x, name, None), dict):
        with contextlib.suppress(
            AttributeError, TypeError
        ):  # a newer JAX may build it otherwise
            new, params = copy.copy(x), _canonical(getattr(x, name))
            setattr(new, name, params)
            if name == "params":
                vars(new).update(params)
            return new
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
    new_eqns = []
    for new in jaxpr.eqns:
        invars, outvars = ([names.get(x, x) for x in xs] for xs in (new.invars, new.outvars))
        own = dict(primitive=new.primitive, params=new.params, invars=invars, outvars=outvars)
        new_eqns.append(eqn.replace(**own))
    return new_eqns


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
