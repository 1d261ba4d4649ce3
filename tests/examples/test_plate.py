"""The residual of examples/conduction.py is that of scikit-fem's matrices, its solver keeps the
temperature of the wall, and loses heat at the boundary only. The emulator of examples/plate.py
keeps the temperature of the wall."""

from functools import partial

import conduction
import jax
import jax.numpy as jnp
import numpy as np
import plate as program
import pytest
import skfem
from replay_buffer import diverged
from skfem.helpers import dot, grad

from benchmarks.tables import read_csv
from studies.plate import small_meshes
from tests.common import run_module, slow


MESH = conduction.random_mesh(0.1, seed=0)


def sample(seed=0):
    """Returns a plate, two random states whose walls are right, and a forcing."""
    plate = conduction.make_plate(*MESH)
    keys = jax.random.split(jax.random.key(seed))
    states, forcings = conduction.random_samples(plate, keys[0], 2)
    forcing = jax.tree.map(lambda x: x[0], forcings)._replace(time=jnp.float64(0.03))
    states += 0.1 * jax.random.normal(keys[1], states.shape)
    return plate, conduction.set_wall(plate, states[0], forcing), states[1], forcing


def assembled_residual(u_next, u_prev, source):
    """Assembles the residual of all nodes as one linear form, and so without any matrix."""
    mesh = skfem.MeshTri(*map(np.ascontiguousarray, (MESH[0].T, MESH[1])))
    basis = skfem.Basis(mesh, skfem.ElementTriP1())
    lossy = mesh.facets_satisfying(lambda x: x[0] > 1e-9, boundaries_only=True)
    edge = skfem.FacetBasis(mesh, skfem.ElementTriP1(), facets=lossy)

    @skfem.LinearForm
    def inside(v, w):
        rate = (w.u - w.u_prev) / conduction.DT - w.source
        return rate * v + (1 + w.u / 2) * dot(grad(w.u), grad(v))

    losses = skfem.LinearForm(lambda v, w: conduction.BETA * w.u * v)
    fields = dict(u=u_next, u_prev=u_prev, source=source)
    fields = {name: basis.interpolate(np.asarray(x)) for name, x in fields.items()}
    return inside.assemble(basis, **fields) + losses.assemble(
        edge, u=edge.interpolate(np.asarray(u_next))
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_residual_is_what_scikit_fem_assembles(seed):
    plate, u_next, u_prev, forcing = sample(seed)
    expected = assembled_residual(u_next, u_prev, conduction.source(plate, forcing))
    actual = conduction.residual(plate, u_next, u_prev, forcing)
    free = ~np.asarray(plate.is_fixed)
    assert np.max(np.abs(expected[free])) > 0.1
    assert np.max(np.abs(actual - expected)[free]) < 1e-10


def test_the_residual_of_fixed_nodes_is_the_error_of_the_wall():
    plate, u_next, u_prev, forcing = sample()
    r = conduction.residual(plate, u_next + 0.1, u_prev, forcing)
    assert plate.is_fixed.sum() == 11
    assert np.allclose(r[plate.is_fixed], 0.1, atol=1e-12)
    r = conduction.residual(plate, u_next, u_prev, forcing)
    assert jnp.all(r[plate.is_fixed] == 0)


def test_the_matrix_is_that_of_a_linear_step():
    """For k = 1, at u = 0, the matrix is the derivative of the residual. It is symmetric, with
    the diagonal that Jacobi's method divides by."""
    plate, _, u_prev, forcing = sample()
    zero = jnp.zeros_like(u_prev)
    jacobian = jax.jacfwd(conduction.residual, argnums=1)(plate, zero, u_prev, forcing)
    diagonal, others = conduction.matrix(plate, zero)
    operator = conduction.fix(plate, partial(conduction.product, plate, (diagonal, others)))
    actual = jax.jacfwd(operator)(zero)
    free = ~plate.is_fixed
    assert np.allclose(actual, actual.T, atol=1e-12)
    assert np.allclose(actual[free][:, free], jacobian[free][:, free], atol=1e-12)
    assert np.allclose(jnp.diag(actual)[free], diagonal[free], atol=1e-12)
    r = jnp.where(plate.is_fixed, 0, u_prev)
    divided = conduction.precondition(plate, r, tol=1e-10)
    assert np.allclose(divided, jnp.linalg.solve(actual, r), atol=1e-9)


def test_the_gradient_through_conjugate_gradients():
    plate, u_next, u_prev, forcing = sample()
    norm = lambda r: jnp.sum(conduction.precondition(plate, r, tol=1e-10) ** 2)
    r = conduction.residual(plate, u_next, u_prev, forcing)
    direction = jnp.where(plate.is_fixed, 0, jnp.sin(10 * jnp.arange(r.size)))
    slope = (norm(r + 1e-4 * direction) - norm(r - 1e-4 * direction)) / 2e-4
    assert jnp.vdot(jax.grad(norm)(r), direction) == pytest.approx(float(slope), rel=1e-6)


def test_the_loss_of_persistence_is_one():
    plate, _, u_prev, forcing = sample()
    start = conduction.set_wall(plate, u_prev, forcing)
    r = conduction.relative_residual(plate, start, u_prev, forcing)
    assert jnp.mean(r**2) == pytest.approx(1, abs=1e-4)


def solver_step(seed=0):
    plate, _, u_prev, forcing = sample(seed)
    source, wall = conduction.source(plate, forcing), conduction.wall_temperature(forcing)
    u_next = conduction.newton_solver(*MESH)(u_prev, np.asarray(source), float(wall))
    return plate, u_next, u_prev, forcing


def test_the_solver_has_no_residual_and_keeps_the_wall():
    plate, u_next, u_prev, forcing = solver_step()
    r = conduction.residual(plate, u_next, u_prev, forcing)
    assert jnp.max(jnp.abs(r)) < 1e-12
    wall = conduction.wall_temperature(forcing)
    assert np.allclose(u_next[plate.is_fixed], wall, atol=1e-14)


@pytest.mark.parametrize("mistake", ["wall", "boundary", "time"])
def test_the_residual_exposes_mistakes(mistake):
    """It is far from zero if the wall of a state is wrong, the losses at the other edges are
    forgotten, or the forcing is that of another step."""
    plate, u_next, u_prev, forcing = solver_step()
    if mistake == "wall":
        u_next = np.where(plate.is_fixed, u_prev, u_next)
    if mistake == "boundary":
        plate = plate._replace(loss=0 * plate.loss)
    if mistake == "time":
        forcing = forcing._replace(time=forcing.time + conduction.DT)
    r = conduction.residual(plate, u_next, u_prev, forcing)
    assert jnp.max(jnp.abs(r)) > 1e-4


def test_heat_is_lost_at_the_boundary_alone():
    """The sum of the residual's rows is the balance of heat. The losses are β ∫ u along all
    edges but the left one."""
    plate, u_next, _, forcing = sample()
    forcing = forcing._replace(heat=0.0)
    balance = jnp.sum(conduction.product(plate, conduction.matrix(plate, u_next), u_next))
    balance -= jnp.sum(plate.lumped_mass * u_next) / conduction.DT
    i, j = plate.edges
    ends = jnp.where(plate.loss > 0, u_next[i] + u_next[j], 0) / 2
    lengths = jnp.linalg.norm(plate.points[i] - plate.points[j], axis=1)
    expected = conduction.BETA * jnp.sum(lengths * ends) / 2  # each edge in two directions
    assert float(balance) == pytest.approx(float(expected), rel=1e-10)
    perimeter = jnp.sum(jnp.where(plate.loss > 0, lengths, 0)) / 2
    assert float(perimeter) == pytest.approx(3 + 2 * np.pi * conduction.HOLE_RADIUS, rel=0.05)


def perturbed_emulator():
    """Returns an emulator with noise on its weights. A fresh one is GCR with Jacobi."""
    emulator = program.Emulator(jax.random.key(0), width=4, depth=2)
    noise = lambda x: 0.05 * jax.random.normal(jax.random.key(1), x.shape, x.dtype)
    return jax.tree.map(lambda x: x + noise(x) if hasattr(x, "shape") else x, emulator)


def test_the_emulator_keeps_the_wall():
    plate, u_next, u_prev, forcing = solver_step()
    emulated = perturbed_emulator()(plate, u_prev, forcing)
    assert jnp.all(emulated[plate.is_fixed] == conduction.wall_temperature(forcing))
    assert jnp.max(jnp.abs(emulated - u_next)) > 1e-3


def test_a_state_without_a_residual_stays():
    plate, u, _, forcing = sample()
    forcing = forcing._replace(heat=jnp.float64(0), wall=jnp.float64(0), swing=jnp.float64(0))
    assert jnp.all(perturbed_emulator()(plate, 0 * u, forcing) == 0)


def test_a_fresh_emulator_is_gcr_with_jacobi():
    plate, _, u_prev, forcing = sample()
    fresh = program.Emulator(jax.random.key(0), width=4, depth=2)
    actual = fresh(plate, u_prev, forcing, num_corrections=3)
    by_jacobi = conduction.gcr(conduction.jacobi, 3)
    assert np.allclose(actual, by_jacobi(plate, u_prev, forcing), atol=1e-10)


def nearly_linear_step():
    """Returns a plate, a state so small that k = 1, a forcing of 0, and the residual's norm."""
    plate, _, u_prev, forcing = sample()
    forcing = jax.tree.map(jnp.zeros_like, forcing)
    diagonal, _ = conduction.matrix(plate, 0 * u_prev)

    def norm(u):
        r = conduction.residual(plate, u, 1e-5 * u_prev, forcing)
        return jnp.sqrt(jnp.sum(r**2 / diagonal))

    return plate, 1e-5 * u_prev, forcing, norm


def test_gcr_minimises_the_residual_over_all_directions():
    """The Krylov space of Jacobi's method is spanned by powers of the preconditioned matrix."""
    plate, u_prev, forcing, norm = nearly_linear_step()
    start = conduction.set_wall(plate, u_prev, forcing)
    diagonal, others = conduction.matrix(plate, 0 * u_prev)
    free = ~plate.is_fixed
    vectors = [free * conduction.residual(plate, start, u_prev, forcing) / diagonal]
    for _ in range(3):
        image = conduction.product(plate, (diagonal, others), vectors[-1])
        vectors.append(free * image / diagonal)
    image = lambda v: free * conduction.product(plate, (diagonal, others), v) / diagonal**0.5
    images = jnp.stack([image(v) for v in vectors], axis=1)
    r = conduction.residual(plate, start, u_prev, forcing) / diagonal**0.5
    smallest = jnp.linalg.norm(r - images @ jnp.linalg.lstsq(images, r)[0])
    by_gcr = conduction.gcr(conduction.jacobi, 4)(plate, u_prev, forcing)
    assert float(norm(by_gcr)) == pytest.approx(float(smallest), rel=1e-3)


def test_gcr_cannot_diverge():
    """A preconditioner that makes repeated corrections diverge only makes GCR slow."""
    plate, u_prev, forcing, norm = nearly_linear_step()
    hostile = lambda plate, u, matrix: lambda r: -10 * r / matrix[0] ** 2
    start = norm(conduction.set_wall(plate, u_prev, forcing))
    by_repetition = conduction.repeat(hostile, 6)(plate, u_prev, forcing)
    assert norm(by_repetition) > 100 * start
    norms = [norm(conduction.gcr(hostile, n)(plate, u_prev, forcing)) for n in range(1, 7)]
    assert np.all(np.diff([start, *norms]) <= 1e-6 * start)
    assert norms[-1] < 0.5 * start


def test_gcr_solves_a_step_that_changes_the_conductivity():
    """The wall heats a cold plate, so k = 0.3 becomes 1.5 beside the wall. With the images of
    the first matrix, the same corrections diverge."""
    plate = conduction.make_plate(*MESH)
    u_prev = jnp.full(len(plate.points), -1.4)
    forcing = conduction.Forcing(*map(jnp.float64, (0, 0, 0, 0, 1, 0)))
    source = np.zeros(len(u_prev))
    u_next = conduction.newton_solver(*MESH)(np.asarray(u_prev), source, 1.0)
    by_gcr = conduction.gcr(conduction.jacobi, 40)(plate, u_prev, forcing)
    assert np.allclose(by_gcr, u_next, atol=1e-3)


def test_samples_and_their_series():
    plate = conduction.make_plate(*MESH)
    u, forcing = conduction.random_samples(plate, jax.random.key(0), 64)
    assert u.shape == (64, len(plate.points)) and not jnp.any(diverged(u, bound=4))
    assert jnp.mean(u) == pytest.approx(0.5, abs=0.1)
    assert jnp.std(u) == pytest.approx(0.5, abs=0.1)
    series = conduction.forcing_series(forcing, 3)
    assert np.allclose(series.time, np.tile([0.01, 0.02, 0.03], (64, 1)))
    assert jnp.all(series.heat == forcing.heat[:, None])


def test_training_lowers_the_loss(monkeypatch):
    """The loss is 1 for persistence, and is less after a few updates."""
    plate = conduction.make_plate(*MESH)
    losses = []
    train = program.common.train

    def spy(update, carry, keys, name):
        def record(carry, key):
            carry, loss = update(carry, key)
            losses.append(float(loss))
            return carry, loss

        return train(record, carry, keys, name)

    monkeypatch.setattr(program.common, "train", spy)
    program.train_emulator(plate, jax.random.key(0), 100)
    assert losses[-1] < 0.1 and losses[-1] < losses[0]


@slow
def test_quick_study_of_small_meshes(tmp_path):
    """An emulator that is hardly trained is as good as GCR with Jacobi's preconditioner."""
    run_module(small_meshes.__name__, "--quick", "--output", "rows", cwd=tmp_path)
    names = {path.name for path in (tmp_path / "rows").iterdir()}
    assert names == {"small_meshes.csv", "small_meshes.md"}
    rows = {row["model"]: row for row in read_csv(tmp_path / "rows" / "small_meshes.csv")}
    for column in ("training_mesh_1", "another_mesh_10", "finer_mesh_10"):
        error = {name: float(row[column]) for name, row in rows.items()}
        assert error["Newton"] == 0 < error["4 steps u − P r"] < error["1 step u − P r"] < 0.1
        assert error["emulator"] < 1.1 * error["4 steps of GCR, Jacobi"]
        assert error["estimated error"] == pytest.approx(error["emulator"], rel=0.1)
