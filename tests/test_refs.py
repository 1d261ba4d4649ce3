"""A `jax.Ref` that a function creates for itself works as in the textbook loop. A `jax.Ref`
from outside raises an error that says what to do."""

import jax
import jax.numpy as jnp
import pytest

from residuum import Cuts, residuum_loss
from test_residuum import assert_as_textbook
from tests.common import also_slow


pytestmark = pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="needs a newer JAX")


def difference(u_next, u_prev):
    return u_next - u_prev


def through_a_ref(u):
    """Computes the sine of `u` in place."""
    ref = jax.new_ref(u)
    ref[...] = jnp.sin(ref[...])
    return ref[...]


@pytest.mark.parametrize("bptt", also_slow(False, 1, slowly=[2, 3, [True, False, True, False]]))
@pytest.mark.parametrize("where", ["stepper", "residuum"])
def test_a_function_may_make_a_ref(where, bptt):
    data = jnp.linspace(0, 1, 6).reshape(2, 1, 3)

    def derivatives(loss_fn, x, data):
        def loss(x, data, **options):
            in_stepper = through_a_ref if where == "stepper" else jnp.sin
            in_residuum = through_a_ref if where == "residuum" else jnp.cos
            stepper = lambda u: in_stepper(x * u)
            residuum_fn = lambda n, p: in_residuum(n) - p
            options = dict(num_rollout_steps=4, cuts=Cuts(bptt))
            return loss_fn(stepper, data, residuum_fn, **options)

        gradient = jax.grad(loss, (0, 1))
        second = jax.jvp(lambda x: gradient(x, data), (x,), (x,))
        return loss(x, data), gradient(x, data), second

    extra = [{}, {"checkpoint": True}, {"unroll": True}]
    assert_as_textbook(derivatives, jnp.float64(1.2), data, extra=extra)


@pytest.mark.parametrize("num_rollout_steps", [1, 3])
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_ref_cannot_be_closed_over(where, num_rollout_steps):
    outside = jax.new_ref(jnp.arange(3.0))

    def loss(x):
        ref = jax.new_ref(jnp.arange(3.0)) if where == "inside" else outside
        options = dict(num_rollout_steps=num_rollout_steps, cuts=Cuts(bptt=1))
        return residuum_loss(
            lambda u: x * u * ref[...], jnp.ones((2, 1, 3)), difference, **options
        )

    for f in (loss, jax.grad(loss), jax.jit(jax.grad(loss))):
        with pytest.raises(TypeError, match=r"jax.Ref cannot be closed over.*ref\[\.\.\.\]"):
            f(2.0)
