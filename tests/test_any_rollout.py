"""Value and gradient equal those of the textbook loop for any state, batch, rollout length and
cut, and for any way of running the loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from residuum import Cuts, residuum_loss
from test_residuum import (
    assert_as_textbook,
    assert_close,
    MASK,
    problem,
    textbook_loss,
    value_and_grad,
)
from tests.common import also_slow, slow


@pytest.mark.parametrize("bptt", also_slow(3, slowly=[False, 2]))
def test_unroll_that_does_not_divide_equals_the_textbook_loop(bptt):
    f = functools.partial(value_and_grad, num_rollout_steps=7, cuts=Cuts(bptt))
    extra = [dict(unroll=unroll) for unroll in (2, 3, 4, 9)]
    assert_as_textbook(f, problem(7), extra=extra)


@pytest.mark.parametrize("every", also_slow(3, slowly=[1, 2, 4, 7, 9]))
@pytest.mark.parametrize("bptt", also_slow(False, slowly=[True, 3, 6]))
def test_every_kth_state_stored_equals_the_textbook_loop(bptt, every):
    """Storing every `every`-th state changes no value and no gradient, whether or not `every`
    divides the seven steps or the segment, and if it exceeds them. The steps run in a loop, in
    unrolled code, in blocks that are loops of unrolled code, and with several blocks per
    iteration."""
    f = functools.partial(value_and_grad, num_rollout_steps=7, cuts=Cuts(bptt, next=MASK))
    extra = [dict(checkpoint=every, unroll=unroll) for unroll in (1, True, every, 2 * every)]
    assert_as_textbook(f, problem(7), extra=extra)


@st.composite
def rollouts(draw):
    """Draws a state with any tree and any shapes, and valid options."""
    shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)
    tree = draw(
        st.recursive(
            shapes.map(lambda shape: {"leaf": shape}),
            lambda inner: (
                st.lists(inner, min_size=1, max_size=2)
                | st.dictionaries(st.sampled_from("ab"), inner, min_size=1)
            ),
            max_leaves=4,
        )
    )
    batch, num_snapshots, steps = (draw(st.integers(1, 4)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    data = jax.tree.map(
        lambda shape: rng.normal(size=(batch, num_snapshots, *shape)),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    mask = st.lists(st.booleans(), min_size=steps, max_size=steps).map(np.array)
    flag = st.booleans() | st.booleans().map(np.array) | mask
    cuts = Cuts(draw(st.booleans() | st.integers(1, 5) | mask), draw(flag), draw(flag))
    weights = draw(st.none() | st.just(rng.normal(size=steps)))
    return data, dict(num_rollout_steps=steps, cuts=cuts, weights=weights)


@slow
@settings(max_examples=30, deadline=None)
@given(rollouts(), st.integers(1, 5) | st.booleans(), st.integers(1, 3) | st.booleans())
def test_any_rollout_equals_the_textbook_loop(rollout, checkpoint, unroll):
    data, options = rollout

    def loss(loss_fn, scale, data, **more):
        def stepper(u):
            total = sum(jnp.mean(leaf) for leaf in jax.tree.leaves(u))
            return jax.tree.map(lambda leaf: jnp.sin(scale * leaf + total), u)

        def residuum_fn(u_next, u_prev):
            return jax.tree.map(lambda n, p: n * p - jnp.cos(scale * p), u_next, u_prev)

        return loss_fn(stepper, data, residuum_fn, **options, **more)

    def evaluate(loss_fn, **more):
        f = functools.partial(loss, loss_fn, **more)
        return jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(jnp.float64(1.3), data)

    actual = evaluate(residuum_loss, checkpoint=checkpoint, unroll=unroll)
    assert_close(actual, evaluate(textbook_loss))
