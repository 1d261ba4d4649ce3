"""Defines the shallow-water equations in closed basins, with coasts, islands, an uneven bottom
and a wind that changes in time.

    ∂u/∂t − f v + g ∂η/∂x = τ_x / h − drag u        no flow through the walls
    ∂v/∂t + f u + g ∂η/∂y = τ_y / h − drag v        drag = (0.01 + 0.05 |(u, v)|) / h
    ∂η/∂t + ∂(h u)/∂x + ∂(h v)/∂y = 0

The grid is staggered (Arakawa C): the velocities are on the faces of the cells, and so are the
walls. A face is open if the cells on both of its sides are wet.
"""

from typing import NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
from canonical_convolutions import canonical_convolutions


NUM_POINTS, DT, GRAVITY = 32, 2.0, 1.0  # the mesh width is 1
WIND_SIZE = 0.002  # typical stress over density
# Measured once: the RMS of u, v and η on trajectories, and of their change in one step.
FIELD_SIZE = np.array([0.044, 0.044, 0.052])[:, None, None]
CHANGE_SIZE = np.array([0.015, 0.015, 0.013])[:, None, None]


class State(NamedTuple):
    fields: jax.Array  # u on west faces, v on south faces, η in cells: [3, x, y]
    depth: jax.Array  # [x, y], positive even on land
    mask: jax.Array  # [x, y], 1 in wet cells and 0 on land


#
# The grid: a neighbour outside of the array is a ghost cell, where fields and mask are 0
#


def west(x):
    return jnp.pad(x, ((1, 0), (0, 0)))[:-1]


def east(x):
    return jnp.pad(x, ((0, 1), (0, 0)))[1:]


def south(x):
    return west(x.T).T


def north(x):
    return east(x.T).T


def open_faces(mask):
    """Returns 1 on west and south faces between two wet cells, 0 elsewhere, `[2, x, y]`."""
    return mask * jnp.stack([west(mask), south(mask)])


def face_depths(depth):
    """Averages the depths of two cells, `[2, x, y]`. The outermost faces are always closed."""
    padded = jnp.pad(depth, ((1, 0), (1, 0)), "edge")
    return (depth + jnp.stack([padded[:-1, 1:], padded[1:, :-1]])) / 2


#
# The equations
#


def drag(fields, depths):
    """Computes the drag on faces, `[2, x, y]`."""
    u, v, _ = fields
    v_at_u, u_at_v = v + west(v), u + south(u)
    v_at_u, u_at_v = (v_at_u + north(v_at_u)) / 4, (u_at_v + east(u_at_v)) / 4
    speed = jnp.sqrt(jnp.stack([u**2 + v_at_u**2, u_at_v**2 + v**2]) + 1e-8)
    return (0.01 + 0.05 * speed) / depths


def coriolis(shape):
    return jnp.broadcast_to(0.1 + 0.003 * jnp.arange(shape[1]), shape)


def time_derivative(fields, state, wind):
    """Computes the time derivative of `fields` under the wind stress `[2, x, y]`. Basin and
    drag are those of `state`, so the result is linear in the fields, plus a constant."""
    faces, depths = open_faces(state.mask), face_depths(state.depth)
    flux_u, flux_v = faces * depths * fields[:2]
    corner = coriolis(state.mask.shape) / face_depths(depths[0])[1]  # at south-west corners
    turn_u, turn_v = corner * (flux_v + west(flux_v)), corner * (flux_u + south(flux_u))
    turn = jnp.stack([turn_u + north(turn_u), -turn_v - east(turn_v)]) / 4  # does no work
    slope = jnp.stack([fields[2] - west(fields[2]), fields[2] - south(fields[2])])
    force = turn - GRAVITY * slope + wind / depths - drag(state.fields, depths) * fields[:2]
    return jnp.concatenate([faces * force, inflow(flux_u, flux_v)[None]])


def inflow(flux_u, flux_v):
    """Sums the fluxes into each cell through its faces. What leaves one cell enters another."""
    return flux_u - east(flux_u) + flux_v - north(flux_v)


def crank_nicolson(u_next, u_prev, wind):
    """Returns zero if `u_next` is one step after `u_prev`, with a constant wind."""
    slopes = (time_derivative(u.fields, u_prev, wind) for u in (u_prev, u_next))
    return u_next.fields - u_prev.fields - DT / 2 * sum(slopes)


def hermite(u_next, u_prev, wind):
    """Returns zero if `u_next` is one step, of fourth order except for the drag, after
    `u_prev`."""
    f = lambda fields: time_derivative(fields, u_prev, wind)
    slope_0, slope_1 = f(u_prev.fields), f(u_next.fields)
    bend = jax.jvp(f, (u_prev.fields,), (slope_0 - slope_1,))[1]
    change = u_next.fields - u_prev.fields
    return change - DT / 2 * (slope_0 + slope_1) - DT**2 / 12 * bend


#
# Solvers, which are used only for the evaluation
#


def exact_step(residuum_fn):
    """Returns the step at which the residual, which is linear in that step, is zero."""

    def step(state, wind):
        residual = lambda fields: residuum_fn(state._replace(fields=fields), state, wind)
        guess = runge_kutta(state, wind, num_substeps=4).fields
        value, jacobian = jax.linearize(residual, guess)
        options = dict(tol=3e-4, restart=20, maxiter=10)
        change, _ = jax.scipy.sparse.linalg.gmres(jacobian, -value, **options)
        return state._replace(fields=guess + change)

    return step


