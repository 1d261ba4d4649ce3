"""Trains convolutional emulators of the 1D viscous Burgers equation from initial
conditions alone, and compares three ways to roll them out.

    ∂u/∂t + ½ ∂(u²)/∂x = ν ∂²u/∂x²,   x in [0, 1) periodic

The residuum is one implicit (Crank–Nicolson) time step. It says how wrong a pair of states
is, so it replaces both the reference trajectories and the solver during training. The
exponential time differencing solver of exponax is used only to judge the result.

    python examples/burgers.py             trains and writes assets/burgers.png
    python examples/burgers.py --quick     the same in seconds, to see that it runs
"""

import argparse
import pathlib
import time
from functools import partial

import equinox as eqx
import exponax as ex
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

from residuum import Cuts, residuum_loss


NUM_POINTS = 64
DOMAIN_EXTENT = 1.0
DT = 0.01
VISCOSITY = 0.01

NUM_TRAIN, NUM_TEST = 256, 32
BATCH_SIZE = 32
TEST_STEPS = 50
REPORT_STEPS = (1, 10, 50)


#
# The equation
#

WAVENUMBERS = 2 * np.pi / DOMAIN_EXTENT * np.arange(NUM_POINTS // 2 + 1)
RESOLVED = np.arange(NUM_POINTS // 2 + 1) < NUM_POINTS / 3  # 2/3 rule of dealiasing


def time_derivative(u):
    """∂u/∂t of a state `[1, NUM_POINTS]`, with spectral derivatives."""
    u_hat = jnp.fft.rfft(u)
    u_squared_hat = RESOLVED * jnp.fft.rfft(jnp.fft.irfft(RESOLVED * u_hat) ** 2)
    convection = 0.5j * WAVENUMBERS * u_squared_hat
    diffusion = VISCOSITY * WAVENUMBERS**2 * u_hat
    return jnp.fft.irfft(-convection - diffusion)


def crank_nicolson(u_next, u_prev):
    """Zero if `u_next` is one Crank–Nicolson step of length `DT` after `u_prev`."""
    slope = (time_derivative(u_next) + time_derivative(u_prev)) / 2
    return u_next - u_prev - DT * slope


def initial_conditions(num_samples, key):
    """Random states `[num_samples, 1, NUM_POINTS]`."""
    generator = ex.ic.RandomTruncatedFourierSeries(1, cutoff=5, max_one=True)
    return ex.build_ic_set(generator, num_points=NUM_POINTS, num_samples=num_samples, key=key)


def reference_solver():
    return ex.stepper.Burgers(1, DOMAIN_EXTENT, NUM_POINTS, DT, diffusivity=VISCOSITY)


#
# The emulator
#


class ConvNet(eqx.Module):
    """Advances a state `[1, NUM_POINTS]` by adding what a periodic ConvNet makes of it."""

    layers: list[eqx.nn.Conv1d]

    def __init__(self, *, width=32, depth=4, kernel_size=5, key):
        channels = [1] + [width] * depth + [1]
        self.layers = [
            eqx.nn.Conv1d(
                c_in,
                c_out,
                kernel_size,
                padding="SAME",
                padding_mode="CIRCULAR",
                key=layer_key,
            )
            for c_in, c_out, layer_key in zip(
                channels[:-1],
                channels[1:],
                jax.random.split(key, depth + 1),
                strict=True,
            )
        ]

    def __call__(self, u):
        hidden = u
        for layer in self.layers[:-1]:
            hidden = jax.nn.gelu(layer(hidden))
        return u + self.layers[-1](hidden)


def train(name, loss_fn, data, *, num_updates, key):
    """Trains a fresh emulator with Adam on batches of `data`, `[sample, num_snapshots, 1,
    NUM_POINTS]`; returns it and the seconds that took."""
    init_key, batch_key = jax.random.split(key)
    stepper = ConvNet(key=init_key)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, num_updates))
    opt_state = optimizer.init(eqx.filter(stepper, eqx.is_array))

    @eqx.filter_jit
    def update(stepper, opt_state, data, key):
        samples = jax.random.choice(key, NUM_TRAIN, (BATCH_SIZE,), replace=False)
        loss, grads = eqx.filter_value_and_grad(loss_fn)(stepper, data[samples])
        updates, opt_state = optimizer.update(grads, opt_state)
        return eqx.apply_updates(stepper, updates), opt_state, loss

    start = time.perf_counter()
    progress = tqdm(jax.random.split(batch_key, num_updates), desc=f"{name:>24}")
    for i, update_key in enumerate(progress):
        stepper, opt_state, loss = update(stepper, opt_state, data, update_key)
        if i % 20 == 0 or i == num_updates - 1:
            progress.set_postfix(loss=f"{loss:.1e}")
    return stepper, time.perf_counter() - start


