"""Trains an emulator of the 2D Kuramoto–Sivashinsky equation on long rollouts in little memory,
by truncated backpropagation through time (`Cuts(bptt=k)`) and rematerialisation
(`checkpoint=True`). A table shows the memory of a gradient with and without them.

    ∂u/∂t + ½|∇u|² + ∇²u + ∂⁴u/∂x⁴ + ∂⁴u/∂y⁴ = 0,   (x, y) periodic

This is the form that exponax solves; others use the biharmonic operator. Fourth derivatives
would dominate the residual, so it is preconditioned: the linear part of a time step is inverted
in Fourier space. Training uses no data. Each rollout continues from the final states of the
previous one.

    python examples/kuramoto_sivashinsky_2d.py             trains and writes the figure
    python examples/kuramoto_sivashinsky_2d.py --quick     in seconds, to see that it runs
"""

import common
import equinox as eqx
import exponax as ex
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from canonical_convolutions import canonical_convolutions
from replay_buffer import replay

from residuum import Cuts, residuum_loss


NUM_POINTS, DOMAIN_EXTENT, DT = 32, 30.0, 0.1
BATCH_SIZE, NUM_TEST, TRANSIENT_STEPS = 8, 8, 500
REPORT_STEPS = (1, 10, 50, 100)


#
# The equation
#

