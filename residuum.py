"""Train neural emulators of time-dependent problems on the residual of their rollout.

An autoregressive network `stepper` advances a state in time. If the problem is discretised
as `residuum_fn(u_next, u_prev) = 0`, by an implicit time step for example, the network can be
trained from initial conditions alone: roll it out, and measure at every time level how far
two consecutive states are from satisfying the equation. No reference trajectory is needed, and
no solver runs in the loop. ("Residuum" is what trainax, the reference, calls the residual.)

This one file needs jax and jaxtyping. Install the package, or copy the file.
"""

import reprlib
from collections.abc import Callable, Hashable, Sequence
from functools import partial, reduce
from itertools import pairwise
from numbers import Number
from operator import is_, itemgetter
from typing import Any, get_args, Literal, NamedTuple, overload, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr, Tracer
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Real, Shaped


__all__ = ["Cuts", "Rollout", "mse", "residuum_loss"]
__version__ = "0.2.0"


#
# Public API
#

# With `inputs`, these have one more argument.
Stepper = Callable[[PyTree], PyTree] | Callable[[PyTree, PyTree], PyTree]
ResiduumFn = Callable[[PyTree, PyTree], PyTree] | Callable[[PyTree, PyTree, PyTree], PyTree]


class Cuts(NamedTuple):
    """Where gradients stop in a rollout. Values never change.

    Python bools and ints are static: JAX drops the dead backward pass. Arrays and lists are
    data: a change does not recompile. A cut replaces the cotangent instead of multiplying it by
    0, so no NaN or infinity downstream of it can reach the gradient of an upstream state.

    **Fields:**

    - `bptt`: cuts the main chain, i.e., truncates backpropagation through time (TBPTT). An
        int `k >= 1` cuts after every `k`-th step: the state made by step `t`, counted from 0,
        is cut where `(t + 1) % k == 0`, with all its leaves. `False` cuts nothing, `True` after
        every step, a bool array or list `[num_rollout_steps]` after step `t` where it is true.
    - `prev`, `next`: cut that argument of `residuum_fn`. A bool, or a bool array or list, `[]`
        or `[num_rollout_steps]`.
    """

    bptt: bool | int | Bool[ArrayLike, " num_rollout_steps"] | Sequence[bool] = False
    prev: bool | Bool[ArrayLike, "*num_rollout_steps"] | Sequence[bool] = False
    next: bool | Bool[ArrayLike, "*num_rollout_steps"] | Sequence[bool] = False


class Rollout(NamedTuple):
    """The auxiliary output of a rollout, see `has_aux`. No gradient flows through it.

    **Fields:**

    - `time_level_losses`: the unweighted batch-mean loss of every time level.
    - `final_state`: the state after the last step, leaves `[batch, ...]`. With a snapshot axis,
        `x[:, None]`, it is the `data` for the next piece of a trajectory.
    """

    time_level_losses: Float[Array, " num_rollout_steps"]
    final_state: PyTree[Shaped[Array, "batch ..."]]


def mse(residuum: PyTree[Shaped[ArrayLike, "..."]]) -> Float[Array, ""]:
    """Mean of `|r|²` over all entries of all leaves: a real scalar, in float32 or wider.

    **Arguments:**

    - `residuum`: PyTree of real or complex arrays of any shape, with at least one entry.
    """
    leaves = _check_tree("residuum", residuum, "must be an array", lambda _: True, Number)
    # Unlike abs(r)**2, this is differentiable where r is 0.
    sums = [jnp.sum((r * r.conj()).real) for r in map(_at_least_float32, leaves)]
    widest = max((s.dtype for s in sums), key=lambda dtype: dtype.itemsize)
    return reduce(jnp.add, [s.astype(widest) for s in sums]) / sum(r.size for r in leaves)


class Options(TypedDict, total=False):  # for type checkers
    num_rollout_steps: int
    cuts: Cuts
    weights: Real[ArrayLike, " num_rollout_steps"] | Sequence[ArrayLike] | None
    inputs: PyTree[Shaped[ArrayLike, "batch num_rollout_steps ..."]] | None
    time_level_loss: Callable[[PyTree], Real[ArrayLike, ""]]
    axis_name: Hashable
    checkpoint: bool | int
    unroll: int | bool


