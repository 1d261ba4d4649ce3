"""Train neural emulators of time-dependent problems on the residual of their rollout.

An autoregressive network `stepper` advances a state in time. If the problem is discretised
as `residuum_fn(u_next, u_prev) = 0`, by an implicit time step for example, the network can be
trained from initial conditions alone: roll it out, and measure at every time level how far
two consecutive states are from satisfying the equation. No reference trajectory is needed, and
no solver runs in the loop. ("Residuum" is what trainax, the reference, calls the residual.)

This one file needs jax and jaxtyping. Install the package, or copy the file.
"""

import re
import reprlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from numbers import Number
from operator import is_, itemgetter
from typing import (
    Any,
    get_args,
    Literal,
    NamedTuple,
    overload,
    TypedDict,
    TypeVar,
    Unpack,
)

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr, Tracer
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Real, Shaped


__all__ = ["Cuts", "Rollout", "mse", "residuum_loss"]
__version__ = "0.3.0"

# Each in a section of its own, in this order: the public API; a scan that is cut into segments,
# and its gradient; how closures become the arrays of such a scan; what depends on the version
# of JAX; checks and error messages.


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
    leaves = _residuum_leaves(residuum, "residuum")
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
@overload
def residuum_loss(
    stepper: Stepper,
    data: PyTree[Shaped[ArrayLike, "batch num_snapshots ..."]],
    residuum_fn: ResiduumFn,
    *,
    has_aux: bool,
    **options: Unpack[Options],
) -> Float[Array, ""] | tuple[Float[Array, ""], Rollout]: ...
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
        received (a mask, a coefficient) is stored once, if `bptt` is static and no state has to
        be stored for each segment (see `cuts`).
    - `data`: PyTree of arrays `[batch, num_snapshots, ...]`. Only snapshot 0, the initial
        condition, is read. It is promoted if `stepper` returns a wider dtype of its kind.
    - `residuum_fn`: `(u_next, u_prev) -> residuum`, any PyTree of real or complex arrays.
        Note the order: next first.
    - `num_rollout_steps`: static number of autoregressive steps `T`, at least 1.
    - `cuts`: where gradients stop, see `Cuts`. With a static `bptt` of `k` steps, a gradient
        takes the memory of `k` steps, however long the rollout, and so does forward over
        reverse. Reverse over reverse also stores a state for each segment. A gradient does so,
        too, if your functions exchange data with other members of an outer `vmap` or of a mesh,
        by collectives, or if a parameter does not vary over a `jax.shard_map(check_vma=True)`.
        Forward mode needs functions that can be differentiated in reverse mode, so no
        `while_loop`. A factor outside of the loss comes after the gradient of a segment has
        been rounded, and cannot undo its underflow in float16 or its overflow: put the factor
        of a loss scaling into `weights`.
    - `weights`: `[num_rollout_steps]`, the weight of every time level. `None` means all ones.
        A dtype that is wider than that of the losses widens the result. A weight of 0 does not
        remove an infinite loss, since 0 · ∞ is NaN.
    - `inputs`: PyTree of arrays `[batch, num_rollout_steps, ...]` of any dtype: what a sample
        is given at each step besides the state, such as a forcing, boundary values or a PRNG
        key. The functions are then called as `stepper(u_prev, inputs_t)` and
        `residuum_fn(u_next, u_prev, inputs_t)`, with the slice `[b, t]` for the step from `uᵗ`
        to `uᵗ⁺¹`. One more copy of `inputs` is stored.
    - `time_level_loss`: `residuum -> real scalar`.
    - `axis_name`: one name, for the batch axis inside the functions, as in `jax.vmap`:
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
    num_steps = _check_int("num_rollout_steps", num_rollout_steps)
    segment_length, static_cuts, masks = _check_cuts(cuts, num_steps)
    loop = Loop(
        segment_length,
        checkpoint=_check_bool_or_int("checkpoint", checkpoint, false=0, true=1),
        unroll=_check_bool_or_int("unroll", unroll, false=1, true=num_steps),
    )
    level_weights = _check_weights(weights, num_steps)
    initial_state = _check_data(data, num_steps)
    level_inputs, named_inputs = _check_inputs(inputs, initial_state[0].shape[0], num_steps)
    _check_axis_name(axis_name)
    _check_bool("has_aux", has_aux)
    _check_callable("stepper", stepper)
    _check_callable("residuum_fn", residuum_fn)
    _check_callable("time_level_loss", time_level_loss)

    # From here on, a state is the list of its leaves, of which your functions get `to_state`.
    to_state = partial(jax.tree.unflatten, jax.tree.structure(data))
    call = partial(_call, data, axis_name)

    def next_state(u_prev: State, inputs_t: list[Array]) -> State:
        arguments = {"u_prev": to_state(u_prev), **named_inputs(inputs_t)}
        check = partial(_check_next_state, u_prev=to_state(u_prev))
        return call("stepper", stepper, arguments, check)

    def level_loss(u_next: State, u_prev: State, inputs_t: list[Array]) -> Array:
        states = {"u_next": to_state(u_next), "u_prev": to_state(u_prev)}
        arguments = {**states, **named_inputs(inputs_t)}
        residuum = call("residuum_fn", residuum_fn, arguments, _check_residuum)
        return call("time_level_loss", time_level_loss, {"residuum": residuum}, _check_loss)

    def time_step(u_prev: State, masks_t: Masks, inputs_t: list[Array]) -> tuple[State, Array]:
        is_cut: dict[str, bool | Array] = {**static_cuts, **masks_t}
        u_next = next_state(u_prev, inputs_t)
        loss = level_loss(_cut(u_next, is_cut["next"]), _cut(u_prev, is_cut["prev"]), inputs_t)
        # What cuts here is `prev`, `next`, and a `bptt` that is an array. A static `bptt` cuts
        # between segments, see `_segment`, and is `False` here.
        return _cut(u_next, is_cut["bptt"]), loss

    def batch_step(u_prev: State, masks_t: Masks, inputs_t: list[Array]) -> tuple[State, Array]:
        over_batch = jax.vmap(time_step, (0, None, 0), axis_name=axis_name)
        u_next, losses = over_batch(u_prev, masks_t, inputs_t)
        return u_next, jnp.mean(_at_least_float32(losses))

    step, arrays = _hoist(batch_step, initial_state, level_weights, (masks, level_inputs))
    # If a static `bptt` cuts the rollout into segments, the rollout is streamed: the gradient
    # of a segment is taken while the rollout advances, so that one segment at a time is stored.
    # (`_segmented_scan` lists the exceptions.)
    loss, losses, final_state = _segmented_scan(step, loop, arrays)
    rollout = jax.lax.stop_gradient(Rollout(losses, to_state(final_state)))
    return (loss, rollout) if has_aux else loss


