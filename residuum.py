"""Train neural emulators of time-dependent problems on the residuum of their rollout.

An autoregressive network `stepper` advances a state in time, `u_next = stepper(u_prev)`.
If the problem is discretised as `residuum_fn(u_next, u_prev) = 0` (an implicit time step,
say), the network can be trained from initial conditions alone: roll it out, and ask at
every time level how far two consecutive states are from satisfying the equation. No
reference trajectory is needed and no solver runs in the loop.

This module is one pure function, `residuum_loss`. It needs jax and jaxtyping, and may be
installed (`pip install residuum-jax`) or copied into a project as the one file it is.
"""

import reprlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial, reduce
from itertools import pairwise
from numbers import Integral, Number
from operator import itemgetter
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr, Tracer
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Real, Shaped


__all__ = ["Cuts", "Rollout", "mse", "residuum_loss"]
__version__ = "0.1.0"


#
# Public API
#


class Cuts(NamedTuple):
    """Where gradients stop in a rollout. Values never change.

    Python bools and ints are static: they leave no selection in the program, and JAX
    drops the backward pass that became dead. Arrays are data: changing them does not
    recompile. They select, they do not multiply, so a cut also keeps NaN and infinity
    on the far side out of the gradient.

    **Fields:**

    - `bptt`: cuts the main chain, i.e., truncates backpropagation through time. `False`
        keeps all of it. An int `k >= 1` cuts after every `k`-th step: the state made by
        step `t`, counted from 0, is cut where `(t + 1) % k == 0`. `True` is `1`. A bool
        array or list `[num_rollout_steps]` cuts after step `t` where it is true.
    - `prev`, `next`: cut that argument of `residuum_fn`. A bool, or a bool array `[]` or
        `[num_rollout_steps]`, or a list, that says so for each time level.
    """

    bptt: bool | int | Bool[ArrayLike, " num_rollout_steps"] | Sequence[bool] = False
    prev: bool | Bool[ArrayLike, "*num_rollout_steps"] | Sequence[bool] = False
    next: bool | Bool[ArrayLike, "*num_rollout_steps"] | Sequence[bool] = False


class Rollout(NamedTuple):
    """What a rollout leaves behind, see `has_aux`. No gradient flows through it.

    **Fields:**

    - `time_level_losses`: the unweighted batch-mean loss of every time level.
    - `final_state`: the state after the last step, leaves `[batch, ...]`. With a snapshot
        axis put back (`x[:, None]`) it is the `data` for the next piece of a trajectory.
    """

    time_level_losses: Float[Array, " num_rollout_steps"]
    final_state: PyTree[Shaped[Array, "batch ..."]]


