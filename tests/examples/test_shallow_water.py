"""The basins of examples/basin.py and the emulator of examples/shallow_water.py have the right
walls, mass, energy and equilibria, and their steps have the right orders."""

from functools import partial

import basin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shallow_water

from benchmarks.tables import read_csv
from studies import train_and_tabulate
from studies.shallow_water import run as study
from tests.common import ROOT, slow


def moving_state(seed=0):
    """Returns a state in a random basin, with currents through the open faces, and a wind."""
    keys = jax.random.split(jax.random.key(seed), 3)
    states, amplitudes = basin.random_samples(keys[0], 1)
    state = jax.tree.map(lambda x: x[0], states)
    flow = 0.05 * jax.random.normal(keys[1], (2, *state.mask.shape))
    u_and_v = basin.open_faces(state.mask) * flow
    wind = basin.wind_stress(amplitudes)[0]
    return state._replace(fields=jnp.concatenate([u_and_v, state.fields[2:]])), wind


def trained_emulator():
    """Returns an emulator that is not the identity, unlike a fresh one."""
    emulator = shallow_water.Emulator(jax.random.key(0), width=4, depth=2)
    noise = lambda x: 0.1 * jax.random.normal(jax.random.key(1), x.shape, x.dtype)
    return jax.tree.map(lambda x: x + noise(x), emulator)


def rectangle(depth):
    """Returns a basin at rest, of uniform depth and without islands."""
    shape = (basin.NUM_POINTS, basin.NUM_POINTS)
    return basin.State(jnp.zeros((3, *shape)), jnp.full(shape, depth), jnp.ones(shape))


def test_neighbours_are_those_on_the_map():
    x = jnp.arange(12.0).reshape(3, 4)  # [x, y]
    assert jnp.all(basin.west(x)[1:] == x[:-1]) and jnp.all(basin.west(x)[0] == 0)
    assert jnp.all(basin.east(x)[:-1] == x[1:]) and jnp.all(basin.east(x)[-1] == 0)
    assert jnp.all(basin.south(x)[:, 1:] == x[:, :-1]) and jnp.all(basin.south(x)[:, 0] == 0)
    assert jnp.all(basin.north(x)[:, :-1] == x[:, 1:]) and jnp.all(basin.north(x)[:, -1] == 0)


def test_a_face_is_open_between_two_wet_cells():
    mask = np.ones((3, 4))
    mask[1, 2] = 0
    west_faces, south_faces = basin.open_faces(jnp.asarray(mask))
    assert not west_faces[0].any() and not south_faces[:, 0].any()  # the outermost faces
    assert west_faces.sum() == 2 * 4 - 2 and south_faces.sum() == 3 * 3 - 2
    assert west_faces[1, 2] == west_faces[2, 2] == south_faces[1, 2] == south_faces[1, 3] == 0


def test_basins_have_coasts_islands_and_uneven_depth():
    states, _ = basin.random_samples(jax.random.key(0), 32)
    wet = jnp.mean(states.mask, axis=(1, 2))
    assert jnp.all((wet > 0.4) & (wet < 1)) and jnp.std(wet) > 0.02
    assert jnp.min(states.depth) == pytest.approx(0.2) and jnp.max(states.depth) > 0.9
    assert jnp.all(states.fields * (1 - states.mask[:, None]) == 0)
    assert jnp.max(jnp.abs(jnp.sum(states.fields[:, 2], axis=(1, 2)))) < 1e-9


def test_time_derivatives_keep_the_walls_and_the_mass():
    state, wind = moving_state()
    slope = basin.time_derivative(state.fields, state, wind)
    assert jnp.max(jnp.abs(slope[:2])) > 1e-3
    assert jnp.all(slope[:2] * (1 - basin.open_faces(state.mask)) == 0)
    assert jnp.all(slope[2] * (1 - state.mask) == 0)
    assert abs(jnp.sum(slope[2])) < 1e-12