K = 2 * np.pi / DOMAIN_EXTENT * np.fft.fftfreq(NUM_POINTS, 1 / NUM_POINTS)
KX, KY = K[:, None], np.abs(K[None, : NUM_POINTS // 2 + 1])
K_SQUARED = KX**2 + KY**2
LINEAR = K_SQUARED - KX**4 - KY**4  # symbol of -∇² - ∂⁴/∂x⁴ - ∂⁴/∂y⁴
RESOLVED = np.maximum(np.abs(KX), KY) < 2 / 3 * K.max()  # 2/3 rule of dealiasing


def time_derivative(u):
    """Computes the Fourier transform of ∂u/∂t of a state `[1, NUM_POINTS, NUM_POINTS]`."""
    u_hat = jnp.fft.rfft2(u)
    u_x, u_y = (jnp.fft.irfft2(1j * k * RESOLVED * u_hat) for k in (KX, KY))
    return LINEAR * u_hat - 0.5 * RESOLVED * jnp.fft.rfft2(u_x**2 + u_y**2)


def preconditioned_crank_nicolson(u_next, u_prev):
    """Returns zero if `u_next` is one Crank–Nicolson step of length `DT` after `u_prev`. To
    first order, this residual is the error of `u_next`, since the linear part of the step is
    inverted."""
    slope = (time_derivative(u_next) + time_derivative(u_prev)) / 2
    residual = jnp.fft.rfft2(u_next - u_prev) - DT * slope
    return jnp.fft.irfft2(residual / (1 - DT / 2 * LINEAR))


def residual_loss(stepper, states, **options):
    data = states[:, None]  # [batch, num_snapshots, 1, NUM_POINTS, NUM_POINTS]
    return residuum_loss(stepper, data, preconditioned_crank_nicolson, **options)


def random_states(key, num_samples):
    """Draws random waves `[num_samples, 1, NUM_POINTS, NUM_POINTS]` of a typical amplitude."""
    noise = jax.random.normal(key, (num_samples, 1, NUM_POINTS, NUM_POINTS))
    spectrum = np.exp(-((K_SQUARED / 0.8) ** 2)) * (K_SQUARED > 0)
    waves = jnp.fft.irfft2(spectrum * jnp.fft.rfft2(noise))
    return 4 * waves / jnp.std(waves, axis=(1, 2, 3), keepdims=True)


def without_mean(u):
    """Subtracts the spatial mean, which drifts and does not influence the dynamics."""
    return u - jnp.mean(u, axis=(-3, -2, -1), keepdims=True)


#
# The emulator
#


class Emulator(eqx.Module):
    """Advances a state `[1, NUM_POINTS, NUM_POINTS]`, whatever its mean."""

    network: common.ConvNet

    def __init__(self, key):
        options = dict(kernel_sizes=4 * [3], dilations=(1, 2, 2, 1), gain=3**0.5, key=key)
        self.network = common.ConvNet(2, (1, 16, 16, 16, 1), **options)

    def __call__(self, u):
        return u + self.network(without_mean(u) / 4)


def train_emulator(stepper, *, num_updates, key, **options):
    adam = optax.adam(optax.cosine_decay_schedule(3e-3, num_updates))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam)
    opt_state = optimizer.init(eqx.filter(stepper, eqx.is_array))
    states_key, updates_key = jax.random.split(key)

    @eqx.filter_jit
    @canonical_convolutions
    def update(carry, key):
        stepper, opt_state, states = carry
        gradient = eqx.filter_value_and_grad(residual_loss, has_aux=True)
        (loss, aux), grads = gradient(stepper, states, has_aux=True, **options)
        updates, opt_state = optimizer.update(grads, opt_state)
        stepper = eqx.apply_updates(stepper, updates)
        states = without_mean(aux.final_state)
        size = jnp.std(states, axis=(1, 2, 3))
        lost = ~((size > 0.5) & (size < 10))  # true for NaN as well
        choice_key, fresh_key = jax.random.split(key)
        fresh = random_states(fresh_key, BATCH_SIZE)
        states = replay(states, fresh, lost=lost, share=0.05, key=choice_key)
        return (stepper, opt_state, states), loss

    carry = stepper, opt_state, random_states(states_key, BATCH_SIZE)
    (stepper, _, _), _ = common.train(update, carry, jax.random.split(updates_key, num_updates))
    return stepper


#
# Evaluation
#


def memory(stepper, **options):
    """Returns the temporary memory of one gradient, in bytes."""
    states = random_states(jax.random.key(0), BATCH_SIZE)
    params, static = eqx.partition(stepper, eqx.is_array)
    loss = lambda params: residual_loss(eqx.combine(params, static), states, **options)
    program = jax.jit(canonical_convolutions(jax.grad(loss))).lower(params).compile()
    return program.memory_analysis().temp_size_in_bytes  # type: ignore[union-attr]


def plot(trajectories, errors):
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.3), layout="constrained")
    limit = max(jnp.max(jnp.abs(u[0, -1])) for u in trajectories.values())
    modes = slice(1, NUM_POINTS // 2)
    styles = zip(axes, common.LINES, common.COLORS, trajectories.items(), strict=False)
    for axis, line, color, (name, u) in styles:
        title, extent = f"{name}, t = {DT * (u.shape[1] - 1):.0f}", (DOMAIN_EXTENT,) * 2
        image = common.show(axis, title, u[0, -1, 0], extent, vmin=-limit, vmax=limit)
        axis.set(xlabel="x", ylabel="y", aspect="equal")
        spectra = jax.jit(jax.vmap(jax.vmap(ex.get_spectrum)))(u[:, u.shape[1] // 2 :])
        energy = jnp.mean(spectra, axis=(0, 1, 2))
        axes[3].semilogy(K[modes], energy[modes], linestyle=line, color=color, label=name)
    figure.colorbar(image, ax=axes[1], label="u")
    common.plot_errors(axes[2], DT, errors, "error on the attractor")
    axes[2].legend(loc="lower right")
    axes[3].set(title="spectrum", xlabel="wavenumber", ylabel="energy", ylim=(1e-7, 10))
    axes[3].grid(alpha=0.3)
    axes[3].legend(loc="lower left")
    return figure


def main():
    defaults = dict(updates=(1200, 10), rollout_steps=10, bptt=2, test_steps=(500, 100))
    args = common.parse_options(__doc__, "assets/kuramoto_sivashinsky_2d.png", **defaults)
    model_key, train_key, test_key = jax.random.split(jax.random.key(args.seed), 3)
    stepper = Emulator(model_key)
    steps, k = args.rollout_steps, args.bptt
    lengths, cases = [steps, 100], [(False, False), (False, True), (k, False), (k, True)]
    if args.quick:  # compiles one program instead of eight
        lengths, cases = lengths[:1], cases[-1:]
    rows = {}
    for bptt, checkpoint in cases:
        options = dict(cuts=Cuts(bptt=bptt), checkpoint=checkpoint)
        megabytes = [memory(stepper, num_rollout_steps=n, **options) / 1e6 for n in lengths]
        rows[f"bptt={bptt}, checkpoint={checkpoint}"] = [f"{x:.1f} MB" for x in megabytes]
    common.print_table("memory of one gradient", [f"{n} steps" for n in lengths], rows)

    options = dict(num_rollout_steps=steps, cuts=Cuts(bptt=k), checkpoint=True)
    stepper = train_emulator(stepper, num_updates=args.updates, key=train_key, **options)

    # The solver treats the nonlinear term explicitly, so it needs two substeps.
    substep = ex.stepper.KuramotoSivashinsky(2, DOMAIN_EXTENT, NUM_POINTS, DT / 2)
    solver = ex.RepeatedStepper(substep, 2)
    simulate = lambda step, u, num_steps: without_mean(common.rollout(step, u, num_steps))
    start = simulate(solver, random_states(test_key, NUM_TEST), TRANSIENT_STEPS)[:, -1]
    steppers = solver, lambda u: u, stepper
    reference, constant, emulated = (simulate(f, start, args.test_steps) for f in steppers)
    trajectories = {"persistence": constant, "emulator": emulated}
    errors = {name: common.error_over_time(u, reference) for name, u in trajectories.items()}
    rows = {name: [f"{error[n]:.4f}" for n in REPORT_STEPS] for name, error in errors.items()}
    common.print_table("nRMSE after", [f"step {n}" for n in REPORT_STEPS], rows)
    print(f"\nstd u: solver {jnp.std(reference):.2f}, emulator {jnp.std(emulated):.2f}")
    common.save_figure(args.output, plot({"solver": reference, "emulator": emulated}, errors))


if __name__ == "__main__":
    main()
