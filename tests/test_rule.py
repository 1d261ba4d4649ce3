"""The streaming rule by itself, its parts one by one against ordinary differentiation.

`_value_and_grad`, `_advance` and the derivative rule are functions of arrays. Here they meet
the plain loop with a `stop_gradient` in it, on arguments made for the purpose.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import residuum
from test_residuum import also_slow, assert_close, slow


NUM_STEPS = 7


def step(closed_over, u, masks, inputs):
    """A time step of a batch: a state of a float, an integer and a complex array."""
    w, shift = closed_over
    x, count, z = u
    x_next = jnp.tanh(x @ w + shift[count]) + z.real + inputs[0]
    z_next = z * jnp.exp(1j * x) / 2
    loss = jnp.mean(jnp.where(masks["prev"], jax.lax.stop_gradient(x), x) * x_next**2)
    return [x_next, count + 1, z_next], loss + jnp.mean(jnp.abs(z_next - 1) ** 2)


def loop(k=NUM_STEPS, unroll=1):
    return residuum.Loop(step, [False] * 3, k, 0, unroll)


def arguments():
    rng = np.random.default_rng(0)
    closed_over = [rng.normal(size=(3, 3)), rng.normal(size=NUM_STEPS + 1)]
    z = rng.normal(size=(2, 3)) + 1j * rng.normal(size=(2, 3))
    u = [rng.normal(size=(2, 3)), np.int32(0), z]
    masks = {"prev": np.arange(NUM_STEPS) % 3 == 0}
    weights, inputs = rng.normal(size=NUM_STEPS), [rng.normal(size=(NUM_STEPS, 2, 3))]
    levels = residuum.Levels(weights, masks, inputs)
    return jax.tree.map(jnp.asarray, (closed_over, u, levels))


def plain_rollout(k, closed_over, u, levels):
    """The rollout as a loop, with the state cut after every `k`-th step."""
    loss, losses = 0.0, []
    for t in range(NUM_STEPS):
        _, masks, inputs = jax.tree.map(lambda x, t=t: x[t], levels)
        u, level_loss = step(closed_over, u, masks, inputs)
        u = jax.lax.stop_gradient(u) if (t + 1) % k == 0 else u
        loss += levels.weights[t] * level_loss
        losses.append(level_loss)
    return loss, (jnp.stack(losses), u)


@pytest.mark.parametrize("unroll", [1, NUM_STEPS])
def test_a_rollout_is_the_loop(unroll):
    actual = residuum._rollout(loop(unroll=unroll), *arguments())
    assert_close(actual, plain_rollout(NUM_STEPS + 1, *arguments()))


CHUNKS = {  # of how many steps, in blocks of how many, how many first: the shapes
    (7, 3, 0): [(2, 3), (1, 1)],
    (7, 3, 3): [(1, 3), (1, 3), (1, 1)],
    (6, 3, 3): [(1, 3), (1, 3)],
    (2, 3, 0): [(1, 2)],
    (17, 6, 0): [(2, 6), (1, 5)],  # a set of Python has 17 before 12
}


@pytest.mark.parametrize("steps, length, first", CHUNKS)
def test_chunks_are_all_levels_in_order(steps, length, first):
    levels = residuum.Levels(jnp.arange(steps), {}, [])
    chunks = [chunk.weights for chunk in residuum._chunks(levels, length, first)]
    assert [chunk.shape for chunk in chunks] == CHUNKS[steps, length, first]
    assert_close(residuum._merge(chunks), levels.weights)


def marks(matrix=False, x=False, z=False, levels=False):
    """What the gradient is taken with respect to; never a shift, an integer or a mask."""
    return [matrix, False], [x, False, z], residuum.Levels(levels, {"prev": False}, [levels])


WRT = list(itertools.product([False, True], repeat=4))


@pytest.mark.parametrize("wrt", also_slow(WRT[8], WRT[15], slowly=WRT[:8] + WRT[9:15]), ids=str)
@pytest.mark.parametrize("k", also_slow(3, slowly=[1, 2, NUM_STEPS - 1]))
def test_value_and_gradient_of_all_segments(k, wrt):
    """With respect to the matrix, to x, to z, to weights and inputs, or not."""
    wrt = marks(*wrt)
    variables, constants = residuum._partition(arguments(), wrt)

    def loss(variables):
        return plain_rollout(k, *residuum._combine(variables, constants))

    expected = jax.value_and_grad(loss, has_aux=True)(variables)
    actual = jax.jit(functools.partial(residuum._value_and_grad, loop(k), wrt))(*arguments())
    assert_close(actual, expected)


def test_one_segment_moves_the_state_and_adds_to_the_sums():
    closed_over, u, levels = arguments()
    sums = jax.tree.map(lambda x: 1 + jnp.zeros_like(x), (levels.weights[0], closed_over))
    wrt = [True, True], [False] * 3, jax.tree.map(lambda _: False, levels)
    actual = residuum._advance(loop(), wrt, closed_over, (u, sums), levels)
    (u_next, (loss, grads)), (losses, u_grads, level_grads) = actual
    loss_of = lambda closed_over: plain_rollout(NUM_STEPS + 1, closed_over, u, levels)
    (expected, aux), expected_grads = jax.value_and_grad(loss_of, has_aux=True)(closed_over)
    assert_close((loss, grads), (1 + expected, [1 + grad for grad in expected_grads]))
    assert_close((losses, u_next), aux)
    assert jax.tree.leaves((u_grads, level_grads)) == []


def test_the_state_after_a_segment_has_no_gradient():
    """Or derivatives of second order would see through the cut."""
    _, u, levels = arguments()

    def state(closed_over):
        carry = u, (levels.weights[0], [None, None])
        (u_next, _), _ = residuum._advance(loop(), marks(), closed_over, carry, levels)
        return jnp.sum(u_next[0])

    closed_over, _, _ = arguments()
    grads = jax.grad(state)(closed_over)
    assert_close(grads, jax.tree.map(jnp.zeros_like, grads))


def differentiable(k, x, streamed):
    """The loss as a function of the arguments that are not integers or bools."""
    _, u, levels = arguments()
    w, shift, u_0, z, weights, inputs = x
    levels = levels._replace(weights=weights, inputs=[inputs])
    args = [w, shift], [u_0, u[1], z], levels
    return residuum._streamed_rollout(loop(k), *args) if streamed else plain_rollout(k, *args)


def point():
    closed_over, u, levels = arguments()
    return [*closed_over, u[0], u[2], levels.weights, *levels.inputs]


@pytest.mark.parametrize("k, twice", [(3, False), pytest.param(1, True, marks=slow)])
def test_jvp_and_vjp_are_those_of_the_plain_rollout(k, twice):
    x, tangents = point(), [jnp.cos(x) for x in point()]

    def derivatives(x, streamed):
        loss = lambda x: differentiable(k, x, streamed)[0]
        squared_norm = lambda x: sum(jnp.sum(jnp.abs(g) ** 2) for g in jax.grad(loss)(x))
        forward = jax.jvp(loss, (x,), (tangents,))
        reverse = jax.vjp(loss, x)[1](1.5)
        forward_over_reverse = jax.jvp(jax.grad(loss), (x,), (tangents,))
        reverse_over_reverse = jax.grad(squared_norm)(x) if twice else None
        return forward, reverse, forward_over_reverse, reverse_over_reverse

    actual, expected = (jax.jit(derivatives, static_argnums=1)(x, s) for s in (True, False))
    assert_close(actual, expected)


def test_what_else_is_returned_has_no_tangent():
    x, tangents = point(), [jnp.cos(x) for x in point()]
    _, (_, aux_dot) = jax.jvp(lambda x: differentiable(2, x, True), (x,), (tangents,))
    floats = [x for x in jax.tree.leaves(aux_dot) if x.dtype != jax.dtypes.float0]
    assert len(floats) == 3
    assert_close(floats, [jnp.zeros_like(x) for x in floats])
