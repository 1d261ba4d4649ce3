"""The assembled matrices of studies/plate are those of examples/conduction.py, and its solvers
solve."""

from functools import partial

import conduction
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from studies.plate import methods, run, solvers


@pytest.fixture(scope="module")
def problem():
    return methods.make_problem(0.07, num_samples=2, num_steps=3)


def last_step(problem):
    """Returns a state, another one with the right wall, and the forcing of the third step."""
    forcing = jax.tree.map(lambda x: x[0, 2], problem.inputs)
    u_prev, u = problem.u_0
    u = np.asarray(conduction.set_wall(problem.plate, u, forcing))
    return u_prev, u, forcing


def fixed(problem, matrix):
    """Replaces rows and columns of fixed nodes by those of the identity."""
    free = ~np.asarray(problem.plate.is_fixed)
    return np.where(free[:, None] & free, matrix, np.diag(~free))


def test_the_assembled_residual_is_that_of_the_example(problem):
    u_prev, u, forcing = last_step(problem)
    expected = conduction.residual(problem.plate, u, u_prev, forcing)
    actual = problem.assembled.residual(u_prev, forcing)(u)
    assert np.max(np.abs(expected)) > 0.1
    np.testing.assert_allclose(actual, expected, atol=1e-13)


def test_the_assembled_jacobian_is_the_derivative_of_the_residual(problem):
    u_prev, u, forcing = last_step(problem)
    jacobian = jax.jacfwd(conduction.residual, argnums=1)(problem.plate, u, u_prev, forcing)
    actual = problem.assembled.matrix(u, derivative=True).toarray()
    np.testing.assert_allclose(actual, fixed(problem, jacobian), atol=1e-12)


def test_the_assembled_matrix_is_that_of_the_example(problem):
    _, u, _ = last_step(problem)
    entries = conduction.matrix(problem.plate, u)
    product = jax.jacfwd(partial(conduction.product, problem.plate, entries))(u)
    actual = problem.assembled.matrix(u).toarray()
    np.testing.assert_allclose(actual, fixed(problem, product), atol=1e-12)


def test_the_exact_step_is_that_of_scikit_fem(problem):
    method = methods.Method("", "", run.newton(problem), problem, dtype=np.float64)
    mesh = problem.plate.points, problem.plate.triangles
    expected = conduction.solve(*map(np.asarray, mesh), problem.u_0, problem.inputs)
    np.testing.assert_allclose(run.rollout(method, 3), expected, atol=1e-9)


def test_shorter_steps_come_close_to_the_exact_step(problem):
    step = partial(run.newton(problem), *problem.u_0[[0, 0]])
    forcing = jax.tree.map(lambda x: x[0, 0], problem.inputs)
    one, ten = (run.substeps(problem, n)(problem.u_0[0], None, forcing) for n in (1, 10))
    exact = step(forcing)
    assert np.max(np.abs(one - exact)) < 0.02  # two corrections, not Newton's method
    assert 1e-3 < np.sqrt(np.mean((ten - exact) ** 2)) < 0.2


def test_preconditioners_divide_by_the_matrix(problem):
    r = np.where(problem.plate.is_fixed, 0, np.cos(np.arange(problem.u_0.shape[1])))
    u = np.full(r.shape, 0.5)
    expected = np.linalg.solve(problem.matrix.toarray(), r)
    hierarchy = solvers.multigrid(problem.matrix)
    levels, coarsest = solvers.hierarchy_in_jax(hierarchy)
    assert len(levels) > 1 and coarsest.dtype == jnp.float32
    arguments = problem.plate, u, conduction.matrix(problem.plate, u)
    relative = lambda x: np.linalg.norm(x - expected) / np.linalg.norm(expected)
    assert relative(solvers.factorise(problem.matrix)(r)) < 1e-5
    assert relative(solvers.chebyshev(60)(*arguments)(r)) < 1e-3
    assert relative(solvers.v_cycle(levels, coarsest, r.astype(np.float32))) < 0.3


def test_interpolation_is_exact_for_linear_functions(problem):
    target = methods.make_problem(0.03, num_samples=1, num_steps=1)
    linear = lambda problem: np.asarray(problem.plate.points) @ [[1.0, 2.0], [3.0, -1.0]] + 1
    actual = run.interpolate(linear(problem).T, problem, target)
    np.testing.assert_allclose(actual, linear(target).T, atol=1e-12)