#
# A scan that sums, and is cut into segments
#
# This section knows nothing of residuals. A step is that of a `jax.lax.scan`; it also reads
# parameters, and its output is a number, its term. The scan adds up the terms:
#
#     state, termₜ = step(params, state, xsₜ),        total = Σₜ weightsₜ · termₜ
#
# Of the results, only the total may be differentiated; the caller stops the gradients of the
# terms and of the final state, for which the rule below has no tangents.
#
# The state is cut after each segment of some steps: no gradient crosses from one segment into
# another. Differentiating a loop over all segments would nevertheless store something for each
# of them, because the loop runs forward to its end before it runs backward. But the gradient
# of the total is the sum of the gradients of the segments. So `_segments_and_grad` takes value
# and gradient of one segment, adds the gradient to a sum, cuts the state, and goes on. It
# stores the sum, and the activations of one segment.
#
# `_streamed_scan_jvp` makes a derivative rule of it. If anything is differentiated, the forward
# pass computes the gradient as well, and the tangent of the total is <gradient, tangents>. This
# is linear in the tangents, so JAX transposes it for reverse mode, and it is made of operations
# that JAX can differentiate, so derivatives of any order are exact. A `jax.custom_vjp` would be
# shorter, but has no forward mode. The price: reverse mode over reverse mode stores the state
# of each segment, and forward mode needs a step that has a reverse mode.
#


State = list[Array]  # the leaves of a state: of one sample, `[...]`, or of all, `[batch, ...]`
Masks = dict[str, Array]  # the cuts that are arrays, by field

R = TypeVar("R")  # what a function returns


class Step(NamedTuple):
    """A step of a scan, and what is known about it."""

    call: Callable[[list[Array], State, PyTree], tuple[State, Array]]  # of params, state, x
    is_constant: list[bool]  # for each leaf of the state: whether it is returned as it is
    term_type: Any  # the abstract value of a term
    is_streamable: bool  # no exchange of data with other members, and no `jax.Ref`


class Loop(NamedTuple):
    """How a scan runs, in numbers of steps."""

    segment_length: int  # after which the state is cut; if not below `num_steps`: no cut
    checkpoint: int  # for each so many, one state is stored; if 0, all activations are
    unroll: int  # for each iteration


class Levels(NamedTuple):
    """What belongs to the steps, `[num_steps, ...]`; to a single one, without that axis; or to
    pieces of some steps, `[num_pieces, length, ...]`."""

    weights: PyTree
    xs: PyTree


class Arrays(NamedTuple):
    """What a scan reads."""

    params: PyTree  # all arrays that the step closed over, integers and keys included
    state: PyTree  # the initial one
    levels: Levels


Marks = Arrays  # a bool for each array
Gradient = Arrays  # `None` for each array that is not marked


class Scanned(NamedTuple):
    """What a scan returns."""

    total: Float[Array, ""]
    terms: Float[Array, " num_steps"]
    state: State  # the final one


class Sums(NamedTuple):
    """What is carried from one segment to the next."""

    state: State
    total: Float[Array, ""]
    excess: Float[Array, ""]  # see `_add`
    params_grad: list[Array | None]


def _segmented_scan(step: Step, loop: Loop, arrays: Arrays) -> Scanned:
    """The scan, in the cheapest way whose derivatives are exact.

    - `_plain_scan`, if there is no cut.
    - `_streamed_scan`, if there is one: a gradient stores one segment at a time. If data are
        exchanged in the backward pass alone, its rule falls back to `_segments` by itself.
    - `_segments`, if there is one, but the step exchanges data with other members of a `vmap`
        or of a mesh, for which the rule would be wrong; or makes a `jax.Ref`, since JAX does
        not compile one inside of a custom rule. A gradient also stores the state before each
        segment. (Collectives over the axis of the batch are gone by now: they became sums when
        the batch was vmapped.)
    """
    if loop.segment_length >= _length(arrays.levels):
        return _plain_scan(step, loop, arrays)
    if loop.segment_length == 1:
        # Rematerialisation would save nothing: the backward pass of a step is next.
        loop = loop._replace(checkpoint=0)
    if step.is_streamable:
        return _streamed_scan(step, loop, arrays)
    return _segments(step, loop, arrays)


def _plain_scan(step: Step, loop: Loop, arrays: Arrays) -> Scanned:
    """`jax.lax.scan`, without a cut."""
    params, state, levels = arrays
    # What is constant is closed over. In the carry, it would be stored for each step.
    constants, carry = _partition(state, step.is_constant)

    def body(carry: PyTree, level: Levels) -> tuple[PyTree, Array]:
        state, term = step.call(params, _combine(carry, constants), level.xs)
        _, carry = _partition(state, step.is_constant)  # the constants stay what they are
        return carry, term

    if 1 < loop.checkpoint < _length(levels):
        carry, terms = _scan_blocks(body, carry, levels, loop.checkpoint, loop.unroll)
    else:
        carry, terms = _scan(body, carry, levels, loop.unroll, remat=loop.checkpoint > 0)
    return Scanned(_weighted_sum(levels, terms), terms, _combine(carry, constants))


def _segment(step: Step, loop: Loop, arrays: Arrays) -> Scanned:
    """A plain scan over the steps of one segment, with the state cut at its end.

    This section has no other cut of a state: value and gradient both call this function, and
    derivatives of higher order differentiate what it does.
    """
    segment = _plain_scan(step, loop, arrays)
    return segment._replace(state=_cut(segment.state, True))


