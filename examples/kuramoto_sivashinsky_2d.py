"""Trains an emulator of the 2D Kuramoto–Sivashinsky equation, which is chaotic and stiff.

    ∂u/∂t + ½|∇u|² + ∇²u + ∂⁴u/∂x⁴ + ∂⁴u/∂y⁴ = 0,   (x, y) periodic

That is the form that exponax solves; others have the biharmonic operator in it. Training it
takes what a larger problem takes. A long rollout, whose truncation (`Cuts(bptt=k)`) and
rematerialisation (`checkpoint=True`) keep the memory small: a table shows it with and without.
A preconditioned residuum: fourth derivatives would otherwise drown everything else, see
conditioning.py; in Fourier space, the linear part of the equation is easily inverted. And no
data: training goes on from the last states of the rollout (`Rollout.final_state`), with new
random ones now and then.

    python examples/kuramoto_sivashinsky_2d.py             trains and writes the figure
    python examples/kuramoto_sivashinsky_2d.py --quick     in seconds, to see that it runs
"""

import argparse
import pathlib

import equinox as eqx
import exponax as ex
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from convolutions_on_cpu import canonical_convolutions
from tqdm import tqdm

from residuum import Cuts, residuum_loss


NUM_POINTS = 32
DOMAIN_EXTENT = 30.0
DT = 0.1
BATCH_SIZE = 8
NUM_TEST, TRANSIENT_STEPS, TEST_STEPS = 8, 500, 500


#
# The equation
#

K = 2 * np.pi / DOMAIN_EXTENT * np.fft.fftfreq(NUM_POINTS, 1 / NUM_POINTS)
KX, KY = K[:, None], np.abs(K[None, : NUM_POINTS // 2 + 1])
K_SQUARED = KX**2 + KY**2
LINEAR = K_SQUARED - KX**4 - KY**4  # symbol of -∇² - ∂⁴/∂x⁴ - ∂⁴/∂y⁴
RESOLVED = np.maximum(np.abs(KX), KY) < 2 / 3 * K.max()  # 2/3 rule of dealiasing


def time_derivative(u):
    """The Fourier transform of ∂u/∂t of a state `[1, NUM_POINTS, NUM_POINTS]`."""
    u_hat = jnp.fft.rfft2(u)
    u_x, u_y = (jnp.fft.irfft2(1j * k * RESOLVED * u_hat) for k in (KX, KY))
    return LINEAR * u_hat - 0.5 * RESOLVED * jnp.fft.rfft2(u_x**2 + u_y**2)


def preconditioned_crank_nicolson(u_next, u_prev):
    """Zero if `u_next` is one Crank–Nicolson step of length `DT` after `u_prev`; to first
    order the error of `u_next`, since the linear part of the step is inverted."""
    slope = (time_derivative(u_next) + time_derivative(u_prev)) / 2
    residuum = jnp.fft.rfft2(u_next - u_prev) - DT * slope
    return jnp.fft.irfft2(residuum / (1 - DT / 2 * LINEAR))


#
# The emulator
#


class ConvNet(eqx.Module):
    """Advances a state `[1, NUM_POINTS, NUM_POINTS]`, whatever its mean."""

    layers: list[eqx.nn.Conv2d]

    def __init__(self, *, width=16, dilations=(1, 2, 2, 1), key):
        channels = [1] + [width] * (len(dilations) - 1) + [1]
        keys = jax.random.split(key, len(dilations))
        layers = [
            eqx.nn.Conv2d(
                *(c_in, c_out, 3),
                dilation=dilation,
                padding="SAME",
                padding_mode="CIRCULAR",
                key=layer_key,
            )
            for c_in, c_out, dilation, layer_key in zip(
                channels, channels[1:], dilations, keys, strict=False
            )
        ]
        # Equinox's weights have a third of the variance 1 / fan_in, and train more slowly.
        self.layers = jax.tree.map(lambda x: 3**0.5 * x, layers)

    def __call__(self, u):
        hidden = (u - jnp.mean(u)) / 4
        for layer in self.layers[:-1]:
            hidden = jax.nn.gelu(layer(hidden))
        return u + self.layers[-1](hidden)


def random_states(key, num_samples):
    """Random waves `[num_samples, 1, NUM_POINTS, NUM_POINTS]` of about the right size."""
    noise = jax.random.normal(key, (num_samples, 1, NUM_POINTS, NUM_POINTS))
    spectrum = np.exp(-((K_SQUARED / 0.8) ** 2)) * (K_SQUARED > 0)
    waves = jnp.fft.irfft2(spectrum * jnp.fft.rfft2(noise))
    return 4 * waves / jnp.std(waves, axis=(1, 2, 3), keepdims=True)


def make_loss(stepper, data, options):
    return residuum_loss(stepper, data, preconditioned_crank_nicolson, **options)


def train(stepper, options, *, num_updates, key):
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(3e-3, num_updates)),
    )
    opt_state = optimizer.init(eqx.filter(stepper, eqx.is_array))
    states_key, updates_key = jax.random.split(key)
    states = random_states(states_key, BATCH_SIZE)

    @eqx.filter_jit
    @canonical_convolutions  # without which they are slow in a loop on a CPU
    def update(stepper, opt_state, states, key):
        loss_fn = lambda stepper: make_loss(stepper, states[:, None], options)
        (loss, rollout), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(stepper)
        updates, opt_state = optimizer.update(grads, opt_state)
        stepper = eqx.apply_updates(stepper, updates)

        choice_key, anew_key = jax.random.split(key)
        u = rollout.final_state
        u -= jnp.mean(u, axis=(1, 2, 3), keepdims=True)
        size = jnp.std(u, axis=(1, 2, 3), keepdims=True)
        anew = jax.random.uniform(choice_key, size.shape) < 0.05
        anew |= ~((size > 0.5) & (size < 10))  # also where not a number
        states = jnp.where(anew, random_states(anew_key, BATCH_SIZE), u)
        return stepper, opt_state, states, loss

    progress = tqdm(jax.random.split(updates_key, num_updates))
    for i, update_key in enumerate(progress):
        stepper, opt_state, states, loss = update(stepper, opt_state, states, update_key)
        if i % 20 == 0 or i == num_updates - 1:
            progress.set_postfix(loss=f"{loss:.1e}")
    return stepper


