"""The test of superiority in studies/superiority is what it claims to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.tables import read_csv
from studies.superiority import run as superiority
from studies.train_and_tabulate import medians
from tests.common import ROOT


def states(num_samples=3):
    return superiority.initial_conditions(num_samples, jax.random.key(0))


def test_one_step_is_upwind_with_the_mean_of_the_wind():
    v, wind = np.asarray(states(2), np.float64)[:, 0]
    wind = wind - np.mean(wind)  # so that the wind blows both ways
    n, expected = superiority.NUM_POINTS, np.zeros(superiority.NUM_POINTS)
    for i in range(n):
        left, right = v[i - 1], v[(i + 1) % n]
        from_left = max((wind[i] + wind[i - 1]) / 2, 0)
        from_right = min((wind[i] + wind[(i + 1) % n]) / 2, 0)
        # The time step is 1, the mesh width 1/60, the viscosity 0.2 / (2 · 60²), and b = 8/60.
        expected[i] = 0.2 / (2 * 60**2) * 60**2 * (left - 2 * v[i] + right)
        expected[i] -= 8 / 60 * 60 * (from_left * (v[i] - left) + from_right * (right - v[i]))
    assert np.ptp(np.sign(wind)) == 2
    assert np.allclose(superiority.change(v[None], wind[None])[0], expected)


def test_the_coarse_solver_takes_the_wind_of_the_last_step_and_the_fine_one_solves():
    for u in states():
        coarse, fine = superiority.coarse(u), superiority.fine(u)
        assert jnp.allclose(coarse, u + superiority.change(coarse, wind=u), atol=1e-6)
        assert jnp.max(jnp.abs(superiority.implicit_euler(fine, u))) < 1e-5
        assert jnp.max(jnp.abs(superiority.implicit_euler(coarse, u))) > 1e-2
        assert jnp.mean(superiority.preconditioned(u, u) ** 2) == pytest.approx(1, rel=1e-3)


def test_initial_conditions_are_a_wave_and_an_offset():
    u = np.asarray(states(2000))
    assert u.shape == (2000, 1, 60) and np.allclose(np.max(np.abs(u), axis=-1), 1)
    u_hat = np.fft.rfft(u[:, 0]) / 60
    assert np.max(np.abs(u_hat[:, 2:])) < 1e-6
    offset, amplitude = u_hat[:, 0].real, 2 * np.abs(u_hat[:, 1])
    # |offset| / amplitude has the distribution of U(0, ½) / U(0, 1), whose median is ½.
    assert np.median(np.abs(offset) / amplitude) == pytest.approx(0.5, rel=0.1)
    assert np.mean(offset > 0) == pytest.approx(0.5, abs=0.05)


def test_data_are_one_step_pairs_of_the_solver(monkeypatch):
    """The data are one-step pairs of the solver, so the solver itself has a loss of zero and
    the other solver does not."""
    monkeypatch.setattr(superiority, "NUM_TRAIN", 4)
    loss_fn = superiority.on_data(superiority.coarse, jax.random.key(0))
    key = jax.random.key(1)
    loss, memory = loss_fn(superiority.coarse, (), key)
    assert loss < 1e-9 and memory == ()
    assert loss_fn(superiority.fine, (), key)[0] > 1e-4


def test_rows_of_the_csv_file():
    row = superiority.make_row("model", np.arange(1, 11) / 10, 2)
    assert [row[f"superiority_{n}"] for n in (1, 10)] == ["0.1", "1"]
    assert (row["superiority_largest"], row["seed"], row["updates"]) == ("1", 2, "")


def test_the_goal_is_reached_by_the_rows_of_the_csv_file():
    """The rows of the CSV file reach the goal: a median over three seeds of at most 0.03 at
    each of the ten steps."""
    rows = read_csv(ROOT / "studies" / "superiority" / "rows.csv")
    ours = [row for row in rows if row["model"] == superiority.RESIDUAL]
    assert [row["seed"] for row in ours] == ["0", "1", "2"]
    for n in range(1, 11):
        scores = medians(rows, f"superiority_{n}")
        assert scores[superiority.RESIDUAL][0] <= 0.03
    assert all(int(row["parameters"]) <= 27_193 for row in ours)
    assert medians(rows, "seconds")[superiority.RESIDUAL][0] <= 300
