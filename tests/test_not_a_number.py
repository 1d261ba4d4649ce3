"""A cut replaces the cotangent instead of multiplying it by zero, so NaN and infinity
downstream of a cut do not reach the gradient upstream. A rollout that diverges is a result and
not an error."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from residuum import Cuts, residuum_loss
from test_residuum import assert_close, BPTT, textbook_loss
from tests.common import also_slow, slow


@pytest.mark.parametrize(
    "options", also_slow({}, slowly=[{"checkpoint": True}, {"unroll": True}]), ids=str
)
@pytest.mark.parametrize("field", ["bptt", "prev", "next"])
def test_cuts_keep_infinite_derivatives_out(field, options):
    # √ has an infinite derivative at 0, which is the value of its argument here.
    def residuum_fn(u_next, u_prev):
        if field == "prev":
            return u_next + jnp.sqrt(u_prev - jax.lax.stop_gradient(u_prev))
        if field == "next":
            return u_prev + jnp.sqrt(u_next - jax.lax.stop_gradient(u_next))
        return u_next

    def value_and_grad(loss_fn, x, cut, **options):
        def loss(x):
            def stepper(u):
                if field == "bptt":
                    return jnp.cos(x) + jnp.sqrt(u - jax.lax.stop_gradient(u))
                return x * u

            data, cuts = jnp.ones((2, 1, 3)), Cuts(**{field: cut})
            more = dict(num_rollout_steps=4, cuts=cuts, **options)
            return loss_fn(stepper, data, residuum_fn, **more)

        return jax.value_and_grad(loss)(x)

    def all_of_them(x):
        ours = [value_and_grad(residuum_loss, x, cut, **options) for cut in cuts]
        return ours, value_and_grad(textbook_loss, x, True)

    cuts = [True, np.ones(4, bool), False]
    (*actual, without_a_cut), expected = jax.jit(all_of_them)(1.5)
    chex.assert_tree_all_finite(actual)
    assert_close(actual, [expected] * 2)
    # Without the cut, the gradient is not finite.
    assert not np.isfinite(without_a_cut[1])


@st.composite
def poisoned_rollouts(draw):
    """Draws cuts, and coefficients that are 0 only downstream of a cut, where √ is infinitely
    steep."""
    steps = draw(st.integers(1, 5))
    masks = st.lists(st.booleans(), min_size=steps, max_size=steps).map(np.array)
    cuts = Cuts(
        draw(st.booleans() | st.integers(1, 5) | masks),
        draw(st.booleans() | masks),
        draw(st.booleans() | masks),
    )
    every = cuts.bptt if isinstance(cuts.bptt, int) else 0  # True counts as 1, and False as 0
    after = np.array([every and (t + 1) % every == 0 for t in range(steps)], bool)
    after = cuts.bptt if isinstance(cuts.bptt, np.ndarray) else after
    before = np.concatenate([[False], after[:-1]])
    poison = {
        "stepper": draw(masks) & before,
        "prev": draw(masks) & (before | cuts.prev),
        "next": draw(masks) & cuts.next,
    }
    weights = draw(st.none() | st.lists(st.integers(-1, 1), min_size=steps, max_size=steps))
    coefficients = {name: np.where(mask, 0.0, 1.0) for name, mask in poison.items()}
    return coefficients, dict(num_rollout_steps=steps, cuts=cuts, weights=weights)


@slow
@settings(max_examples=20, deadline=None)
@given(poisoned_rollouts(), st.booleans(), st.sampled_from([1, 2, True]))
def test_what_a_cut_separates_stays_clean(rollout, checkpoint, unroll):
    coefficients, options = rollout
    data = {"u": np.linspace(0.5, 1, 6).reshape(2, 1, 3), "t": np.zeros((2, 1), int)}
    coefficients = jax.tree.map(jnp.asarray, coefficients)

    def loss(loss_fn, x, **more):
        def steep(name, state):  # 0, but with an infinite derivative where the coefficient is 0
            coefficient = coefficients[name][state["t"]]
            u = coefficient + state["u"] - jax.lax.stop_gradient(state["u"])
            return jnp.sqrt(u) - jnp.sqrt(coefficient)

        def stepper(state):
            return {"u": jnp.sin(x * state["u"]) + steep("stepper", state), "t": state["t"] + 1}

        def residuum_fn(u_next, u_prev):
            steep_next = steep("next", {"u": u_next["u"], "t": u_prev["t"]})
            return u_next["u"] + steep_next - u_prev["u"] * x - steep("prev", u_prev)

        return loss_fn(stepper, data, residuum_fn, **options, **more)

    f = functools.partial(loss, residuum_loss, checkpoint=checkpoint, unroll=unroll)
    actual = jax.jit(jax.value_and_grad(f))(1.3)
    chex.assert_tree_all_finite(actual)
    f = functools.partial(loss, textbook_loss)
    assert_close(actual, jax.jit(jax.value_and_grad(f))(1.3))


@pytest.mark.parametrize("bptt", BPTT)
def test_a_diverging_rollout_is_not_an_exception(bptt):
    def loss(x):
        options = dict(num_rollout_steps=50, cuts=Cuts(BPTT[bptt]))
        if bptt == "mask":
            options["cuts"] = Cuts(np.arange(50) % 3 == 0)
        data = jnp.full((2, 1, 3), 10.0)
        return residuum_loss(lambda u: x * u**3, data, lambda n, p: n - p, **options)

    assert not np.isfinite(jax.jit(loss)(2.0))
    assert not np.isfinite(jax.jit(jax.grad(loss))(2.0))