def test_only_friction_and_wind_do_work():
    """Only friction and wind change the sum of kinetic and potential energy. Coriolis force and
    pressure exchange energy without loss."""
    state, wind = moving_state()
    faces, depths = basin.open_faces(state.mask), basin.face_depths(state.depth)
    velocity, eta = state.fields[:2], state.fields[2]
    slope = basin.time_derivative(state.fields, state, wind)
    power = jnp.sum(depths * velocity * slope[:2]) + jnp.sum(basin.GRAVITY * eta * slope[2])
    force = wind / depths - basin.drag(state.fields, depths) * velocity
    expected = jnp.sum(faces * depths * velocity * force)
    assert float(power) == pytest.approx(float(expected), rel=1e-9) and abs(power) > 1e-4


@pytest.mark.parametrize("residual, order", [("hermite", 4), ("crank_nicolson", 2)])
def test_orders_of_the_residuals(residual, order, monkeypatch):
    """The residual of an accurate solution falls by one order more than the order of the step,
    if the drag does not change within a step."""
    state, wind = moving_state()
    drag = basin.drag(state.fields, basin.face_depths(state.depth))
    monkeypatch.setattr(basin, "drag", lambda fields, depths: drag)
    sizes = []
    for dt in (0.2, 0.1):
        monkeypatch.setattr(basin, "DT", dt)
        u_next = basin.runge_kutta(state, wind)
        sizes.append(jnp.max(jnp.abs(getattr(basin, residual)(u_next, state, wind))))
    assert np.log2(sizes[0] / sizes[1]) == pytest.approx(order + 1, abs=0.3)


@pytest.mark.parametrize("residuum_fn", [basin.hermite, basin.crank_nicolson])
def test_the_exact_step_has_no_residual(residuum_fn):
    state, wind = moving_state()
    state = state._replace(fields=state.fields.at[:2].set(0))
    for _ in range(5):  # after some steps, the state is smoother, as in a rollout
        state = jax.jit(basin.runge_kutta)(state, wind)
    u_next = jax.jit(basin.exact_step(residuum_fn))(state, wind)
    largest = lambda u: jnp.max(jnp.abs(residuum_fn(u, state, wind)))
    assert largest(u_next) < 1e-4 * largest(state) and largest(state) > 1e-2


def test_a_wind_piles_the_water_up_in_a_closed_basin():
    """Under a uniform wind, the equilibrium of a closed basin is a slope of τ / (g h). The
    emulator preserves this slope, trained or not."""
    depth, stress = 0.5, 0.004
    state = rectangle(depth)
    x = jnp.arange(basin.NUM_POINTS) - (basin.NUM_POINTS - 1) / 2
    slope = stress / (basin.GRAVITY * depth)
    eta = jnp.broadcast_to(slope * x[:, None], state.mask.shape)
    state = state._replace(fields=state.fields.at[2].set(eta))
    wind = basin.wind_stress(jnp.array([stress, 0, 0, 0, 0, 0]))
    assert jnp.max(jnp.abs(basin.time_derivative(state.fields, state, wind))) < 1e-12
    assert jnp.max(jnp.abs(trained_emulator()(state, wind).fields - state.fields)) < 1e-12


def test_the_emulator_keeps_walls_mass_and_basin():
    state, wind = moving_state()
    fresh = shallow_water.Emulator(jax.random.key(0), width=4, depth=2)(state, wind)
    assert jnp.all(fresh.fields[:2] == state.fields[:2])  # η follows from these currents
    u_next = trained_emulator()(state, wind)
    assert u_next.depth is state.depth and u_next.mask is state.mask
    change = u_next.fields - state.fields
    assert jnp.max(jnp.abs(change)) > 1e-4
    assert jnp.all(change[:2] * (1 - basin.open_faces(state.mask)) == 0)
    assert jnp.all(change[2] * (1 - state.mask) == 0) and abs(jnp.sum(change[2])) < 1e-10