def _segments(step: Step, loop: Loop, arrays: Arrays) -> Scanned:
    """One segment after the other.

    This is the value of `_streamed_scan`, which is differentiated by a rule. Where the rule
    does not apply, JAX differentiates this function: exactly, but it stores the state before
    each segment.
    """
    params, state, levels = arrays

    def body(state: State, piece: Levels) -> tuple[State, Array]:
        segment = _segment(step, loop, Arrays(params, state, piece))
        return segment.state, segment.terms

    state, terms = _scan_pieces(body, state, levels, loop.segment_length, loop.unroll)
    return Scanned(_weighted_sum(levels, terms), terms, state)


def _segments_and_grad(
    step: Step, loop: Loop, wrt: Marks, arrays: Arrays
) -> tuple[Scanned, Gradient]:
    """`_segments`, and the gradient of the total for the arrays that `wrt` marks."""
    params, state, levels = arrays
    accumulate = partial(_accumulate, step, loop, params)
    variables, _ = _partition(params, wrt.params)
    # Like the total, this varies over each axis of a mesh over which a weight or a term varies.
    zero = _vary(jnp.zeros_like(levels.weights[0]), _varying_axes(step.term_type))
    sums = Sums(state, zero, zero, jax.tree.map(jnp.zeros_like, variables))

    outputs: list[PyTree] = []
    state_grad: list[Array | None] = [None] * len(state)
    if any(wrt.state):
        # The gradient for the initial state comes from the first segment, which therefore stays
        # outside of the loop: the others start from a state that is cut.
        first, levels = _split(levels, loop.segment_length)
        sums, output, state_grad = accumulate(wrt, sums, first)
        outputs.append(output)
        wrt = wrt._replace(state=[False] * len(state))

    def body(sums: Sums, piece: Levels) -> tuple[Sums, PyTree]:
        sums, output, _ = accumulate(wrt, sums, piece)
        return sums, output

    # Each piece has its backward pass in it, so its rematerialisation by `_scan_pieces` is for
    # derivatives of higher order alone.
    sums, output = _scan_pieces(body, sums, levels, loop.segment_length, loop.unroll)
    terms, levels_grad = _concatenate(*outputs, output)
    grad = Arrays(sums.params_grad, state_grad, levels_grad)
    return Scanned(sums.total, terms, sums.state), grad


def _accumulate(
    step: Step,
    loop: Loop,
    params: list[Array],
    wrt: Marks,
    sums: Sums,
    levels: Levels,
) -> tuple[Sums, tuple[Array, Levels], list[Array | None]]:
    """Advances by one segment, and adds its total and its gradient to the sums.

    Also returns what there is for each level, its term and the gradient for its arrays; and the
    gradient for the state from which the segment starts.
    """
    levels = _depending_on(sums.total, levels)
    variables, others = _partition(Arrays(params, sums.state, levels), wrt)

    def total_of_segment(variables: Arrays) -> tuple[Array, Scanned]:
        segment = _segment(step, loop, _combine(variables, others))
        return segment.total, segment

    (_, segment), grad = jax.value_and_grad(total_of_segment, has_aux=True)(variables)
    total, excess = _add(sums.total, sums.excess, segment.total)
    # A compensated sum of the gradient would need another copy of the parameters.
    params_grad = jax.tree.map(jnp.add, sums.params_grad, grad.params)
    sums = Sums(segment.state, total, excess, params_grad)
    return sums, (segment.terms, grad.levels), grad.state


# The rule returns what `_segments` does: the same structure and dtypes; and each result varies
# over the same axes of a mesh, and is batched by a `vmap` in the same cases. So it must be made
# of the same arrays in both, even if its value is a constant.
_streamed_scan = jax.custom_jvp(_segments, nondiff_argnums=(0, 1))


def _streamed_scan_jvp(
    step: Step, loop: Loop, primals: tuple[Arrays], tangents: tuple[Arrays]
) -> tuple[Scanned, Scanned]:
    """The tangent of the total is <gradient, tangents>; here, nothing else has one.

    This would be wrong if the total depended on arrays of other members, those of a `vmap` or
    of a mesh: the gradient is by the arrays of one member alone. A step with such an exchange
    of data does not get here. But two exchanges are in the backward pass alone, where only the
    program of the gradient shows them: a collective in the backward pass of a custom rule; and
    the sum over the mesh that is the gradient for an array which is the same for all members of
    a `jax.shard_map(check_vma=True)`. If there is either, the tangent is the one that JAX makes
    of `_segments`.
    """
    (wrt,), (nonzero_tangents,) = _perturbed(primals, tangents)
    with _note(_hint):
        program, structure = _trace(partial(_segments_and_grad, step, loop, wrt), *primals)
        if _axes_of_collectives(program.jaxpr):
            return _jvp(partial(_segments, step, loop), primals, tangents)
    leaves = _evaluate(program, *jax.tree.leaves(primals))
    scanned, grad = jax.tree.unflatten(structure, leaves)
    # JAX's gradient of a complex variable is conjugated already, so this is not `jnp.vdot`; and
    # `jnp.dot` would lose precision on an accelerator.
    product = lambda x, dx: jnp.sum(_at_least_float32(x) * _at_least_float32(dx)).real
    products = jax.tree.leaves(jax.tree.map(product, grad, nonzero_tangents))
    total_tangent = sum([x.astype(scanned.total.dtype) for x in products])
    no_tangents = jax.tree.map(zero_from_primal, scanned)
    return scanned, no_tangents._replace(total=total_tangent)


_streamed_scan.defjvp(_streamed_scan_jvp, symbolic_zeros=True)


def _jvp(f: Callable[..., R], primals: PyTree, tangents: PyTree) -> tuple[R, R]:
    """`jax.jvp`, where tangents may be symbolic zeros."""
    wrt, nonzero_tangents = _perturbed(primals, tangents)
    variables, others = _partition(primals, wrt)
    duals: tuple[R, R] = jax.jvp(
        lambda x: f(*_combine(x, others)), (variables,), (nonzero_tangents,)
    )
    return duals


