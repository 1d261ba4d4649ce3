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
from functools import partial, reduce
from numbers import Integral
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
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
        array `[num_rollout_steps]` cuts after step `t` where it is true.
    - `prev`, `next`: cut that argument of `residuum_fn`. A bool, or a bool array `[]` or
        `[num_rollout_steps]` that says so for each time level.
    """

    bptt: bool | int | Bool[ArrayLike, " num_rollout_steps"] = False
    prev: bool | Bool[ArrayLike, ""] | Bool[ArrayLike, " num_rollout_steps"] = False
    next: bool | Bool[ArrayLike, ""] | Bool[ArrayLike, " num_rollout_steps"] = False


class Rollout(NamedTuple):
    """What a rollout leaves behind, with gradients stopped; see `has_aux`.

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
    sums = [jnp.sum(_abs_squared(r)) for r in leaves]
    widest = max((s.dtype for s in sums), key=lambda dtype: dtype.itemsize)
    return reduce(jnp.add, [s.astype(widest) for s in sums]) / sum(r.size for r in leaves)


def residuum_loss(
    stepper: Callable[[PyTree], PyTree],
    data: PyTree[Shaped[ArrayLike, "batch num_snapshots ..."]],
    residuum_fn: Callable[[PyTree, PyTree], PyTree],
    *,
    num_rollout_steps: int = 1,
    cuts: Cuts = Cuts(),
    weights: Real[ArrayLike, "{num_rollout_steps}"] | Sequence[Any] | None = None,
    time_level_loss: Callable[[PyTree], Real[ArrayLike, ""]] = mse,
    checkpoint: bool = False,
    unroll: int | bool = 1,
    has_aux: bool = False,
) -> Float[Array, ""] | tuple[Float[Array, ""], Rollout]:
    """Loss of an autoregressive rollout, measured by the residuum between its states.

        u⁰ = data[:, 0],   uᵗ⁺¹ = stepper(uᵗ)

        L = Σₜ weights[t] · mean_batch time_level_loss(residuum_fn(uᵗ⁺¹, uᵗ))

    for `t = 0, …, num_rollout_steps - 1`. `stepper`, `residuum_fn` and `time_level_loss`
    are called on one sample, without a batch axis, and must be pure. Gradients flow to
    whatever they close over, to `data` and to `weights`. Several devices: a `jax.shard_map`
    with `check_vma=True` should begin with `jax.lax.pcast` of the parameters to varying, or
    a truncated rollout takes the memory of all its steps; other ways need nothing.

    The configuration `Residuum` of trainax (https://github.com/Ceyron/trainax) is the
    reference; its taxonomy is due to Koehler et al., "APEBench: A Benchmark for
    Autoregressive Neural Emulators of PDEs" (https://arxiv.org/abs/2411.00180).

    **Arguments:**

    - `stepper`: `u_prev -> u_next`, the emulator. A state is any PyTree of arrays;
        `u_next` has the structure and the shapes of `u_prev`.
    - `data`: PyTree of arrays `[batch, num_snapshots, ...]`. Only snapshot 0, the initial
        condition, is read. It is promoted if `stepper` returns a wider dtype.
    - `residuum_fn`: `(u_next, u_prev) -> residuum`, any PyTree of real or complex arrays.
        Note the order: next first.
    - `num_rollout_steps`: static number of autoregressive steps, at least 1.
    - `cuts`: where gradients stop, see `Cuts`. With a static `bptt` of `k` steps the
        gradient takes the memory of `k` steps, however long the rollout.
    - `weights`: `[num_rollout_steps]`, the weight of every time level. `None` is all ones.
    - `time_level_loss`: `residuum -> real scalar`.
    - `checkpoint`: rematerialise each time step in the backward pass. Stores one state per
        step instead of its activations, for about one more forward pass of run time.
    - `unroll`: time steps per loop iteration, as in `jax.lax.scan`; `True` for no loop at
        all. Compile time grows with it, and is otherwise independent of the number of
        steps. On a CPU, XLA runs a convolution in a loop slower than outside
        (https://github.com/jax-ml/jax/issues/12868), which is what `True` is for. A single
        step is never a loop.
    - `has_aux`: also return a `Rollout`.

    **Returns:**

    The loss, a scalar in float32 or wider (its dtype is that of `time_level_loss`; bf16
    and fp16 are accumulated in float32, and so are the gradients of parameters in these
    formats, which takes a copy in float32). With `has_aux`, the pair `(loss, Rollout)`.

    **Raises:**

    `TypeError` or `ValueError` at trace time, naming the argument. What your functions
    raise passes through, with a note that says which one it was and what it was called with.
    """
    _check_types(stepper, residuum_fn, time_level_loss, checkpoint, has_aux)
    num_steps = _check_int("num_rollout_steps", num_rollout_steps)
    steps_per_iteration = _check_unroll(unroll, num_steps)
    constant_cuts, masks, segment_length = _check_cuts(cuts, num_steps)
    level_weights = _check_weights(weights, num_steps)
    u_0 = _check_data(data)
    u_0 = _check_functions(stepper, residuum_fn, time_level_loss, u_0)

    def time_step(u_prev, mask):
        bptt, prev, next = constant_cuts._replace(**mask)
        u_next = jax.vmap(stepper)(u_prev)
        residuum = jax.vmap(residuum_fn)(_cut(u_next, next), _cut(u_prev, prev))
        loss = jnp.mean(_at_least_float32(jax.vmap(time_level_loss)(residuum)))
        return _cut(u_next, bptt), loss

    streamed = segment_length < num_steps
    if checkpoint and not (streamed and segment_length == 1):
        # In a loop XLA cannot undo rematerialisation; straight code must be protected.
        straight = steps_per_iteration >= segment_length
        time_step = jax.checkpoint(time_step, prevent_cse=straight)

    levels = (level_weights, masks)
    step, closed_over = _hoist(time_step, u_0, _first(masks))
    if streamed:
        loss, aux = _streamed_rollout(
            step, closed_over, u_0, levels, num_steps, segment_length, steps_per_iteration
        )
    else:
        step = partial(step, closed_over)
        loss, aux = _rollout(step, u_0, levels, num_steps, steps_per_iteration)
    return (loss, Rollout(*jax.lax.stop_gradient(aux))) if has_aux else loss