def mse(residuum: PyTree[Shaped[ArrayLike, "..."]]) -> Float[Array, ""]:
    """Mean of `|r|²` over all entries of all leaves.

    **Arguments:**

    - `residuum`: PyTree of real or complex arrays of any shape.

    **Returns:**

    Real scalar, accumulated in float32 or wider. Leaves count by their number of entries.
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(residuum)]
    if not leaves:
        raise ValueError(f"residuum must hold at least one array, got {residuum!r}.")
    # |r|² = Re² + Im² is differentiable where r is 0, unlike abs(r)**2.
    parts = [x for r in leaves for x in ([r.real, r.imag] if jnp.iscomplexobj(r) else [r])]
    sums = [jnp.sum(jnp.square(_at_least_float32(x))) for x in parts]
    widest = max((s.dtype for s in sums), key=lambda dtype: dtype.itemsize)
    return reduce(jnp.add, [s.astype(widest) for s in sums]) / sum(r.size for r in leaves)


@overload
def residuum_loss(
    stepper: Callable[[PyTree], PyTree],
    data: PyTree[Shaped[ArrayLike, "batch num_snapshots ..."]],
    residuum_fn: Callable[[PyTree, PyTree], PyTree],
    *,
    num_rollout_steps: int = ...,
    cuts: Cuts = ...,
    weights: Real[ArrayLike, "num_rollout_steps"] | Sequence[Any] | None = ...,
    time_level_loss: Callable[[PyTree], Real[ArrayLike, ""]] = ...,
    checkpoint: bool | int = ...,
    unroll: int | bool = ...,
    has_aux: Literal[False] = ...,
) -> Float[Array, ""]: ...
@overload
def residuum_loss(
    stepper: Callable[[PyTree], PyTree],
    data: PyTree[Shaped[ArrayLike, "batch num_snapshots ..."]],
    residuum_fn: Callable[[PyTree, PyTree], PyTree],
    *,
    num_rollout_steps: int = ...,
    cuts: Cuts = ...,
    weights: Real[ArrayLike, "num_rollout_steps"] | Sequence[Any] | None = ...,
    time_level_loss: Callable[[PyTree], Real[ArrayLike, ""]] = ...,
    checkpoint: bool | int = ...,
    unroll: int | bool = ...,
    has_aux: Literal[True],
) -> tuple[Float[Array, ""], Rollout]: ...
def residuum_loss(
    stepper: Callable[[PyTree], PyTree],
    data: PyTree[Shaped[ArrayLike, "batch num_snapshots ..."]],
    residuum_fn: Callable[[PyTree, PyTree], PyTree],
    *,
    num_rollout_steps: int = 1,
    cuts: Cuts = Cuts(),
    weights: Real[ArrayLike, "{num_rollout_steps}"] | Sequence[Any] | None = None,
    time_level_loss: Callable[[PyTree], Real[ArrayLike, ""]] = mse,
    checkpoint: bool | int = False,
    unroll: int | bool = 1,
    has_aux: bool = False,
) -> Float[Array, ""] | tuple[Float[Array, ""], Rollout]:
    """Loss of an autoregressive rollout, measured by the residuum between its states.

        u⁰ = data[:, 0],   uᵗ⁺¹ = stepper(uᵗ),   t = 0, …, num_rollout_steps - 1

        L = Σₜ weights[t] · mean_batch time_level_loss(residuum_fn(uᵗ⁺¹, uᵗ))

    `stepper`, `residuum_fn` and `time_level_loss` are called on one sample, without a batch
    axis, and must be pure. Gradients flow to whatever they close over, to `data` and to
    `weights`. The reference is the configuration `Residuum` of trainax
    (https://github.com/Ceyron/trainax), whose taxonomy is due to Koehler et al., "APEBench: A
    Benchmark for Autoregressive Neural Emulators of PDEs" (https://arxiv.org/abs/2411.00180).

    **Arguments:**

    - `stepper`: `u_prev -> u_next`, the emulator. A state is any PyTree of arrays;
        `u_next` has the structure and the shapes of `u_prev`.
    - `data`: PyTree of arrays `[batch, num_snapshots, ...]`. Only snapshot 0, the initial
        condition, is read. It is promoted if `stepper` returns a wider dtype.
    - `residuum_fn`: `(u_next, u_prev) -> residuum`, any PyTree of real or complex arrays.
        Note the order: next first.
    - `num_rollout_steps`: static number of autoregressive steps, at least 1.
    - `cuts`: where gradients stop, see `Cuts`. With a static `bptt` of `k` steps the gradient
        takes the memory of `k` steps, however long the rollout; so do forward over reverse
        derivatives, but not reverse over reverse ones. Inside a `jax.shard_map` with
        `check_vma=True` the parameters need a `jax.lax.pcast` to varying for it.
    - `weights`: `[num_rollout_steps]`, the weight of every time level. `None` is all ones. A
        weight of 0 does not keep an infinite loss out, since 0 · ∞ is not a number.
    - `time_level_loss`: `residuum -> real scalar`.
    - `checkpoint`: rematerialise each time step in the backward pass. `True` stores one state
        per step instead of its activations, for about one more forward pass of run time. An
        int `k` stores every `k`-th state only, and those of the one block of `k` steps whose
        turn it is: `T / k + k` states in all, least for `k` near the square root of `T`, for
        about two more forward passes. `1` is `True`.
    - `unroll`: time steps per loop iteration, as in `jax.lax.scan`; `True` for no loop at
        all, as a single step never is one. Compile time grows with it and with nothing else.
        It is for a CPU, where XLA runs a convolution in a loop slower than outside
        (https://github.com/jax-ml/jax/issues/12868), if `examples/convolutions_on_cpu.py` is
        not applied.
    - `has_aux`: also return a `Rollout`.

    **Returns:**

    The loss, a scalar in float32 or wider (its dtype is that of `time_level_loss`; bf16
    and fp16 are accumulated in float32, and so are the gradients of parameters in these
    formats, which takes a copy in float32). With `has_aux`, the pair `(loss, Rollout)`.

    **Raises:**

    `TypeError` or `ValueError` at trace time, naming the argument. What your functions raise
    passes through, with notes: which one it was, called with what, and how `data` was read.
    """
    _require(isinstance(has_aux, bool), TypeError, "has_aux must be a static bool", has_aux)
    num_steps = _check_int("num_rollout_steps", num_rollout_steps)
    unroll = _check_int("unroll", unroll, {True: num_steps, False: 1})
    checkpoint = _check_int("checkpoint", checkpoint, {True: 1, False: 0})
    constant_cuts, masks, k = _check_cuts(cuts, num_steps)
    weights = jnp.ones(num_steps, jnp.float32) if weights is None else weights
    real = [jnp.floating, jnp.integer, jnp.bool]
    level_weights = _check_levels("weights", weights, "a real array", real, num_steps)
    u_0, structure, how_data_was_read = _check_data(data)
    checked = partial(_checked, how_data_was_read)
    stepper = checked("stepper", stepper, "u_prev")
    residuum_fn = checked("residuum_fn", residuum_fn, "u_next", "u_prev")
    time_level_loss = checked("time_level_loss", time_level_loss, "residuum")

    # A state is the list of its leaves: it is a tree for the user's functions alone.
    tree: Any = partial(jax.tree.unflatten, structure)

    def advance(u_prev: State) -> State:
        return [jnp.asarray(leaf) for leaf in jax.tree.leaves(stepper(tree(u_prev)))]

    def time_step(u_prev: State, mask: dict[str, Any]) -> tuple[State, Any]:
        bptt, prev, next = constant_cuts._replace(**mask)
        u_next = advance(u_prev)
        residuum = residuum_fn(tree(_cut(u_next, next)), tree(_cut(u_prev, prev)))
        return _cut(u_next, bptt), time_level_loss(residuum)

    def batch_step(u_prev: State, mask: dict[str, Any]) -> tuple[State, Array]:
        u_next, losses = jax.vmap(time_step, in_axes=(0, None))(u_prev, mask)
        return u_next, jnp.mean(_at_least_float32(losses))

    u_1 = jax.eval_shape(jax.vmap(advance), u_0)
    while [x.dtype for x in u_0] != [x.dtype for x in u_1]:
        u_0 = _cast(u_0, u_1)
        u_1 = jax.eval_shape(jax.vmap(advance), u_0)
    step, closed_over, (_, loss) = _hoist(batch_step, u_0, {f: x[0] for f, x in masks.items()})
    levels = {"weights": level_weights.astype(loss.dtype), **masks}
    if k == 1 < num_steps:
        checkpoint = 0  # the backward pass of a segment of one step follows at once
    rollout = partial(_rollout, step, checkpoint, unroll)
    if k < num_steps:
        rollout = partial(_streamed_rollout, rollout, k, unroll // k)
    loss, (losses, u) = rollout(closed_over, u_0, levels)
    losses, u = jax.lax.stop_gradient((losses, u))
    return (loss, Rollout(losses, tree(u))) if has_aux else loss


#
# The rollout: a loop over time steps
#
# `step` is a pure function `(closed_over, u, mask) -> (u, loss)`: `closed_over` are the
# arrays that the user's functions close over, `u` is a state, the list of its leaves
# `[batch, ...]`. `levels` are weights, in the dtype of the loss, and masks, `[num_steps]`.
#

State = list[Array]
Levels = dict[str, Array]
LossAndAux = tuple[Array, tuple[Array, State]]


def _rollout(
    step: Any, checkpoint: int, unroll: int, closed_over: Any, u: State, levels: Levels
) -> LossAndAux:
    """Returns the weighted sum of the losses; and the losses, and the final state.

    With `checkpoint > 1` the loop is one over blocks of as many steps. Its backward pass finds
    the state before each block, computes those within the block again, and from each of them
    the activations: `num_steps / checkpoint + checkpoint` states are stored in all.
    """
    num_steps = len(levels["weights"])
    block_length = checkpoint if checkpoint > 1 else num_steps
    chunks = _chunks(levels, block_length)
    one_step, losses = partial(step, closed_over), []
    for chunk in chunks:
        num_blocks, length = chunk["weights"].shape
        masks = {name: x for name, x in chunk.items() if name != "weights"}
        block = partial(_scan, one_step, length=length, unroll=unroll, remat=checkpoint > 0)
        # The backward pass of a last block by itself follows at once.
        remat = num_blocks > 1 or chunk is not chunks[-1]
        u, ys = _scan(block, u, masks, num_blocks, unroll // block_length, remat)
        losses.append(ys.reshape(-1))
    all_losses = jnp.concatenate(losses)
    return jnp.sum(levels["weights"] * all_losses), (all_losses, u)


def _chunks(levels: Levels, length: int, first: int = 0) -> list[Levels]:
    """The time levels in chunks of blocks, `[num_blocks, length]`.

    The `first` levels are a chunk of their own, and what is left over is a shorter block.
    """
    num_steps = len(levels["weights"])
    last = num_steps - (num_steps - first) % length
    return [
        {name: x[i:j].reshape(max((j - i) // length, 1), -1) for name, x in levels.items()}
        for i, j in pairwise(sorted({0, first, last, num_steps}))
    ]


def _scan(
    step: Any, carry: Any, xs: Any, length: int, unroll: int, remat: bool = False
) -> tuple[Any, Any]:
    """`jax.lax.scan`, but straight code where one iteration does it all.

    With `remat` the backward pass computes each step again, from the carry before it.
    """
    unroll = max(unroll, 1)
    if remat:
        # In a loop XLA cannot undo rematerialisation; straight code must be protected.
        step = jax.checkpoint(step, prevent_cse=unroll >= length)
    if unroll < length:
        return jax.lax.scan(step, carry, xs, length, unroll=unroll)
    ys = []
    for t in range(length):
        carry, y = step(carry, jax.tree.map(itemgetter(t), xs))
        ys.append(y)
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)


def _cut(u: State, where: Any) -> State:
    """Stops the gradient where `where` is true; selects only if that is not static."""
    if isinstance(where, bool):
        return jax.lax.stop_gradient(u) if where else u
    return [jnp.where(where, jax.lax.stop_gradient(x), x) for x in u]


def _cast(leaves: list[Array], like: list[Any]) -> list[Array]:
    pairs = zip(leaves, like, strict=True)
    return [x if x.dtype == y.dtype else x.astype(y.dtype) for x, y in pairs]


def _at_least_float32(x: Array) -> Array:
    is_wide = jnp.issubdtype(x.dtype, jnp.inexact) and x.dtype.itemsize >= 4
    return x if is_wide else x.astype(jnp.float32)


def _hoist(f: Any, *args: Any) -> tuple[Any, list[Array], Any]:
    """Returns `g`, `closed_over` with `g(closed_over, *args) = f(*args)`, and its shape.

    So what the user's functions close over, first of all the parameters, becomes data: an
    array of half precision in float32, in which its gradient is then accumulated over the
    time levels. `jax.closure_convert` would miss integers and keys.
    """
    jaxpr, shape = jax.make_jaxpr(f, return_shape=True)(*args)
    if any(type(getattr(x, "aval", None)).__name__ == "AbstractRef" for x in jaxpr.consts):
        raise TypeError("A jax.Ref cannot be closed over. Read it before: value = ref[...].")
    constants = [jnp.asarray(x) for x in jaxpr.consts]
    is_float: Any = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    closed_over = [_at_least_float32(x) if is_float(x) else x for x in constants]

    def run(closed_over: list[Array], *leaves: Array) -> Any:
        return eval_jaxpr(jaxpr.jaxpr, _cast(closed_over, constants), *leaves)

    # Traced once more, since the constants may be tracers, and `g` must not hold on to them.
    program = jax.make_jaxpr(run)(closed_over, *jax.tree.leaves(args))

    def g(*args: Any) -> Any:
        leaves = eval_jaxpr(program.jaxpr, program.consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), leaves)

    return g, closed_over, shape


#
# The streaming gradient of a truncated rollout
#
# Static cuts divide the rollout into segments of `k` steps, and no gradient crosses from one
# into another. Differentiating a loop over all of them would nevertheless store every
# activation on the way: it runs forward to the end before it runs backward.
#
# But the loss is a scalar, the sum of the losses of the segments, and so its gradient is the
# sum of their gradients, which can be accumulated while the rollout advances: take value and
# gradient of one segment, add them up, cut the state, go on. This is the arithmetic of
# ordinary backpropagation in another order, and nothing is kept but the running sum and one
# segment's activations.
#
# A `jax.custom_jvp` rule makes that sum the derivative of the rollout. It is linear in the
# tangents, so JAX transposes it for reverse mode; it is made of operations that JAX can
# differentiate, so derivatives of any order are exact; and where only the value is asked for
# it does not run. Reverse mode over it, though, stores every step of the loop below; so does
# a gradient with respect to what does not vary over a `jax.shard_map` with `check_vma=True`.
#
# `segment(closed_over, u, levels)` is the `_rollout` of one segment. `variables` is what the
# gradient is taken with respect to, `(closed_over, u)` with `None` for each constant.
#


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _streamed_rollout(
    segment: Any, k: int, unroll: int, closed_over: list[Array], u_0: State, levels: Levels
) -> LossAndAux:
    """`segment` over all time levels, with the main chain cut after every `k`-th step."""
    constants = jax.tree.map(lambda _: None, (closed_over, u_0))
    return _value_and_grad(segment, k, unroll, constants, closed_over, u_0, levels)[0]


def _streamed_rollout_jvp(
    segment: Any, k: int, unroll: int, primals: Any, tangents: Any
) -> tuple[LossAndAux, Any]:
    """The loss changes by `<gradient, tangents>`; what else is returned has no gradient."""
    variables, dots = _perturbed(primals, tangents)
    axes = _varying_axes(primals)
    if any(_varying_axes(x) != axes for x in jax.tree.leaves(variables)):
        # The gradient with respect to what does not vary over an axis of a `shard_map`
        # is a sum over that axis; a tangent of the local loss cannot be made from it.
        return _jvp(partial(_streamed_rollout.fun, segment, k, unroll), primals, tangents)
    (loss, aux), grads = _value_and_grad(segment, k, unroll, variables[:2], *primals)
    # The loss is linear in the weights; what it multiplies them by is the losses.
    weights_grad = jax.tree.map(lambda _: aux[0], variables[2]["weights"])
    dots = (*dots[:2], dots[2]["weights"])
    pairs = zip(jax.tree.leaves((*grads, weights_grad)), jax.tree.leaves(dots), strict=True)
    # A gradient of a complex input is the conjugate of the mathematician's, so this is not
    # `vdot`; and `dot` would lose precision on an accelerator.
    products = [jnp.sum(grad * dot.astype(grad.dtype)).real for grad, dot in pairs]
    loss_dot = reduce(jnp.add, [product.astype(loss.dtype) for product in products])
    # Zeros, or for integers what JAX has in their place.
    _, aux_dot = jax.jvp(lambda _: aux, (0.0,), (0.0,))
    return (loss, aux), (loss_dot, aux_dot)


_streamed_rollout.defjvp(_streamed_rollout_jvp, symbolic_zeros=True)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _value_and_grad(
    segment: Any, k: int, unroll: int, variables: Any, closed_over: Any, u: Any, levels: Levels
) -> tuple[LossAndAux, Any]:
    """`_streamed_rollout`, and its gradient with respect to `variables`.

    The initial condition gets its gradient from the first segment, which shares the loop of
    the others if that is not wanted. The last segment may be shorter.
    """
    closed_variables, u_grads = variables
    first = k if jax.tree.leaves(u_grads) else 0
    vary = partial(_vary, _varying_axes((closed_over, u)))
    sums = jax.tree.map(jnp.zeros_like, (levels["weights"][0], closed_variables))
    carry = jax.tree.map(vary, (u, sums))
    losses = []
    for i, chunk in enumerate(_chunks(levels, k, first)):
        is_first = i == 0 < first
        with_respect_to = variables if is_first else (closed_variables, [None] * len(u))
        advance = partial(_advance, segment, with_respect_to, closed_over)
        carry, ys = _scan(advance, carry, chunk, len(chunk["weights"]), unroll)
        losses.append(ys[0].reshape(-1))
        if is_first:
            u_grads = jax.tree.map(itemgetter(0), ys[1])
    u, (loss, grads) = carry
    return (loss, (jnp.concatenate(losses), u)), (grads, u_grads)


def _value_and_grad_jvp(
    segment: Any, k: int, unroll: int, primals: Any, tangents: Any
) -> tuple[Any, Any]:
    """What JAX would do by itself; the rule is there to keep it from doing more.

    Linearising `_streamed_rollout`, it evaluates the rule partially, and would trace the loop a
    second time, to find all of it known. A function with a rule of its own it leaves closed.
    """
    return _jvp(partial(_value_and_grad.fun, segment, k, unroll), primals, tangents)


_value_and_grad.defjvp(_value_and_grad_jvp, symbolic_zeros=True)


def _advance(
    segment: Any, variables: Any, closed_over: Any, carry: Any, levels: Levels
) -> tuple[Any, Any]:
    """Moves on by one segment: the state, the sum of the losses, that of the gradients."""
    u, sums = carry
    # Where this loop stands in a loop of the user's, JAX moves out of that one what does not
    # depend on the state, and would store it for each time level: a cotangent, which begins
    # with the weights and is as large as the residuum. So make the weights depend on the
    # state, by an empty sum of it that XLA removes (a barrier has no `vmap` in early JAX).
    empty = [jnp.any(x != x)[None][:0] for x in u if jnp.issubdtype(x.dtype, jnp.inexact)]
    add = lambda level: reduce(jnp.add, [x.sum().astype(level.dtype) for x in empty], level)
    levels = jax.tree.map(add, levels)
    f = lambda variables: segment(*_combine(variables, (closed_over, u)), levels)
    (loss, (losses, u_next)), (grads, u_grads) = jax.value_and_grad(f, has_aux=True)(variables)
    # Cut the state here, too: derivatives of higher order differentiate this code.
    return (_cut(u_next, True), jax.tree.map(jnp.add, sums, (loss, grads))), (losses, u_grads)


def _jvp(f: Any, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """`jax.jvp` where tangents may be symbolic zeros."""
    variables, dots = _perturbed(primals, tangents)
    return jax.jvp(lambda x: f(*_combine(x, primals)), (variables,), (dots,))


def _perturbed(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """The primals that are perturbed, and their tangents; `None` for all others."""
    dots = jax.tree.map(lambda x: None if isinstance(x, SymbolicZero) else x, tangents)
    return jax.tree.map(lambda x, dot: None if dot is None else x, primals, dots), dots


def _combine(variables: Any, constants: Any) -> Any:
    """`variables`, with the arrays of `constants` where they are `None`."""
    pick = lambda x, constant: constant if x is None else x
    return jax.tree.map(pick, variables, constants, is_leaf=lambda x: x is None)


def _varying_axes(tree: Any) -> frozenset[Any]:
    """The axes of a `jax.shard_map` over which any leaf varies; elsewhere none."""
    avals: list[Any] = [getattr(x, "aval", None) for x in jax.tree.leaves(tree)]
    types = [getattr(aval, "manual_axis_type", aval) for aval in avals]  # from JAX 0.10 on
    return frozenset().union(*[getattr(t, "varying", getattr(t, "vma", ())) for t in types])


def _vary(axes: frozenset[Any], x: Array) -> Any:
    """Makes `x` vary over `axes`. A loop may not change what its carry varies over."""
    missing = tuple(axes - _varying_axes(x))
    if not missing:
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, missing, to="varying")
    return getattr(jax.lax, "pvary")(x, missing)  # noqa: B009  # before JAX 0.8


#
# Validation
#
# All that can be said at trace time. A reader who trusts the inputs can stop here.
#


def _require(condition: bool, error: Any, expected: str, got: Any) -> None:
    if not condition:
        message = f"{expected}, got {_describe(got)}."
        if isinstance(got, Tracer) and "static" in expected:
            message += " It is traced: close over it, or make it static in jax.jit."
        raise error(message)


def _check_int(name: str, value: Any, bools: dict[bool, int] | None = None) -> int:
    """Returns `value`, or what it stands for if it is one of `bools`."""
    if bools and isinstance(value, bool):
        return bools[value]
    is_int = isinstance(value, Integral) and not isinstance(value, bool)
    kind = "a static bool or a static int" if bools else "a static int"
    _require(is_int, TypeError, f"{name} must be {kind}", value)
    in_range = 1 <= int(value) < 2**31
    _require(in_range, ValueError, f"{name} must be at least 1 and below 2**31", value)
    return int(value)


def _check_cuts(cuts: Any, num_steps: int) -> tuple[Any, Levels, int]:
    """Returns the cuts of all levels alike, the masks, and the steps of a static segment."""
    _require(isinstance(cuts, Cuts), TypeError, "cuts must be a Cuts(bptt, prev, next)", cuts)
    constants, segment_length, masks = cuts._replace(bptt=False), num_steps, dict[str, Array]()
    for field, cut in cuts._asdict().items():
        name, is_chain = f"cuts.{field}", field == "bptt"
        if is_chain and cut is True:
            segment_length = 1
        elif is_chain and isinstance(cut, Integral) and not isinstance(cut, bool):
            segment_length = min(_check_int(name, cut), num_steps)
        elif not isinstance(cut, bool):
            kind = f"{'a static bool, a static int' if is_chain else 'a bool'} or a bool array"
            mask = _check_levels(name, cut, kind, [jnp.bool], num_steps, or_scalar=not is_chain)
            constants = constants._replace(**{field: mask})
            if mask.shape:
                masks[field] = mask
    return constants, masks, segment_length


def _check_levels(
    name: str, x: Any, kind: str, kinds: list[Any], num_steps: int, or_scalar: bool = False
) -> Any:
    array: Any = None
    if isinstance(x, (Sequence, Number)) or _kind(x) is not None:
        with suppress(TypeError, ValueError, OverflowError):
            array = jnp.asarray(x)
    shape = f"{'[] or ' * or_scalar}[num_rollout_steps] = [{num_steps}]"
    expected = f"{name} must be {kind} of shape {shape}"
    _require(_kind(array) in kinds, TypeError, expected, x)
    fits = array.shape == (num_steps,) or (or_scalar and array.shape == ())
    _require(fits, ValueError, expected, array)
    return array


def _check_data(data: Any) -> tuple[State, Any, str]:
    """Returns snapshot 0, the structure of a state, and how the data was read."""
    leaves = _leaves("data", data)
    _require(len(leaves) > 0, ValueError, "data must hold at least one array", data)
    for name, x in leaves:
        _require(_kind(x) is not None, TypeError, f"{name} must be an array", x)
    hint = ""
    if type(data) in (list, tuple) and len({x.shape for _, x in leaves}) == 1 < len(leaves):
        hint = " (data is a list of fields; of samples make one array, by jnp.stack)"
    shape = leaves[0][1].shape[:2]
    for name, x in leaves:
        is_batched = len(x.shape) >= 2 and 0 not in x.shape[:2]
        expected = f"{name} must be of shape [batch, num_snapshots, ...], both at least 1"
        _require(is_batched, ValueError, expected + hint, x)
        expected = f"{name} must agree with the other leaves on [batch, num_snapshots]"
        _require(x.shape[:2] == shape, ValueError, f"{expected} = {list(shape)}", x)
    # Naming the dtype makes a weakly typed array strong, as the stepper's output is.
    arrays = [jnp.asarray(x, dtype=x.dtype) for x in (jnp.asarray(x) for _, x in leaves)]
    u_0 = [jax.lax.index_in_dim(x, 0, axis=1, keepdims=False) for x in arrays]
    sample = _describe_leaves([(name.removeprefix("data"), x) for name, x in leaves], skip=2)
    read = f"data: batch {shape[0]}, num_snapshots {shape[1]}, one sample {sample}{hint}."
    return u_0, jax.tree.structure(data), read


def _checked(how_data_was_read: str, name: str, function: Any, *names: str) -> Any:
    """One of the user's functions, with its result checked and notes on what it raises."""
    _require(callable(function), TypeError, f"{name} must be callable", function)

    def checked(*args: Any) -> Any:
        try:
            # A copy, since a State of Equinox is not there any more after its first update.
            result = function(*jax.tree.map(lambda x: x, args))
            _check_result(name, result, *args)
        except Exception as error:
            leaves = [leaf for pair in zip(names, args, strict=True) for leaf in _leaves(*pair)]
            called = f"{name}({_describe_leaves(leaves)})"
            error.add_note(f"Raised when {name} was called on one sample: {called}.")
            if "axis name" in str(error) or "TraceContextError" in type(error).__name__:
                hint = "for a batch's statistics, and for NNX modules, see 'Batch statistics'"
                error.add_note(f"It is called under jax.vmap: {hint} in the documentation.")
            error.add_note(how_data_was_read)
            raise
        return result

    return checked


def _check_result(name: str, result: Any, *args: Any) -> None:
    leaves = _leaves("", result)
    for path, x in leaves:
        fits = isinstance(x, (bool, int, float, complex)) or _kind(x) is not None
        where = f" at {path}" if path else ""
        _require(fits, TypeError, f"{name} must return arrays{where}", x)
    if name == "stepper":
        _check_next(result, *args)
    elif name == "residuum_fn":
        _require(len(leaves) > 0, TypeError, f"{name} must return at least one array", result)
    else:
        is_scalar = [(path, jnp.shape(x)) for path, x in leaves] == [("", ())]
        if not is_scalar or _kind(jnp.asarray(result)) not in (jnp.floating, jnp.integer):
            got = _describe_leaves(leaves)
            raise TypeError(f"{name} must return a real scalar, got {got}.")


def _check_next(u_next: Any, u_prev: Any) -> None:
    structures: list[Any] = [jax.tree.structure(u) for u in (u_prev, u_next)]
    if structures[0] != structures[1]:
        what = "the next state only, and that" if type(u_next) is tuple else "a state"
        expected = f"stepper must return {what} of the structure of its input"
        raise TypeError(f"{expected}, {structures[0]}, got {structures[1]}.")
    u_next = map(jnp.asarray, jax.tree.leaves(u_next))
    for (path, prev), next in zip(_leaves("", u_prev), u_next, strict=True):
        is_wider = next.dtype.itemsize > prev.dtype.itemsize and _kind(next) == _kind(prev)
        if prev.shape != next.shape or not (prev.dtype == next.dtype or is_wider):
            raise TypeError(
                "stepper must return a state of the shapes and dtypes of its input: "
                f"u_prev{path} is {_describe(prev)}, u_next{path} is {_describe(next)}."
            )


def _leaves(name: str, tree: Any) -> list[tuple[str, Any]]:
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return [(name + jax.tree_util.keystr(path), leaf) for path, leaf in pairs]


def _kind(x: Any) -> Any:
    """What kind of array `x` is, `None` if it is none."""
    kinds = (jnp.floating, jnp.complexfloating, jnp.integer, jnp.bool, jax.dtypes.prng_key)
    is_ref = type(getattr(x, "aval", None)).__name__ == "AbstractRef"
    if is_ref or isinstance(x, jax.ShapeDtypeStruct) or not hasattr(x, "shape"):
        return None
    with suppress(AttributeError, TypeError):  # the dtype of another library
        return next((kind for kind in kinds if jnp.issubdtype(x.dtype, kind)), None)
    return None


def _describe(x: Any, skip: int = 0) -> str:
    if _kind(x) is not None:
        return f"{x.dtype}{list(x.shape[skip:])}"
    return f"{reprlib.repr(x)} of type {type(x).__name__}"


def _describe_leaves(leaves: list[tuple[str, Any]], skip: int = 0) -> str:
    described = [f"{name} {_describe(x, skip)}".strip() for name, x in leaves]
    return ", ".join(described[:8] + ["..."] * (len(described) > 8))
