"""Trains an emulator of Burgers' equation in two dimensions, without data, down to the floor of
its residual.

    ∂u/∂t + (u·∇)u = ν ∇²u,   u = (u_x, u_y), ν = 1/200, periodic on the unit square

The program follows docs/how_good_is_it.md: it checks the residual, measures the floor, trains,
and estimates the error of the emulator. Only the check and the true errors need a solver.

    python examples/burgers_2d.py             trains, and writes assets/burgers_2d.png
    python examples/burgers_2d.py --quick     the same in seconds, to see that it runs
"""

from functools import cache, partial

import common
import exponax as ex
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from error_estimate import estimate_error, gmres
from replay_buffer import diverged, put_back, sample

from residuum import residuum_loss


NUM_POINTS, DT, VISCOSITY = 64, 0.002, 1 / 200
BUFFER_SIZE, BATCH_SIZE = 32, 1
NUM_TEST, REPORT_STEPS = 8, (1, 10, 50, 200, 1000)

#
# The equation
#


@cache
def spectrum(num_points):
    """Returns i k, -k², and the low-pass filter of the 2/3 rule, for Fourier coefficients."""
    derivatives = np.array(ex.spectral.build_derivative_operator(2, 1.0, num_points))
    low_pass = ex.spectral.low_pass_filter_mask(2, num_points, cutoff=(num_points - 1) // 3)
    return derivatives, np.sum(derivatives**2, axis=0).real, np.array(low_pass)


def to_waves(u):
    return spectrum(u.shape[-1])[2] * jnp.fft.rfft2(u)


def to_fields(waves):
    return jnp.fft.irfft2(waves, (waves.shape[-2], waves.shape[-2]))


def slope(u):
    """Computes ∂u/∂t for a velocity `[2, x, y]`, as Fourier coefficients."""
    derivatives, laplacian, _ = spectrum(u.shape[-1])
    waves = to_waves(u)
    gradients = to_fields(derivatives * waves[:, None])  # ∂u_i/∂x_j, [i, j, x, y]
    advection = jnp.einsum("jxy, ijxy -> ixy", to_fields(waves), gradients)
    return VISCOSITY * laplacian * waves - to_waves(advection)


def crank_nicolson(u_next, u_prev):
    """Computes the residual, multiplied by the inverse of the implicit diffusion."""
    residual = to_waves(u_next - u_prev) - DT / 2 * (slope(u_next) + slope(u_prev))
    return to_fields(residual / (1 - DT / 2 * VISCOSITY * spectrum(u_prev.shape[-1])[1]))


def relative_residual(u_next, u_prev):
    """Divides the residual by that of persistence, so slow samples count like fast ones."""
    size = jnp.sqrt(jnp.mean(crank_nicolson(u_prev, u_prev) ** 2))
    return crank_nicolson(u_next, u_prev) / jax.lax.stop_gradient(size)


def exact_step(u_prev):
    """Takes the exact step by iteration, which converges because the time step is short."""
    return jax.lax.fori_loop(0, 8, lambda _, u: u - crank_nicolson(u, u_prev), u_prev)


def solver(num_points, num_substeps, order=4):
    """Returns an independent solver, an exponential Runge–Kutta method of exponax."""
    options = dict(diffusivity=VISCOSITY, order=order, dealiasing_fraction=11 / 16)
    step = ex.stepper.Burgers(2, 1.0, num_points, DT / num_substeps, **options)
    return ex.RepeatedStepper(step, num_substeps)


def initial_conditions(num_samples, key, num_points=NUM_POINTS):
    """Draws smooth Gaussian fields of zero mean, whose largest component is 1 to 2."""
    noise_key, size_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (num_samples, 2, num_points, num_points))
    k_squared = -spectrum(num_points)[1] / (2 * np.pi) ** 2
    u = to_fields(np.where(k_squared > 0, np.exp(-k_squared / 16), 0) * to_waves(noise))
    sizes = jax.random.uniform(size_key, (num_samples, 1, 1, 1), minval=1, maxval=2)
    return sizes * u / jnp.max(jnp.abs(u), axis=(1, 2, 3), keepdims=True)


#
# The emulator: u + N₂(u + N₁(u)), where each N is one layer
#

OFFSETS = np.array([(i, 0) for i in range(-4, 5)] + [(0, i) for i in range(-4, 5) if i])


def whitening(offsets=OFFSETS):
    """Returns the matrix that makes the values at `offsets` uncorrelated, with variance 1, in
    fields with fronts, whose energy falls as 1 / k²."""
    k = np.stack(np.meshgrid(*2 * [np.arange(-21, 22)]))  # the waves that 64 points keep
    variance = np.where(np.any(k, axis=0), np.hypot(*k), np.inf) ** -3.0  # of each wave
    phases = 2 * np.pi / NUM_POINTS * np.tensordot(offsets[:, None] - offsets, k, 1)
    covariance = np.sum(variance * np.cos(phases), axis=(2, 3)) / np.sum(variance)
    values, vectors = np.linalg.eigh(covariance)
    return vectors / np.sqrt(values) @ vectors.T


