"""Defines the Kuramoto–Sivashinsky equation as in the test of AR-DenseED: residual, solver,
initial conditions, and a network.

    ∂u/∂t + ½ ∂(u²)/∂x + ∂²u/∂x² + ∂⁴u/∂x⁴ = 0,   x in [0, 22π) periodic
"""

from collections.abc import Callable

import equinox as eqx
import exponax as ex
import jax
import jax.numpy as jnp
import numpy as np
from common import bilinear, rollout


NUM_POINTS = 96
DOMAIN_EXTENT = 22 * np.pi
DT = 0.1
NUM_TEST, TRANSIENT_STEPS, TEST_STEPS = 200, 1000, 1000


#
# The equation
#

WAVENUMBERS = 2 * np.pi / DOMAIN_EXTENT * np.arange(NUM_POINTS // 2 + 1)
WAVENUMBERS[-1] = 0  # the shortest wave has no derivative on this grid
SPECTRAL = WAVENUMBERS, WAVENUMBERS**2  # symbols of -i ∂/∂x and -∂²/∂x²
MESH_WIDTH = DOMAIN_EXTENT / NUM_POINTS
DIFFERENCES = (  # symbols of the second-order differences
    np.sin(WAVENUMBERS * MESH_WIDTH) / MESH_WIDTH,
    (2 - 2 * np.cos(WAVENUMBERS * MESH_WIDTH)) / MESH_WIDTH**2,
)


def crank_nicolson(u_next, u_prev, symbols=SPECTRAL, precondition=False):
    """Returns zero if `u_next` is one Crank–Nicolson step of length `DT` after `u_prev`. States
    are `[1, NUM_POINTS]`."""
    first, second = symbols
    linear = second - second**2  # symbol of -∂²/∂x² - ∂⁴/∂x⁴
    slope = lambda u: linear * jnp.fft.rfft(u) - 0.5j * first * jnp.fft.rfft(u**2)
    residual = jnp.fft.rfft(u_next - u_prev) - DT / 2 * (slope(u_next) + slope(u_prev))
    return jnp.fft.irfft(residual / (1 - DT / 2 * linear) if precondition else residual)


def preconditioned_crank_nicolson(u_next, u_prev, symbols=SPECTRAL):
    """Computes the Crank–Nicolson residual with the linear part of the step inverted. To first
    order, it is the error of `u_next`."""
    return crank_nicolson(u_next, u_prev, symbols, precondition=True)


def crank_nicolson_step(u_prev):
    """Solves the Crank–Nicolson step. Each iteration reduces the error to a fifth."""
    correct = lambda _, u: u - preconditioned_crank_nicolson(u, u_prev)
    return jax.lax.fori_loop(0, 12, correct, u_prev)


def reference_solver():
    """Returns a solver of fourth order in time, without dealiasing, like that of the
    authors."""
    return ex.stepper.KuramotoSivashinskyConservative(
        1, DOMAIN_EXTENT, NUM_POINTS, DT, order=4, dealiasing_fraction=1.0
    )


#
# Initial conditions for training and test, `[num_samples, 1, NUM_POINTS]`
#


def long_waves(num_samples, key):
    """Draws the two longest waves with random coefficients, as in the published test."""
    real, imaginary = jax.random.uniform(key, (2, num_samples, 1, 2))
    u_hat = jnp.zeros((num_samples, 1, NUM_POINTS // 2 + 1), complex)
    return jnp.fft.irfft(u_hat.at[..., 1:3].set(NUM_POINTS * (real - 1j * imaginary)))


def initial_conditions(num_samples, key, long=0.1):
    """Draws the random waves of the published training. Their period is about a seventh of the
    domain, and a convolutional emulator preserves that period. Adding `long` times `long_waves`
    breaks the symmetry."""
    keys = jax.random.split(key, 5)
    shape = (num_samples, 1, 1)
    amplitude = 2.5 + jax.random.uniform(keys[0], shape)
    mode = jnp.round(jnp.abs(7 + 0.5 * jax.random.normal(keys[1], shape)))
    phase = 2 * jnp.pi * jax.random.uniform(keys[2], shape)
    second = jax.random.normal(keys[3], shape)
    x = 2 * jnp.pi * mode * jnp.arange(NUM_POINTS) / NUM_POINTS
    u = jnp.sin(x + phase) + second * jnp.sin(2 * x + phase) + jnp.sin(3 * x + phase) / 3
    lowest, highest = (f(u, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
    waves = amplitude * (2 * (u - lowest) / (highest - lowest) - 1)
    return waves + long * long_waves(num_samples, keys[4])


def published_test(num_samples=NUM_TEST, seed=0):
    """Returns the solver's trajectories `[num_samples, TEST_STEPS + 1, 1, NUM_POINTS]` from t =
    100 on, after the transient. The emulators start from the first states of these
    trajectories."""
    solver = reference_solver()
    start = long_waves(num_samples, jax.random.key(seed))
    start = rollout(solver, start, TRANSIENT_STEPS)[:, -1]
    return rollout(solver, start, TEST_STEPS)


#
# The emulator
#


class ConvNet(eqx.Module):
    """Advances a state `[1, NUM_POINTS]`: adds the output of a periodic ConvNet with dense
    connections. The activations are products of channels, because the equation is quadratic."""

    layers: list[eqx.nn.Conv1d]
    activation: Callable = eqx.field(static=True)

    def __init__(self, *, width=16, depth=3, kernel_size=9, activation=bilinear, key):
        self.activation = activation
        hidden_width = 2 * width if activation is bilinear else width
        layers = [
            eqx.nn.Conv1d(
                1 + i * width,
                hidden_width if i < depth - 1 else 1,
                kernel_size,
                padding="SAME",
                padding_mode="CIRCULAR",
                key=layer_key,
            )
            for i, layer_key in enumerate(jax.random.split(key, depth))
        ]
        # Equinox initialises with a third of the variance 1 / fan_in, with which training is
        # slower.
        self.layers = jax.tree.map(lambda x: 3**0.5 * x, layers[:-1])
        # A last layer of zeros makes the emulator start as the identity.
        self.layers += jax.tree.map(jnp.zeros_like, layers[-1:])

    def __call__(self, u):
        hidden = jnp.clip(u, -5, 5) / 2  # prevents any overflow of a rollout
        for layer in self.layers[:-1]:
            hidden = jnp.concatenate([hidden, self.activation(layer(hidden))])
        return u + self.layers[-1](hidden)