#
# The rollout: a loop over time steps
#


def _rollout(time_step, u, levels, num_steps, unroll):
    """Returns the weighted sum of the losses; and the losses, and the final state."""
    weights, masks = levels
    u, losses = _scan(time_step, u, masks, num_steps, unroll)
    return jnp.sum(weights.astype(losses.dtype) * losses), (losses, u)


def _scan(step, carry, xs, length, unroll):
    """`jax.lax.scan`, but straight code where one iteration does it all."""
    if unroll < length:
        return jax.lax.scan(step, carry, xs, length, unroll=unroll)
    ys = []
    for t in range(length):
        carry, y = step(carry, jax.tree.map(itemgetter(t), xs))
        ys.append(y)
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)


def _first(masks):
    return jax.tree.map(itemgetter(0), masks)


def _cut(u, where):
    """Stops the gradient where `where` is true; selects only if that is not static."""
    if where is False:
        return u
    if where is True:
        return jax.lax.stop_gradient(u)
    select = partial(jnp.where, where)
    return jax.tree.map(lambda x: select(jax.lax.stop_gradient(x), x), u)


def _hoist(f, *args):
    """Returns `g` and `closed_over` such that `g(closed_over, *args)` is `f(*args)`.

    So what the user's functions close over, first of all the parameters, becomes data: an
    array of half precision in float32, in which its gradient is then accumulated over the
    time levels. `jax.closure_convert` would miss integers and keys.
    """
    jaxpr, shape = jax.make_jaxpr(f, return_shape=True)(*args)
    constants = [jnp.asarray(x) for x in jaxpr.consts]
    is_half = lambda x: jnp.issubdtype(x.dtype, jnp.inexact) and x.dtype.itemsize < 4

    def run(closed_over, *leaves):
        pairs = zip(closed_over, constants, strict=True)
        narrow = [x.astype(c.dtype) if is_half(c) else x for x, c in pairs]
        return jax.core.eval_jaxpr(jaxpr.jaxpr, narrow, *leaves)

    # Traced once more, since the constants may be tracers, and `g` must not hold on to them.
    closed_over = [x.astype(jnp.float32) if is_half(x) else x for x in constants]
    program = jax.make_jaxpr(run)(closed_over, *jax.tree.leaves(args))

    def g(closed_over, *args):
        leaves = jax.tree.leaves((closed_over, args))
        leaves = jax.core.eval_jaxpr(program.jaxpr, program.consts, *leaves)
        return jax.tree.unflatten(jax.tree.structure(shape), leaves)

    return g, closed_over


