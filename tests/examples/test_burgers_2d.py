"""These tests verify examples/burgers_2d.py: its residual, its network, and its buffer."""

import burgers_2d
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from residuum import residuum_loss
from studies.burgers_2d import run as study
from studies.train_and_tabulate import float64


def test_the_residual_is_that_of_a_second_order_step(monkeypatch):
    """The residual is of second order: at half the time step, the residual of the solver's
    states, relative to the change, is a quarter."""
    with float64():
        states = burgers_2d.initial_conditions(2, jax.random.key(0))[:, None]
        losses = []
        for dt in (0.002, 0.001):
            monkeypatch.setattr(burgers_2d, "DT", dt)
            solver = burgers_2d.solver(64, 4)
            losses.append(residuum_loss(solver, states, burgers_2d.relative_residual))
        persistence = residuum_loss(lambda u: u, states, burgers_2d.relative_residual)
    assert losses[0] < 1e-5 and persistence == pytest.approx(1)
    assert losses[0] / losses[1] == pytest.approx(16, rel=0.1)


def test_the_exact_step_has_no_residual():
    u = burgers_2d.initial_conditions(1, jax.random.key(0))[0]
    u_next = burgers_2d.exact_step(u)
    residual = burgers_2d.crank_nicolson(u_next, u)
    change = jnp.linalg.norm(u_next - u)
    assert jnp.linalg.norm(residual) < 2e-5 * change


@pytest.mark.parametrize("num_points", [64, 128])
def test_initial_conditions_are_smooth_fields_of_zero_mean(num_points):
    u = burgers_2d.initial_conditions(8, jax.random.key(0), num_points)
    assert u.shape == (8, 2, num_points, num_points)
    assert jnp.max(jnp.abs(jnp.mean(u, axis=(2, 3)))) < 1e-6
    largest = jnp.max(jnp.abs(u), axis=(1, 2, 3))
    assert jnp.all((largest >= 1) & (largest <= 2))


def test_whitened_neighbours_of_fields_with_fronts_are_uncorrelated():
    k = np.stack(np.meshgrid(*2 * [np.fft.fftfreq(64, 1 / 64)], indexing="ij"))
    is_kept = np.any(k, axis=0) & np.all(np.abs(k) <= 21, axis=0)
    amplitude = np.where(is_kept, np.maximum(np.hypot(*k), 1) ** -1.5, 0)
    noise = np.random.default_rng(0).normal(size=(400, 64, 64))
    u = np.fft.ifft2(amplitude * np.fft.fft2(noise)).real
    neighbours = np.stack([np.roll(u, x, (1, 2)) for x in burgers_2d.OFFSETS])
    covariance = np.cov(burgers_2d.whitening() @ neighbours.reshape(len(neighbours), -1))
    covariance /= np.mean(np.diag(covariance))
    chex.assert_trees_all_close(covariance, np.eye(len(covariance)), atol=0.1)


def test_the_emulator_starts_as_no_change_and_keeps_only_the_waves_of_the_residual():
    u = burgers_2d.initial_conditions(1, jax.random.key(0))[0]
    weights = burgers_2d.random_weights(jax.random.key(1))
    chex.assert_trees_all_close(burgers_2d.emulator(weights, u), u, atol=1e-5)
    u_next = burgers_2d.emulator(weights + 0.1, u)
    assert jnp.linalg.norm(u_next - u) > 1e-3
    _, _, low_pass = burgers_2d.spectrum(64)
    dropped = jnp.where(low_pass, 0, jnp.fft.rfft2(u_next))
    assert jnp.max(jnp.abs(dropped)) < 1e-3


def test_all_emulators_of_the_ablation_start_as_no_change():
    u = burgers_2d.initial_conditions(1, jax.random.key(0))[0]
    for recipe in study.ABLATION.values():
        stepper = recipe.make_stepper(jax.random.key(1))
        chex.assert_trees_all_close(stepper(u), u, atol=1e-5)
        moved = jax.tree.map(lambda x: x + 0.1, stepper)
        assert jnp.linalg.norm(moved(u) - u) > 1e-3


def test_near_neighbours_are_whitened_among_themselves():
    matrix = study.near_whitening()
    is_used = np.any(matrix, axis=0)
    near = np.max(np.abs(burgers_2d.OFFSETS), axis=1) <= 2
    assert np.all(is_used == [*near, *near, True])
    own = burgers_2d.whitening(burgers_2d.OFFSETS[near])
    chex.assert_trees_all_close(matrix[:9, : len(near)][:, near], own)
