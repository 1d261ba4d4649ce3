"""What the examples share: options, a ConvNet, training, a replay buffer, errors, figures."""

import argparse
import pathlib
import time
from collections.abc import Callable
from functools import partial

import equinox as eqx
import exponax as ex
import jax
import jax.numpy as jnp
import numpy as np
from canonical_convolutions import canonical_convolutions
from tqdm import tqdm


def parse_options(description, output, **options):
    """The options that every example has, and those of this one: each an int, or True (which
    `--no-NAME` turns off), or a pair of defaults, the second one for `--quick`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, default=output, help="%(default)s")
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs")
    pairs = {name: np.broadcast_to(x, 2).tolist() for name, x in {"seed": 0, **options}.items()}
    for name, (default, quick) in pairs.items():
        flag, text = f"--{name.replace('_', '-')}", f"{default}; with --quick {quick}"
        kind = {"action": argparse.BooleanOptionalAction} if default is True else {"type": int}
        parser.add_argument(flag, **kind, help=text)
    args = parser.parse_args()
    for name, pair in pairs.items():
        if getattr(args, name) is None:
            setattr(args, name, pair[args.quick])
    return args


#
# Training
#


def bilinear(hidden):
    """An activation for quadratic equations: the product of the two halves of the channels."""
    a, b = jnp.split(hidden, 2)
    return a * b


class ConvNet(eqx.Module):
    """Layers `[channels[0], *space] -> ... -> [channels[-1], *space]`, periodic in space. Their
    weights have variance gain² / (3 fan-in), those of the last layer 0 if `zero_last`."""

    layers: list[eqx.nn.Conv]
    activation: Callable = eqx.field(static=True)

    def __init__(self, num_spatial_dims, channels, kernel_sizes, *, activation=jax.nn.gelu,
                 dilations=None, gain=1.0, zero_last=False, key):  # fmt: skip
        self.layers, self.activation = [], activation
        for i, layer_key in enumerate(jax.random.split(key, len(kernel_sizes))):
            is_last = i == len(kernel_sizes) - 1
            layer = eqx.nn.Conv(
                num_spatial_dims,
                channels[i],
                channels[i + 1] * (2 if activation is bilinear and not is_last else 1),
                kernel_sizes[i],
                dilation=dilations[i] if dilations else 1,
                padding="SAME",
                padding_mode="CIRCULAR",
                key=layer_key,
            )
            scale = 0.0 if zero_last and is_last else gain
            self.layers.append(jax.tree.map(partial(jnp.multiply, scale), layer))

    def __call__(self, u):
        for layer in self.layers[:-1]:
            u = self.activation(layer(u))
        return self.layers[-1](u)


def train(update, carry, keys, name=""):
    """Calls `carry, loss = update(carry, key)` for each key, with a progress bar. Returns the
    last carry, and the seconds that this took, compilation included."""
    start = time.perf_counter()
    progress = tqdm(keys, desc=name or None)
    for i, key in enumerate(progress):
        carry, loss = update(carry, key)
        if i % 20 == 0 or i == len(keys) - 1:
            progress.set_postfix(loss=f"{loss:.1e}")
    return carry, time.perf_counter() - start


def replay(final_state, fresh, *, lost, share, key):
    """The states that go back into a replay buffer, leaves `[batch, ...]`: the final states of
    a rollout, so that training moves on along the emulator's own trajectories. Where they are
    `lost`, `bool[batch]`, and for a `share` of the others by chance, they are fresh ones."""
    anew = lost | (jax.random.uniform(key, lost.shape) < share)
    return jax.tree.map(
        lambda x, y: jnp.where(anew.reshape(-1, *[1] * (x.ndim - 1)), x, y), fresh, final_state
    )


#
# Evaluation
#


def rollout(stepper, states, num_steps):
    """Trajectories from states `[batch, ...]`, leaves `[batch, num_steps + 1, ...]`."""
    trajectory = ex.rollout(stepper, num_steps, include_init=True)
    return jax.jit(canonical_convolutions(jax.vmap(trajectory)))(states)


def error_over_time(trajectories, reference):
    """nRMSE `[time]`: ‖u − reference‖ / ‖reference‖ of a state, mean over samples."""
    norm = lambda u: jnp.sqrt(jnp.sum(u**2, axis=tuple(range(2, u.ndim))))
    return jnp.mean(norm(trajectories - reference) / norm(reference), axis=0)


def print_table(heading, columns, rows):
    """Of rows `{name: cells}`, all of them texts."""
    print(f"\n{heading:<28}" + "".join(f"{column:>12}" for column in columns))
    for name, cells in rows.items():
        print(f"{name:<28}" + "".join(f"{cell:>12}" for cell in cells))


# In the colours of Okabe and Ito, which the colour-blind can tell apart.
COLORS = ("#777777", "#D55E00", "#0072B2", "#009E73", "#CC79A7")
LINES = (":", "-.", "--", "-", (0, (1, 1)))


def plot_errors(axis, dt, errors, title="unseen initial conditions"):
    """Errors `{name: [time]}` over time, without that of the initial condition, which is 0."""
    for color, line, (name, error) in zip(COLORS, LINES, errors.items(), strict=False):
        times = dt * np.arange(1, len(error))
        axis.semilogy(times, error[1:], linestyle=line, color=color, label=name)
    axis.set(title=title, xlabel="time t", ylabel="nRMSE")
    axis.grid(alpha=0.3)


def show(axis, title, u, extent, **style):
    """A field `[x, y]`, on [0, extent[0]) × [0, extent[1])."""
    style = dict(cmap="RdBu_r", aspect="auto", origin="lower") | style
    axis.set(title=title)
    return axis.imshow(u.T, extent=(0, extent[0], 0, extent[1]), **style)


def save_figure(path, figure):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"\nFigure: {path}")
