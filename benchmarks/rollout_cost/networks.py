"""Defines the problem, and the networks whose gradient is measured."""

import equinox as eqx
import jax
import jax.numpy as jnp

from benchmarks import losses


BATCH_SIZE = 16
NUM_POINTS = 128  # in 1D, and 32² in 2D
NAMES = ("MLP", "FNO", "conv 1D", "conv 2D", "U-Net")


def heat_residuum(u_next, u_prev, roll=jnp.roll):
    """Computes the residual of one sample, or of a batch."""
    axes = (-1,) if u_next.shape[-1] == NUM_POINTS else (-2, -1)
    return losses.heat_residuum(u_next, u_prev, axes, roll)


class MLP(eqx.Module):
    layers: list

    def __init__(self, key, width=128, depth=2):
        sizes = [NUM_POINTS] + [width] * depth + [NUM_POINTS]
        keys = jax.random.split(key, depth + 1)
        self.layers = [
            eqx.nn.Linear(n, m, key=k) for n, m, k in zip(sizes, sizes[1:], keys, strict=False)
        ]

    def __call__(self, u):
        hidden = u[0]
        for layer in self.layers[:-1]:
            hidden = jax.nn.relu(layer(hidden))
        return u + self.layers[-1](hidden)[None]


class ConvNet(eqx.Module):
    layers: list

    def __init__(self, key, num_spatial_dims, width=32, depth=3):
        channels = [1] + [width] * depth + [1]
        keys = jax.random.split(key, depth + 1)
        self.layers = [
            eqx.nn.Conv(
                num_spatial_dims, n, m, 3, padding="SAME", padding_mode="CIRCULAR", key=k
            )
            for n, m, k in zip(channels, channels[1:], keys, strict=False)
        ]

    def __call__(self, u):
        hidden = u
        for layer in self.layers[:-1]:
            hidden = jax.nn.relu(layer(hidden))
        return u + self.layers[-1](hidden)


class FNO(eqx.Module):
    """This network is the Fourier neural operator of Li et al.,
    https://arxiv.org/abs/2010.08895."""

    lift: eqx.nn.Conv1d
    bypasses: list
    spectral_weights: jax.Array
    project: eqx.nn.Conv1d

    def __init__(self, key, width=16, num_modes=12, depth=4):
        *keys, spectral_key, lift_key, project_key = jax.random.split(key, depth + 3)
        self.lift = eqx.nn.Conv1d(1, width, 1, key=lift_key)
        self.bypasses = [eqx.nn.Conv1d(width, width, 1, key=k) for k in keys]
        shape = (depth, 2, width, width, num_modes)
        self.spectral_weights = jax.random.normal(spectral_key, shape) / width
        self.project = eqx.nn.Conv1d(width, 1, 1, key=project_key)

    def __call__(self, u):
        hidden = self.lift(u)
        num_modes = self.spectral_weights.shape[-1]
        for (real, imag), bypass in zip(self.spectral_weights, self.bypasses, strict=True):
            modes = jnp.fft.rfft(hidden)[:, :num_modes]
            modes = jnp.einsum("iom,im->om", real + 1j * imag, modes)
            padding = ((0, 0), (0, hidden.shape[-1] // 2 + 1 - num_modes))
            spectral = jnp.fft.irfft(jnp.pad(modes, padding), n=hidden.shape[-1])
            hidden = jax.nn.relu(spectral + bypass(hidden))
        return u + self.project(hidden)


def unet(key):
    import pdequinox  # the benchmarks need this package, and their tests do not

    return pdequinox.arch.ClassicUNet(1, 1, 1, hidden_channels=8, key=key)


def make_problems(names):
    key = jax.random.key(0)
    networks = {
        "MLP": lambda: MLP(key),
        "FNO": lambda: FNO(key),
        "conv 1D": lambda: ConvNet(key, 1),
        "conv 2D": lambda: ConvNet(key, 2),
        "U-Net": lambda: unet(key),
    }
    for name in names:
        shape = (32, 32) if name == "conv 2D" else (NUM_POINTS,)
        data = jax.random.normal(jax.random.key(1), (BATCH_SIZE, 1, 1, *shape))
        yield name, networks[name](), data