#
# The judgement
#


def memory(stepper, **options):
    """Megabytes of temporary memory that one gradient takes."""
    data = random_states(jax.random.key(0), BATCH_SIZE)[:, None]
    params, static = eqx.partition(stepper, eqx.is_array)
    loss_fn = lambda params: make_loss(eqx.combine(params, static), data, options)
    program = jax.jit(canonical_convolutions(jax.grad(loss_fn)))
    analysis = program.lower(params).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes / 1e6


def print_memory(stepper, k, lengths, *, quick):
    """With and without truncation and rematerialisation, by rollout length. If it has to be
    quick only with both, since each entry is a program to compile."""
    columns = "".join(f"{f'{n} steps':>12}" for n in lengths)
    print(f"\n{'memory of one gradient':<32}{columns}")
    cases = [(Cuts(), False), (Cuts(), True), (Cuts(bptt=k), False), (Cuts(bptt=k), True)]
    for cuts, checkpoint in cases[-1:] if quick else cases:
        options = dict(cuts=cuts, checkpoint=checkpoint)
        row = [memory(stepper, num_rollout_steps=n, **options) for n in lengths]
        name = f"bptt={cuts.bptt}, checkpoint={checkpoint}"
        print(f"{name:<32}" + "".join(f"{megabytes:>9.1f} MB" for megabytes in row))


def rollout(stepper, states, num_steps):
    """Trajectories `[batch, num_steps + 1, 1, NUM_POINTS, NUM_POINTS]`, without the mean."""
    trajectory = ex.rollout(stepper, num_steps, include_init=True)
    u = jax.jit(canonical_convolutions(jax.vmap(trajectory)))(states)
    return u - jnp.mean(u, axis=(-2, -1), keepdims=True)


def error_over_time(u, reference):
    """nRMSE `[time]`: ‖u - reference‖ / ‖reference‖, mean over samples."""
    difference, size = (
        jnp.linalg.norm(v[:, :, 0], axis=(-2, -1)) for v in (u - reference, reference)
    )
    return jnp.mean(difference / size, axis=0)