#
# The streaming gradient of a truncated rollout
#
# Static cuts divide the rollout into segments of `k` steps, and no gradient crosses from
# one segment into another. Differentiating a loop over all of them would nevertheless store
# every activation on the way: it runs forward to the end before it runs backward.
#
# But the loss is a scalar, the sum of the losses of the segments, and so its gradient is the
# sum of their gradients, which can be accumulated while the rollout advances: take value and
# gradient of one segment, add them up, cut the state, go on. This is the arithmetic of
# ordinary backpropagation in another order, and nothing is kept but the running sum and one
# segment's activations.
#
# A `jax.custom_jvp` rule makes that sum the derivative of the rollout: the tangent of the
# loss is the inner product of the accumulated gradient and the tangents of the inputs. It is
# linear in the tangents, so JAX transposes it for reverse mode. It consists of operations
# that JAX can differentiate, so derivatives of any order are exact. And it does not run
# where only the value is asked for.
#
# Cost: memory for the gradient of one segment and one copy of what it is taken with respect
# to, whatever the number of steps; the run time of ordinary backpropagation. The exception
# is a `jax.shard_map` with `check_vma=True`, and a gradient with respect to what does not
# vary over its mesh: there the loop is differentiated as a whole. `jax.lax.pcast` helps.
#


