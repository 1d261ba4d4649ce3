"""The mechanism of examples/pollu.py has the published solution. Its Jacobian, linear solver
and schemes are right, and so are the solvers of the study. The emulator of chemistry.py
conserves atoms and stays positive."""

from functools import partial

import chemistry
import jax
import jax.numpy as jnp
import numpy as np
import pollu
import pytest
import scipy.integrate
from error_estimate import estimate_error
from pollu import SPECIES

from benchmarks.tables import read_csv
from studies.chemistry import run as study, solvers
from tests.common import run_module, slow


NOON = pollu.Day(jnp.array(720.0), jnp.array(0.0), jnp.array(1.0))
NUM_SPECIES = len(SPECIES)


def cells(num_cells=5, seed=0):
    """Returns states and days in float64."""
    keys = jax.random.split(jax.random.key(seed))
    y, days = pollu.random_cells(keys[0], num_cells), pollu.random_days(keys[1], num_cells)
    return jax.tree.map(lambda x: x.astype(jnp.float64), (y, days))


def balanced_cells():
    """Returns states whose radicals are in balance, and days."""
    y, days = cells()
    light = jnp.maximum(pollu.sun(days), 0.1)
    for _ in range(100):
        y = pollu.euler_backward(y, light, 0.1, num_sweeps=4)
    return y, light


def relative(x, y):
    return jnp.max(jnp.abs(x - y) / (jnp.abs(y) + 1e-6 * pollu.TYPICAL[:, None]))


def dense(matrix, size):
    """Returns `[size, size]` from `{(row, column): number}`."""
    result = np.zeros((size, size))
    for place, x in matrix.items():
        result[place] = x
    return result


#
# The mechanism
#


def tendency(y, light=1.0):
    return jnp.stack(pollu.tendency(y, light))


def scipy_solution(y, minutes, light=1.0):
    field = jax.jit(lambda t, y: tendency(y, light))
    jacobian = jax.jit(lambda t, y: jax.jacfwd(tendency)(y, light))
    options = dict(method="Radau", jac=jacobian, rtol=1e-9, atol=1e-22)
    return scipy.integrate.solve_ivp(field, (0, minutes), y, **options).y[:, -1]


def test_the_published_solution_after_an_hour():
    """The numbers are those of the test set for IVP solvers."""
    solution = scipy_solution(pollu.vector(pollu.REFERENCE_STATE), 60.0)
    np.testing.assert_allclose(solution, pollu.TYPICAL, rtol=1e-4)
    few = {"NO2": 0.05646255, "NO": 0.13424841, "O3": 0.005523140}
    for name, published in few.items():
        assert pollu.AFTER_AN_HOUR[name] == pytest.approx(published, rel=1e-6)


def test_the_sparse_jacobian_is_the_derivative():
    y = pollu.TYPICAL
    expected = jax.jacfwd(tendency)(jnp.asarray(y))
    entries = pollu.jacobian(y, 1.0)
    np.testing.assert_allclose(dense(entries, NUM_SPECIES), expected, rtol=1e-12)
    assert set(entries) == {tuple(place) for place in np.argwhere(expected != 0).tolist()}
    assert len(entries) == 82  # of 400
    factors = pollu.factorise(solvers.shifted(entries, 0.2))
    assert len(factors) == 94  # the order of elimination adds few entries


def test_nothing_else_than_atoms_is_conserved():
    assert not np.any(pollu.ATOMS @ pollu.STOICHIOMETRY)
    rank = np.linalg.matrix_rank(pollu.STOICHIOMETRY)
    assert np.linalg.matrix_rank(pollu.ATOMS) == NUM_SPECIES - rank == 3


def test_the_sun_is_dark_at_night_and_smooth_at_sunrise():
    minutes = jnp.arange(0, 1440.0)
    light = pollu.sun(pollu.Day(minutes, jnp.array(0.1), jnp.array(0.8)))
    assert light[0] == 0 and jnp.argmax(light) == 720 and 0.9 < light[720] < 1
    assert jnp.max(jnp.abs(jnp.diff(light))) < 0.01
    zenith = pollu.sun(NOON)
    assert zenith == pytest.approx(1)


#
# Linear systems and steps
#


