"""The published test in studies/ar_densed_burgers is what it claims to be. These tests verify
the equation, the residuals, the initial conditions, and the scores of the emulators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.tables import read_csv
from studies.ar_densed_burgers import problem, run as burgers
from studies.train_and_tabulate import medians
from tests.common import ROOT


FOLDER = ROOT / "studies" / "ar_densed_burgers"


def smooth_states(num_samples=2):
    """Returns states `[num_samples, 1, x]` in float64, with amplitudes so small that shocks are
    far off."""
    return problem.published_states(range(500, 500 + num_samples)) / 8


def spectral_slope(u):
    """Computes -½ ∂(u²)/∂x + ν ∂²u/∂x² of states `[..., x]` in NumPy."""
    k = 2j * np.pi * np.fft.rfftfreq(u.shape[-1], 1 / u.shape[-1])
    k[-1] = 0
    slope = -k * np.fft.rfft(u**2 / 2) + problem.VISCOSITY * k**2 * np.fft.rfft(u)
    return np.fft.irfft(slope)


def runge_kutta(u, time, num_steps=400):
    dt = time / num_steps
    for _ in range(num_steps):
        k1 = spectral_slope(u)
        k2 = spectral_slope(u + dt / 2 * k1)
        k3 = spectral_slope(u + dt / 2 * k2)
        k4 = spectral_slope(u + dt * k3)
        u = u + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return u


def test_differences_are_of_sixth_order():
    x = np.arange(problem.NUM_POINTS) / problem.NUM_POINTS
    errors = []
    for mode in (20, 40):
        k = 2 * np.pi * mode
        u = np.sin(k * x)[None]
        first = problem.first_derivative(u) - k * np.cos(k * x)
        second = problem.second_derivative(u) + k**2 * u
        errors.append([np.max(np.abs(first)) / k, np.max(np.abs(second)) / k**2])
    assert np.log2(errors[1][0] / errors[0][0]) == pytest.approx(6, abs=0.3)
    assert np.log2(errors[1][1] / errors[0][1]) == pytest.approx(6, abs=0.3)


@pytest.mark.parametrize("residual, order", [("hermite", 4), ("crank_nicolson", 2)])
def test_orders_of_the_residuals_in_time(residual, order, monkeypatch):
    """The residual of a fine solution falls with the time step by one order more than the order
    of the step."""
    u = smooth_states()
    sizes = []
    for dt in (0.02, 0.01):
        monkeypatch.setattr(problem, "DT", dt)
        r = getattr(problem, residual)(jnp.asarray(runge_kutta(u, dt)), jnp.asarray(u))
        sizes.append(float(jnp.max(jnp.abs(r))))
    assert np.log2(sizes[0] / sizes[1]) == pytest.approx(order + 1, abs=0.4)


def test_the_published_residual_is_crank_nicolson_on_a_mesh_of_one_point_more():
    u_prev, u_next = smooth_states()
    width, dt, size = 1 / 513, 0.005, problem.NUM_POINTS
    expected = np.zeros(size)
    for i in range(size):
        expected[i] = u_next[0, i] - u_prev[0, i]
        for u in (u_prev[0], u_next[0]):
            left, right = u[i - 1], u[(i + 1) % size]
            advection = u[i] * (right - left) / (2 * width)
            diffusion = 0.0025 * (left - 2 * u[i] + right) / width**2
            expected[i] += dt / 2 * (advection - diffusion)
    assert np.allclose(problem.published_residual(u_next, u_prev)[0], expected, atol=1e-12)


def test_persistence_has_a_residual_of_size_one():
    u = jnp.asarray(problem.published_states([0]))[0]
    for residuum_fn in (problem.crank_nicolson, problem.hermite):
        assert jnp.mean(problem.scaled(residuum_fn)(u, u) ** 2) == pytest.approx(1, rel=1e-4)


def test_the_solver_agrees_with_a_fine_one():
    u = problem.published_states([7], 1024)
    solution = problem.reference(u, num_steps=10)
    fine = runge_kutta(problem.published_states([7], 2048), 10 * problem.DT, 4000)[..., ::4]
    assert solution.shape == (1, 11, 1, 512) and solution.dtype == np.float64
    assert np.max(np.abs(solution[:, -1] - fine)) < 1e-4
    assert np.mean((solution[:, -1] - fine) ** 2) < 1e-10


def test_the_exact_step_has_no_residual():
    reference = problem.reference(problem.published_states([3], 1024), num_steps=3)
    u = problem.solved_exactly(problem.crank_nicolson, reference)
    for n in range(3):
        assert np.max(np.abs(problem.crank_nicolson(u[0, n + 1], u[0, n]))) < 1e-9
    assert 1e-9 < burgers.mean_squared_error(u, reference)[3] < 1e-3


def test_initial_conditions_of_the_test():
    """The initial conditions equal those of the published program, run by run. They are scaled
    by their maximum over 1024 points."""
    for run in (0, 199):
        np.random.seed(run)
        lam, c = np.random.randn(2, 9), np.random.rand() - 0.5
        x = np.arange(1024) / 1024
        f = sum(
            lam[0, i] * np.cos(2 * np.pi * k * x) + lam[1, i] * np.sin(2 * np.pi * k * x)
            for i, k in enumerate(range(-4, 5))
        )
        expected = 2 * f / np.max(np.abs(f)) + 2 * c
        assert np.allclose(problem.published_states([run], 1024)[0, 0], expected)
        assert np.allclose(problem.published_states([run])[0, 0], expected[::2])


def test_training_has_the_distribution_of_the_test():
    u = problem.initial_conditions(1000, jax.random.key(0), with_mean=True)
    test = problem.published_states(range(1000))
    energy = lambda u: np.mean(np.abs(np.fft.rfft(u)) ** 2, axis=(0, 1))[:6] / 512**2
    assert np.allclose(energy(u)[:5], energy(test)[:5], rtol=0.2)
    assert np.all(energy(u)[5:] < 1e-9) and np.all(energy(test)[5:] < 1e-9)
    u = problem.initial_conditions(10, jax.random.key(0))
    assert np.allclose(np.mean(u, axis=-1), 0, atol=1e-6) and np.std(u) > 0.5


def random_emulator(width=3):
    """Returns an emulator that is not the identity, unlike a fresh one."""
    emulator = burgers.Emulator(burgers.Recipe(width=width), jax.random.key(0))
    add = lambda x: x + 0.5 * jax.random.normal(jax.random.key(x.size), x.shape)
    return jax.tree.map(add, emulator)


def test_the_emulator_keeps_the_mean_and_starts_as_the_identity():
    u = jnp.asarray(problem.published_states([0]))[0]
    fresh = burgers.Emulator(burgers.Recipe(), jax.random.key(0))
    assert jnp.all(fresh(u) == u)
    u_next = random_emulator()(u)
    assert jnp.max(jnp.abs(u_next - u)) > 0.01
    assert abs(jnp.mean(u_next) - jnp.mean(u)) < 1e-6


def test_translation():
    u = jnp.asarray(problem.published_states([0, 1]))
    u -= jnp.mean(u, axis=-1, keepdims=True)
    distance = jnp.array([[3.0], [-7.0]]) / 512
    expected = jnp.stack([jnp.roll(u[0], 3, -1), jnp.roll(u[1], -7, -1)])
    assert jnp.allclose(problem.translate(u, distance), expected, atol=1e-4)


def test_rollouts_in_the_moving_frame_are_those_of_the_solver(monkeypatch):
    """In the moving frame, u has no mean. The solver run in that frame and moved back equals
    the solver, and so does the exact step, which takes whole trajectories."""
    monkeypatch.setattr(burgers, "TEST_STEPS", 8)
    reference = problem.reference(problem.published_states([5], 1024), num_steps=8)
    solver = problem.ex.stepper.Burgers(1, 1.0, 512, 0.005 / 10, diffusivity=0.0025, order=4)
    solver = problem.ex.repeat(solver, 10)
    stepper = lambda u: solver(u.astype(jnp.float64)).astype(jnp.float32)
    for moving_frame in (True, False):
        u = burgers.trajectories(stepper, reference[:, 0], moving_frame)
        assert np.max(np.abs(u - reference)) < 0.03  # the solver has 512 points, not 1024
    moved = reference - np.roll(reference, 1, axis=1)
    assert np.max(np.abs(moved)) > 0.3 and np.abs(np.mean(reference)) > 0.1

    seen = []
    same = problem.in_moving_frame(lambda u: seen.append(u) or u, reference)
    assert np.max(np.abs(same - reference)) < 1e-4  # the shortest wave has no phase
    assert np.max(np.abs(np.mean(seen[0], axis=-1))) < 1e-9
    exact = problem.in_moving_frame(
        lambda u: problem.solved_exactly(problem.hermite, u), reference[:, :4]
    )
    assert np.max(np.abs(exact - reference[:, :4])) < 2e-3


def test_the_published_error_is_that_of_the_weights():
    errors = {
        float(row["time"]): row["mse"] for row in read_csv(FOLDER / "published_error.csv")
    }
    assert len(errors) == problem.TEST_STEPS + 1
    found = [round(float(errors[t]), 4) for t in burgers.REPORT_TIMES]
    assert found == [0.0499, 0.0396, 0.0313, 0.0326, 0.0354]


def test_rows_of_the_csv_file():
    mse = np.arange(401) / 400
    emulator = random_emulator()
    row = burgers.make_row("ours", mse, 3, emulator, 20, 1.25)
    found = [row[f"mse_{t:g}"] for t in burgers.REPORT_TIMES]
    assert found == ["0.125", "0.25", "0.5", "0.75", "1"]
    assert (row["mse_largest"], row["seconds"], row["updates"]) == ("1", "1.2", 20)
    assert row["parameters"] == (1 * 9 + 1) * 6 + 2 * (3 * 9 + 1) * 6 + 3 * 9 + 1
    diverged = burgers.make_row("other", np.where(mse > 0.3, np.nan, mse))
    assert (diverged["mse_0.25"], diverged["mse_2"]) == ("0.125", "inf")
    assert diverged.keys() == row.keys() and diverged["parameters"] == ""


def test_the_goal_is_reached_by_the_rows_of_the_csv_file():
    """The rows of the CSV file reach the goal: a median over three seeds of at most 5e-7 at
    each of the five times."""
    rows = read_csv(FOLDER / "rows.csv")
    ours = [row for row in rows if row["model"] == burgers.OURS]
    assert [row["seed"] for row in ours] == ["0", "1", "2"]
    for t in burgers.REPORT_TIMES:
        assert medians(rows, f"mse_{t:g}")[burgers.OURS][0] <= 5e-7
    assert all(int(row["parameters"]) <= 13_442 for row in ours)
    assert medians(rows, "seconds")[burgers.OURS][0] <= 600


def test_errors_over_time_agree_with_the_table():
    rows = read_csv(FOLDER / "rows.csv")
    errors = read_csv(FOLDER / "error.csv")
    assert len(errors) == problem.TEST_STEPS + 1
    for t in burgers.REPORT_TIMES:
        [at_that_time] = [row for row in errors if float(row["time"]) == t]
        for model, (median, *_) in medians(rows, f"mse_{t:g}").items():
            assert float(at_that_time[model]) == pytest.approx(median, rel=0.02)


def test_readme_has_the_errors_of_the_rows():
    rows, errors = read_csv(FOLDER / "rows.csv"), read_csv(FOLDER / "error.csv")
    names = [f"mse_{t:g}" for t in burgers.REPORT_TIMES]
    ours = [medians(rows, name)[burgers.OURS][0] for name in names]
    published = [medians(rows, name)[burgers.PUBLISHED][0] for name in names]
    over_time = {name: [float(row[name]) for row in errors] for name in errors[0]}
    largest = {name: max(over_time[name]) for name in (burgers.OURS, burgers.PUBLISHED)}
    time = over_time["time"][over_time[burgers.OURS].index(largest[burgers.OURS])]
    texts = [min(published), max(published), *largest.values(), max(ours)]
    least, most, of_ours, of_theirs, at_most = (f"{x:.1e}".replace("e-0", "e-") for x in texts)
    cells = (
        f"| {least} to {most}; {of_theirs} | at most {at_most}; {of_ours}, at t = {time:g} |"
    )
    assert cells in (ROOT / "README.md").read_text()