def _streamed_rollout(step, closed_over, u_0, levels, num_steps, k, unroll):
    """`_rollout` with the main chain cut after every `k`-th step."""

    def advance(variables, num_steps, closed_over, carry, levels):
        """Moves on by one segment: the state, the sum of the losses, that of the gradients."""
        u, sums = carry
        constants = (closed_over, u)

        def segment(variables):
            closed_over, u = _combine(variables, constants)
            return _rollout(partial(step, closed_over), u, levels, num_steps, unroll)

        value_and_grad = jax.value_and_grad(segment, has_aux=True)
        (loss, (losses, u)), (grads, u_grads) = value_and_grad(variables)
        # Cut the state here, too: derivatives of higher order differentiate this code.
        return (_cut(u, True), jax.tree.map(jnp.add, sums, (loss, grads))), (losses, u_grads)

    def value_and_grad(variables, closed_over, u, levels):
        """Value of the rollout, and its gradient with respect to `variables`: the pair
        `(closed_over, u)` with `None` for every leaf that is held constant."""
        closed_variables, u_variables = variables
        # The initial condition gets its gradient from the first segment, which shares the
        # loop of the others if that is not wanted. The last segment may be shorter.
        num_first = 1 if jax.tree.leaves(u_variables) else 0
        num_whole, remainder = divmod(num_steps - num_first * k, k)
        # `zeros_like` knows the mesh of explicit sharding; a scalar of `zeros` is on none.
        _, level_loss = jax.eval_shape(step, closed_over, u, _first(levels[1]))
        zeros = jax.tree.map(jnp.zeros_like, (level_loss, closed_variables))
        carry = _vary((u, zeros), _varying_axes((closed_over, u)))
        start, losses, u_grads = 0, [], []
        for num_segments, length, with_respect_to in (
            (num_first, k, variables),
            (num_whole, k, (closed_variables, None)),
            (min(remainder, 1), remainder, (closed_variables, None)),
        ):
            if num_segments == 0:
                continue
            segment = partial(advance, with_respect_to, length, closed_over)
            chunk = _chunk(levels, start, num_segments, length)
            carry, ys = _scan(segment, carry, chunk, num_segments, max(unroll // k, 1))
            losses.append(ys[0].reshape(-1))
            u_grads.append(ys[1])
            start += num_segments * length
        u, (loss, grads) = carry
        u_grads = jax.tree.map(itemgetter(0), u_grads[0])
        return (loss, (jnp.concatenate(losses), u)), (grads, u_grads)

    def rollout(closed_over, u_0, levels):
        value, _ = value_and_grad((None, None), closed_over, u_0, levels)
        return value

    def rollout_jvp(primals, tangents):
        primals = jax.tree.map(jnp.asarray, primals)  # of Python scalars, too
        is_zero = lambda tangent: isinstance(tangent, SymbolicZero)
        variables = jax.tree.map(lambda x, dot: None if is_zero(dot) else x, primals, tangents)
        tangents = jax.tree.map(lambda dot: None if is_zero(dot) else dot, tangents)
        axes = _varying_axes(primals)
        if any(_varying_axes(x) != axes for x in jax.tree.leaves(variables)):
            # The gradient with respect to what does not vary over an axis of a `shard_map`
            # is a sum over that axis; a tangent of the local loss cannot be made from it.
            f = lambda variables: rollout(*_combine(variables, primals))
            return jax.jvp(f, (variables,), (tangents,))
        (loss, aux), grads = value_and_grad(variables[:2], *primals)
        closed_over_dot, u_0_dot, (weights_dot, _) = tangents
        # The loss is linear in the weights; what it multiplies them by is the losses.
        gradient = (*grads, None if weights_dot is None else aux[0])
        tangent = (closed_over_dot, u_0_dot, weights_dot)
        pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(tangent), strict=True)
        loss_dot = reduce(jnp.add, [_inner_product(*pair, loss.dtype) for pair in pairs])
        # Nothing else has a tangent: zeros, or for integers what JAX has in their place.
        _, aux_dot = jax.jvp(lambda _: aux, (0.0,), (0.0,))
        return (loss, aux), (loss_dot, aux_dot)

    streamed_rollout = jax.custom_jvp(rollout)
    streamed_rollout.defjvp(rollout_jvp, symbolic_zeros=True)
    return streamed_rollout(closed_over, u_0, levels)


def _chunk(levels, start, num_segments, length):
    """The levels of some segments from level `start` on, `[num_segments, length]`."""
    stop = start + num_segments * length
    return jax.tree.map(lambda x: x[start:stop].reshape(num_segments, length), levels)


def _varying_axes(tree):
    """The axes of a `jax.shard_map` over which any leaf varies; elsewhere none."""

    def axes(leaf):
        aval: Any = getattr(leaf, "aval", None)
        if hasattr(aval, "manual_axis_type"):  # from JAX 0.10 on
            return aval.manual_axis_type.varying
        return getattr(aval, "vma", frozenset())

    return frozenset().union(*map(axes, jax.tree.leaves(tree)))


def _vary(tree, axes):
    """Makes all leaves vary over `axes`. A loop may not change what its carry varies over."""

    def vary(x):
        missing = tuple(axes - _varying_axes(x))
        if not missing:
            return x
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(x, missing, to="varying")
        return jax.lax.pvary(x, missing)  # type: ignore[attr-defined]  # before JAX 0.8

    return jax.tree.map(vary, tree)


def _combine(variables, constants):
    """`variables`, with the leaves of `constants` where they are `None`."""
    is_none = lambda x: x is None
    pick = lambda variable, constant: constant if variable is None else variable
    return jax.tree.map(pick, variables, constants, is_leaf=is_none)


def _inner_product(gradient, tangent, dtype):
    # A gradient of a complex input is the conjugate of the mathematician's, so this is not
    # `vdot`; and `dot` would lose precision on an accelerator.
    return jnp.sum(gradient * tangent.astype(gradient.dtype)).real.astype(dtype)


#
# Precision: half precision is accumulated in float32
#


def _at_least_float32(x):
    is_wide = jnp.issubdtype(x.dtype, jnp.inexact) and x.dtype.itemsize >= 4
    return x if is_wide else x.astype(jnp.float32)


def _abs_squared(r):
    """`|r|²`, which unlike `abs(r)**2` is differentiable where `r` is 0."""
    if jnp.iscomplexobj(r):
        return _abs_squared(r.real) + _abs_squared(r.imag)
    return jnp.square(_at_least_float32(r))


#
# Validation
#
# Everything that can be said before any computation, at trace time. A reader who trusts
# the inputs can stop here.
#


def _check_types(stepper, residuum_fn, time_level_loss, checkpoint, has_aux):
    functions = dict(stepper=stepper, residuum_fn=residuum_fn, time_level_loss=time_level_loss)
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name} must be callable, got {_describe(function)}.")
    for name, flag in dict(checkpoint=checkpoint, has_aux=has_aux).items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a static bool, got {_describe(flag)}.")


