"""The functions of the segmented scan are tested one by one, against ordinary differentiation.

These functions know nothing of residuals. Here they are compared with a plain loop that
contains a `stop_gradient`, on a step and arguments made for the purpose.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import residuum
from residuum import Arrays, Levels, Scanned
from test_residuum import assert_close
from tests.common import also_slow, slow


NUM_STEPS = 7


def call(params, state, x):
    """Takes one step. The state consists of a float, an integer and a complex array."""
    w, shift = params
    u, count, z = state
    is_cut, forcing = x
    u_next = jnp.tanh(u @ w + shift[count]) + z.real + forcing
    z_next = z * jnp.exp(1j * u) / 2
    term = jnp.mean(jnp.where(is_cut, jax.lax.stop_gradient(u), u) * u_next**2)
    return [u_next, count + 1, z_next], term + jnp.mean(jnp.abs(z_next - 1) ** 2)


STEP = residuum.Step(call, [False] * 3, jax.ShapeDtypeStruct((), float), is_streamable=True)


def loop(k=NUM_STEPS, checkpoint=0, unroll=1):
    return residuum.Loop(k, checkpoint, unroll)


def arguments():
    rng = np.random.default_rng(0)
    params = [rng.normal(size=(3, 3)), rng.normal(size=NUM_STEPS + 1)]
    z = rng.normal(size=(2, 3)) + 1j * rng.normal(size=(2, 3))
    state = [rng.normal(size=(2, 3)), np.int32(0), z]
    xs = np.arange(NUM_STEPS) % 3 == 0, rng.normal(size=(NUM_STEPS, 2, 3))
    levels = Levels(rng.normal(size=NUM_STEPS), xs)
    return jax.tree.map(jnp.asarray, Arrays(params, state, levels))


def plain_loop(k, arrays):
    """Runs the scan as a Python loop that cuts the state after every `k`-th step."""
    params, state, levels = arrays
    total, terms = 0.0, []
    for t in range(len(levels.weights)):
        weight, x = jax.tree.map(lambda x, t=t: x[t], levels)
        state, term = call(params, state, x)
        state = jax.lax.stop_gradient(state) if (t + 1) % k == 0 else state
        total += weight * term
        terms.append(term)
    return Scanned(total, jnp.stack(terms), state)


UNCUT = NUM_STEPS + 1


@pytest.mark.parametrize("checkpoint", [0, 1, 3])
@pytest.mark.parametrize("unroll", [1, NUM_STEPS])
def test_a_plain_scan_is_the_loop(unroll, checkpoint):
    options = loop(unroll=unroll, checkpoint=checkpoint)
    actual = residuum._plain_scan(STEP, options, arguments())
    assert_close(actual, plain_loop(UNCUT, arguments()))


PIECES = {  # (number of levels, length of a piece): the length of each piece
    (7, 3): [3, 3, 1],
    (6, 3): [3, 3],
    (2, 3): [2],
    (17, 6): [6, 6, 5],
}


@pytest.mark.parametrize("unroll", [1, 20])
@pytest.mark.parametrize("num_steps, length", PIECES)
def test_pieces_are_all_levels_in_order(num_steps, length, unroll):
    levels = Levels(jnp.arange(1.0, num_steps + 1), ())

    def body(carry, piece):
        carry = 100 * carry + piece.weights[0]
        return carry, (piece.weights, jnp.full_like(piece.weights, len(piece.weights)))

    _, outputs = residuum._scan_pieces(body, 0.0, levels, length, unroll)
    lengths = [n for n in PIECES[num_steps, length] for _ in range(n)]
    assert_close(outputs, (levels.weights, jnp.array(lengths, float)))


def marks(matrix=False, u=False, z=False, levels=False):
    """Marks the leaves with respect to which the gradient is taken. A shift, an integer or a
    mask is never marked."""
    return Arrays([matrix, False], [u, False, z], Levels(levels, (False, levels)))


WRT = list(itertools.product([False, True], repeat=4))


@pytest.mark.parametrize("wrt", also_slow(WRT[8], WRT[15], slowly=WRT[:8] + WRT[9:15]), ids=str)
@pytest.mark.parametrize("k", also_slow(3, slowly=[1, 2, NUM_STEPS - 1]))
def test_value_and_gradient_of_all_segments(k, wrt):
    """The value and the gradient are exact for every choice of variables among the matrix, u,
    z, and the weights and inputs together."""
    wrt = marks(*wrt)
    variables, constants = residuum._partition(arguments(), wrt)

    def total(variables):
        scanned = plain_loop(k, residuum._combine(variables, constants))
        return scanned.total, scanned

    (_, expected), expected_grad = jax.value_and_grad(total, has_aux=True)(variables)
    f = functools.partial(residuum._segments_and_grad, STEP, loop(k), wrt)
    assert_close(jax.jit(f)(arguments()), (expected, expected_grad))


def test_one_segment_moves_the_state_and_adds_to_the_sums():
    params, state, levels = arguments()
    one = jnp.ones(())
    sums = residuum.Sums(state, one, 0 * one, [jnp.ones_like(params[0]), None])
    f = functools.partial(residuum._accumulate, STEP, loop(), params, marks(matrix=True))
    (next_state, total, _, grad), (terms, levels_grad), state_grad = f(sums, levels)
    total_of = lambda w: plain_loop(UNCUT, Arrays([w, params[1]], state, levels))
    expected = total_of(params[0])
    expected_grad = jax.grad(lambda w: total_of(w).total)(params[0])
    assert_close((total, grad), (1 + expected.total, [1 + expected_grad, None]))
    assert_close((terms, next_state), (expected.terms, expected.state))
    assert jax.tree.leaves((levels_grad, state_grad)) == []


def test_the_state_after_a_segment_has_no_gradient():
    """The state after a segment has no gradient. Otherwise second derivatives would see through
    the cut."""
    params, state, levels = arguments()

    def first_leaf(params):
        segment = residuum._segment(STEP, loop(), Arrays(params, state, levels))
        return jnp.sum(segment.state[0])

    assert_close(jax.grad(first_leaf)(params), jax.tree.map(jnp.zeros_like, params))


def differentiable(k, x, scan):
    """Runs the scan as a function of the arguments that are neither integers nor bools."""
    _, state, levels = arguments()
    w, shift, u, z, weights, forcing = x
    levels = Levels(weights, (levels.xs[0], forcing))
    return scan(k, Arrays([w, shift], [u, state[1], z], levels))


def streamed(k, arrays):
    return residuum._streamed_scan(STEP, loop(k), arrays)


def point():
    params, state, levels = arguments()
    return [*params, state[0], state[2], levels.weights, levels.xs[1]]


@pytest.mark.parametrize("k, twice", [(3, False), pytest.param(1, True, marks=slow)])
def test_jvp_and_vjp_are_those_of_the_plain_loop(k, twice):
    x, tangents = point(), [jnp.cos(x) for x in point()]

    def derivatives(x, scan):
        total = lambda x: differentiable(k, x, scan).total
        squared_norm = lambda x: sum(jnp.sum(jnp.abs(g) ** 2) for g in jax.grad(total)(x))
        forward = jax.jvp(total, (x,), (tangents,))
        reverse = jax.vjp(total, x)[1](1.5)
        forward_over_reverse = jax.jvp(jax.grad(total), (x,), (tangents,))
        reverse_over_reverse = jax.grad(squared_norm)(x) if twice else None
        return forward, reverse, forward_over_reverse, reverse_over_reverse

    both = jax.jit(lambda x: [derivatives(x, scan) for scan in (streamed, plain_loop)])
    assert_close(*both(x))


def test_only_the_total_has_a_tangent():
    x, tangents = point(), [jnp.cos(x) for x in point()]
    _, dot = jax.jvp(lambda x: differentiable(2, x, streamed), (x,), (tangents,))
    assert dot.total != 0
    rest = jax.tree.leaves((dot.terms, dot.state))
    floats = [x for x in rest if x.dtype != jax.dtypes.float0]
    assert len(floats) == 3
    assert_close(floats, [jnp.zeros_like(x) for x in floats])


@pytest.mark.parametrize("terms", [[3e38, 3e38, 1.0], [np.inf, 1.0], [1.0, np.nan, 1.0]])
def test_a_sum_overflows_as_any_sum(terms):
    total, excess = jnp.zeros((2,), jnp.float32)
    for term in terms:
        total, excess = residuum._add(total, excess, jnp.float32(term))
    with np.errstate(over="ignore"):
        expected = sum(map(np.float32, terms), np.float32(0))
    np.testing.assert_equal(float(total), float(expected))
