"""Half precision is accumulated in float32, single precision stays single, and parameters in a
wider format promote the state."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from residuum import Cuts, mse, residuum_loss
from test_residuum import (
    assert_close,
    BPTT,
    cuts_of,
    problem,
    rotation_loss,
    rotation_problem,
    SINGLE_TOLERANCE,
    textbook_loss,
    value_and_grad,
)
from tests.common import also_slow, config, slow


@pytest.mark.parametrize("bptt", also_slow("2", slowly=["none", "mask"]))
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_accumulates_in_float32(dtype, bptt):
    factor, data = rotation_problem(dtype, batch=512)
    options = dict(num_rollout_steps=5, cuts=cuts_of(5, bptt), has_aux=True)
    f = functools.partial(rotation_loss, residuum_loss, **options)
    (loss, rollout), grad = jax.jit(jax.value_and_grad(f, has_aux=True))(factor, data)
    chex.assert_type([loss, rollout.time_level_losses], jnp.float32)
    chex.assert_type([grad, rollout.final_state], dtype)

    # The reference is the mean of the same half-precision residuals over 512 samples, in
    # float64.
    factor, u, losses = np.asarray(factor), np.asarray(data[:, 0]), []
    for _ in range(5):
        u_next = u * factor / (1 + u * u)
        entries = (u_next - np.roll(u, 1, axis=-1)).astype(np.float64)
        losses.append(np.mean(entries**2))
        u = u_next
    # Between two operations, XLA may keep more precision than the format has, but never less.
    tolerance = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(loss, sum(losses), rtol=tolerance)


def test_a_half_precision_time_level_loss_is_averaged_in_float32():
    data = jnp.array([1, 1, 2], jnp.bfloat16)[:, None]  # bfloat16 has no number near 4 / 3
    loss = residuum_loss(lambda u: 2 * u, data, lambda n, p: n - p, time_level_loss=lambda r: r)
    assert_close(loss, jnp.float32(4 / 3), 1e-6)


def half_precision_problem(dtype, num_rollout_steps):
    """Returns a loss `(loss_fn, params, data)` of a rollout that neither dies out nor diverges,
    and its arguments."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(0.7 / 4 * rng.normal(size=(16, 16)), dtype)
    data = jnp.asarray(rng.normal(size=(4, 1, 16)), dtype)

    def loss(loss_fn, kernel, data, **options):
        half = jnp.asarray(0.5, kernel.dtype)
        stepper = lambda u: jnp.tanh(kernel @ u) + half * u + half
        options = dict(num_rollout_steps=num_rollout_steps, **options)
        return loss_fn(stepper, data, lambda n, p: n - half * p, **options)

    return loss, kernel, data


def errors_in_half_precision(dtype, loss_fn, num_rollout_steps, **options):
    """Returns the relative errors of the loss and of its gradient, in units of the format's
    machine epsilon."""
    loss, kernel, data = half_precision_problem(dtype, num_rollout_steps)
    f = jax.value_and_grad(functools.partial(loss, loss_fn, **options))
    actual = jax.jit(f)(kernel, data)
    chex.assert_type(actual[1], dtype)
    wide = (x.astype(jnp.float64) for x in (kernel, data))
    f = functools.partial(loss, residuum_loss, cuts=options.get("cuts", Cuts(bptt=True)))
    expected = jax.jit(jax.value_and_grad(f))(*wide)
    return [
        jnp.linalg.norm(x.astype(jnp.float64) - y) / jnp.linalg.norm(y) / jnp.finfo(dtype).eps
        for x, y in zip(actual, expected, strict=True)
    ]


@pytest.mark.parametrize("bptt", also_slow("every", slowly=["none", "9", "mask"]))
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_on_a_long_rollout(dtype, bptt):
    cuts = Cuts(np.ones(200, bool) if bptt == "mask" else BPTT[bptt])
    errors = errors_in_half_precision(dtype, residuum_loss, 200, cuts=cuts)
    assert max(errors) < 8


def scan_loss(stepper, data, residuum_fn, *, num_rollout_steps):
    """Cuts the rollout after every step, in a scan as one writes it by hand."""

    def step(u_prev, _):
        u_prev = jax.lax.stop_gradient(u_prev)
        u_next = jax.vmap(stepper)(u_prev)
        return u_next, mse(jax.vmap(residuum_fn)(u_next, u_prev))

    return jnp.sum(jax.lax.scan(step, data[:, 0], length=num_rollout_steps)[1])