def _check_int(name, value):
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a static int, got {_describe(value)}.")
    if not 1 <= int(value) < 2**31:
        raise ValueError(f"{name} must be at least 1 and below 2**31, got {value}.")
    return int(value)


def _check_unroll(unroll, num_steps):
    if isinstance(unroll, bool):
        return num_steps if unroll else 1
    return _check_int("unroll", unroll)


def _check_cuts(cuts, num_steps):
    """Returns the cuts that are the same at all time levels, the masks `[num_steps]` by
    field, and the number of steps between static cuts of the main chain."""
    if not isinstance(cuts, Cuts):
        raise TypeError(f"cuts must be a Cuts(bptt, prev, next), got {_describe(cuts)}.")
    constant, masks, segment_length = Cuts(), {}, num_steps
    for field, cut in cuts._asdict().items():
        name, main_chain = f"cuts.{field}", field == "bptt"
        if main_chain and isinstance(cut, Integral):
            if cut is not False:
                segment_length = 1 if cut is True else _check_int(name, cut)
        elif isinstance(cut, bool):
            constant = constant._replace(**{field: cut})
        elif not _is_array(cut) or _kind(cut.dtype) != jnp.bool:
            expected = "a bool, a static int" if main_chain else "a bool"
            raise TypeError(f"{name} must be {expected} or a bool array, got {_describe(cut)}.")
        elif cut.shape == () and not main_chain:
            constant = constant._replace(**{field: cut})
        elif cut.shape == (num_steps,):
            masks[field] = jnp.asarray(cut)
        else:
            expected = f"[num_rollout_steps] = [{num_steps}]"
            raise ValueError(
                f"{name} must be of shape {expected if main_chain else '[] or ' + expected}"
                f", got {_describe(cut)}."
            )
    return constant, masks, segment_length


def _check_weights(weights, num_steps):
    if weights is None:
        # As an array like any other. JAX moves what depends on constants alone out of the
        # loop over segments, and would then store it for each step of one.
        return jnp.ones(num_steps, jnp.float32)
    try:
        array = jnp.asarray(weights)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"weights must be an array, got {_describe(weights)}.") from None
    if _kind(array.dtype) not in (jnp.floating, jnp.integer, jnp.bool):
        raise TypeError(f"weights must be real, got {_describe(array)}.")
    if array.shape != (num_steps,):
        raise ValueError(
            f"weights must be of shape [num_rollout_steps] = [{num_steps}], "
            f"got {_describe(array)}."
        )
    return array


def _check_data(data):
    """Returns snapshot 0."""
    leaves = jax.tree_util.tree_leaves_with_path(data)
    if not leaves:
        raise ValueError(f"data must hold at least one array, got {_describe(data)}.")
    shape = None
    for path, leaf in leaves:
        name = f"data{jax.tree_util.keystr(path)}"
        if not _is_array(leaf):
            raise TypeError(f"{name} must be an array, got {_describe(leaf)}.")
        if len(leaf.shape) < 2 or 0 in leaf.shape[:2]:
            raise ValueError(
                f"{name} must be of shape [batch, num_snapshots, ...], both at least 1, "
                f"got {_describe(leaf)}."
            )
        shape = leaf.shape[:2] if shape is None else shape
        if leaf.shape[:2] != shape:
            raise ValueError(
                f"{name} must agree with the other leaves on [batch, num_snapshots] = "
                f"{list(shape)}, got {_describe(leaf)}."
            )
    return jax.tree.map(_first_snapshot, data)