WHITENING = np.eye(2 * len(OFFSETS) + 1)  # of both components; the last input is 1
WHITENING[:-1, :-1] = np.kron(np.eye(2), whitening())


def random_weights(key, width=32):
    """Draws weights of both layers. One factor is 0, so the emulator starts as persistence."""
    weights = jax.random.normal(key, (2, 2, 2 * width, len(WHITENING))) / 4
    return weights.at[:, 1].set(0)


def products(weights, u):
    """Sums products of two linear functions of whitened neighbours, like those in (u·∇)u."""
    neighbours = jnp.stack([jnp.roll(u, offset, (1, 2)) for offset in OFFSETS], axis=1)
    inputs = jnp.concatenate([neighbours.reshape(-1, u[0].size), jnp.ones((1, u[0].size))])
    factors = jnp.einsum("fwi, in -> fwn", weights @ WHITENING, inputs)
    return jnp.sum(jnp.prod(factors, 0).reshape(2, -1, *u.shape[1:]), axis=1)


def emulator(weights, u_prev):
    u = u_prev
    for layer in weights:  # without the waves that the residual drops
        u = to_fields(to_waves(u_prev + DT * products(layer, u)))
    return u


#
# Training
#


# The probability of a fresh start in each place of the buffer: mean ages of 2 to 1000 steps.
SHARES = 1 / np.geomspace(2, 1000, BUFFER_SIZE)


def train_emulator(seed, num_updates):
    """Returns the weights, and the training time in seconds."""

    def loss_fn(weights, buffer, key):
        sample_key, states_key, replay_key = jax.random.split(key, 3)
        samples, states = sample(buffer, BATCH_SIZE, sample_key)
        stepper, data = partial(emulator, weights), states[:, None]  # [batch, snapshots, ...]
        loss, rollout = residuum_loss(stepper, data, relative_residual, has_aux=True)
        last, fresh = rollout.final_state, initial_conditions(BATCH_SIZE, states_key)
        options = dict(share=jnp.asarray(SHARES)[samples], key=replay_key)
        return loss, put_back(buffer, samples, last, fresh, lost=diverged(last, 5), **options)

    keys = jax.random.split(jax.random.key(seed), 3)
    weights, buffer = random_weights(keys[0]), initial_conditions(BUFFER_SIZE, keys[1])
    options = dict(num_updates=num_updates, learning_rate=2e-3)
    return common.minimise("Burgers in 2D", weights, loss_fn, buffer, keys[2], **options)


def main():
    args = common.parse_options(__doc__, "assets/burgers_2d.png", updates=(20_000, 20))
    num_test, steps = (2, REPORT_STEPS[:2]) if args.quick else (NUM_TEST, REPORT_STEPS)
    states = initial_conditions(num_test, jax.random.key(args.seed + 1000))
    check = residuum_loss(solver(NUM_POINTS, 1), states[:, None], relative_residual)
    print(f"Loss of the solver's states: {check:.0e}, of persistence: 1")
    weights, _ = train_emulator(args.seed, args.updates)
    options = dict(num_rollout_steps=steps[-1], solve=partial(gmres, restart=4, maxiter=1))
    estimate = partial(estimate_error, partial(emulator, weights), crank_nicolson, **options)
    emulated, estimated = jax.jit(jax.vmap(estimate))(states)
    finer = jax.vmap(partial(ex.map_between_resolutions, new_num_points=192))(states)
    solution = common.rollout(solver(192, 2), finer, steps[-1])[:, 1:, :, ::3, ::3]
    exact = common.rollout(exact_step, states, steps[-1])[:, 1:]
    errors = {
        "persistence": common.error_over_time(states[:, None], solution),
        "exact step, i.e., floor": common.error_over_time(exact, solution),
        "emulator": common.error_over_time(emulated, solution),
        "against the exact step": common.error_over_time(emulated, exact),
        "its estimate": common.error_over_time(exact + estimated, exact),
    }
    rows = {name: [f"{error[n - 1]:.2g}" for n in steps] for name, error in errors.items()}
    common.print_table("nRMSE after", [f"step {n}" for n in steps], rows)
    figure, axes = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
    n = steps[-1] // 10
    pictures = {"solver": solution[0, n - 1, 0], "emulator": emulated[0, n - 1, 0]}
    pictures["difference × 10"] = 10 * (pictures["emulator"] - pictures["solver"])
    for axis, (name, u) in zip(axes, pictures.items(), strict=False):
        common.show(axis, f"u_x, {name}, step {n}", u, (1, 1), vmin=-1, vmax=1)
    errors = {name: np.insert(error, 0, 0) for name, error in errors.items()}
    common.plot_errors(axes[3], DT, errors, "unseen initial conditions")
    axes[3].legend(fontsize="small")
    common.save_figure(args.output, figure)


if __name__ == "__main__":
    main()
