"""The loss is the same when JAX is told to be strict about promotion of dtypes and ranks, NaN
and infinity, leaked tracers, or transfers, and also without `jit` and without float64."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from residuum import residuum_loss
from test_residuum import (
    assert_close,
    cuts_of,
    EXTRA,
    SINGLE_TOLERANCE,
    textbook_loss,
    TOLERANCE,
)
from tests.common import also_slow, config


CHECKS = {
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_debug_nans": True,
    "jax_debug_infs": True,
    "jax_check_tracer_leaks": True,
}
STRICT_MODES = [
    CHECKS,
    {"jax_disable_jit": True},
    {"jax_transfer_guard": "disallow"},
]
EACH_CHECK = [{"jax_enable_x64": False}, *({name: value} for name, value in CHECKS.items())]


@functools.cache
def loss_and_inputs(dtype, bptt):
    """Returns the loss `(loss_fn, kernel, weights, data)`, its inputs, and the expected
    results."""
    rng = np.random.default_rng(0)
    data = {
        "u": jnp.asarray(rng.normal(size=(2, 1, 3)), dtype),
        "key": jax.random.split(jax.random.key(0), (2, 1)),
    }
    kernel = jnp.asarray(rng.normal(size=3), dtype)
    weights = jnp.arange(1, 6, dtype=dtype)

    def loss(loss_fn, kernel, weights, data, **options):
        def stepper(state):
            key, _ = jax.random.split(state["key"])
            return {"u": jnp.tanh(kernel * state["u"]), "key": key}

        residuum_fn = lambda u_next, u_prev: u_next["u"] - jnp.sin(u_prev["u"])
        options = dict(num_rollout_steps=5, cuts=cuts_of(5, bptt, prev=True), **options)
        return loss_fn(stepper, data, residuum_fn, weights=weights, **options)

    args = (kernel, weights, data)
    return loss, args, jax.device_get(jax.jit(derivatives(loss, textbook_loss))(*args))


def derivatives(loss, loss_fn, **options):
    """Computes the value, the gradient, and a Hessian-vector product."""
    f = functools.partial(loss, loss_fn, **options)

    def of_args(kernel, *rest):
        grad = lambda kernel: jax.grad(f)(kernel, *rest)
        second_order = jax.jvp(grad, (kernel,), (kernel,))[1]
        return jax.value_and_grad(f, argnums=(0, 1))(kernel, *rest), second_order

    return of_args


@pytest.mark.parametrize("modes", also_slow(*STRICT_MODES, slowly=EACH_CHECK), ids=str)
@pytest.mark.parametrize("bptt", also_slow("3", slowly=["mask"]))
def test_strict_modes(bptt, modes):
    dtype = np.float32 if "jax_enable_x64" in modes else np.float64
    loss, args, expected = loss_and_inputs(dtype, bptt)
    expected_loss = expected[0][0]
    tolerance = TOLERANCE if dtype == np.float64 else SINGLE_TOLERANCE
    with contextlib.ExitStack() as stack:
        for mode in modes.items():
            stack.enter_context(config(*mode))

        @jax.jit
        def all_of_them(*args):
            loss_with_aux, _ = loss(residuum_loss, *args, has_aux=True)
            return loss_with_aux, [
                derivatives(loss, residuum_loss, **e)(*args) for e in EXTRA[:2]
            ]

        loss_with_aux, all_derivatives = jax.device_get(all_of_them(*args))
        assert_close(loss_with_aux, expected_loss, tolerance)
        for actual in all_derivatives:
            assert_close(actual, expected, tolerance)
        if "jax_transfer_guard" not in modes:  # the guard forbids constants outside `jit`
            actual = loss(residuum_loss, *args)
            assert_close(jax.device_get(actual), expected_loss, tolerance)
