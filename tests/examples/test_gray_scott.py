"""The residual of examples/gray_scott.py is that of its solver, its scales are those of its
states, and its emulator starts as the identity."""

import equinox as eqx
import gray_scott as example
import jax
import jax.numpy as jnp
import pytest
from gray_scott import Emulator, State

from residuum import residuum_loss
from tests.common import config, slow


def in_float64(tree):
    cast = lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x
    return jax.tree.map(cast, tree)


@pytest.fixture(scope="module")
def states():
    """Returns patterns in float64, at four rates."""
    seeds = in_float64(example.random_states(jax.random.key(0), 4))
    step = lambda states, _: (jax.vmap(example.solver)(states), None)
    return jax.jit(lambda states: jax.lax.scan(step, states, length=100)[0])(seeds)


def persistence(state):
    return state


@pytest.mark.parametrize("residuum_fn", [example.imex_euler, example.scaled_residual])
def test_the_solvers_own_steps_have_no_residual(states, residuum_fn):
    data = jax.tree.map(lambda x: x[:, None], states)
    assert residuum_loss(example.solver, data, residuum_fn, num_rollout_steps=3) < 1e-18
    assert residuum_loss(persistence, data, residuum_fn) > 1e-8


def test_the_laplacian_is_that_of_its_symbol(states):
    spectral = jnp.fft.irfft2(example.LAPLACIAN * jnp.fft.rfft2(states.fields))
    assert jnp.allclose(jax.vmap(example.laplacian)(states.fields), spectral, atol=1e-12)


def test_a_step_is_consistent_with_the_equation():
    """A step is consistent with the equation. Uniform fields do not diffuse, so their step is
    explicit Euler for the reaction."""
    u, v, feed, kill = 0.6, 0.2, 0.04, 0.06
    shape = (2, example.NUM_POINTS, example.NUM_POINTS)
    uniform = jnp.ones(shape) * jnp.array([u, v])[:, None, None]
    u_next, v_next = example.solver(State(uniform, jnp.array([feed, kill]))).fields
    assert jnp.allclose(u_next, u + feed * (1 - u) - u * v * v, atol=1e-12)
    assert jnp.allclose(v_next, v + u * v * v - (feed + kill) * v, atol=1e-12)


@slow
def test_initial_conditions_are_what_patterns_grow_from():
    states = example.random_states(jax.random.key(0), 256)
    u, v = jnp.moveaxis(states.fields, 1, 0)
    assert jnp.all((u > 0) & (u <= 1) & (v >= 0) & (v < 0.5))
    for rates, low, high in zip(
        states.rates.T, example.LOWEST_RATES, example.HIGHEST_RATES, strict=True
    ):
        assert jnp.all((rates > low) & (rates < high))
        assert jnp.ptp(rates) > 0.9 * (high - low)
    assert len(jnp.unique(states.rates)) == 512  # each sample has its own rate


def test_the_residual_is_the_difference_to_the_solver_in_units_of_a_change(states):
    """The residual is exactly the difference to the solver, in units of one step's change,
    because the implicit part of the step is linear and is inverted as a whole."""
    shifted = State(jnp.roll(states.fields, 1, axis=-1) ** 2, states.rates)
    residual = jax.vmap(example.scaled_residual)(shifted, states)
    difference = shifted.fields - jax.vmap(example.solver)(states).fields
    assert jnp.allclose(residual * example.CHANGE_SIZE, difference, atol=1e-12)
    unconditioned = jax.vmap(example.imex_euler)(shifted, states)
    assert not jnp.allclose(unconditioned, difference, atol=1e-3)


@slow
def test_persistence_has_a_loss_of_about_one_in_each_field(states):
    seeds = example.random_states(jax.random.key(0), 64)
    for start in (states, seeds):
        residual = jax.vmap(example.scaled_residual)(start, start)
        assert jnp.all(jnp.abs(jnp.log(jnp.mean(residual**2, axis=(0, 2, 3)))) < jnp.log(4))


def test_the_input_of_the_network_is_of_order_one(states):
    fields = (states.fields - example.FIELD_MEAN) / example.FIELD_SIZE
    assert jnp.all(jnp.abs(jnp.mean(fields, axis=(0, 2, 3))) < 0.5)
    assert jnp.all(jnp.abs(jnp.log(jnp.std(fields, axis=(0, 2, 3)))) < jnp.log(1.5))


@slow
@config("jax_enable_x64", False)
def test_the_emulator_starts_as_the_identity_and_receives_the_rates():
    states = example.random_states(jax.random.key(0), 2)
    other = State(states.fields, states.rates + 1e-3)
    emulator = Emulator(jax.random.key(1))
    assert (jax.jit(jax.vmap(emulator))(states).fields == states.fields).all()
    trained = eqx.tree_at(lambda x: x.network.layers[-1].weight, emulator, replace_fn=jnp.cos)
    for stepper in (trained, example.solver):
        next_states, next_other = (jax.jit(jax.vmap(stepper))(x) for x in (states, other))
        assert (next_states.rates == states.rates).all()
        assert not jnp.allclose(next_states.fields, next_other.fields, atol=1e-6)


def test_errors_are_relative_to_the_solver_by_field(states, monkeypatch):
    monkeypatch.setattr(example, "TEST_STEPS", 2)

    def doubling(state):  # v is 100 % off after the first step
        u, v = example.solver(state).fields
        return State(jnp.stack([u, 2 * v]), state.rates)

    fields, errors = example.evaluate(doubling, states)
    assert {x.shape for x in fields.values()} == {(4, 3, *states.fields.shape[1:])}
    after = jax.vmap(example.solver)(states).fields
    size = jnp.linalg.norm(after.reshape(4, 2, -1), axis=2)  # [sample, field]
    expected = {"u": 0.0, "v": 1.0, "u and v": jnp.mean(size[:, 1] / jnp.hypot(*size.T))}
    for field, error in expected.items():
        assert jnp.allclose(errors[f"{field}, emulator"][:2], jnp.array([0, error]))
    change = jnp.linalg.norm((after - states.fields).reshape(4, 2, -1), axis=2)
    for i, field in enumerate("uv"):
        expected_change = jnp.mean(change[:, i] / size[:, i])
        assert jnp.allclose(errors[f"{field}, persistence"][1], expected_change)
