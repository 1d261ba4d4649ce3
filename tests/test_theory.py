"""The documentation promises a mathematical relation between the residual and the error of a
step, i.e., the diverted chain. These tests verify that relation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trainax

from residuum import mse, residuum_loss
from tests.common import also_slow


def linear_step(condition_number, size=5, seed=0):
    """Returns A with the given condition number, B, a linear emulator and initial conditions,
    all random."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(2))
    matrix = left @ np.diag(np.geomspace(1, condition_number, size)) @ right
    others = (rng.normal(size=(size, size)) / np.sqrt(size) for _ in range(2))
    return matrix, *others, rng.normal(size=(4, 1, size))


def diverted_chain_loss(matrix, b, emulator, data, num_rollout_steps):
    """Computes the loss of `trainax.configuration.DivertedChainBranchOne` in a loop."""
    u_prev, loss = data[:, 0], 0.0
    for _ in range(num_rollout_steps):
        u_next = u_prev @ emulator.T
        loss += jnp.mean((u_next - jnp.linalg.solve(matrix, b @ u_prev.T).T) ** 2)
        u_prev = u_next
    return loss


@pytest.mark.parametrize("seed", also_slow(0, slowly=[1, 2, 3, 4]))
@pytest.mark.parametrize("condition_number", [2, 1e2, 1e4])
def test_residuum_and_diverted_chain(condition_number, seed):
    matrix, b, emulator, data = linear_step(condition_number, seed=seed)
    loss = functools.partial(
        residuum_loss,
        lambda u: emulator @ u,
        data,
        lambda n, p: matrix @ n - b @ p,
        num_rollout_steps=4,
    )
    preconditioned = functools.partial(
        loss, time_level_loss=lambda r: mse(jnp.linalg.solve(matrix, r))
    )
    diverted = functools.partial(diverted_chain_loss, matrix, b, emulator, data, 4)
    loss, preconditioned, diverted = jax.jit(lambda: (loss(), preconditioned(), diverted()))()
    np.testing.assert_allclose(preconditioned, diverted, rtol=1e-9)
    largest, *_, smallest = np.linalg.svd(matrix, compute_uv=False)
    assert smallest**2 * diverted <= loss * (1 + 1e-9)
    assert loss <= largest**2 * diverted * (1 + 1e-9)


def test_residuum_and_diverted_chain_agree_with_trainax():
    matrix, b, emulator, data = linear_step(1e2)
    reference = trainax.configuration.DivertedChainBranchOne(3)(
        lambda u: emulator @ u, data, ref_stepper=lambda u: jnp.linalg.solve(matrix, b @ u)
    )
    np.testing.assert_allclose(
        diverted_chain_loss(matrix, b, emulator, data, 3), reference, rtol=1e-9
    )


@pytest.mark.parametrize("condition_number", [2, 1e2, 1e4])
def test_hessian_has_the_squared_condition_number(condition_number):
    matrix, b, _, data = linear_step(condition_number)

    def loss(u_next, time_level_loss):
        residuum_fn = lambda n, p: matrix @ n - b @ p
        options = dict(time_level_loss=time_level_loss)
        return residuum_loss(lambda _: u_next, data[:1], residuum_fn, **options)

    for time_level_loss, expected in (
        (mse, condition_number**2),
        (lambda r: mse(jnp.linalg.solve(matrix, r)), 1),
    ):
        f = functools.partial(loss, time_level_loss=time_level_loss)
        hessian = jax.jit(jax.hessian(f))(data[0, 0])
        np.testing.assert_allclose(np.linalg.cond(hessian), expected, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1e-5])
def test_near_the_solution_a_nonlinear_step_is_as_its_linearisation(size):
    matrix, b, _, data = linear_step(1e2)
    residuum_fn = lambda n, p: matrix @ n + 0.1 * n**3 - b @ p
    u_prev, solution = data[0, 0], np.zeros(5)
    for _ in range(30):  # Newton's method
        jacobian = matrix + np.diag(0.3 * solution**2)
        solution -= np.linalg.solve(jacobian, residuum_fn(solution, u_prev))
    error = size * np.random.default_rng(1).normal(size=5)
    stepper = lambda u_prev: solution + error
    loss = residuum_loss(stepper, data[:1], residuum_fn)
    largest, *_, smallest = np.linalg.svd(jacobian, compute_uv=False)
    assert (1 - 10 * size) * smallest**2 * mse(error) <= loss
    assert loss <= (1 + 10 * size) * largest**2 * mse(error)
    precondition = lambda r: mse(jnp.linalg.solve(jacobian, r))
    loss = residuum_loss(stepper, data[:1], residuum_fn, time_level_loss=precondition)
    np.testing.assert_allclose(loss, mse(error), rtol=10 * size)