@overload
def residuum_loss(
    stepper: Stepper,
    data: PyTree[Shaped[ArrayLike, "batch num_snapshots ..."]],
    residuum_fn: ResiduumFn,
    *,
    has_aux: Literal[False] = ...,
    **options: Unpack[Options],
) -> Float[Array, ""]: ...
@overload
def residuum_loss(
    stepper: Stepper,
    data: PyTree[Shaped[ArrayLike, "batch num_snapshots ..."]],
    residuum_fn: ResiduumFn,
    *,
    has_aux: Literal[True],
    **options: Unpack[Options],
) -> tuple[Float[Array, ""], Rollout]: ...
def residuum_loss(
    stepper: Stepper,
    data: PyTree[Shaped[ArrayLike, "batch num_snapshots ..."]],
    residuum_fn: ResiduumFn,
    *,
    num_rollout_steps: int = 1,
    cuts: Cuts = Cuts(),
    weights: Real[ArrayLike, "{num_rollout_steps}"] | Sequence[ArrayLike] | None = None,
    inputs: PyTree[Shaped[ArrayLike, "batch {num_rollout_steps} ..."]] | None = None,
    time_level_loss: Callable[[PyTree], Real[ArrayLike, ""]] = mse,
    axis_name: Hashable = None,
    checkpoint: bool | int = False,
    unroll: int | bool = 1,
    has_aux: bool = False,
) -> Float[Array, ""] | tuple[Float[Array, ""], Rollout]:
    """Loss of an autoregressive rollout, measured by the residual between its states.

        u⁰ = data[:, 0],   uᵗ⁺¹ = stepper(uᵗ),   t = 0, …, num_rollout_steps - 1

        L = Σₜ weights[t] · mean_batch time_level_loss(residuum_fn(uᵗ⁺¹, uᵗ))

    The functions are called on one sample, without a batch axis, and must be pure. Gradients
    flow to whatever they close over, to `data`, `weights` and `inputs`. The reference is the
    configuration `Residuum` of trainax (https://github.com/Ceyron/trainax), whose taxonomy is
    that of Koehler et al., "APEBench" (https://arxiv.org/abs/2411.00180).

    **Arguments:**

    - `stepper`: `u_prev -> u_next`, the emulator. A state is any PyTree of arrays; `u_next`
        has the structure, shapes and dtypes of `u_prev`. A leaf that is returned as it was
        received (a mask, a coefficient) is stored once, if `bptt` is static.
    - `data`: PyTree of arrays `[batch, num_snapshots, ...]`. Only snapshot 0, the initial
        condition, is read. It is promoted if `stepper` returns a wider dtype of its kind.
    - `residuum_fn`: `(u_next, u_prev) -> residuum`, any PyTree of real or complex arrays.
        Note the order: next first.
    - `num_rollout_steps`: static number of autoregressive steps `T`, at least 1.
    - `cuts`: where gradients stop, see `Cuts`. With a static `bptt` of `k` steps, a gradient
        takes the memory of `k` steps, however long the rollout; so does forward over reverse,
        not reverse over reverse. In `jax.shard_map(check_vma=True)`, this requires parameters
        that vary over the mesh.
    - `weights`: `[num_rollout_steps]`, the weight of every time level. `None` means all ones.
        A weight of 0 does not remove an infinite loss, since 0 · ∞ is NaN.
    - `inputs`: PyTree of arrays `[batch, num_rollout_steps, ...]` of any dtype: what a sample
        is given at each step besides the state, such as a forcing, boundary values or a PRNG
        key. The functions are then called as `stepper(u_prev, inputs_t)` and
        `residuum_fn(u_next, u_prev, inputs_t)`, with the slice `[b, t]` for the step from `uᵗ`
        to `uᵗ⁺¹`. One more copy of `inputs` is stored.
    - `time_level_loss`: `residuum -> real scalar`.
    - `axis_name`: a name for the batch axis inside the functions, as in `jax.vmap`:
        `jax.lax.pmean(x, axis_name)` is a mean over the batch, which batch norms need.
    - `checkpoint`: rematerialise each time step in the backward pass. `True` stores a state
        per step instead of its activations, at the cost of about one more forward pass. An int
        `k` stores every `k`-th state, plus the `k` states of the block being differentiated:
        `T / k + k` in all, fewest for `k` near `√T`, for about two such passes. With a static
        `bptt`, this holds within a segment; for `bptt=1`, nothing is left to save.
    - `unroll`: time steps per loop iteration, as in `jax.lax.scan`; `True` for no loop.
        Compile time grows with it. One step has no loop. On a CPU, convolutions are slower in a
        loop (jax-ml/jax#12868): unroll, or apply `examples/canonical_convolutions.py`.
    - `has_aux`: also return a `Rollout`.

    **Returns:**

    The loss, a scalar in float32 or wider, or the pair `(loss, Rollout)`. Half precision is
    summed in float32, gradients of parameters included, which takes a copy of the parameters.

    **Raises:**

    `TypeError` or `ValueError` at trace time, naming the argument. What your functions raise
    passes through, with notes: which function it was, its arguments, and how `data` was read.
    """
    _check(type(_scalar(has_aux)) is bool, TypeError, "has_aux must be a static bool", has_aux)
    num_steps = _check_int("num_rollout_steps", num_rollout_steps)
    unrolled_steps = _check_int("unroll", unroll, {True: num_steps, False: 1})
    stored_every = _check_int("checkpoint", checkpoint, {True: 1, False: 0})
    all_cuts, masks, k = _check_cuts(cuts, num_steps)
    given_weights = jnp.ones(num_steps, jnp.float32) if weights is None else weights
    level_weights = _check_levels(
        "weights must be a real array", given_weights, REAL, num_steps
    )
    snapshot, to_state, how_data_was_read = _check_data(data, num_steps)
    level_inputs, to_arguments = _check_inputs(inputs, len(snapshot[0]), num_steps)
    try:
        hash(axis_name)
    except TypeError:
        _check(False, TypeError, "axis_name must be hashable", axis_name)
    over_batch = partial(jax.vmap, axis_name=axis_name)
    checked = partial(_checked, how_data_was_read, axis_name)
    next_state = checked("stepper", stepper, _check_next, "u_prev")
    residual = checked("residuum_fn", residuum_fn, _check_residual, "u_next", "u_prev")
    residual_loss = checked("time_level_loss", time_level_loss, _check_loss, "residuum")

    # Here a state is a list of leaves. Only the user's functions see the PyTree.
    def advance(u_prev: State, inputs_t: list[Array]) -> Any:
        return next_state(to_state(u_prev), *to_arguments(inputs_t))

    def time_step(u_prev: State, masks_t: Masks, inputs_t: list[Array]) -> tuple[State, Array]:
        bptt, prev, next = all_cuts._replace(**masks_t)
        u_next = advance(u_prev, inputs_t)
        states = to_state(_cut(u_next, next)), to_state(_cut(u_prev, prev))
        return _cut(u_next, bptt), residual_loss(residual(*states, *to_arguments(inputs_t)))

    def batch_step(u_prev: State, masks_t: Masks, inputs_t: list[Array]) -> tuple[State, Array]:
        u_next, losses = over_batch(time_step, (0, None, 0))(u_prev, masks_t, inputs_t)
        return [*map(_cast, u_next, u_prev)], jnp.mean(_at_least_float32(losses))

    first_masks, first_inputs = jax.tree.map(itemgetter(0), (masks, level_inputs))
    cut = partial(_cut, where=first_masks.get("bptt", False))  # which may vary over a mesh
    u_0 = _settle(lambda u: cut(over_batch(advance)(u, first_inputs)), snapshot)
    step, closed_over, is_constant, loss_dtype = _hoist(
        batch_step, u_0, first_masks, first_inputs
    )
    # `checkpoint` would save nothing in a segment of one step: its backward pass is next.
    loop = Loop(step, is_constant, k, 0 if k == 1 < num_steps else stored_every, unrolled_steps)
    levels = Levels(level_weights.astype(loss_dtype), masks, level_inputs)
    rollout = _streamed_rollout if k < num_steps else _rollout
    loss, (losses, u) = rollout(loop, closed_over, u_0, levels)
    return (loss, jax.lax.stop_gradient(Rollout(losses, to_state(u)))) if has_aux else loss