def _perturbed(primals: PyTree, tangents: PyTree) -> tuple[Any, Any]:
    """Which arrays have a tangent that is not zero; and these tangents, `None` for the rest."""
    wrt = jax.tree.map(lambda dx: not isinstance(dx, SymbolicZero), tangents)
    # A tangent may be a Python number.
    to_array = lambda x, dx, is_wrt: jnp.asarray(dx, x.dtype) if is_wrt else None
    return wrt, jax.tree.map(to_array, primals, tangents, wrt)


def _trace(f: Callable[..., PyTree], *args: PyTree) -> tuple[Any, Any]:
    """The program of `f(*args)`, a closed jaxpr, and the structure of its result.

    The rule reads the collectives off the program before it evaluates it.
    """
    program, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
    return program, jax.tree.structure(shapes)


def _run(program: Any, *leaves: Array) -> list[Array]:
    return eval_jaxpr(program.jaxpr, program.consts, *leaves)


# In reverse mode, JAX runs the rule under partial evaluation, which traces every loop once more
# to separate what depends on tangents, even if nothing does, and forgets what the loop
# rematerialises: derivatives of higher order would then store it. A function with a custom rule
# is kept as it is if none of its arguments depends on a tangent.
_evaluate = jax.custom_jvp(_run, nondiff_argnums=(0,))
_evaluate.defjvp(
    lambda program, *duals: _jvp(partial(_run, program), *duals), symbolic_zeros=True
)


def _axes_of_collectives(jaxpr: Any) -> set[Hashable]:
    """Names of the axes, bound outside of `jaxpr`, over which it exchanges data."""
    found: set[Hashable] = set()
    for equation in jaxpr.eqns:
        within = set[Hashable]().union(*map(_axes_of_collectives, _inner_jaxprs(equation)))
        found |= within - _bound_axes(equation)
        if equation.primitive.name not in ("axis_index", "pvary"):  # which exchange nothing
            axes = equation.params.get("axes", equation.params.get("axis_name", ()))
            axes = axes if isinstance(axes, tuple) else (axes,)
            # The axes of other operations, such as those of a sum, are numbers.
            found |= {axis for axis in axes if not hasattr(axis, "__index__")}
    return found


def _inner_jaxprs(equation: Any) -> list[Any]:
    leaves = jax.tree.leaves([*equation.params.values()])
    jaxprs = [getattr(x, "jaxpr", x) for x in leaves]  # a closed jaxpr holds one
    return [x for x in jaxprs if hasattr(x, "eqns")]


def _depending_on(total: Array, levels: Levels) -> Levels:
    """The same `levels`, but computed from `total`, so that JAX takes them to depend on it.

    This matters if the whole rollout is in the body of an outer loop that is differentiated.
    JAX computes in advance what does not depend on the carry of that loop, and stores it for
    all levels: here, what a step makes of its weight, mask and inputs alone. `total` does
    depend on the carry, by way of the parameters.

    A zero is subtracted that is made from `total`: a sum over no entries, which is 0 even where
    `0 * total` is NaN. (To add it would turn -0.0 into 0.0.) XLA removes the subtraction.
    """
    zero = jnp.sum(jnp.broadcast_to(total, (0,)))

    def tie(x: Array) -> Array:
        if _varying_axes(x) != _varying_axes(zero):
            return x  # the step was traced for an `x` that varies over its own axes alone
        return x ^ zero.astype(bool) if x.dtype == bool else x - zero.astype(x.dtype)

    return Levels(levels.weights - zero, jax.tree.map(tie, levels.xs))


def _add(total: Array, excess: Array, x: Array) -> tuple[Array, Array]:
    """Kahan's sum `total + x`: as accurate for many numbers as for two.

    The excess is by how much rounding made a total too large. Also returns the new one.
    """
    x = x - excess
    new_total = total + x
    # Without limits, the excess of an infinite sum would be NaN, and so would be the next sum.
    limit: Any = jnp.finfo(total.dtype).max  # type: ignore[no-untyped-call]
    after, before, added = [jax.lax.clamp(-limit, y, limit) for y in (new_total, total, x)]
    excess = (after - before) - added
    return new_total, jax.lax.stop_gradient(excess)  # a rounding error has no derivative


def _weighted_sum(levels: Levels, terms: Array) -> Array:
    return jnp.sum(levels.weights * terms.astype(levels.weights.dtype))


def _scan(
    body: Callable[..., Any], carry: PyTree, levels: Levels, unroll: int, *, remat: bool
) -> tuple[Any, Any]:
    """`jax.lax.scan`, without a loop if one iteration does it all; `remat` recomputes steps."""
    num_steps = _length(levels)
    is_loop = unroll < num_steps
    if remat:
        # XLA cannot undo rematerialisation in a loop; without a loop, CSE would.
        body = jax.checkpoint(body, prevent_cse=not is_loop)
    if is_loop:
        return jax.lax.scan(body, carry, levels, unroll=unroll)
    outputs = []
    for t in range(num_steps):
        carry, output = body(carry, jax.tree.map(itemgetter(t), levels))
        outputs.append(output)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *outputs)


def _scan_blocks(
    body: Callable[..., Any], carry: PyTree, levels: Levels, length: int, unroll: int
) -> tuple[Any, Any]:
    """A scan over blocks of `length` steps.

    Its backward pass reads the state before a block, recomputes the states in the block, and
    from each of them its activations: one state is stored for each block, and those of one.
    """
    block = partial(_scan, body, unroll=unroll, remat=True)
    return _scan_pieces(block, carry, levels, length, unroll)