def runge_kutta(state, wind, num_substeps=16):
    """Returns the state after one step, with the drag of each instant. Doubling the number of
    substeps changes a rollout by 2e-5 at most."""
    dt = DT / num_substeps
    f = lambda fields: time_derivative(fields, state._replace(fields=fields), wind)

    def substep(_, u):
        k1 = f(u)
        k2 = f(u + dt / 2 * k1)
        k3 = f(u + dt / 2 * k2)
        return u + dt / 6 * (k1 + 2 * k2 + 2 * k3 + f(u + dt * k3))

    return state._replace(fields=jax.lax.fori_loop(0, num_substeps, substep, state.fields))


#
# Random basins and winds
#


def smooth_noise(key, scale):
    wavenumbers = 2 * np.pi * np.fft.fftfreq(2 * NUM_POINTS)
    smooth = np.exp(-(scale**2) / 2 * (wavenumbers[:, None] ** 2 + wavenumbers**2))
    noise = jnp.fft.ifft2(smooth * jnp.fft.fft2(jax.random.normal(key, smooth.shape))).real
    return noise[:NUM_POINTS, :NUM_POINTS] / jnp.std(noise)


def random_state(key):
    """Returns a state at rest, with a rough surface, a coast, shoals and two islands."""
    keys = jax.random.split(key, 5)
    x = (jnp.arange(NUM_POINTS) + 0.5) / NUM_POINTS
    to_wall = jnp.minimum(x, 1 - x)
    coast = jnp.minimum(to_wall[:, None], to_wall) + 0.05 * smooth_noise(keys[0], 3) > 0.05
    centre = jax.random.uniform(keys[1], (2, 2, 1), minval=0.2, maxval=0.8)
    radius = jax.random.uniform(keys[2], (2, 1, 1), minval=0.03, maxval=0.1)
    distance = jnp.hypot((x - centre[0])[:, :, None], (x - centre[1])[:, None])
    mask = jnp.where(coast & jnp.all(distance > radius, axis=0), 1.0, 0.0)
    eta = 0.08 * mask * smooth_noise(keys[3], 4)
    eta -= mask * jnp.sum(eta) / jnp.sum(mask)
    depth = jnp.clip(0.6 + 0.25 * smooth_noise(keys[4], 3), 0.2, 1.0)
    return State(jnp.stack([0 * eta, 0 * eta, eta]), depth, mask)


def wind_stress(amplitudes):
    """Computes `[..., 2, x, y]` from amplitudes `[..., 6]` of uniform, sheared, convergent
    winds."""
    wave = jnp.cos(jnp.pi * (jnp.arange(NUM_POINTS) + 0.5) / NUM_POINTS)
    x, y = jnp.meshgrid(wave, wave, indexing="ij")
    patterns = jnp.stack([jnp.ones_like(x), x, y])
    amplitudes = amplitudes.reshape(*amplitudes.shape[:-1], 2, 3)
    return jnp.einsum("...cp,pxy->...cxy", amplitudes, patterns)


def amplitude_series(amplitudes, num_steps, key):
    """Draws the amplitudes `[..., num_steps, 6]` that follow `amplitudes`, `[..., 6]`. They are
    an Ornstein–Uhlenbeck process with a memory of ten steps."""
    correlation = np.exp(-1 / 10)

    def step(amplitudes, key):
        noise = WIND_SIZE * jax.random.normal(key, amplitudes.shape)
        return 2 * (correlation * amplitudes + np.sqrt(1 - correlation**2) * noise,)

    _, series = jax.lax.scan(step, amplitudes, jax.random.split(key, num_steps))
    return jnp.moveaxis(series, 0, -2)


def random_samples(key, num_samples):
    """Returns random states, and amplitudes `[num_samples, 6]` of the wind."""
    states_key, wind_key = jax.random.split(key)
    states = jax.vmap(random_state)(jax.random.split(states_key, num_samples))
    return states, WIND_SIZE * jax.random.normal(wind_key, (num_samples, 6))


#
# Evaluation
#


def rollout(stepper, states, winds):
    """Returns fields `[sample, time, 3, x, y]` under the winds `[sample, time, 2, x, y]`."""

    def trajectory(state, wind):
        step = lambda state, wind: 2 * (stepper(state, wind),)
        _, states = jax.lax.scan(step, state, wind)
        return jnp.concatenate([state.fields[None], states.fields])

    return jax.jit(canonical_convolutions(jax.vmap(trajectory)))(states, winds)


def relative_error(fields, reference):
    """Computes the nRMSE `[time]` of all three fields, each divided by its RMS."""
    return common.error_over_time(fields / FIELD_SIZE, reference / FIELD_SIZE)


def show_basin(axis, title, mask, fields):
    """Draws η in colours and the currents as arrows."""
    u, v, eta = (np.where(mask == 0, np.nan, field) for field in fields)
    image = common.show(axis, title, eta, eta.shape, vmin=-0.1, vmax=0.1)
    centres = np.arange(0.5, len(eta), 2)
    axis.quiver(centres, centres, u[::2, ::2].T, v[::2, ::2].T, scale=2, width=0.004)
    axis.set_facecolor("#d8cfc0")  # land
    return image
