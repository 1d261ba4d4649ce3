"""The published test in studies/ar_densed_kuramoto_sivashinsky is what it claims to be. These
tests verify the residual, the solver, the initial conditions, and the scores of the
emulators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import error_over_time, rollout

from benchmarks.tables import read_csv
from residuum import residuum_loss
from studies.ar_densed_kuramoto_sivashinsky import problem, run as ks
from studies.train_and_tabulate import num_parameters
from tests.common import ROOT, slow


FOLDER = ROOT / "studies" / "ar_densed_kuramoto_sivashinsky"


def attractor(num_samples=2):
    """Returns smooth states with the amplitude of the attractor."""
    waves = problem.long_waves(num_samples, jax.random.key(0))
    return rollout(problem.reference_solver(), waves, 600)[:, -1]


def loss_of(stepper, states, num_steps=3):
    residuum_fn = problem.preconditioned_crank_nicolson
    options = dict(num_rollout_steps=num_steps)
    return jax.jit(lambda u: residuum_loss(stepper, u, residuum_fn, **options))(states[:, None])


def test_residual_of_the_exact_step_is_zero():
    states = attractor()
    assert loss_of(problem.crank_nicolson_step, states) < 1e-15
    assert loss_of(lambda u: u, states) > 1e-4


def test_symbols_of_differences_are_those_of_the_stencils():
    first, second = problem.DIFFERENCES
    u = np.random.default_rng(0).normal(size=96)
    u_hat = np.fft.rfft(u)
    u_hat[-1] = 0  # the shortest wave has no derivative here
    u = np.fft.irfft(u_hat)
    h = 22 * np.pi / 96
    after, before = np.roll(u, -1), np.roll(u, 1)
    assert np.allclose(np.fft.irfft(1j * first * u_hat), (after - before) / (2 * h))
    assert np.allclose(np.fft.irfft(-second * u_hat), (after - 2 * u + before) / h**2)


def time_derivative(u):
    """Computes -½ ∂(u²)/∂x - ∂²u/∂x² - ∂⁴u/∂x⁴ of states `[batch, x]` in NumPy."""
    k = 2j * np.pi / (22 * np.pi) * np.fft.fftfreq(96, 1 / 96)
    derivative = lambda u, order: np.fft.ifft(k**order * np.fft.fft(u)).real
    return -derivative(u**2 / 2, 1) - derivative(u, 2) - derivative(u, 4)


def runge_kutta(u, dt):
    k1 = time_derivative(u)
    k2 = time_derivative(u + dt / 2 * k1)
    k3 = time_derivative(u + dt / 2 * k2)
    k4 = time_derivative(u + dt * k3)
    return u + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def test_solver_agrees_with_a_fine_one():
    """The solver agrees with a fine solver to fourth order, far better than Crank–Nicolson with
    its second order."""
    states = attractor()
    fine = np.asarray(states[:, 0], np.float64)
    for _ in range(500):
        fine = runge_kutta(fine, 10 * problem.DT / 500)

    def error(stepper):
        u = rollout(stepper, states, 10)[:, -1, 0]
        return np.sqrt(np.mean((np.asarray(u) - fine) ** 2))

    assert error(problem.reference_solver()) < 2e-5
    assert 5e-5 < error(problem.crank_nicolson_step) < 1e-3


def test_long_waves_have_the_coefficients_of_the_test():
    """The long waves are u = Σ a_k exp(-2πikx/L) + c.c., with real and imaginary parts of a_k
    in [0, 1)."""
    u = np.asarray(problem.long_waves(200, jax.random.key(0)))[:, 0]
    x = np.arange(96) / 96
    a = np.stack([np.mean(u * np.exp(2j * np.pi * k * x), axis=-1) for k in (1, 2)], axis=-1)
    for part in (a.real, a.imag):
        assert np.all((part > -1e-6) & (part < 1 + 1e-6))
        assert np.allclose(np.mean(part, axis=0), 0.5, atol=0.1)
    waves = sum(a[:, k - 1 : k] * np.exp(-2j * np.pi * k * x) for k in (1, 2))
    assert np.allclose(u, 2 * waves.real, atol=1e-5)


def test_training_starts_from_periodic_waves_and_long_ones():
    u = np.asarray(problem.initial_conditions(200, jax.random.key(0)))[:, 0]
    u_hat = np.fft.rfft(u) / 96
    assert np.all(np.max(np.abs(u_hat[:, 1:3]), axis=-1) > 1e-4)
    u_hat[:, 1:3] = 0
    size = np.max(np.abs(np.fft.irfft(96 * u_hat)), axis=-1)
    assert np.all((size > 2.5 - 1e-4) & (size < 3.5 + 1e-4))
    assert np.min(size) < 2.6 and np.max(size) > 3.4
    repetitions = set()
    for wave in np.abs(u_hat):
        others = [np.delete(wave, np.s_[::n]).max() for n in range(5, 10)]
        assert min(others) < 1e-6
        repetitions.add(5 + np.argmin(others))
    assert {6, 7, 8} <= repetitions


def random_network():
    """Returns a network that is not the identity, unlike a fresh one."""
    stepper = problem.ConvNet(width=3, key=jax.random.key(0))
    leaves, structure = jax.tree.flatten(stepper)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, leaves)


@slow
def test_no_rollout_overflows():
    """No rollout overflows, whatever the weights. Only the clip keeps this network from
    squaring u twice a step."""
    stepper = jax.tree.map(lambda x: 10 * x, random_network())
    u = rollout(stepper, attractor(), 50)
    assert jnp.max(jnp.abs(u)) > 100 and jnp.all(jnp.isfinite(u))


@slow
def test_the_network_starts_as_the_identity_and_commutes_with_shifts():
    u = attractor()[0]
    step = jax.jit(lambda stepper, u: stepper(u))
    assert jnp.all(step(problem.ConvNet(width=3, key=jax.random.key(0)), u) == u)
    stepper = random_network()
    assert jnp.max(jnp.abs(step(stepper, u) - u)) > 0.1
    shifted = step(stepper, jnp.roll(u, 5))
    assert jnp.allclose(shifted, jnp.roll(step(stepper, u), 5), atol=1e-5)


def test_number_of_parameters():
    stepper = problem.ConvNet(width=3, depth=3, kernel_size=5, key=jax.random.key(0))
    first, second, last = (1 * 5 + 1) * 6, (4 * 5 + 1) * 6, 7 * 5 + 1
    assert num_parameters(stepper) == first + second + last


def waves(amplitudes, num_steps=400):
    """Returns a standing trajectory `[1, time, 1, x]` of cosines, `{mode: amplitude}`."""
    x = 2 * np.pi * np.arange(96) / 96
    u = sum(amplitude * np.cos(mode * x) for mode, amplitude in amplitudes.items())
    return jnp.broadcast_to(jnp.asarray(u), (1, num_steps, 1, 96))


def test_spectrum_and_errors_of_known_waves():
    u = waves({3: 2.0, 7: 0.5})
    expected = np.zeros(49)
    expected[[3, 7]] = 1.0, 0.0625
    assert np.allclose(ks.spectrum(u), expected, atol=1e-6)
    assert np.allclose(ks.mean_squared_error(1.1 * u, u), 0.01 * (2 + 0.125), rtol=1e-4)
    assert np.allclose(error_over_time(1.1 * u, u), 0.1, rtol=1e-4)


def test_scores_of_a_known_emulator():
    """The scores are right for an emulator that is ten per cent too large and has the wrong
    sign from t = 30 on, and also once it diverges."""
    every = {mode: 1.0 for mode in range(49)}
    u = waves(every)
    emulated = (1.1 * u).at[:, 300:].multiply(-1)
    scores = ks.evaluate(emulated, u)
    mse = 0.01 * float(np.mean(u**2))
    expected = dict(mse_1=mse, mse_5=mse, mse_10=mse, mse_20=mse, std=float(np.std(emulated)))
    expected |= {"time_of_nrmse_0.3": 30.0, "spectrum": 0.21}
    assert scores.numbers == pytest.approx(expected, rel=1e-3)
    assert scores.energy.shape == (23,) and np.allclose(scores.energy, 1.21, rtol=1e-3)
    numbers = ks.evaluate(emulated.at[:, 50:].set(jnp.nan), u).numbers
    assert numbers["mse_1"] == pytest.approx(mse, rel=1e-3)
    assert [numbers[f"mse_{t}"] for t in (5, 10, 20)] == 3 * [np.inf]
    assert numbers["time_of_nrmse_0.3"] == pytest.approx(5.0)


@slow
def test_the_published_test_is_on_the_attractor():
    """The published test begins after the transient, so the statistics no longer change."""
    reference = problem.published_test(num_samples=16)
    assert reference.shape == (16, 1001, 1, 96)
    early, late = (float(jnp.std(u)) for u in (reference[:, :300], reference[:, -300:]))
    assert early == pytest.approx(late, rel=0.05) and early == pytest.approx(1.31, rel=0.05)


def test_rows_of_the_csv_file_have_the_columns_of_the_table():
    row = ks.make_row("emulator", ks.PUBLISHED_NUMBERS, 3)
    assert (row["model"], row["seed"]) == ("emulator", 3)
    assert [row[f"mse_{t}"] for t in (1, 5, 10, 20)] == ["0.0006", "0.0088", "0.066", "0.56"]
    assert {column for column, _ in ks.COLUMNS.values()} < row.keys()


def test_readme_has_the_medians_of_the_csv_file():
    rows = [row for row in read_csv(FOLDER / "rows.csv") if row["model"] == "4 steps"]
    assert [row["seed"] for row in rows] == ["0", "1", "2"]
    mse, seconds, size = (
        np.median([float(row[column]) for row in rows])
        for column in ("mse_10", "seconds", "parameters")
    )
    ours = f"{mse:.1e} | 4,820 / {size:,.0f} | {seconds:.0f} s |".replace("e-0", "e-")
    assert f"| 6.6e-2 | {ours}" in (ROOT / "README.md").read_text()
