"""Defines Burgers' equation as in the test of AR-DenseED: residuals, initial conditions,
solutions.

    ∂u/∂t + ½ ∂(u²)/∂x = ν ∂²u/∂x²,   x in [0, 1) periodic, ν = 0.0025
"""

from functools import partial

import exponax as ex
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from studies.train_and_tabulate import float64


NUM_POINTS, DT = 512, 0.005
VISCOSITY = 0.0025
NUM_TEST, TEST_STEPS = 200, 400


#
# The equation, for states `[1, NUM_POINTS]` on [0, 1)
#


def first_derivative(u):
    """Computes central differences of sixth order. The differences of a flux sum to zero."""
    pairs = ((1, 3 / 4), (2, -3 / 20), (3, 1 / 60))
    return NUM_POINTS * sum(c * (jnp.roll(u, -s, -1) - jnp.roll(u, s, -1)) for s, c in pairs)


def second_derivative(u):
    pairs = ((1, 3 / 2), (2, -3 / 20), (3, 1 / 90))
    around = sum(c * (jnp.roll(u, -s, -1) + jnp.roll(u, s, -1)) for s, c in pairs)
    return NUM_POINTS**2 * (around - 49 / 18 * u)


def time_derivative(u):
    return VISCOSITY * second_derivative(u) - first_derivative(u**2 / 2)


def hermite(u_next, u_prev):
    """Returns zero if `u_next` is one step of length `DT` after `u_prev`. The residual is of
    fourth order in time, from the first and second time derivatives of the two states."""
    slope_0, bend_0 = jax.jvp(time_derivative, (u_prev,), (time_derivative(u_prev),))
    slope_1, bend_1 = jax.jvp(time_derivative, (u_next,), (time_derivative(u_next),))
    return u_next - u_prev - DT / 2 * (slope_0 + slope_1) - DT**2 / 12 * (bend_0 - bend_1)


def crank_nicolson(u_next, u_prev):
    return u_next - u_prev - DT / 2 * (time_derivative(u_prev) + time_derivative(u_next))


def published_residual(u_next, u_prev):
    """Computes the residual of AR-DenseED: Crank–Nicolson, with advection in the form u ∂u/∂x,
    second-order differences, and a mesh width of 1/513 on a grid of 1/512."""
    width = 1 / (NUM_POINTS + 1)
    left, right = (lambda u: jnp.roll(u, 1, -1)), (lambda u: jnp.roll(u, -1, -1))

    def slope(u):
        advection = u * (right(u) - left(u)) / (2 * width)
        return VISCOSITY * (right(u) - 2 * u + left(u)) / width**2 - advection

    return u_next - u_prev - DT / 2 * (slope(u_prev) + slope(u_next))


def scaled(residuum_fn, relative=True):
    """Divides a residual by the RMS of one step's change, so that all states count alike. If
    not `relative`, the divisor is a typical RMS for all states."""

    def residual(u_next, u_prev):
        change = DT * time_derivative(u_prev)
        size = jnp.sqrt(jnp.mean(change**2) + 1e-8) if relative else 0.02
        return residuum_fn(u_next, u_prev) / size

    return residual


#
# Initial conditions, `[num_samples, 1, num_points]`
#


def published_states(runs, num_points=NUM_POINTS):
    """Returns the initial conditions of the test, one run for each seed: nine random waves
    scaled to a maximum of 2, plus a random constant. The maximum is over 1024 points."""

    def waves(run, num_points):
        generator = np.random.RandomState(run)
        cosines, sines = generator.randn(2, 9)
        shift = generator.rand() - 0.5
        x = 2 * np.pi * np.outer(np.arange(-4, 5), np.arange(num_points) / num_points)
        return cosines @ np.cos(x) + sines @ np.sin(x), 2 * shift

    states = []
    for run in runs:
        (u, constant), (fine, _) = (waves(run, n) for n in (num_points, 1024))
        states.append(2 * u / np.max(np.abs(fine)) + constant)
    return np.stack(states)[:, None]