def test_the_newton_matrix_is_the_derivative_of_the_residual():
    (y, days), (stage, _) = cells(1), cells(1, seed=1)
    y, stage, day = y[:, 0], stage[:, 0], jax.tree.map(lambda x: x[0], days)
    residual = lambda stages: jnp.stack(pollu.radau_residual(stages, y, day))
    stages = jnp.stack([stage, y])
    expected = jax.jacfwd(residual)(stages).reshape(40, 40)
    matrix = dense(pollu.newton_matrix(stages, day), 40)
    np.testing.assert_allclose(matrix, expected, rtol=1e-10)
    correction = pollu.newton_correction(residual(stages), stages, day).reshape(40)
    solution = jnp.linalg.solve(expected, residual(stages))
    np.testing.assert_allclose(correction, solution, rtol=1e-6)


def exact_step(y, day, h):
    """Solves the residual by Newton's method with dense matrices."""
    stages = jnp.stack([y, y])
    for _ in range(6):
        residual = np.stack(pollu.radau_residual(stages, y, day, h))
        matrix = dense(pollu.newton_matrix(stages, day, h), 40)
        stages = stages - np.linalg.solve(matrix, residual).reshape(2, -1)
    return stages[1]


def test_the_exact_radau_step_is_that_of_scipy():
    """Scipy's method is Radau IIA with three stages. A single step of ours is less accurate."""
    y, light = balanced_cells()
    for cell in range(2):
        start = y[:, cell]
        day = always(light[cell])
        expected = scipy_solution(start, 5.0, light[cell])
        errors = []
        for n in (1, 2, 4):
            solution = start
            for _ in range(n):
                solution = exact_step(solution, day, 5.0 / n)
            errors.append(np.linalg.norm((solution - expected) / pollu.TYPICAL))
        assert errors[0] < 1e-2 and errors[2] < errors[1] / 3 < errors[0] / 9


def always(light):
    """Returns a day with constant light, at the pole."""
    return pollu.Day(jnp.array(0.0), 0.4 / (0.4 - jnp.log(light)), jnp.array(0.0))


@pytest.mark.parametrize("name", solvers.ROSENBROCK)
def test_each_rosenbrock_method_has_its_order(name):
    """The conditions are those of Hairer and Wanner, with β = α + Γ. On a stiff problem, the
    measured order is lower."""
    method = solvers.ROSENBROCK[name]
    lower = lambda rows: np.array([row + [0.0] * (len(rows) - len(row)) for row in rows])
    gamma = np.linalg.inv(np.eye(len(method.m)) / method.gamma - lower(method.c))
    alpha, weights = lower(method.a) @ gamma, np.array(method.m) @ gamma
    beta = alpha + gamma
    conditions = [(weights.sum(), 1), (weights @ beta.sum(axis=1), 1 / 2)]
    conditions += [
        (weights @ alpha.sum(axis=1) ** 2, 1 / 3),
        (weights @ beta @ beta.sum(axis=1), 1 / 6),
    ]
    for computed, expected in conditions[: {2: 2, 3: 4}[method.order]]:
        assert computed == pytest.approx(expected, abs=1e-12)


@slow
@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_small_steps_of_each_solver_are_accurate(name):
    y, light = balanced_cells()
    day, n = always(light), 1000 if name == "QSSA" else 50
    step, h = solvers.SOLVERS[name], pollu.DT / n
    result = jax.jit(lambda y: jax.lax.fori_loop(0, n, lambda _, y: step(y, day, h), y))(y)
    expected = jax.jit(pollu.refined_solution)(y, day)
    assert np.max(np.abs(result - expected) / (expected + pollu.FLOOR[:, None])) < 0.01


def test_many_sweeps_of_ebi_are_an_implicit_euler_step():
    y, days = cells()
    light = pollu.sun(days)
    sweep = jax.jit(partial(pollu.euler_backward, num_sweeps=1))
    u = y
    for _ in range(300):
        u = sweep(y, light, 5.0, guess=u)
    residual = u - y - 5 * tendency(u, light)
    scale = y + 5 * jnp.stack([
        pollu.gain_and_loss(i, u, light)[0] * jnp.ones(5) for i in range(NUM_SPECIES)
    ])  # fmt: skip
    assert jnp.max(jnp.abs(residual) / scale) < 1e-4  # the scheme neglects the mass of O3P
    assert jnp.all(u >= 0)


def test_the_extrapolated_solution_is_that_of_scipy():
    y, light = balanced_cells()
    for cell in range(2):
        solution = jax.jit(pollu.refined_solution)(y[:, cell], always(light[cell]))
        expected = scipy_solution(y[:, cell], pollu.DT, light[cell])
        assert np.max(np.abs(solution - expected) / (expected + pollu.FLOOR)) < 1e-4