@pytest.mark.parametrize("bptt", ["static", pytest.param("mask", marks=slow)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_thousand_segments_lose_no_small_contributions(dtype, bptt):
    cuts = Cuts(True if bptt == "static" else np.ones(1000, bool))
    _, error = errors_in_half_precision(dtype, residuum_loss, 1000, cuts=cuts)
    assert error < 4
    _, ordinary_error = errors_in_half_precision(dtype, scan_loss, 1000)
    assert ordinary_error > 10 * error


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_derivatives_in_a_direction_of_half_precision_are_summed_in_float32(dtype):
    """Derivatives along a half-precision direction of data and inputs are summed in float32.
    The gradients of data and inputs keep their own format. Rollouts without a cut do the
    same."""
    rng = np.random.default_rng(0)
    data, inputs = (jnp.asarray(rng.normal(size=(32, n, 64)), dtype) for n in (1, 5))

    def loss(data, inputs, bptt):
        stepper = lambda u, x: jnp.tanh(u) + x
        options = dict(num_rollout_steps=5, cuts=Cuts(bptt), inputs=inputs)
        return residuum_loss(stepper, data, lambda n, p, x: n - p * x, **options)

    def derivative(bptt):
        f = lambda *args: loss(*args, bptt)
        return jax.jvp(f, (data, inputs), (jnp.ones_like(data), jnp.ones_like(inputs)))[1]

    gradients = jax.grad(lambda *args: loss(*args, 1), (0, 1))(data, inputs)
    expected = sum(np.sum(np.asarray(g, np.float64)) for g in gradients)
    with config("jax_numpy_dtype_promotion", "strict"):
        actual = jax.jit(derivative, static_argnums=0)(1)
    np.testing.assert_allclose(actual, expected, rtol=2e-4)


@pytest.mark.parametrize("bptt", also_slow("3", slowly=["none", "every", "2", "9", "mask"]))
def test_wider_parameters_promote_the_initial_condition(bptt):
    factor, data = rotation_problem(jnp.float64)
    narrow = data.astype(jnp.float32)
    options = dict(num_rollout_steps=5, cuts=cuts_of(5, bptt))
    f = jax.value_and_grad(functools.partial(rotation_loss, residuum_loss, **options), (0, 1))
    loss, (grad, data_grad) = jax.jit(f)(factor, narrow)
    expected = jax.jit(f)(factor, narrow.astype(jnp.float64))
    assert_close((loss, grad), (expected[0], expected[1][0]))
    assert_close(data_grad, expected[1][1].astype(jnp.float32), 1e-6)


def test_weakly_typed_data_counts_as_what_it_is():
    # `jnp.full` makes a weakly typed float64 of a Python number. Combined with a float32, a
    # weak type would give way.
    weak = jnp.full((2, 1, 3), 0.3)
    assert weak.weak_type
    strong = jnp.asarray(weak, weak.dtype)
    kernel = jnp.arange(3, dtype=jnp.float32)

    def f(data):
        stepper = lambda u: jnp.sin(kernel * u)
        return residuum_loss(stepper, data, lambda n, p: n - p, num_rollout_steps=3)

    assert_close(jax.value_and_grad(f)(weak), jax.value_and_grad(f)(strong))


def test_promotion_goes_on_until_the_dtypes_settle():
    data = {"a": jnp.ones((2, 1, 3), jnp.float32), "b": jnp.ones((2, 1), jnp.float16)}

    def stepper(u):  # b widens a in the first step, and a widens b in the second
        return {"a": u["a"] * jnp.float64(2), "b": u["b"] + u["a"][0]}

    _, rollout = residuum_loss(
        stepper, data, lambda n, p: n["b"] - p["b"], num_rollout_steps=3, has_aux=True
    )
    chex.assert_type(jax.tree.leaves(rollout), jnp.float64)


def test_single_precision_without_x64():
    with config("jax_enable_x64", False):
        inputs = jax.tree.map(np.float32, jax.device_get(problem(5)))
        actual, expected = (
            jax.jit(functools.partial(value_and_grad, f, num_rollout_steps=5))(inputs)
            for f in (residuum_loss, textbook_loss)
        )
        chex.assert_type(jax.tree.leaves(actual), jnp.float32)
        assert_close(actual, expected, SINGLE_TOLERANCE)


def test_weights_are_any_array_like_and_leave_the_dtype_of_the_loss_alone():
    factor, data = rotation_problem(jnp.float32)
    weights = [1, 0.5, jnp.float32(0.25)]
    loss, half = (
        rotation_loss(residuum_loss, factor, data, num_rollout_steps=3, weights=np.asarray(w))
        for w in (np.asarray(weights, np.float32), np.asarray(weights, np.float16))
    )
    assert_close(loss, half)
    chex.assert_type(loss, jnp.float32)
    for weights in (np.array([3, 0, 1], np.uint8), [True, False, True]):
        loss, expected = (
            rotation_loss(residuum_loss, factor, data, num_rollout_steps=3, weights=w)
            for w in (weights, np.asarray(weights, np.float32))
        )
        assert_close(loss, expected)


@pytest.mark.parametrize("bptt", ["none", "every", "mask"])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32, jnp.complex64])
def test_wider_weights_widen_the_loss(dtype, bptt):
    """Wider weights widen the loss, as in the textbook loop. In float32, the first weight would
    be 0."""
    factor, data = rotation_problem(dtype)
    weights = np.array([1e-300, 2e-300, 3e-300])
    options = dict(num_rollout_steps=3, cuts=cuts_of(3, bptt), has_aux=True)

    def loss(weights):
        return rotation_loss(residuum_loss, factor, data, weights=weights, **options)

    # The stepper of complex states relies on implicit promotion.
    mode = "standard" if dtype == jnp.complex64 else "strict"
    with config("jax_numpy_dtype_promotion", mode):
        (value, rollout), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights)
    losses = np.asarray(rollout.time_level_losses)
    assert losses.dtype == np.float32
    np.testing.assert_allclose(value, weights @ losses, rtol=1e-12)
    np.testing.assert_allclose(grad, losses, rtol=1e-6)
    assert_close(loss(list(weights))[0], value)


