"""Makes convolutions in loops on a CPU about as fast as outside of loops. Copy this file.

On a CPU, XLA compiles most convolutions in a loop, such as a rollout, to code that takes many
times as long as the same convolutions outside (https://github.com/jax-ml/jax/issues/12868). A
rollout of 1D convolutions without a gradient is an exception: leave it as it is. The fast
kernels of XLA need one layout: batch, space, features for the data; space, input features,
output features for the kernel. JAX uses another layout, and the gradients of a convolution use
yet others. XLA's pass that converts layouts, `ConvCanonicalization`, visits the entry
computation of a program but not the bodies of loops. `canonical_convolutions` does the work of
that pass: it puts every convolution between transposes.

    update = jax.jit(canonical_convolutions(jax.value_and_grad(loss)))

The function leaves convolutions alone for which XLA has no fast kernels (float64, complex
numbers), and grouped convolutions, for which the kernels are slower than the loops. Do not use
it on an accelerator, where the transposes only cost time. benchmarks/convolutions_on_cpu/run.py
measures the gain.
"""

import contextlib
import copy
import functools
from typing import Any

import jax
import numpy as np
from jax.core import eval_jaxpr


def canonical_convolutions(fun):
    """Returns `fun` with its convolutions in the layout of XLA's fast kernels for a CPU.

    - `fun`: any function that JAX can trace. Take gradients inside it, as in the example above.
        Gradients that are taken outside are right, but slow. Leaves that are not arrays pass
        through unchanged.

    The returned function has the same arguments and the same results, up to round-off. Call it
    inside `jax.jit`, since each call traces `fun`. You can `vmap` it.
    """

    @functools.wraps(fun)
    def canonical(*args, **kwargs):
        structure: Any = None
        others: list[Any] = []  # results that are not traced, None in place of traced ones
        is_traced = lambda x: isinstance(x, jax.core.Tracer)

        def arrays():
            nonlocal structure, others
            leaves, structure = jax.tree.flatten(fun(*args, **kwargs))
            others = [None if is_traced(x) else x for x in leaves]
            return [x for x in leaves if is_traced(x)]

        # The arguments are closed over, so that arguments other than arrays stay as they are.
        jaxpr = jax.make_jaxpr(arrays)()
        results = iter(eval_jaxpr(_canonical(jaxpr.jaxpr), jaxpr.consts))
        leaves = [next(results) if x is None else x for x in others]
        return jax.tree.unflatten(structure, leaves)

    return canonical


def _canonical(x):
    """Returns a jaxpr, or an object that holds jaxprs, with canonical convolutions. Anything
    else is returned as it is."""
    if isinstance(x, dict):
        return jax.tree.map(_canonical, x, is_leaf=lambda leaf: hasattr(leaf, "eqns"))
    if hasattr(x, "eqns"):
        inner = getattr(x, "jaxpr", x)  # of a closed jaxpr; since JAX 0.12, there is one kind
        if inner is not x:
            return x.replace(jaxpr=_canonical(inner))
        return x.replace(eqns=[new for eqn in x.eqns for new in _canonical_eqns(eqn)])
    # Some primitives lower a jaxpr of their own (JAX_REMAT3, JAX_CUSTOM_JVP3, JAX_CUSTOM_VJP3).
    # Their parameters, which are also attributes, contain the jaxpr or a traced function with
    # it.
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
    """Returns the equations that replace one equation. A convolution gets transposes before and
    after it."""
    if eqn.primitive is not jax.lax.conv_general_dilated_p:
        return [eqn.replace(params=_canonical(eqn.params))]
    groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
    dtypes = {x.aval.dtype.name for x in eqn.invars}
    if groups > 1 or not dtypes <= {"float32", "float16", "bfloat16"}:
        return [eqn]
    with eqn.ctx.manager:  # the mesh, inside a `shard_map`
        f = functools.partial(_convolve, **eqn.params)
        jaxpr = jax.make_jaxpr(f)(*[x.aval for x in eqn.invars]).jaxpr
    # The new values are traced here, so their types lack the mesh axes over which they vary.
    # The result of the old convolution has these axes. All else in the new types is right. Old
    # versions of JAX have no sharding in them.
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
    """Applies the convolution primitive in the canonical layout, between transposes."""
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
