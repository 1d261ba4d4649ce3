"""The examples share these functions for options, a ConvNet, training, errors and figures."""

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
import optax
from canonical_convolutions import canonical_convolutions
from tqdm import tqdm


def parse_options(description, output, **options):
    """Adds `--output`, `--quick`, `--seed` and the given options. A pair holds the default and
    the value under `--quick`."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=style)
    parser.add_argument("--output", type=pathlib.Path, default=output, help="%(default)s")
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs")
    pairs = {}
    for name, x in {"seed": 0, **options}.items():
        default, quick = pairs[name] = x if isinstance(x, tuple) else (x, x)
        kind = {"action": argparse.BooleanOptionalAction} if default is True else {"type": int}
        text = f"{default}" if quick == default else f"{default}; with --quick {quick}"
        parser.add_argument(f"--{name.replace('_', '-')}", **kind, help=text)
    args = parser.parse_args()
    for name, pair in pairs.items():
        if getattr(args, name) is None:
            setattr(args, name, pair[args.quick])
    return args


#
# Training
#


def bilinear(hidden):
    """Multiplies the two halves of the channels: an activation for quadratic equations."""
    a, b = jnp.split(hidden, 2)
    return a * b


def gated(hidden):
    """Multiplies the two halves of the channels, but grows no more than linearly in large
    states. With long time steps, products of products would overflow."""
    a, b = jnp.split(hidden, 2)
    return a * jnp.tanh(b)


class ConvNet(eqx.Module):
    """Maps `[channels[0], *space] -> ... -> [channels[-1], *space]`, periodic in space. The
    weights have variance gain² / (3 fan-in). With `zero_last`, the weights of the last layer
    are 0."""

    # pdequinox has no bilinear activation, no dilations, and no last layer of zeros.
    layers: list[eqx.nn.Conv]
    activation: Callable = eqx.field(static=True)

    def __init__(self, num_spatial_dims, channels, kernel_sizes, *, activation=jax.nn.gelu,
                 dilations=None, gain=1.0, zero_last=False, key):  # fmt: skip
        self.activation = activation
        factor = 2 if activation in (bilinear, gated) else 1
        outputs = [factor * n for n in channels[1:-1]] + [channels[-1]]
        dilations = dilations or len(outputs) * [1]
        keys = jax.random.split(key, len(outputs))
        conv = partial(eqx.nn.Conv, num_spatial_dims, padding="SAME", padding_mode="CIRCULAR")
        layers = [
            conv(channels[i], outputs[i], kernel_sizes[i], dilation=dilations[i], key=keys[i])
            for i in range(len(outputs))
        ]
        self.layers = jax.tree.map(lambda x: gain * x, layers)
        if zero_last:
            self.layers[-1] = jax.tree.map(jnp.zeros_like, layers[-1])

    def __call__(self, u):
        for layer in self.layers[:-1]:
            u = self.activation(layer(u))
        return self.layers[-1](u)


def train(update, carry, keys, name=""):
    """Calls `carry, loss = update(carry, key)` for each key, with a progress bar. Returns the
    last carry and the seconds that all calls took, including compilation."""
    start = time.perf_counter()
    progress = tqdm(keys, desc=name or None)
    for i, key in enumerate(progress):
        carry, loss = update(carry, key)
        if i % 20 == 0 or i == len(keys) - 1:
            progress.set_postfix(loss=f"{loss:.1e}")
    return carry, time.perf_counter() - start


def minimise(name, stepper, loss_fn, memory, key, *, num_updates, learning_rate, b2=0.99):
    """Minimises `loss_fn: stepper, memory, key -> loss, memory`, where one update passes the
    memory on to the next. Returns the stepper and the training time in seconds, including
    compilation."""
    warmup = num_updates // 20
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, num_updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=b2))

    def update(carry, key):
        stepper, opt_state, memory = carry
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, memory), grads = value_and_grad(stepper, memory, key)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(stepper, updates), opt_state, memory), loss

    @jax.jit
    @canonical_convolutions
    def several_updates(carry, keys):
        carry, losses = jax.lax.scan(update, carry, keys)
        return carry, losses[-1]

    keys = jax.random.split(key, num_updates)
    chunks = [keys[i : i + 20] for i in range(0, num_updates, 20)]
    carry = stepper, optimizer.init(stepper), memory
    (stepper, *_), seconds = train(several_updates, carry, chunks, f"{name}, 20 updates each")
    return stepper, seconds


#
# Evaluation
#


def rollout(stepper, states, num_steps):
    """Rolls out from states `[batch, ...]`. The leaves of the result are `[batch, num_steps +
    1, ...]`."""
    trajectory = ex.rollout(stepper, num_steps, include_init=True)
    return jax.jit(canonical_convolutions(jax.vmap(trajectory)))(states)


def to_float64(tree):
    """Converts all floating-point arrays, which needs `jax_enable_x64`."""
    return jax.tree.map(lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, tree)


def error_over_time(trajectories, reference):
    """Computes the nRMSE `[time]`, i.e., ‖u − reference‖ / ‖reference‖ of each state, as a mean
    over samples."""
    # exponax.metrics.nRMSE normalises each channel separately and sums over the channels.
    norm = lambda u: jnp.sqrt(jnp.sum(u**2, axis=tuple(range(2, u.ndim))))
    return jnp.mean(norm(trajectories - reference) / norm(reference), axis=0)


def print_table(heading, columns, rows):
    """Prints rows `{name: cells}`, where all cells are strings."""
    print(f"\n{heading:<28}" + "".join(f"{column:>12}" for column in columns))
    for name, cells in rows.items():
        print(f"{name:<28}" + "".join(f"{cell:>12}" for cell in cells))


# These are colours of Okabe and Ito, which colour-blind people can tell apart.
COLORS = ("#777777", "#D55E00", "#0072B2", "#009E73", "#CC79A7")
LINES = (":", "-.", "--", "-", (0, (1, 1)))


def plot_errors(axis, dt, errors, title="unseen initial conditions"):
    """Plots errors `{name: [time]}` over time. The error of the initial condition is 0 and left
    out."""
    for color, line, (name, error) in zip(COLORS, LINES, errors.items(), strict=False):
        times = dt * np.arange(1, len(error))
        axis.semilogy(times, error[1:], linestyle=line, color=color, label=name)
    axis.set(title=title, xlabel="time t", ylabel="nRMSE")
    axis.grid(alpha=0.3)


def show(axis, title, u, extent, **style):
    """Shows a field `[x, y]` on [0, extent[0]) × [0, extent[1])."""
    style = dict(cmap="RdBu_r", aspect="auto", origin="lower") | style
    axis.set(title=title)
    return axis.imshow(u.T, extent=(0, extent[0], 0, extent[1]), **style)


def save_figure(path, figure):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"\nFigure: {path}")
