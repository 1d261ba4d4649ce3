"""The loss goes through JAX's transformations, and so do the functions and arrays that it is
given.

Each derivative equals that of the textbook loop, in whatever order grad, jit, vmap, scan, cond
and checkpoint are put around it, and whichever of these the stepper itself uses.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import export

from residuum import residuum_loss
from test_residuum import (
    assert_as_textbook,
    assert_close,
    cuts_of,
    evaluate,
    flat_problem,
    problem,
    textbook_loss,
    value_and_grad,
)
from tests.common import also_slow, slow


TRANSFORMATIONS = {
    "grad": jax.grad,
    "jit of grad": lambda f: jax.jit(jax.grad(f)),
    "grad of jit": lambda f: jax.grad(jax.jit(f)),
    "grad of checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
    "vmap of grad": lambda f: lambda x: jax.vmap(jax.grad(f))(x[None] + jnp.eye(2, 1)),
    "grad of vmap": lambda f: jax.grad(
        lambda x: jnp.sum(jax.vmap(f)(x[None] * jnp.arange(3.0)[:, None]))
    ),
    "grad of scan": lambda f: jax.grad(
        lambda x: jax.lax.scan(lambda c, s: (c + f(s * x), None), 0.0, jnp.arange(3.0))[0]
    ),
    "grad of cond": lambda f: jax.grad(lambda x: jax.lax.cond(x[0] > 9, jnp.sum, f, x)),
}


@pytest.mark.parametrize("bptt", also_slow("2", slowly=["mask"]))
@pytest.mark.parametrize(
    "name",
    also_slow(
        *("jit of grad", "grad of jit", "vmap of grad", "grad of scan"),
        slowly=["grad", "grad of vmap", "grad of cond", "grad of checkpoint"],
    ),
)
def test_composes_with(name, bptt):
    flat, loss = flat_problem(num_rollout_steps=3, cuts=cuts_of(3, bptt))
    transform = TRANSFORMATIONS[name]
    expected = jax.jit(transform(functools.partial(loss, textbook_loss)))(flat)
    actual = transform(functools.partial(loss, residuum_loss))
    # A transformation that begins with `jit` is compiled already.
    assert_close((actual if "jit" in name else jax.jit(actual))(flat), expected)


@pytest.mark.parametrize("bptt", also_slow("2", slowly=["none", "mask"]))
@pytest.mark.parametrize(
    "transform", also_slow("grad of jit", slowly=["jit of grad", "grad of checkpoint"])
)
def test_closures_over_traced_ints_and_keys(transform, bptt):
    options = dict(num_rollout_steps=5, cuts=cuts_of(5, bptt))
    data = jax.random.normal(jax.random.key(0), (2, 1, 3))

    def loss(loss_fn, x, shift, key):
        noise = jax.random.normal(key, (3,))

        def stepper(u):
            drawn = jax.random.normal(jax.random.fold_in(key, shift), (3,))
            return jnp.sin(x * jnp.roll(u, shift) + noise + drawn)

        return loss_fn(stepper, data, lambda n, p: n - x * jnp.roll(p, 2 * shift), **options)

    def of_x(loss_fn, x, shift, seed):
        # `shift` and the key are traced wherever the transformation traces.
        f = lambda x: loss(loss_fn, x, shift, jax.random.key(seed))
        return TRANSFORMATIONS[transform](f)(x)

    assert_as_textbook(of_x, jnp.arange(3.0), 1, 7)


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))

STEPPERS = {
    "jit": lambda x, u: jax.jit(lambda u: jnp.sin(x * u))(u),
    "custom_vjp": lambda x, u: sine(x * u),
    "checkpoint": lambda x, u: jax.checkpoint(lambda u: jnp.sin(x * u))(u),
    "cond": lambda x, u: jax.lax.cond(u[0] > 0, jnp.sin, jnp.cos, x * u),
    "fori_loop": lambda x, u: jax.lax.fori_loop(0, 2, lambda _, u: jnp.sin(x * u), u),
    "debug": lambda x, u: (jax.debug.callback(lambda _: None, u), jnp.sin(x * u))[1],
}


@slow
@pytest.mark.parametrize("bptt", ["2", "none"])
@pytest.mark.parametrize("name", STEPPERS)
def test_steppers_that_use_transformations(name, bptt):
    def loss(loss_fn, x):
        options = dict(num_rollout_steps=3, cuts=cuts_of(3, bptt))
        data = jnp.linspace(-1, 1, 6).reshape(2, 1, 3)
        stepper = functools.partial(STEPPERS[name], x)
        return loss_fn(stepper, data, lambda n, p: n - x * p, **options)

    x = jnp.arange(1.0, 4.0)
    expected = jax.jit(jax.grad(functools.partial(loss, textbook_loss)))(x)
    for f in (jax.grad(loss, 1), jax.grad(jax.jit(loss, static_argnums=0), 1)):
        assert_close(f(residuum_loss, x), expected)


@pytest.mark.parametrize("bptt", also_slow("2", slowly=["none", "mask"]))
def test_export_round_trips_a_gradient(bptt):
    inputs = problem(5)
    gradient = lambda loss_fn, inputs: value_and_grad(
        loss_fn, inputs, num_rollout_steps=5, cuts=cuts_of(5, bptt)
    )
    exported = export.export(jax.jit(functools.partial(gradient, residuum_loss)))(inputs)
    actual = exported.call(inputs)
    assert_close(actual, jax.jit(functools.partial(gradient, textbook_loss))(inputs))


@pytest.mark.parametrize("bptt", also_slow("2", slowly=["none", "mask"]))
def test_a_training_step_may_donate_its_buffers(bptt):
    params, *rest = problem(5)
    options = dict(num_rollout_steps=5, cuts=cuts_of(5, bptt))

    def training_step(loss_fn, params):
        loss = lambda params: evaluate(loss_fn, params, *rest, **options)
        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    step = jax.jit(functools.partial(training_step, residuum_loss), donate_argnums=0)
    expected_step = jax.jit(functools.partial(training_step, textbook_loss))
    donated, expected = jax.tree.map(jnp.copy, params), params
    for _ in range(3):
        consumed = donated
        value, donated = step(donated)
        expected_value, expected = expected_step(expected)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(consumed))
        # Copies are compared, since a view that NumPy holds may keep a buffer from being
        # donated.
        copies = jax.tree.map(jnp.copy, (value, donated))
        assert_close(copies, (expected_value, expected))