#
# The judgement
#


def rollout(stepper, initial_conditions):
    """Trajectories `[batch, TEST_STEPS + 1, 1, NUM_POINTS]`."""
    trajectory = ex.rollout(stepper, TEST_STEPS, include_init=True)
    return jax.jit(jax.vmap(trajectory))(initial_conditions)


def error_over_time(trajectories, reference):
    """nRMSE `[time]`: ‖u − reference‖ / ‖reference‖, mean over samples."""
    difference = jnp.linalg.norm(trajectories - reference, axis=(-2, -1))
    return jnp.mean(difference / jnp.linalg.norm(reference, axis=(-2, -1)), axis=0)


def print_table(errors, seconds):
    steps = "".join(f"{f'step {step}':>10}" for step in REPORT_STEPS)
    print(f"\n{'nRMSE after':<24}{steps}{'trained in':>14}")
    for name, error in errors.items():
        row = "".join(f"{error[step]:>10.4f}" for step in REPORT_STEPS)
        trained_in = f"{seconds[name]:.0f} s" if name in seconds else ""
        print(f"{name:<24}{row}{trained_in:>14}")


def save_figure(path, reference, emulated, name, errors):
    """Space–time pictures of one test sample, and the error of all models over time."""
    figure, axes = plt.subplots(
        1, 3, figsize=(11, 3.4), width_ratios=(1, 1, 1.4), layout="constrained"
    )
    end = TEST_STEPS * DT
    limit = float(jnp.max(jnp.abs(reference)))
    pictures = {"reference solver": reference, f"emulator, {name}": emulated}
    for axis, (title, u) in zip(axes, pictures.items(), strict=False):
        axis.imshow(
            u[:, 0].T,
            extent=(0, end, 0, DOMAIN_EXTENT),
            vmin=-limit,
            vmax=limit,
            cmap="RdBu_r",
            aspect="auto",
            origin="lower",
        )
        axis.set(title=title, xlabel="time t", ylabel="position x")
    figure.colorbar(axes[1].images[0], ax=axes[1], label="u")

    styles = zip(
        ("#777777", "#D55E00", "#0072B2", "#009E73"),  # Okabe and Ito, colour-blind safe
        (":", "-.", "--", "-"),
        errors.items(),
        strict=True,
    )
    for color, line, (label, error) in styles:
        time_axis = DT * jnp.arange(1, TEST_STEPS + 1)
        axes[2].semilogy(time_axis, error[1:], line, color=color, label=label)
    axes[2].set(title="unseen initial conditions", xlabel="time t", ylabel="nRMSE")
    axes[2].grid(alpha=0.3)
    axes[2].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=1500, help="updates of each model")
    parser.add_argument(
        "--rollout-steps",
        type=int,
        default=5,
        help="steps of the rollout model; the truncated model goes twice as far",
    )
    parser.add_argument("--output", type=pathlib.Path, default="assets/burgers.png")
    parser.add_argument("--quick", action="store_true", help="20 updates of each model")
    args = parser.parse_args()
    num_updates = 20 if args.quick else args.updates

    train_key, test_key, model_key = jax.random.split(jax.random.key(args.seed), 3)
    train_set = initial_conditions(NUM_TRAIN, train_key)
    test_set = initial_conditions(NUM_TEST, test_key)

    steps = args.rollout_steps
    models = {
        "1 step": dict(num_rollout_steps=1),
        f"{steps} steps": dict(num_rollout_steps=steps),
        f"{2 * steps} steps, bptt={steps}": dict(
            num_rollout_steps=2 * steps, cuts=Cuts(bptt=steps)
        ),
    }
    trajectories, seconds = {"persistence": rollout(lambda u: u, test_set)}, {}
    for name, options in models.items():
        loss_fn = partial(residuum_loss, residuum_fn=crank_nicolson, unroll=True, **options)
        data = train_set[:, None]  # with the one snapshot that is needed
        stepper, seconds[name] = train(
            name, loss_fn, data, num_updates=num_updates, key=model_key
        )
        trajectories[name] = rollout(stepper, test_set)

    reference = rollout(reference_solver(), test_set)
    errors = {name: error_over_time(u, reference) for name, u in trajectories.items()}
    print_table(errors, seconds)
    save_figure(args.output, reference[0], trajectories[name][0], name, errors)
    print(f"\nFigure: {args.output}")


if __name__ == "__main__":
    main()
