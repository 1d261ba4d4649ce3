"""Trains convolutional emulators of the 1D viscous Burgers equation from initial conditions
alone, and compares three ways to roll them out.

    ∂u/∂t + ½ ∂(u²)/∂x = ν ∂²u/∂x²,   x in [0, 1) periodic

The residual is that of one implicit (Crank–Nicolson) time step. It says how far two
consecutive states are from satisfying the discretised equation, so training needs neither
reference trajectories nor a solver. The solver of exponax (exponential time differencing) is
used only to evaluate the emulators.

    python examples/burgers.py             trains and writes assets/burgers.png
    python examples/burgers.py --quick     the same in seconds, to see that it runs
"""

from functools import partial

import equinox as eqx
import exponax as ex
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import (
    ConvNet,
    error_over_time,
    parse_options,
    plot_errors,
    print_table,
    rollout,
    save_figure,
    show,
    train,
)

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
    """Computes ∂u/∂t of a state `[1, NUM_POINTS]` with spectral derivatives."""
    u_hat = jnp.fft.rfft(u)
    u_squared_hat = RESOLVED * jnp.fft.rfft(jnp.fft.irfft(RESOLVED * u_hat) ** 2)
    convection = 0.5j * WAVENUMBERS * u_squared_hat
    diffusion = VISCOSITY * WAVENUMBERS**2 * u_hat
    return jnp.fft.irfft(-convection - diffusion)


def crank_nicolson(u_next, u_prev):
    """Returns zero if `u_next` is one Crank–Nicolson step of length `DT` after `u_prev`."""
    slope = (time_derivative(u_next) + time_derivative(u_prev)) / 2
    return u_next - u_prev - DT * slope


def initial_conditions(num_samples, key):
    """Draws random states `[num_samples, 1, NUM_POINTS]`."""
    generator = ex.ic.RandomTruncatedFourierSeries(1, cutoff=5, max_one=True)
    return ex.build_ic_set(generator, num_points=NUM_POINTS, num_samples=num_samples, key=key)


def reference_solver():
    return ex.stepper.Burgers(1, DOMAIN_EXTENT, NUM_POINTS, DT, diffusivity=VISCOSITY)


#
# The emulator
#


class Emulator(eqx.Module):
    """Advances a state `[1, NUM_POINTS]` by one time step: adds the output of a ConvNet."""

    network: ConvNet

    def __init__(self, key):
        self.network = ConvNet(1, (1, 32, 32, 32, 32, 1), kernel_sizes=5 * [5], key=key)

    def __call__(self, u):
        return u + self.network(u)


def train_emulator(name, loss_fn, data, *, num_updates, key):
    """Trains a fresh emulator with Adam on batches of `data`, `[sample, num_snapshots, 1,
    NUM_POINTS]`. Returns the emulator and the training time in seconds."""
    init_key, batch_key = jax.random.split(key)
    stepper = Emulator(init_key)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, num_updates))
    opt_state = optimizer.init(eqx.filter(stepper, eqx.is_array))

    @eqx.filter_jit
    def update(data, carry, key):
        stepper, opt_state = carry
        samples = jax.random.choice(key, NUM_TRAIN, (BATCH_SIZE,), replace=False)
        loss, grads = eqx.filter_value_and_grad(loss_fn)(stepper, data[samples])
        updates, opt_state = optimizer.update(grads, opt_state)
        return (eqx.apply_updates(stepper, updates), opt_state), loss

    keys = jax.random.split(batch_key, num_updates)
    carry = stepper, opt_state
    (stepper, _), seconds = train(partial(update, data), carry, keys, name)
    return stepper, seconds


def main():
    args = parse_options(__doc__, "assets/burgers.png", updates=(1500, 20), rollout_steps=5)
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
    data = train_set[:, None]  # a single snapshot, the initial condition
    trajectories = {"persistence": rollout(lambda u: u, test_set, TEST_STEPS)}
    seconds = {}
    for name, options in models.items():
        # The rollout is unrolled, because XLA's convolutions are slow in a loop on a CPU.
        loss_fn = partial(residuum_loss, residuum_fn=crank_nicolson, unroll=True, **options)
        stepper, seconds[name] = train_emulator(
            name, loss_fn, data, num_updates=args.updates, key=model_key
        )
        trajectories[name] = rollout(stepper, test_set, TEST_STEPS)

    reference = rollout(reference_solver(), test_set, TEST_STEPS)
    errors = {name: error_over_time(u, reference) for name, u in trajectories.items()}
    rows = {name: [f"{error[n]:.4f}" for n in REPORT_STEPS] for name, error in errors.items()}
    for name in models:
        rows[name].append(f"{seconds[name]:.0f} s")
    print_table("nRMSE after", [*(f"step {n}" for n in REPORT_STEPS), "trained in"], rows)

    figure, axes = plt.subplots(
        1, 3, figsize=(11, 3.4), width_ratios=(1, 1, 1.4), layout="constrained"
    )
    last = list(models)[-1]
    pictures = {"reference solver": reference, f"emulator, {last}": trajectories[last]}
    extent = (TEST_STEPS * DT, DOMAIN_EXTENT)
    limit = jnp.max(jnp.abs(reference[0]))
    for axis, (title, u) in zip(axes, pictures.items(), strict=False):
        image = show(axis, title, u[0, :, 0], extent, vmin=-limit, vmax=limit)
        axis.set(xlabel="time t", ylabel="position x")
    figure.colorbar(image, ax=axes[1], label="u")
    plot_errors(axes[2], DT, errors)
    axes[2].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    save_figure(args.output, figure)


if __name__ == "__main__":
    main()