def _scan_pieces(
    body: Callable[..., Any], carry: PyTree, levels: Levels, length: int, unroll: int
) -> tuple[Any, Any]:
    """A scan over pieces of `length` levels: segments or blocks.

    `body` takes a carry and the levels of a piece. It returns the carry, and outputs that this
    function concatenates along their first axis: by level, `[length, ...]`.

    Pieces are rematerialised, but not the shorter one that is left over at the end, with which
    the backward pass begins.
    """
    num_pieces = _length(levels) // length
    whole, rest = _split(levels, num_pieces * length)
    outputs = []
    if num_pieces > 0:
        pieces = jax.tree.map(lambda x: x.reshape(num_pieces, length, *x.shape[1:]), whole)
        carry, output = _scan(body, carry, pieces, max(unroll // length, 1), remat=True)
        outputs.append(jax.tree.map(lambda x: jax.lax.collapse(x, 0, 2), output))
    if _length(rest) > 0:
        carry, output = body(carry, rest)
        outputs.append(output)
    return carry, _concatenate(*outputs)


def _length(levels: Levels) -> int:
    return len(levels.weights)


def _split(levels: Levels, i: int) -> tuple[Any, Any]:
    return jax.tree.map(lambda x: x[:i], levels), jax.tree.map(lambda x: x[i:], levels)


def _concatenate(*trees: PyTree) -> Any:
    return jax.tree.map(lambda *x: jnp.concatenate(x), *trees)


def _partition(tree: PyTree, where: PyTree[bool]) -> tuple[Any, Any]:
    """The leaves where `where` is true, and the others; each with `None` for the rest."""
    kept = jax.tree.map(lambda x, w: x if w else None, tree, where)
    rest = jax.tree.map(lambda x, w: None if w else x, tree, where)
    return kept, rest


def _combine(tree: PyTree, others: PyTree) -> Any:
    """The inverse of `_partition`."""
    pick = lambda x, other: other if x is None else x
    return jax.tree.map(pick, tree, others, is_leaf=lambda x: x is None)


def _cut(u: State, where: bool | Array) -> State:
    """Stops the gradient where `where` is true.

    If that is an array, by a select, after which a leaf no longer counts as constant. Integers
    and keys, which have no gradient, are left as they are.
    """
    if isinstance(where, bool):
        return jax.lax.stop_gradient(u) if where else u
    return [jnp.where(where, jax.lax.stop_gradient(x), x) if _is_inexact(x) else x for x in u]


#
# From closures to arrays
#
# A derivative rule has to see every array that may have a derivative, and a loop has to return
# what it carries in the types in which it received it. But functions close over arrays, and
# steppers promote. This section makes a `Step` of a function: what the function closed over
# becomes the step's first argument, and the state comes back in the types in which it came. The
# type of an array is its dtype; inside of a `jax.shard_map(check_vma=True)` also the axes of
# the mesh over which the array varies; and on a mesh with explicit axes also its sharding.
#


def _hoist(
    f: Callable[..., Any], state: State, weights: Array, xs: tuple[PyTree, PyTree]
) -> tuple[Step, Arrays]:
    """`f(state, *x) -> (state, term)` as a step, and the arrays of a scan over it.

    What `f` closes over is in float32 if it was of half precision, so that its gradient is
    summed in float32. (`jax.closure_convert` would miss integers and keys.)
    """
    program, state = _settle(f, state, jax.tree.map(itemgetter(0), xs))
    if any(map(_is_ref, program.consts)):
        raise TypeError("A jax.Ref cannot be closed over. Read it before: value = ref[...].")
    closed_over = [*map(jnp.asarray, program.consts)]
    params = [_at_least_float32(x) if _is_inexact(x) else x for x in closed_over]
    # The step keeps their types, and a jaxpr without them: they may be tracers, and must not
    # outlive their trace.
    types, jaxpr = [v.aval for v in program.jaxpr.constvars], _without_consts(program.jaxpr)

    def call(params: list[Array], state: State, x: PyTree) -> tuple[State, Array]:
        consts = [*map(_cast, params, types)]
        *next_state, term = eval_jaxpr(jaxpr, consts, *state, *jax.tree.leaves(x))
        return [*map(_cast, map(_reshard, next_state, state), state)], term

    *outputs, term = program.jaxpr.outvars
    pairs = zip(outputs, program.jaxpr.invars, strict=False)  # the inputs go on with those of x
    is_constant = [output is x for output, x in pairs]
    is_streamable = not _axes_of_collectives(jaxpr) and not _makes_refs(jaxpr)
    step = Step(call, is_constant, term.aval, is_streamable)
    # Weights are in the dtype of the terms, or in a wider one of their own.
    is_wider = _is_inexact(weights) and weights.dtype.itemsize > term.aval.dtype.itemsize
    weights = weights if is_wider else weights.astype(term.aval.dtype)
    return step, Arrays(params, state, Levels(weights, xs))


def _settle(f: Callable[..., Any], state: State, x: tuple[PyTree, PyTree]) -> tuple[Any, State]:
    """The program of `f`, a closed jaxpr, for `state` in types that `f` preserves."""
    program: Any = jax.make_jaxpr(f)(state, *x)  # its results are a state and, last, a term
    # Shardings once: while dtypes can only become wider, a sharding may change at every step.
    settled = [*map(_cast, map(_reshard, state, program.out_avals), program.out_avals)]
    while not all(map(is_, settled, state)):  # whatever is settled comes back as it is
        state = settled
        program = jax.make_jaxpr(f)(state, *x)
        settled = [*map(_cast, state, program.out_avals)]
    return program, state


def _makes_refs(jaxpr: Any) -> bool:
    return any(
        any(map(_is_ref, equation.outvars)) or any(map(_makes_refs, _inner_jaxprs(equation)))
        for equation in jaxpr.eqns
    )


def _cast(x: Array, like: Any) -> Array:  # like an array, or an abstract value
    """`x` in the dtype of `like`, and varying over its axes of a mesh; `x` itself, if it is."""
    x = _vary(x, _varying_axes(like))
    return x if x.dtype == like.dtype else x.astype(like.dtype)


def _at_least_float32(x: Array) -> Array:
    return x if _is_inexact(x) and x.dtype.itemsize >= 4 else x.astype(jnp.float32)


def _is_inexact(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


#
# What differs between versions of JAX
#


def _varying_axes(x: Any) -> frozenset[Hashable]:
    """The axes of a `jax.shard_map` over which an array, or an abstract value, varies."""
    aval = getattr(x, "aval", x)
    vma = getattr(aval, "manual_axis_type", aval)  # from JAX 0.10 on
    return frozenset(getattr(vma, "varying", getattr(vma, "vma", ())))  # none before JAX 0.6


def _vary(x: Array, axes: frozenset[Hashable]) -> Array:
    missing = tuple(axes - _varying_axes(x))
    if missing and hasattr(jax.lax, "pcast"):
        x = jax.lax.pcast(x, missing, to="varying")
    elif missing:  # before JAX 0.8
        x = vars(jax.lax)["pvary"](x, missing)
    return x


def _reshard(x: Array, like: Any) -> Array:
    """`x` in the sharding of `like`. They differ on a mesh with explicit axes, from JAX 0.7 on.

    Otherwise an abstract value has no sharding, or one that says nothing.
    """
    before, after = [getattr(getattr(y, "aval", y), "sharding", None) for y in (x, like)]
    if getattr(before, "spec", None) != getattr(after, "spec", None):
        x = vars(jax.sharding)["reshard"](x, after)
    return x


def _bound_axes(equation: Any) -> set[Hashable]:
    """The axes of a mesh that a `jax.shard_map` binds; for other equations none."""
    if equation.primitive.name != "shard_map":
        return set()
    params = equation.params
    all_axes = params["mesh"].axis_names
    # The latter before JAX 0.10, and neither before JAX 0.7.
    return {*params.get("newly_manual_axes", params.get("manual_axes", all_axes))}


def _without_consts(jaxpr: Any) -> Any:
    """From JAX 0.12 on, a jaxpr holds its constants."""
    return jaxpr.replace(consts=[]) if hasattr(jaxpr, "consts") else jaxpr


def _is_ref(x: Any) -> bool:
    return type(getattr(x, "aval", None)).__name__ == "AbstractRef"


#
# Checks of arguments and of results, at trace time
#
# A check of an argument returns what the code above works with: static values as those of
# Python, arrays as strongly typed JAX arrays, a static `bptt` as the length of a segment. An
# error says by name what was expected, and what came instead.
#

Kinds = tuple[Any, ...]  # of dtypes
REAL: Kinds = (jnp.floating, jnp.integer, jnp.bool)
NUMBERS: Kinds = (*REAL, jnp.complexfloating)
ANY: Kinds = (*NUMBERS, jax.dtypes.prng_key)
Shapes = list[tuple[int, ...]]


def _error(
    kind: type[Exception], expected: str, x: object, *, got: str = "", why: str = ""
) -> Exception:
    return kind(f"{expected}, got {got or _describe(x)}. {why}".rstrip())


def _not_static(kind: type[Exception], expected: str, x: object) -> Exception:
    why = "It is traced: close over it, or make it static in jax.jit."
    return _error(kind, expected, x, why=why if isinstance(x, Tracer) else "")


def _check_bool(name: str, x: object) -> None:
    if not isinstance(_to_python(x), bool):
        raise _not_static(TypeError, f"{name} must be a static bool", x)


def _check_int(name: str, x: object, *, kind: str = "a static int") -> int:
    x = _to_python(x)
    if not isinstance(x, int) or isinstance(x, bool):
        raise _not_static(TypeError, f"{name} must be {kind}", x)
    if not 1 <= x < 2**31:
        raise _error(ValueError, f"{name} must be at least 1 and below 2**31", x)
    return x


def _check_bool_or_int(name: str, x: object, *, false: int, true: int) -> int:
    """An int, or the one that a bool stands for."""
    x = _to_python(x)
    if isinstance(x, bool):
        return true if x else false
    return _check_int(name, x, kind="a static bool or a static int")


def _check_callable(name: str, x: object) -> None:
    if not callable(x):
        raise _error(TypeError, f"{name} must be callable", x)


def _check_axis_name(x: object) -> None:
    if isinstance(x, tuple):
        raise _error(TypeError, "axis_name must be one name, not a tuple of names", x)
    try:
        hash(x)
    except TypeError:
        raise _error(TypeError, "axis_name must be hashable", x) from None


def _check_cuts(cuts: object, num_steps: int) -> tuple[int, dict[str, bool], Masks]:
    """The length of a segment; and what is cut at a level, by field: bools, and arrays.

    A `bptt` that is an int or a bool becomes the length of a segment, and cuts at no level.
    """
    if not isinstance(cuts, Cuts):
        raise _error(TypeError, "cuts must be a Cuts(bptt, prev, next)", cuts)
    segment_length = num_steps
    bptt = _to_python(cuts.bptt)
    if isinstance(bptt, int):  # as every bool is
        segment_length = _check_bool_or_int("cuts.bptt", bptt, false=num_steps, true=1)
        cuts = cuts._replace(bptt=False)
    static: dict[str, bool] = {}
    masks: Masks = {}
    for field, cut in cuts._asdict().items():
        cut = _to_python(cut)
        if isinstance(cut, bool):
            static[field] = cut
        else:
            masks[field] = _check_mask(field, cut, num_steps)
    return segment_length, static, masks


def _check_mask(field: str, mask: object, num_steps: int) -> Bool[Array, " {num_steps}"]:
    shape = f"[num_rollout_steps] = [{num_steps}]"
    if field == "bptt":
        shapes: Shapes = [(num_steps,)]
        expected = f"a static bool, a static int or a bool array of shape {shape}"
    else:
        shapes = [(), (num_steps,)]
        expected = f"a bool or a bool array of shape [] or {shape}"
    expected = f"cuts.{field} must be {expected}"
    if isinstance(mask, Tracer) and mask.shape not in shapes:
        raise _not_static(ValueError, expected, mask)
    array = _check_one_per_step(expected, mask, shapes, (jnp.bool,))
    return jnp.broadcast_to(array, num_steps)


def _check_weights(weights: object, num_steps: int) -> Real[Array, " {num_steps}"]:
    if weights is None:
        return jnp.ones(num_steps, jnp.float32)
    expected = f"weights must be a real array of shape [num_rollout_steps] = [{num_steps}]"
    return _check_one_per_step(expected, weights, [(num_steps,)], REAL)


def _check_one_per_step(expected: str, x: object, shapes: Shapes, kinds: Kinds) -> Array:
    """An array, or what JAX makes one of, such as a list."""
    array = _to_array(x, expected, kinds, also=(Sequence, Number))
    if array.shape not in shapes:
        raise _error(ValueError, expected, x, got=_describe(x if _is_array(x) else array))
    return array


def _check_data(data: PyTree, num_steps: int) -> list[Shaped[Array, "batch ..."]]:
    """Snapshot 0."""
    must = "must be an array of shape [batch, num_snapshots, ...], both at least 1"
    arrays = []
    for path, x in _leaves("data", data):
        array = _to_array(x, f"{path} {must}", ANY, why=_if_list_of_samples(data))
        if array.ndim < 2 or 0 in array.shape[:2]:
            raise _error(ValueError, f"{path} {must}", x, why=_if_list_of_samples(data))
        arrays.append(array)
    _check_not_empty(ValueError, "data", data, arrays)
    if len({x.shape[:2] for x in arrays}) > 1:
        snapshots = {x.shape[1] for x in arrays}
        is_series = len(snapshots) > 1 or num_steps in snapshots - {1}
        why = "Only snapshot 0 is read: what changes in time belongs in inputs."
        expected = "data must be arrays that agree on [batch, num_snapshots]"
        raise _error(ValueError, expected, data, why=why if is_series else "")
    return [jax.lax.index_in_dim(x, 0, axis=1, keepdims=False) for x in arrays]


def _if_list_of_samples(data: PyTree) -> str:
    is_list = isinstance(data, (list, tuple)) and len(data) > 1
    if is_list and len({str(getattr(x, "shape", x)) for x in data}) == 1:
        return "A list is read as separate fields: to batch samples, use jnp.stack."
    return ""


def _how_data_was_read(data: PyTree) -> str:
    batch, num_snapshots = jax.tree.leaves(data)[0].shape[:2]
    sample = _describe(data, skip_axes=2)
    read = f"data: batch {batch}, num_snapshots {num_snapshots}, one sample {sample}."
    return f"{_if_list_of_samples(data)} {read}".lstrip()


def _check_inputs(
    inputs: PyTree, batch: int, num_steps: int
) -> tuple[list[Shaped[Array, "{num_steps} ..."]], Callable[[list[Array]], dict[str, PyTree]]]:
    """The leaves, time first; and a function from those of a sample and level to keywords."""
    if inputs is None:
        return [], lambda _: {}
    must = f"must be an array [batch, num_rollout_steps, ...] = [{batch}, {num_steps}, ...]"
    arrays = []
    for path, x in _leaves("inputs", inputs):
        array = _to_array(x, f"{path} {must}", ANY)
        if array.shape[:2] != (batch, num_steps):
            why = _why_inputs_do_not_fit(inputs, array.shape, batch, num_steps)
            raise _error(ValueError, f"{path} {must}", x, why=why)
        arrays.append(array)
    _check_not_empty(ValueError, "inputs", inputs, arrays)
    # Keys as their data, since `jax.debug_key_reuse` takes even a transposition for a use.
    impls = [jax.random.key_impl(x) if _is_key(x) else None for x in arrays]
    arrays = [jax.random.key_data(x) if _is_key(x) else x for x in arrays]

    def named_inputs(inputs_t: list[Array]) -> dict[str, PyTree]:
        leaves = [
            x if impl is None else jax.random.wrap_key_data(x, impl=impl)
            for x, impl in zip(inputs_t, impls, strict=True)
        ]
        return {"inputs_t": jax.tree.unflatten(jax.tree.structure(inputs), leaves)}

    return [jnp.swapaxes(x, 0, 1) for x in arrays], named_inputs


def _why_inputs_do_not_fit(
    inputs: PyTree, shape: tuple[int, ...], batch: int, num_steps: int
) -> str:
    if isinstance(inputs, (list, tuple)) and len(inputs) == num_steps > 1:
        return "A list is read as separate fields: to stack steps, use jnp.stack(..., axis=1)."
    if shape[:2] == (num_steps, batch):
        return "If time comes first, swap the axes: jnp.swapaxes(x, 0, 1)."
    if num_steps == 1 and shape[:1] == (batch,) and len(shape) > 1:
        return "num_rollout_steps is 1, unless you pass it."
    return ""


def _check_next_state(u_next: PyTree, *, u_prev: PyTree) -> State:
    """The leaves, which may be wider than those of `u_prev`, and may be Python numbers."""
    structure: Any = jax.tree.structure(u_prev)
    if jax.tree.structure(u_next) != structure:
        what = "only the next state" if type(u_next) is tuple else "a state"
        like = f"with the structure of its input, {_describe(u_prev)}"
        raise _error(TypeError, f"stepper must return {what} {like}", u_next)
    arrays = []
    pairs = zip(_leaves("stepper(...)", u_next), _leaves("", u_prev), strict=True)
    for (path, x), (field, prev) in pairs:
        array = _to_array(x, f"{path} must be an array", ANY, also=(Number,))
        has_shape = array.shape == prev.shape
        if has_shape and _is_inexact(array) and _kind(prev) in (jnp.integer, jnp.bool):
            got = _describe(array)
            expected = f"data{field} must be floating point, as stepper returns {got}"
            raise _error(TypeError, expected, prev)
        if not (has_shape and _holds(array, prev)):
            like = f"u_prev{field} is {_describe(prev)}"
            expected = f"stepper must return a state like its input: {like}"
            raise _error(TypeError, expected, array)
        arrays.append(array)
    return arrays


def _holds(x: Array, y: Array) -> bool:
    """Whether `x` is of the dtype of `y`, or of a wider one of its kind."""
    is_wider = x.dtype.itemsize > y.dtype.itemsize and _kind(x) == _kind(y)
    return x.dtype == y.dtype or is_wider


def _check_residuum(residuum: PyTree, name: str = "residuum_fn(...)") -> PyTree:
    _residuum_leaves(residuum, name)
    return residuum


def _residuum_leaves(residuum: PyTree, name: str) -> list[Array]:
    """The leaves, which may be Python numbers."""
    expected = "must be a real or complex array"
    arrays = [
        _to_array(x, f"{path} {expected}", NUMBERS, also=(Number,))
        for path, x in _leaves(name, residuum)
    ]
    _check_not_empty(TypeError, name, residuum, arrays)
    return arrays


def _check_loss(loss: object) -> Real[Array, ""]:
    expected = "time_level_loss must return a real scalar"
    array = _to_array(loss, expected, (jnp.floating, jnp.integer), also=(Number,))
    if array.shape != ():
        raise _error(TypeError, expected, loss)
    return array


def _check_not_empty(
    kind: type[Exception], name: str, tree: PyTree, arrays: list[Array]
) -> None:
    if not any(x.size for x in arrays):
        raise _error(kind, f"{name} must hold at least one array with entries", tree)


def _call(
    data: PyTree,
    axis_name: Hashable,
    name: str,
    f: Callable[..., PyTree],
    arguments: dict[str, PyTree],
    check: Callable[[PyTree], R],
) -> R:
    """Calls one of the user's functions, by position, and checks its result.

    The names of the arguments are for the notes that an error gets: what the function was
    called with, and how `data` was read.
    """

    def how_it_was_called(error: Exception) -> str:
        call = ", ".join(_describe(x, path) for path, x in arguments.items())
        return f"Raised when {name} was called on one sample: {name}({call})."

    def if_on_a_mesh(error: Exception) -> str:
        axes = frozenset[Hashable]().union(*map(_varying_axes, jax.tree.leaves(arguments)))
        is_named = axis_name is not None and axes - {axis_name}
        return (
            "Collectives over axis_name need jax.shard_map(check_vma=False)."
            if is_named
            else ""
        )

    with _note(lambda _: _how_data_was_read(data)):
        with _note(how_it_was_called), _note(_hint), _note(if_on_a_mesh):
            # Copies, since an Equinox `State` can be read only once.
            result = f(*jax.tree.map(lambda x: x, [*arguments.values()]))
        return check(result)


@contextmanager
def _note(text: Callable[[Exception], str]) -> Iterator[None]:
    """Adds a note to an error that is raised inside, unless its text is empty."""
    try:
        yield
    except Exception as error:
        if note := text(error):
            error.add_note(note)
        raise


def _hint(error: Exception) -> str:
    """What to do about an error that JAX or Flax raises in terms of their own."""
    message = f"{type(error).__name__}: {error}"
    if found := re.search(r"unbound axis name: ([\w-]+)", message):
        batch = f'If it is that of the batch, pass axis_name="{found[1]}" to residuum_loss'
        return f"{batch}, see 'Batch statistics' in the documentation."
    if "TraceContextError" in message:
        topic = "Dropout" if "Rng" in message else "Batch statistics"
        return f"For NNX modules that change themselves, see '{topic}' in the documentation."
    needs = "With a static cuts.bptt, {} as well. With an array it does not: {}."
    array = "cuts=Cuts(bptt=np.ones(num_rollout_steps, bool))"
    if "Reverse-mode differentiation does not work" in message:
        return needs.format("forward mode needs reverse mode", array)
    if "to a custom_vjp" in message:
        return needs.format("a collective in a backward pass needs forward mode", array)
    return ""


def _to_array(
    x: object, expected: str, kinds: Kinds, *, also: tuple[type, ...] = (), why: str = ""
) -> Array:
    """`x`, an array or of a type of `also`, as a strongly typed JAX array."""
    if not _is_array(x) and not isinstance(x, also):
        raise _error(TypeError, expected, x, why=_if_sparse(x) or why)
    try:
        array = jnp.asarray(x)
    except (TypeError, ValueError, OverflowError) as error:
        raise _error(TypeError, expected, x, why=_why_not_an_array(x, error)) from None
    if _kind(array) not in kinds:
        raise _error(TypeError, expected, x)
    return jnp.asarray(array, array.dtype)


def _why_not_an_array(x: Any, error: Exception) -> str:
    if hasattr(x, "filled"):
        return "It is a masked array: fill it, x.filled(value)."
    return f"JAX has no {x.dtype}." if _is_array(x) else f"{str(error).rstrip('.')}."


def _is_sparse(x: object) -> bool:
    return type(x).__module__.startswith(("jax.experimental.sparse", "scipy.sparse"))


def _if_sparse(x: object) -> str:
    advice = (
        "Pass the values of a sparse matrix, close over its indices, and rebuild it inside."
    )
    return advice if _is_sparse(x) else ""


def _leaves(name: str, tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves and their paths. A sparse matrix counts as one, to be refused."""
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_sparse)
    return [(name + jax.tree_util.keystr(path), leaf) for path, leaf in pairs]


def _to_python(x: object) -> object:
    """A NumPy scalar as a Python scalar; anything else as it is."""
    return x.item() if isinstance(x, jnp.generic) else x


def _is_array(x: Any) -> bool:
    return _kind(x) is not None


def _is_key(x: Array) -> bool:
    return _kind(x) is jax.dtypes.prng_key


def _kind(x: Any) -> Any:
    """The kind of an array's dtype; `None` if `x` is no array."""
    if not isinstance(x, (jax.Array, *get_args(ArrayLike))) or not hasattr(x, "dtype"):
        return None
    return next((kind for kind in ANY if jnp.issubdtype(x.dtype, kind)), None)


def _describe(x: Any, name: str = "", *, skip_axes: int = 0) -> str:
    """Dtypes and shapes of the arrays in a PyTree; of anything else the value and the type."""
    leaves = _leaves(name, x)
    if not leaves or not all(_is_array(leaf) for _, leaf in leaves):
        return f"{reprlib.repr(_to_python(x))} of type {type(_to_python(x)).__name__}"
    shapes = [f"{path} {x.dtype}{list(x.shape[skip_axes:])}".strip() for path, x in leaves]
    return ", ".join(shapes[:8] + ["..."] * (len(shapes) > 8))