def spectrum(u):
    """Mean energy of all waves of about the same length, `[wavenumber]`."""
    energy = jnp.mean(jnp.abs(jnp.fft.rfft2(u)) ** 2, axis=(0, 1, 2)) / NUM_POINTS**4
    index = np.rint(np.sqrt(K_SQUARED) * DOMAIN_EXTENT / (2 * np.pi)).astype(int)
    return np.bincount(index.ravel(), np.asarray(energy).ravel())[1 : NUM_POINTS // 2]


def save_figure(path, reference, emulated):
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.3), layout="constrained")
    limit = float(jnp.max(jnp.abs(jnp.stack([reference[0, -1], emulated[0, -1]]))))
    extent = (0, DOMAIN_EXTENT, 0, DOMAIN_EXTENT)
    style = dict(vmin=-limit, vmax=limit, cmap="RdBu_r", extent=extent, origin="lower")
    for axis, name, u in zip(axes, ("solver", "emulator"), (reference, emulated), strict=False):
        axis.imshow(u[0, -1, 0].T, **style)
        axis.set(title=f"{name}, t = {DT * TEST_STEPS:.0f}", xlabel="x", ylabel="y")
    figure.colorbar(axes[1].images[0], ax=axes[1], label="u")
    error = error_over_time(emulated, reference)
    axes[2].semilogy(DT * np.arange(1, len(error)), error[1:], color="#D55E00")
    axes[2].set(title="error on the attractor", xlabel="time t", ylabel="nRMSE")
    axes[2].grid(alpha=0.3)
    for name, u, color, line in (
        ("solver", reference, "#0072B2", "-"),
        ("emulator", emulated, "#D55E00", "--"),
    ):
        energy = spectrum(u[:, u.shape[1] // 2 :])
        wavenumbers = 2 * np.pi / DOMAIN_EXTENT * np.arange(1, len(energy) + 1)
        axes[3].semilogy(wavenumbers, energy, line, color=color, label=name)
    axes[3].set(title="spectrum", xlabel="wavenumber", ylabel="energy", ylim=(1e-7, 10))
    axes[3].legend(loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=1200)
    parser.add_argument("--rollout-steps", type=int, default=10)
    parser.add_argument("--bptt", type=int, default=2, help="steps that gradients cross")
    parser.add_argument(
        "--output", type=pathlib.Path, default="assets/kuramoto_sivashinsky_2d.png"
    )
    parser.add_argument("--quick", action="store_true", help="10 updates")
    args = parser.parse_args()

    model_key, train_key, test_key = jax.random.split(jax.random.key(args.seed), 3)
    stepper = ConvNet(key=model_key)
    lengths = (args.rollout_steps,) if args.quick else (args.rollout_steps, 100)
    print_memory(stepper, args.bptt, lengths, quick=args.quick)
    options = dict(
        num_rollout_steps=args.rollout_steps,
        cuts=Cuts(bptt=args.bptt),
        checkpoint=True,
        has_aux=True,
    )
    num_updates = 10 if args.quick else args.updates
    stepper = train(stepper, options, num_updates=num_updates, key=train_key)

    # The solver is explicit where the equation is nonlinear, and needs shorter steps.
    substep = ex.stepper.KuramotoSivashinsky(2, DOMAIN_EXTENT, NUM_POINTS, DT / 2)
    solver = ex.RepeatedStepper(substep, 2)
    start = rollout(solver, random_states(test_key, NUM_TEST), TRANSIENT_STEPS)[:, -1]
    reference, emulated = (rollout(s, start, TEST_STEPS) for s in (solver, stepper))
    error = error_over_time(emulated, reference)
    print(f"\n{'nRMSE after':<16}" + "".join(f"{f'step {n}':>10}" for n in (1, 10, 50, 100)))
    print(f"{'emulator':<16}" + "".join(f"{error[n]:>10.4f}" for n in (1, 10, 50, 100)))
    print(f"{'std u':<16}{jnp.std(reference):>10.2f} solver{jnp.std(emulated):>10.2f} emulator")
    save_figure(args.output, reference, emulated)
    print(f"\nFigure: {args.output}")


if __name__ == "__main__":
    main()