def _first_snapshot(leaf):
    leaf = jnp.asarray(leaf)
    # Naming the dtype makes a weakly typed array strong, as the stepper's output is.
    leaf = jnp.asarray(leaf, dtype=leaf.dtype)
    return jax.lax.index_in_dim(leaf, 0, axis=1, keepdims=False)


def _check_functions(stepper, residuum_fn, time_level_loss, u_0):
    """Returns `u_0` in the dtypes of the states that `stepper` makes."""
    u_1 = _check_call("stepper", stepper, u_0)
    structures: list[Any] = [jax.tree.structure(u) for u in (u_0, u_1)]
    if structures[0] != structures[1]:
        raise TypeError(
            "stepper must return a state of the structure of its input, "
            f"{structures[0]}, got {structures[1]}."
        )
    same_dtype = jax.tree_util.tree_map_with_path(_check_next_leaf, u_0, u_1)
    if not all(jax.tree.leaves(same_dtype)):
        u_0 = jax.tree.map(lambda prev, next: prev.astype(next.dtype), u_0, u_1)
        return _check_functions(stepper, residuum_fn, time_level_loss, u_0)

    residuum = _check_call("residuum_fn", residuum_fn, u_1, u_0)
    if not jax.tree.leaves(residuum):
        raise TypeError(f"residuum_fn must return at least one array, got {residuum!r}.")
    loss = _check_call("time_level_loss", time_level_loss, residuum)
    is_scalar = isinstance(loss, jax.ShapeDtypeStruct) and loss.ndim == 1
    if not is_scalar or _kind(loss.dtype) not in (jnp.floating, jnp.integer):
        got = jax.tree.map(_describe_sample, loss)
        raise TypeError(f"time_level_loss must return a real scalar, got {got}.")
    return u_0


def _check_call(name, function, *batched_args):
    """Returns the shapes of what one of the user's functions makes of a batch."""

    def checked(*args):
        result = function(*args)
        for path, leaf in jax.tree_util.tree_leaves_with_path(result):
            if not (_is_array(leaf) or isinstance(leaf, (bool, int, float, complex))):
                where = f" at {jax.tree_util.keystr(path)}" if path else ""
                raise TypeError(f"{name} must return arrays, got {_describe(leaf)}{where}.")
        return result

    try:
        return jax.eval_shape(jax.vmap(checked), *batched_args)
    except Exception as error:
        args = ", ".join(str(jax.tree.map(_describe_sample, arg)) for arg in batched_args)
        error.add_note(f"Raised when {name} was called on one sample: {name}({args}).")
        raise


def _check_next_leaf(path, prev, next):
    same_dtype = prev.dtype == next.dtype
    wider = _kind(prev.dtype) == _kind(next.dtype) and (
        next.dtype.itemsize > prev.dtype.itemsize
    )
    if prev.shape != next.shape or not (same_dtype or wider):
        raise TypeError(
            "stepper must return a state of the shapes and dtypes of its input: "
            f"u_prev{jax.tree_util.keystr(path)} is {_describe_sample(prev)}, "
            f"u_next{jax.tree_util.keystr(path)} is {_describe_sample(next)}."
        )
    return same_dtype


def _is_array(x):
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        return False
    try:
        return _kind(x.dtype) is not None
    except TypeError:  # the dtype of another library
        return False


def _kind(dtype):
    kinds = (jnp.floating, jnp.complexfloating, jnp.integer, jnp.bool, jax.dtypes.prng_key)
    return next((kind for kind in kinds if jnp.issubdtype(dtype, kind)), None)


def _describe(x):
    if _is_array(x):
        traced = "traced " if isinstance(x, Tracer) else ""
        return f"{traced}{x.dtype}{list(x.shape)}"
    return f"{reprlib.repr(x)} of type {type(x).__name__}"


def _describe_sample(x):
    return f"{x.dtype}{list(x.shape[1:])}"