#
# The emulator
#


def untrained_emulator():
    """Returns an emulator whose network has an effect, unlike that of a fresh one."""
    sizes = jnp.full((2, NUM_SPECIES), 0.1)
    emulator = chemistry.Emulator(jax.random.key(0), sizes)
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape, x.dtype)
    return jax.tree.map(noise, emulator)


def test_the_emulator_conserves_atoms_and_stays_positive():
    emulator = untrained_emulator()
    y, days = cells(20)
    states = jax.jit(
        lambda y: pollu.rollout(lambda y, day: emulator.stages(y, day)[1], y, days, 50)
    )(y)
    assert jnp.all(states >= 0)  # at night, O1D falls to 0
    atoms = np.einsum("fs,tsc->tfc", pollu.ATOMS, states)
    np.testing.assert_allclose(atoms, np.broadcast_to(pollu.ATOMS @ y, atoms.shape), rtol=1e-13)


def test_pan_never_takes_more_atoms_than_there_are():
    y, _ = cells()
    much = y.at[SPECIES.index("PAN")].set(10.0)
    result = pollu.conserve(much, y)
    assert jnp.all(result > 0)
    np.testing.assert_allclose(pollu.ATOMS @ result, pollu.ATOMS @ y, rtol=1e-13)


def test_the_gradient_of_the_relative_error_is_that_with_a_constant_newton_matrix():
    (y, days), (stage, _) = cells(1), cells(1, seed=1)
    y, stage, day = y[:, 0], stage[:, 0], jax.tree.map(lambda x: x[0], days)
    stages = jnp.stack([stage, y])
    scale = stages + pollu.FLOOR

    def with_constant_matrix(x):
        residual = pollu.radau_residual(x, y, day)
        return pollu.newton_correction(residual, stages, day) / scale

    expected = jax.jacfwd(with_constant_matrix)(stages).reshape(40, 40)
    gradient = jax.jacrev(lambda x: pollu.relative_error(x, y, day))(stages).reshape(40, 40)
    assert np.max(np.abs(gradient - expected) * scale.reshape(40)) < 1e-4
    np.testing.assert_allclose(
        pollu.relative_error(stages, y, day), with_constant_matrix(stages), rtol=1e-10
    )


@slow
def test_the_estimated_error_is_that_of_the_function_to_copy():
    """The study needs one Newton correction for each step instead of a general solver."""
    emulator = untrained_emulator()
    y, days = balanced_cells()[0][:, :1], jax.tree.map(lambda x: x[:1], cells()[1])
    _, expected = study.estimated_error(emulator, y, days, 2)
    y, day = y[:, 0], jax.tree.map(lambda x: x[0], days)
    inputs = jax.tree.map(lambda *x: jnp.stack(x), *(pollu.later(day, n) for n in range(2)))

    def residuum_fn(u_next, u_prev, day):
        stages = jnp.stack([u_next.stage, u_next.y])
        return jnp.stack(pollu.radau_residual(stages, u_prev.y, day))

    def solve(operator, right):
        scale = jnp.concatenate([y, y]) + jnp.tile(pollu.FLOOR, 2)
        matrix = jax.jacfwd(operator)(jnp.zeros_like(right)) * scale
        rows = jnp.max(jnp.abs(matrix), axis=1)
        return scale * jnp.linalg.solve(matrix / rows[:, None], right / rows)

    _, errors = estimate_error(
        emulator, residuum_fn, chemistry.State(y, y), inputs, num_rollout_steps=2, solve=solve
    )
    close = np.abs(errors.y - expected[:, :, 0]) / pollu.TYPICAL
    assert np.max(close) < 1e-6 * np.max(np.abs(errors.y) / pollu.TYPICAL)


#
# Programs
#


@slow
def test_quick_study(tmp_path):
    run_module(study.__name__, "--quick", "--output", "rows", cwd=tmp_path)
    names = {path.name for path in (tmp_path / "rows").iterdir()}
    tables = {"rows.csv", "table.md", "work.csv", "work.md", "switch.csv"}
    assert names == tables | {"chemistry_work.png"}
    work = read_csv(tmp_path / "rows" / "work.csv")
    errors = [float(row["after_1_h"]) for row in work if row["model"] == "EBI, 2 sweeps"]
    assert errors == sorted(errors, reverse=True) and errors[0] < 0.1