@pytest.mark.parametrize("bptt", [False, 1, 5])
def test_a_hundred_thousand_steps_are_summed_to_the_last_digits(bptt):
    """The loss of a hundred thousand steps is exact to the last digits. For this problem with a
    cut after every step, a running sum in float32 has an error of 1e-3."""
    options = dict(num_rollout_steps=100_000, cuts=Cuts(bptt))

    def loss(w, dtype):
        data = jnp.asarray([[[0.3, 0.7]]], dtype)
        w = jnp.asarray(w, dtype)
        return residuum_loss(lambda u: jnp.cos(w * u), data, lambda n, p: n - p / 10, **options)

    expected = jax.jit(lambda: loss(0.9, jnp.float64))()
    derivatives = jax.jit(jax.value_and_grad(lambda w: loss(w, jnp.float32)))
    for actual in (jax.jit(lambda: loss(0.9, jnp.float32))(), derivatives(0.9)[0]):
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
    forward = lambda dtype: jax.jit(lambda: jax.jvp(lambda w: loss(w, dtype), (0.9,), (1.0,)))()
    if not bptt:  # the tangent of a cut rollout comes from a gradient
        np.testing.assert_allclose(forward(jnp.float32), forward(jnp.float64), rtol=1e-6)


def test_a_factor_outside_comes_after_an_overflow():
    """With static cuts, a factor outside the loss is applied only after an overflow in the
    gradient. With cuts as an array, the gradient is that of the textbook loop. The
    documentation says so."""

    def guarded(x, cuts):
        data = jnp.full((1, 1, 1), 1e19, jnp.float32)
        options = dict(num_rollout_steps=2, cuts=cuts)
        loss = residuum_loss(lambda u: x * u, data, lambda n, p: n - p / 2, **options)
        return jnp.where(jnp.isfinite(loss), loss, 0)

    x = jnp.float32(2)
    assert jax.grad(guarded)(x, Cuts([True, True])) == 0
    assert jnp.isnan(jax.grad(guarded)(x, Cuts(1)))


@pytest.mark.parametrize("bptt", [1, 2])
def test_loss_scaling_in_half_precision_belongs_in_the_weights(bptt):
    """Loss scaling in half precision belongs in the weights, because the gradient of a segment
    is rounded to float16 before a factor outside the loss is applied."""
    scale = 2.0**14
    data = jnp.full((1, 1, 64), 2.0**-13, jnp.float16)

    def loss(kernel, weights, factor):
        stepper = lambda u: kernel * u
        residuum_fn = lambda n, p: n - p / 2
        options = dict(num_rollout_steps=4, cuts=Cuts(bptt), weights=weights)
        return factor * residuum_loss(stepper, data, residuum_fn, **options)

    gradient = jax.grad(loss)
    kernel, ones = jnp.ones(64, jnp.float16), np.ones(4, np.float32)
    expected = gradient(kernel.astype(jnp.float32), ones, scale)
    actual = gradient(kernel, scale * ones, 1.0).astype(jnp.float32)
    np.testing.assert_allclose(actual, expected, rtol=5e-3)
    assert jnp.all(gradient(kernel, ones, scale) == 0)


@pytest.mark.parametrize("bptt", ["none", "2"])
def test_inputs_may_be_wider_and_narrower_than_the_loss(bptt):
    rng = np.random.default_rng(0)
    data = jnp.asarray(rng.normal(size=(2, 1, 3)), jnp.float32)
    inputs = jnp.asarray(rng.normal(size=3)), jnp.asarray([1.0, 0.5, 2.0], jnp.float16)

    def value_and_grad(loss_fn, *inputs):
        def loss(kernel, weights):
            stepper = lambda u: jnp.sin(kernel.astype(u.dtype) * u)
            options = dict(num_rollout_steps=3, cuts=cuts_of(3, bptt), weights=weights)
            return loss_fn(stepper, data, lambda n, p: n - p, **options)

        return jax.value_and_grad(loss, argnums=(0, 1))(*inputs)

    expected = jax.jit(functools.partial(value_and_grad, textbook_loss))(*inputs)
    with config("jax_numpy_dtype_promotion", "strict"):
        actual = jax.jit(functools.partial(value_and_grad, residuum_loss))(*inputs)
    assert_close(actual, expected, 2e-3)  # to the last digit of float16
    assert_close(actual[1][0], expected[1][0], 1e-3)