def test_winds_have_their_size_and_memory():
    keys = jax.random.split(jax.random.key(0))
    _, amplitudes = basin.random_samples(keys[0], 64)
    winds = basin.wind_stress(basin.amplitude_series(amplitudes, 40, keys[1]))
    assert winds.shape == (64, 40, 2, basin.NUM_POINTS, basin.NUM_POINTS)
    amplitudes = winds.mean(axis=(3, 4))  # of the uniform winds
    assert jnp.std(amplitudes) == pytest.approx(basin.WIND_SIZE, rel=0.2)
    memory = jnp.mean(amplitudes[:, 10:] * amplitudes[:, :-10]) / jnp.mean(amplitudes**2)
    assert memory == pytest.approx(np.exp(-1), abs=0.15)


#
# The study
#


def test_channel_and_square_of_the_study():
    channel = study.rectangle(0.5, width=8)
    assert channel.mask.shape == (1, 32, 32) and jnp.sum(channel.mask) == 8 * 32
    x = jnp.arange(32.0)[None, :, None] / 500  # τ / (g h) is 0.0025
    tilted = lambda state, _: state._replace(fields=state.fields.at[:, 2].set(x))
    assert study.set_up(tilted) == pytest.approx(0.8, rel=1e-6)


def test_winds_that_training_has_not_seen():
    first, key = jnp.zeros((4, 6)), jax.random.key(0)
    turning = study.amplitudes("turning", first, 80, key).reshape(4, 80, 2, 3)
    assert jnp.all(turning[..., 1:] == 0)  # uniform
    speed = jnp.linalg.norm(turning[..., 0], axis=-1)
    assert jnp.allclose(speed, 3 * basin.WIND_SIZE)
    assert jnp.allclose(turning[:, 40:], turning[:, :40], atol=1e-9)
    stopping = study.amplitudes("stopping", first, 80, key)
    assert jnp.all(stopping[:, 50:] == 0)
    assert jnp.all(jnp.max(jnp.abs(stopping[:, :50]), axis=-1) > basin.WIND_SIZE)


def test_mass_error_is_relative_to_the_typical_elevation():
    states = study.rectangle(0.5)
    fields = jnp.zeros((1, 3, 3, 32, 32)).at[0, 2, 2].set(0.0052)
    assert study.mass_error(fields, states) == pytest.approx(0.1)


def test_the_study_reaches_its_goals():
    rows = read_csv(ROOT / "studies" / "shallow_water" / "rows.csv")
    medians = lambda name: train_and_tabulate.medians(rows, name)
    ours = [row for row in rows if row["model"] == study.OURS]
    assert [row["seed"] for row in ours] == ["0", "1", "2"]
    assert medians("exact_50")[study.OURS][0] <= 0.005
    assert medians("exact_200")[study.OURS][0] <= 0.02
    assert medians("refined_50")[study.OURS][0] <= 0.03
    assert medians("refined_50")["exact step, Crank–Nicolson"][0] > 0.15
    assert all(float(row["mass"]) < 1e-6 and row["finite"] == "32" for row in ours)
    assert all(abs(float(row["set_up"]) - 1) < 0.005 for row in ours)
    assert all(float(row["gyre"]) < 1e-3 and float(row["gyre_centre"]) < 0.45 for row in ours)
    assert all(float(row["seconds"]) <= 300 for row in ours)


@slow
def test_sizes_are_those_of_trajectories():
    states, amplitudes = basin.random_samples(jax.random.key(1), 4)
    amplitudes = basin.amplitude_series(amplitudes, 50, jax.random.key(2))
    solver = partial(basin.runge_kutta, num_substeps=4)
    fields = basin.rollout(solver, states, basin.wind_stress(amplitudes))
    size = lambda x: jnp.sqrt(jnp.mean(x**2, axis=(0, 1, 3, 4)))
    assert np.allclose(size(fields), basin.FIELD_SIZE.ravel(), rtol=0.4)
    assert np.allclose(size(jnp.diff(fields, axis=1)), basin.CHANGE_SIZE.ravel(), rtol=0.4)