#
# The rollout: a loop over time steps
#

State = list[Array]  # the leaves of a state, `[batch, ...]`
Masks = dict[str, Array]  # the cuts that are arrays, by field


class Levels(NamedTuple):
    """Per-level arrays, `[num_steps, ...]`; for a single level, without that axis."""

    weights: Array  # in the dtype of the loss
    masks: Masks
    inputs: list[Array]  # `[num_steps, batch, ...]`


# (closed_over, u_prev, masks_t, inputs_t) -> (u_next, loss)
Step = Callable[[list[Array], State, Masks, list[Array]], tuple[State, Array]]
LossAndAux = tuple[Array, tuple[Array, State]]


class Loop(NamedTuple):
    """All that is static about a rollout."""

    step: Step
    is_constant: list[bool]  # for each leaf of a state: whether the step returns it as it is
    segment_length: int  # number of steps after which the main chain is cut
    checkpoint: int  # number of steps for which one state is stored; 0: no rematerialisation
    unroll: int


def _rollout(loop: Loop, closed_over: list[Array], u: State, levels: Levels) -> LossAndAux:
    """The weighted sum of the losses; the losses `[num_steps]`, and the final state.

    A leaf that the step returns unchanged is not carried, or each step would store it.
    With `checkpoint > 1`, the loop is one over blocks of `checkpoint` steps. Its backward pass
    reads the state before each block, recomputes the states in it, and from each of them its
    activations. It stores `num_steps / checkpoint + checkpoint` states.
    """
    constants, carry = _partition(u, loop.is_constant)

    def step(carry: PyTree, level: Levels) -> tuple[PyTree, Array]:
        u = _combine(carry, constants)
        u_next, loss = loop.step(closed_over, u, level.masks, level.inputs)
        return _partition(u_next, loop.is_constant)[1], loss

    block_length = loop.checkpoint if loop.checkpoint > 1 else len(levels.weights)
    chunks, ys = _chunks(levels, block_length), []
    for chunk in chunks:
        num_blocks, length = chunk.weights.shape
        block = partial(_scan, step, length=length, unroll=loop.unroll, remat=loop.checkpoint)
        # A single last block needs none: its backward pass is next.
        remat = num_blocks > 1 or chunk is not chunks[-1]
        carry, y = _scan(block, carry, chunk, num_blocks, loop.unroll // block_length, remat)
        ys.append(y)
    losses = _merge(ys)
    return jnp.sum(levels.weights * losses), (losses, _combine(carry, constants))


def _chunks(levels: Levels, length: int, first: int = 0) -> list[Any]:
    """Chunks of blocks `[num_blocks, length, ...]`: `first` levels, the bulk, a remainder."""
    num_steps = len(levels.weights)
    last = num_steps - num_steps % length  # `first` is 0 or `length`

    def chunk(i: int, j: int) -> Any:
        shape = max((j - i) // length, 1), min(j - i, length)
        return jax.tree.map(lambda x: x[i:j].reshape(*shape, *x.shape[1:]), levels)

    return [chunk(i, j) for i, j in pairwise(sorted({0, first, last, num_steps}))]


def _merge(ys: list[PyTree]) -> PyTree:
    """The inverse of `_chunks`, for what a loop returns for each level."""
    return jax.tree.map(lambda *y: jnp.concatenate([jax.lax.collapse(x, 0, 2) for x in y]), *ys)


def _scan(
    step: Any, carry: PyTree, xs: PyTree, length: int, unroll: int, remat: int
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan`, without a loop if one iteration does it all; `remat` recomputes steps."""
    unroll = max(unroll, 1)
    if remat:
        # XLA cannot undo rematerialisation in a loop; without a loop, CSE would.
        step = jax.checkpoint(step, prevent_cse=unroll >= length)
    if unroll < length:
        return jax.lax.scan(step, carry, xs, length, unroll=unroll)
    ys = []
    for t in range(length):
        carry, y = step(carry, jax.tree.map(itemgetter(t), xs))
        ys.append(y)
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)


def _cut(u: State, where: bool | Array) -> State:
    """Stops the gradient where `where` is true, by a select if it is an array."""
    if isinstance(where, bool):
        return jax.lax.stop_gradient(u) if where else u
    return [jnp.where(where, jax.lax.stop_gradient(x), x) for x in u]


def _at_least_float32(x: Array) -> Array:
    return x if _is_inexact(x) and x.dtype.itemsize >= 4 else x.astype(jnp.float32)


def _is_inexact(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _partition(tree: PyTree, where: PyTree[bool]) -> tuple[PyTree, PyTree]:
    """The leaves where `where` is true, and the others; each with `None` for the rest."""
    kept = jax.tree.map(lambda x, w: x if w else None, tree, where)
    rest = jax.tree.map(lambda x, w: None if w else x, tree, where)
    return kept, rest


def _combine(tree: PyTree, others: PyTree) -> PyTree:
    """The inverse of `_partition`."""
    pick = lambda x, other: other if x is None else x
    return jax.tree.map(pick, tree, others, is_leaf=lambda x: x is None)


def _settle(advance: Callable[[State], State], u: State) -> State:
    """`u`, cast until `advance` preserves its types, as the carry of a loop must be."""
    settled = [*map(_cast, u, jax.make_jaxpr(advance)(u).out_avals)]
    return u if all(map(is_, settled, u)) else _settle(advance, settled)


def _cast(x: Array, like: Any) -> Array:
    """`x` in the dtype of `like`, and varying over its `jax.shard_map` axes."""
    axes = tuple(_varying_axes(like) - _varying_axes(x))
    if axes:  # before JAX 0.8, `pcast` was `pvary`
        pcast = getattr(jax.lax, "pcast", lambda x, axes, to: vars(jax.lax)["pvary"](x, axes))
        x = pcast(x, axes, to="varying")
    return x if x.dtype == like.dtype else x.astype(like.dtype)


def _varying_axes(tree: PyTree) -> frozenset[Hashable]:
    """The axes of a `jax.shard_map` over which any leaf varies; elsewhere none."""
    avals = [getattr(x, "aval", x) for x in jax.tree.leaves(tree)]
    types = [getattr(aval, "manual_axis_type", aval) for aval in avals]  # from JAX 0.10 on
    return frozenset().union(*[getattr(t, "varying", getattr(t, "vma", ())) for t in types])


def _hoist(f: Any, u: State, *level: PyTree) -> tuple[Step, list[Array], list[bool], Any]:
    """`f` as a `step` whose first argument is what `f` closes over; and those arrays.

    The parameters become data, in float32 if they are of half precision, so that their gradient
    is summed in it. `jax.closure_convert` would miss integers and keys. Also returns which
    leaves of the state pass through unchanged, and the dtype of the loss.
    """
    closed: Any = jax.make_jaxpr(f)(u, *level)
    if any(type(getattr(x, "aval", None)).__name__ == "AbstractRef" for x in closed.consts):
        raise TypeError("A jax.Ref cannot be closed over. Read it before: value = ref[...].")
    constants = map(jnp.asarray, closed.consts)
    closed_over = [_at_least_float32(x) if _is_inexact(x) else x for x in constants]
    types = [variable.aval for variable in closed.jaxpr.constvars]
    pairs = zip(closed.jaxpr.outvars[:-1], closed.jaxpr.invars, strict=False)
    # From JAX 0.12 on, a jaxpr holds its constants. They may be tracers, which must not leak.
    jaxpr = closed.jaxpr.replace(consts=[]) if hasattr(closed.jaxpr, "consts") else closed.jaxpr

    def step(closed_over: list[Array], *u_and_level: PyTree) -> tuple[State, Array]:
        leaves = jax.tree.leaves(u_and_level)
        *u_next, loss = eval_jaxpr(jaxpr, [*map(_cast, closed_over, types)], *leaves)
        return u_next, loss

    return step, closed_over, [out is x for out, x in pairs], closed.out_avals[-1].dtype


#
# The streaming gradient of a truncated rollout
#
# A static `bptt=k` divides the rollout into segments of `k` steps; no gradient crosses from one
# into another. Differentiating a loop over all segments would nevertheless store all their
# activations, because the loop runs forward to its end before it runs backward.
#
# But the loss and its gradient are sums over the segments, and can be accumulated while the
# rollout advances: take value and gradient of one segment, add them to the sums, cut the state,
# go on. Only the sums and one segment's activations are stored. The gradient for the initial
# state is that of the first segment. The gradient for the arrays of a time level comes from the
# segment of that level, so the loop over segments stacks it.
#
# The rule is a `jax.custom_jvp`. If anything is differentiated, the forward pass computes the
# gradient as well, and the tangent of the loss is <gradient, tangents>: linear in the tangents,
# so JAX transposes it for reverse mode, and made of operations that JAX can differentiate, so
# derivatives of any order are exact. A `jax.custom_vjp` would be shorter, but has no forward
# mode. The price: reverse mode over the rule stores the state of each segment, as does the
# gradient for arrays that do not vary over an axis of a `jax.shard_map(check_vma=True)`.
#


def _streamed_rollout(loop: Loop, *arguments: Any) -> LossAndAux:
    """`_rollout`, one segment after the other, cut after each; by itself without gradients."""
    return _value_and_grad(loop, jax.tree.map(lambda _: False, arguments), *arguments)[0]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _value_and_grad(
    loop: Loop, wrt: PyTree[bool], closed_over: list[Array], u: State, levels: Levels
) -> tuple[LossAndAux, PyTree]:
    """The streamed rollout, and its gradient with respect to the arrays that `wrt` marks.

    If the gradient of the initial state is wanted, the first segment is outside the loop.
    """
    wrt_closed_over, wrt_u, wrt_levels = wrt
    levels = _depending_on((closed_over, u, levels), levels)
    variables, _ = _partition(closed_over, wrt_closed_over)
    carry = u, jax.tree.map(jnp.zeros_like, (levels.weights[0], variables))
    k, ys = loop.segment_length, []
    for chunk in _chunks(levels, k, first=k if any(wrt_u) else 0):
        advance = partial(_advance, loop, (wrt_closed_over, wrt_u, wrt_levels), closed_over)
        carry, y = _scan(advance, carry, chunk, len(chunk.weights), loop.unroll // k, True)
        ys.append(y)
        wrt_u = [False] * len(u)
    u, (loss, grads) = carry
    u_grads = jax.tree.map(itemgetter(0), ys[0][1])
    losses, level_grads = _merge([(losses, level_grads) for losses, _, level_grads in ys])
    return (loss, (losses, u)), (grads, u_grads, level_grads)


def _advance(
    loop: Loop, wrt: PyTree[bool], closed_over: list[Array], carry: PyTree, levels: Levels
) -> tuple[PyTree, PyTree]:
    """Advances the state and the sums of losses and gradients by one segment."""
    u, sums = carry
    variables, constants = _partition((closed_over, u, levels), wrt)
    f = jax.value_and_grad(lambda x: _rollout(loop, *_combine(x, constants)), has_aux=True)
    (loss, (losses, u_next)), (grads, u_grads, level_grads) = f(variables)
    sums = jax.tree.map(jnp.add, sums, (loss, grads))
    # Cut the state here too: higher-order derivatives differentiate this code.
    return (_cut(u_next, True), sums), (losses, u_grads, level_grads)


def _value_and_grad_jvp(loop: Loop, wrt: PyTree[bool], primals: Any, tangents: Any) -> Any:
    """The derivative of the value is <gradient, tangents>; that of a gradient is JAX's own.

    The gradient calls `_value_and_grad` itself: JAX, linearising the rule, would trace a plain
    loop a second time, only to find that no tangent enters it.
    """
    perturbed = jax.tree.map(lambda x: not isinstance(x, SymbolicZero), tangents)
    variables, constants = _partition(primals, perturbed)
    dots, _ = _partition(tangents, perturbed)
    # A tangent may be a Python number.
    dots = jax.tree.map(lambda x, dx: jnp.asarray(dx, x.dtype), variables, dots)
    unvarying = {*map(_varying_axes, jax.tree.leaves(variables))} - {_varying_axes(primals)}
    if any(jax.tree.leaves(wrt)) or unvarying:
        # The gradient for what does not vary over an axis of a `shard_map` is a sum over that
        # axis. A tangent of the local loss cannot be made from it.
        f = partial(_value_and_grad.fun, loop, wrt)
        return jax.jvp(lambda x: f(*_combine(x, constants)), (variables,), (dots,))
    (loss, aux), grads = _value_and_grad(loop, perturbed, *primals)
    # JAX's gradient of a complex variable is conjugated already, so this is not `jnp.vdot`; and
    # `jnp.dot` would lose precision on an accelerator.
    product = lambda x, dx: jnp.sum(_at_least_float32(x) * _at_least_float32(dx)).real
    products = jax.tree.leaves(jax.tree.map(product, grads, dots))
    loss_dot = sum([x.astype(loss.dtype) for x in products])
    no_grads = jax.tree.map(lambda _: None, grads)
    return ((loss, aux), no_grads), ((loss_dot, jax.tree.map(zero_from_primal, aux)), no_grads)


_value_and_grad.defjvp(_value_and_grad_jvp, symbolic_zeros=True)


def _depending_on(tree: PyTree, levels: Levels) -> Any:
    """`levels` minus a zero made from `tree`, an empty sum, which XLA drops.

    If the rollout is part of a loop, JAX moves out of that loop what does not depend on its
    carry, and stores it for each time level: the part of a cotangent that depends on the
    weights alone, for example. (`optimization_barrier` has no `vmap` in JAX 0.4.)
    """
    zero: Any = sum([jnp.any(x != x)[None][:0].sum() for x in jax.tree.leaves(tree)])
    weights, axes = levels.weights - zero.astype(levels.weights.dtype), _varying_axes(zero)
    tie = lambda x: (
        x - zero.astype(x.dtype) if _is_inexact(x) and axes == _varying_axes(x) else x
    )
    return levels._replace(weights=weights, inputs=[*map(tie, levels.inputs)])


#
# Validation and conversion of the arguments, at trace time. If you trust them, stop here.
#

REAL = (jnp.floating, jnp.integer, jnp.bool)
KINDS = (*REAL, jnp.complexfloating, jax.dtypes.prng_key)


def _check(ok: bool, error: Any, expected: str, x: Any, why: str = "", got: str = "") -> None:
    if not ok:
        if isinstance(x, Tracer) and "static" in expected:
            why = " It is traced: close over it, or make it static in jax.jit."
        raise error(f"{expected}, got {got or _describe(_scalar(x))}.{why}")


def _check_int(name: str, x: Any, bools: dict[bool, int] | None = None) -> Any:
    """Returns `x`, or what it stands for if it is one of `bools`."""
    value = _scalar(x)
    if bools and isinstance(value, bool):
        return bools[value]
    kind = "a static bool or a static int" if bools else "a static int"
    _check(type(value) is int, TypeError, f"{name} must be {kind}", value)
    _check(1 <= value < 2**31, ValueError, f"{name} must be at least 1 and below 2**31", value)
    return value


def _check_cuts(cuts: Any, num_steps: int) -> tuple[Any, Masks, int]:
    """Returns the cuts, of which the masks override some, the masks, and the segment length."""
    _check(isinstance(cuts, Cuts), TypeError, "cuts must be a Cuts(bptt, prev, next)", cuts)
    static, masks, k = Cuts(*map(_scalar, cuts)), dict[str, Array](), num_steps
    if isinstance(static.bptt, int):
        k = min(_check_int("cuts.bptt", static.bptt, {True: 1, False: num_steps}), num_steps)
        static = static._replace(bptt=False)
    for field, cut in static._asdict().items():
        if not isinstance(cut, bool):
            kind = "a bool or" if field != "bptt" else "a static bool, a static int or"
            expected = f"cuts.{field} must be {kind} a bool array"
            masks[field] = _check_levels(expected, cut, (jnp.bool,), num_steps, field != "bptt")
    return static, masks, k


def _check_levels(what: str, x: Any, kinds: Any, num_steps: int, scalar: bool = False) -> Array:
    what += f" of shape {'[] or ' * scalar}[num_rollout_steps] = [{num_steps}]"
    fits = lambda shape: shape == (num_steps,) or (scalar and shape == ())
    return jnp.broadcast_to(_array(what, x, fits, kinds, (Sequence, Number)), num_steps)


def _check_data(data: Any, num_steps: int) -> tuple[State, Any, str]:
    """Returns snapshot 0, the function from leaves to a state, and how the data was read."""
    shapes = {str(getattr(x, "shape", x)) for x in data} if type(data) in (list, tuple) else ()
    is_list = len(shapes) == 1 < len(data)
    hint = " (data is a list of fields; of samples make one array, by jnp.stack)" * is_list
    expected = f"must be an array of shape [batch, num_snapshots, ...], both at least 1{hint}"
    arrays = _check_tree("data", data, expected, lambda s: len(s) >= 2 and 0 not in s[:2])
    batches, snapshots = ({x.shape[axis] for x in arrays} for axis in (0, 1))
    is_series = len(snapshots) > 1 or num_steps in snapshots - {1}
    why = " Only snapshot 0 is read: what changes in time belongs in inputs." * is_series
    expected = "data must be arrays that agree on [batch, num_snapshots]"
    _check(len(batches) == len(snapshots) == 1, ValueError, expected, data, why)
    u_0 = [jax.lax.index_in_dim(x, 0, axis=1, keepdims=False) for x in arrays]
    (batch, length), sample = arrays[0].shape[:2], _describe(data, skip=2)
    read = f"data: batch {batch}, num_snapshots {length}, one sample {sample}{hint}."
    return u_0, partial(jax.tree.unflatten, jax.tree.structure(data)), read


def _check_inputs(inputs: Any, batch: int, num_steps: int) -> tuple[list[Array], Any]:
    """Returns the leaves, time first; and a function from those of a level to arguments."""
    if inputs is None:
        return [], lambda _: ()
    must = f"must be an array [batch, num_rollout_steps, ...] = [{batch}, {num_steps}, ...]"
    arrays = _check_tree("inputs", inputs, must, lambda s: s[:2] == (batch, num_steps))
    to_arguments = partial(jax.tree.unflatten, jax.tree.structure((inputs,)))
    return [jnp.swapaxes(x, 0, 1) for x in arrays], to_arguments


def _check_tree(name: str, tree: Any, must: str, fits: Any, also: Any = ()) -> list[Array]:
    arrays = [_array(f"{path} {must}", x, fits, KINDS, also) for path, x in _leaves(name, tree)]
    error, has_entries = (TypeError if also else ValueError), any(x.size for x in arrays)
    _check(has_entries, error, f"{name} must hold at least one array with entries", tree)
    return arrays


def _array(expected: str, x: Any, fits: Any, kinds: Any, also: Any) -> Any:
    """Returns `x`, an array or of a type of `also`, as a strongly typed JAX array."""
    array: Any = None
    why = ""
    if _kind(x) or isinstance(x, also):
        try:
            array = jnp.asarray(x)
        except (TypeError, ValueError, OverflowError) as error:
            why = f" JAX has no {x.dtype}." if _kind(x) else f" {str(error).rstrip('.')}."
    _check(_kind(array) in kinds, TypeError, expected, x, why)
    misfit = TypeError if also is Number else ValueError  # of a result; of an argument
    _check(fits(array.shape), misfit, expected, x, got=_describe(x if _kind(x) else array))
    return jnp.asarray(array, array.dtype)


def _checked(read: str, axis_name: Any, name: str, f: Any, check: Any, *names: str) -> Any:
    """One of the user's functions, with its result checked and notes on what it raises."""
    _check(callable(f), TypeError, f"{name} must be callable", f)

    def checked(*args: Any) -> Any:
        call = ", ".join(map(_describe, args, (*names, "inputs_t")))
        notes = [f"Raised when {name} was called on one sample: {name}({call})."]
        try:
            # A copy, since an Equinox `State` can be read only once.
            result = f(*jax.tree.map(lambda x: x, args))
            notes = []
            return check(result, *args)
        except Exception as error:
            if "axis name" in str(error) or "TraceContextError" in repr(error):
                notes.append("For axis_name or NNX, see 'Batch statistics' in the docs.")
            if axis_name is not None and _varying_axes(args) - {axis_name}:
                notes.append("Collectives over axis_name need jax.shard_map(check_vma=False).")
            for note in [*notes, read]:
                error.add_note(note)
            raise

    return checked


def _check_next(u_next: Any, u_prev: Any, *_: Any) -> State:
    what = "the next state only, and that" if type(u_next) is tuple else "a state"
    expected = f"stepper must return {what} of the structure of its input, {_describe(u_prev)}"
    structures: list[Any] = [jax.tree.structure(u) for u in (u_prev, u_next)]
    _check(structures[0] == structures[1], TypeError, expected, u_next)
    arrays = _check_tree("stepper(...)", u_next, "must be an array", lambda _: True, Number)
    for (path, prev), next in zip(_leaves("u_prev", u_prev), arrays, strict=True):
        is_wider = next.dtype.itemsize > prev.dtype.itemsize and _kind(next) == _kind(prev)
        fits = prev.shape == next.shape and (prev.dtype == next.dtype or is_wider)
        expected = f"stepper must return a state like its input: {path} is {_describe(prev)}"
        _check(fits, TypeError, expected, next)
    return arrays


def _check_residual(r: Any, *_: Any) -> Any:
    _check_tree("residuum_fn(...)", r, "must be an array", lambda _: True, Number)
    return r


def _check_loss(loss: Any, *_: Any) -> Any:
    expected = "time_level_loss must return a real scalar"
    return _array(expected, loss, lambda shape: shape == (), REAL[:2], Number)


def _leaves(name: str, tree: Any) -> list[tuple[str, Any]]:
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return [(name + jax.tree_util.keystr(path), leaf) for path, leaf in pairs]


def _scalar(x: Any) -> Any:
    """A NumPy scalar as a Python scalar; anything else as it is."""
    return x.item() if isinstance(x, jnp.generic) else x


def _kind(x: Any) -> Any:
    """The kind of an array's dtype; `None` if `x` is no array."""
    is_array = isinstance(x, (jax.Array, *get_args(ArrayLike))) and hasattr(x, "dtype")
    return next((kind for kind in KINDS if is_array and jnp.issubdtype(x.dtype, kind)), None)


def _describe(x: Any, name: str = "", skip: int = 0) -> str:
    leaves = _leaves(name, x)
    if not leaves or not all(_kind(leaf) for _, leaf in leaves):
        return f"{reprlib.repr(x)} of type {type(x).__name__}"
    shapes = [f"{path} {x.dtype}{list(x.shape[skip:])}".strip() for path, x in leaves]
    return ", ".join(shapes[:8] + ["..."] * (len(shapes) > 8))