def initial_conditions(num_samples, key, with_mean=False):
    """Draws training states from the same distribution as the test. The mean of each state is
    subtracted unless `with_mean`."""
    waves_key, shift_key = jax.random.split(key)
    phases = 2 * np.pi * np.outer(np.arange(-4, 5), np.arange(NUM_POINTS) / NUM_POINTS)
    cosines, sines = jax.random.normal(waves_key, (2, num_samples, 9))
    u = cosines @ np.cos(phases) + sines @ np.sin(phases)
    u = 2 * u / jnp.max(jnp.abs(u), axis=-1, keepdims=True)
    shift = jax.random.uniform(shift_key, (num_samples, 1), minval=-1.0)
    u = u + shift if with_mean else u - jnp.mean(u, axis=-1, keepdims=True)
    return u[:, None]


def reference(states, substeps=25, num_steps=TEST_STEPS):
    """Returns trajectories `[run, num_steps + 1, 1, NUM_POINTS]` of the solver. The initial
    states have that many points or a multiple of them. The solver is of fourth order in time
    and spectral in space, in float64."""
    num_points = states.shape[-1]
    with float64():
        solver = ex.stepper.Burgers(
            1, 1.0, num_points, DT / substeps, diffusivity=VISCOSITY, order=4
        )
        step = jax.jit(jax.vmap(ex.repeat(solver, substeps)))
        times = [jnp.asarray(states, jnp.float64)]
        for _ in range(num_steps):
            times.append(step(times[-1]))
        return np.stack(times, axis=1)[..., :: num_points // NUM_POINTS]


#
# Burgers' equation is the same in a frame that moves with the mean of u, because it is Galilean
# invariant.
#


def translate(u, distance):
    """Moves states `[..., NUM_POINTS]` to the right. Between the points, they are Fourier
    series."""
    wavenumbers = 2j * np.pi * np.arange(NUM_POINTS // 2 + 1)
    u_hat = jnp.fft.rfft(u) * jnp.exp(-wavenumbers * distance[..., None])
    return jnp.fft.irfft(u_hat).astype(u.dtype)


def in_moving_frame(advance, u):
    """Calls `advance(u)` on trajectories, or on first states, `[run, time, 1, NUM_POINTS]`, in
    the frame where their mean is 0. The trajectories that `advance` returns are moved back."""
    mean = jnp.mean(u[:, :1], axis=-1, keepdims=True)
    distance = lambda u: mean[..., 0] * DT * jnp.arange(u.shape[1])[:, None]
    u = advance(translate(u - mean, -distance(u)))
    return translate(u, distance(u)) + mean


def solved_exactly(residuum_fn, reference):
    """Computes trajectories from the first states of the reference by Newton's method in
    float64. At each step, the iteration starts from the reference's next state and keeps the
    matrix there."""
    colors = np.tile(np.eye(16), NUM_POINTS // 16)[:, None]  # no stencil has 16 points

    @jax.jit
    @jax.vmap
    def jacobian(u, u_prev):
        jvp = jax.linearize(lambda u: residuum_fn(u, u_prev), u)[1]
        return jax.vmap(jvp)(colors)[:, 0]

    residual = jax.jit(jax.vmap(residuum_fn))
    reference = np.asarray(reference)
    with float64():
        states = [reference[:, 0]]
        for u in reference[:, 1:].swapaxes(0, 1):
            columns = np.asarray(jacobian(u, states[-1]))
            for _ in range(50):
                r = np.asarray(residual(u, states[-1]))
                if np.max(np.abs(r)) < 1e-10:
                    break
                u = u - solve_periodic_band(columns, r[:, 0])[:, None]
            else:
                raise RuntimeError("Newton's method does not converge")
            states.append(u)
    return np.stack(states, axis=1)


def solve_periodic_band(columns, residuals, width=6):
    """Solves J x = r for each run. `columns[c, i]` is the entry of row i in that one of the
    columns c, c + 16, ... which is at most `width` points away. In the order 0, -1, 1, -2, ...,
    the points turn the periodic band into an ordinary band."""
    point = np.arange(NUM_POINTS)
    place = np.minimum(2 * point, 2 * (NUM_POINTS - 1 - point) + 1)
    order = np.argsort(place)
    i = point[:, None]
    j = (i + np.arange(-width, width + 1)) % NUM_POINTS
    band = np.zeros((len(residuals), 4 * width + 1, NUM_POINTS))
    band[:, 2 * width + place[i] - place[j], place[j]] = columns[:, j % 16, i]
    solve = partial(scipy.linalg.solve_banded, (2 * width, 2 * width))
    solutions = [solve(*pair) for pair in zip(band, residuals[:, order], strict=True)]
    return np.stack(solutions)[:, place]
