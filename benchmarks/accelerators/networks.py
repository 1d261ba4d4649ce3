"""Defines the networks, for one sample and in plain JAX, and the residual."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Network(NamedTuple):
    stepper: Callable[[Any, jax.Array], jax.Array]  # (params, u_prev) -> u_next
    params: Any  # shapes
    state: tuple[int, ...]  # shape of one sample
    samples: int  # per chip


def mlp(params, u):
    hidden = u
    for matrix in params[:-1]:
        hidden = jnp.tanh(matrix @ hidden)
    return u + params[-1] @ hidden


def convolve(x, kernel):
    strides = (1,) * (x.ndim - 1)
    return jax.lax.conv_general_dilated(x[None], kernel, strides, "SAME")[0]


def conv_net(params, u):
    hidden = u[None]  # channels first
    for kernel in params[:-1]:
        hidden = jax.nn.relu(convolve(hidden, kernel))
    return u + convolve(hidden, params[-1])[0]


def fno(params, u):
    """Applies a Fourier neural operator, Li et al., https://arxiv.org/abs/2010.08895."""
    lift, layers, project = params
    hidden = lift[:, None, None] * u
    for spectral, bypass in layers:
        spectral = spectral[0] + 1j * spectral[1]  # [low and high, out, in, mode, mode]
        num_modes = spectral.shape[-1]
        modes = jnp.fft.rfft2(hidden)[..., :num_modes]
        low = jnp.einsum("oixy,ixy->oxy", spectral[0], modes[:, :num_modes])
        high = jnp.einsum("oixy,ixy->oxy", spectral[1], modes[:, -num_modes:])
        n, m = u.shape
        between = jnp.zeros((len(lift), n - 2 * num_modes, num_modes), modes.dtype)
        modes = jnp.concatenate([low, between, high], axis=1)
        modes = jnp.pad(modes, ((0, 0), (0, 0), (0, m // 2 + 1 - num_modes)))
        spectral = jnp.fft.irfft2(modes, s=(n, m))
        hidden = jax.nn.relu(spectral + jnp.einsum("oi,ixy->oxy", bypass, hidden))
    return u + jnp.einsum("i,ixy->xy", project, hidden)


def kernels(num_dims, width, depth):
    channels = [1] + [width] * (depth - 1) + [1]
    return [(m, n, *[3] * num_dims) for n, m in itertools.pairwise(channels)]


FNO_LAYER = ((2, 2, 32, 32, 16, 16), (32, 32))
NETWORKS = {
    "MLP": Network(mlp, [(512, 128), (512, 512), (512, 512), (128, 512)], (128,), 256),
    "conv 2D": Network(conv_net, kernels(2, 64, 5), (256, 256), 4),
    "FNO": Network(fno, ((32,), [FNO_LAYER] * 4, (32,)), (256, 256), 4),
    "conv 3D": Network(conv_net, kernels(3, 32, 4), (128, 128, 128), 1),
}
# These are the same network on more points, so many that no chip holds even one step.
LARGE = ("conv 3D, 256³", "conv 3D, 512³")
SMALL = tuple(NETWORKS)
NETWORKS |= {x: NETWORKS["conv 3D"]._replace(state=(int(x[-4:-1]),) * 3) for x in LARGE}


def residuum_fn(u_next, u_prev):
    """Computes the residual of an implicit Euler step of the heat equation."""
    axes = range(u_next.ndim)
    neighbours = [jnp.roll(u_next, shift, axis) for shift in (1, -1) for axis in axes]
    laplacian = sum(neighbours) - 2 * u_next.ndim * u_next
    return u_next - u_prev - 0.1 * laplacian
