"""Trains emulators of the 1D Kuramoto–Sivashinsky equation on the residuum of a Crank–Nicolson
step, and judges them on the test of a published one that was trained so, too: AR-DenseED.

    ∂u/∂t + ½ ∂(u²)/∂x + ∂²u/∂x² + ∂⁴u/∂x⁴ = 0,   x in [0, 22π) periodic

N. Geneva, N. Zabaras: Modeling the dynamics of PDE systems with physics-constrained deep
auto-regressive networks. J. Comput. Phys. 403, 109056 (2020), arXiv 1906.05747.

What helped most: a network that multiplies channels, since the equation is quadratic; small
batches and many updates; training states that do not repeat themselves along x as the waves
of the original training do. All states come from a pool that goes on with the emulator's own
rollouts (`Rollout.final_state`), so that even rollouts of one step get to the attractor. The
solver is used only to judge. Numbers are in docs/published_emulator.md.

    python examples/kuramoto_sivashinsky.py                   trains and writes the figure
    python examples/kuramoto_sivashinsky.py --seed 0 1 2      median, least and most of three
    python examples/kuramoto_sivashinsky.py --quick           in seconds, to see that it runs
"""

import argparse
import pathlib
import time
from typing import Any, NamedTuple

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


NUM_POINTS = 96
DOMAIN_EXTENT = 22 * np.pi
DT = 0.1
POOL_SIZE, BATCH_SIZE = 512, 8
NUM_TEST, TRANSIENT_STEPS, TEST_STEPS = 200, 1000, 1000
REPORT_TIMES = (1, 5, 10, 20)


#
# The equation
#

WAVENUMBERS = 2 * np.pi / DOMAIN_EXTENT * np.arange(NUM_POINTS // 2 + 1)
WAVENUMBERS[-1] = 0  # the shortest wave has no derivative on this grid
LINEAR = WAVENUMBERS**2 - WAVENUMBERS**4  # symbol of -∂²/∂x² - ∂⁴/∂x⁴


def time_derivative(u):
    """The Fourier transform of ∂u/∂t of a state `[1, NUM_POINTS]`."""
    return LINEAR * jnp.fft.rfft(u) - 0.5j * WAVENUMBERS * jnp.fft.rfft(u**2)


def preconditioned_crank_nicolson(u_next, u_prev):
    """Zero if `u_next` is one Crank–Nicolson step of length `DT` after `u_prev`; to first
    order the error of `u_next`, since the linear part of the step is inverted."""
    slope = (time_derivative(u_next) + time_derivative(u_prev)) / 2
    residuum = jnp.fft.rfft(u_next - u_prev) - DT * slope
    return jnp.fft.irfft(residuum / (1 - DT / 2 * LINEAR))


def crank_nicolson_step(u_prev):
    """Solves that step. Each iteration leaves a fifth of the error."""
    correct = lambda _, u: u - preconditioned_crank_nicolson(u, u_prev)
    return jax.lax.fori_loop(0, 12, correct, u_prev)


def reference_solver():
    """Fourth order in time; as theirs, it does not dealias."""
    return ex.stepper.KuramotoSivashinskyConservative(
        1, DOMAIN_EXTENT, NUM_POINTS, DT, order=4, dealiasing_fraction=1.0
    )


#
# The states with which training and test begin, `[num_samples, 1, NUM_POINTS]`
#


def long_waves(num_samples, key):
    """The two longest waves, with the random coefficients of their test."""
    real, imaginary = jax.random.uniform(key, (2, num_samples, 1, 2))
    u_hat = jnp.zeros((num_samples, 1, NUM_POINTS // 2 + 1), complex)
    return jnp.fft.irfft(u_hat.at[..., 1:3].set(NUM_POINTS * (real - 1j * imaginary)))


def initial_conditions(num_samples, key):
    """The random waves of their training. They repeat themselves about seven times along x,
    and a convolutional emulator keeps them so: a tenth of `long_waves` ends that."""
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
    return waves + 0.1 * long_waves(num_samples, keys[4])


def published_test(num_samples=NUM_TEST, seed=0):
    """The solver's trajectories `[num_samples, TEST_STEPS + 1, 1, NUM_POINTS]` from t = 100 on,
    when the transient is over. The emulators start where they do."""
    solver = reference_solver()
    start = long_waves(num_samples, jax.random.key(seed))
    return rollout(solver, rollout(solver, start, TRANSIENT_STEPS)[:, -1])


#
# The emulator
#


class ConvNet(eqx.Module):
    """Advances a state `[1, NUM_POINTS]` by adding what a periodic ConvNet makes of it. Its
    activations are products of channels, since the equation is quadratic."""

    layers: list[eqx.nn.Conv1d]

    def __init__(self, *, width=16, depth=3, kernel_size=9, key):
        layers = [
            eqx.nn.Conv1d(
                1 + i * width,
                2 * width if i < depth - 1 else 1,
                kernel_size,
                padding="SAME",
                padding_mode="CIRCULAR",
                key=layer_key,
            )
            for i, layer_key in enumerate(jax.random.split(key, depth))
        ]
        # Equinox's weights have a third of the variance 1 / fan_in, and train more slowly.
        self.layers = jax.tree.map(lambda x: 3**0.5 * x, layers[:-1])
        # It begins as the identity.
        self.layers += jax.tree.map(jnp.zeros_like, layers[-1:])

    def __call__(self, u):
        hidden = jnp.clip(u, -5, 5) / 2  # so that no rollout can overflow
        for layer in self.layers[:-1]:
            a, b = jnp.split(layer(hidden), 2)
            hidden = jnp.concatenate([hidden, a * b])
        return u + self.layers[-1](hidden)


def num_parameters(stepper):
    return sum(x.size for x in jax.tree.leaves(stepper))


def train(name, options, *, num_updates, key):
    """Trains a fresh emulator, with `options` of `residuum_loss`, on a pool of states. They
    start as random waves and move on with the emulator's rollouts, until they are replaced.
    Returns it and the seconds that took, compiling included."""
    init_key, pool_key, updates_key = jax.random.split(key, 3)
    stepper = ConvNet(key=init_key)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 5e-3, num_updates // 20, num_updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))
    carry = stepper, optimizer.init(stepper), initial_conditions(POOL_SIZE, pool_key)

    def update(carry, key):
        stepper, opt_state, pool = carry
        choice_key, anew_key, states_key = jax.random.split(key, 3)
        chosen = jax.random.choice(choice_key, POOL_SIZE, (BATCH_SIZE,), replace=False)
        loss_fn = lambda stepper: residuum_loss(
            stepper,
            pool[chosen][:, None],  # with the one snapshot that is needed
            preconditioned_crank_nicolson,
            has_aux=True,
            **options,
        )
        (loss, rollout), grads = jax.value_and_grad(loss_fn, has_aux=True)(stepper)
        updates, opt_state = optimizer.update(grads, opt_state)
        stepper = optax.apply_updates(stepper, updates)

        u = rollout.final_state
        size = jnp.max(jnp.abs(u), axis=(1, 2), keepdims=True)
        anew = jax.random.uniform(anew_key, size.shape) < 0.001
        anew |= size > 10
        u = jnp.where(anew, initial_conditions(BATCH_SIZE, states_key), u)
        return (stepper, opt_state, pool.at[chosen].set(u)), loss

    @jax.jit
    @canonical_convolutions  # without which they are slow in a loop on a CPU
    def several_updates(carry, keys):
        return jax.lax.scan(update, carry, keys)

    start = time.perf_counter()
    keys = jax.random.split(updates_key, num_updates)
    with tqdm(total=num_updates, desc=f"{name:>24}") as progress:
        for i in range(0, num_updates, 20):
            carry, losses = several_updates(carry, keys[i : i + 20])
            progress.set_postfix(loss=f"{losses[-1]:.1e}")
            progress.update(len(losses))
    return carry[0], time.perf_counter() - start


#
# The judgement
#


def rollout(stepper, states, num_steps=TEST_STEPS):
    """Trajectories `[batch, num_steps + 1, 1, NUM_POINTS]`."""
    trajectory = ex.rollout(stepper, num_steps, include_init=True)
    return jax.jit(canonical_convolutions(jax.vmap(trajectory)))(states)


def mean_squared_error(u, reference):
    """`[time]`, mean over samples and space."""
    return jnp.mean((u - reference) ** 2, axis=(0, 2, 3))


def relative_error(u, reference):
    """nRMSE `[time]`: ‖u - reference‖ / ‖reference‖, mean over samples."""
    difference, size = (jnp.linalg.norm(v, axis=(-2, -1)) for v in (u - reference, reference))
    return jnp.mean(difference / size, axis=0)


def spectrum(u):
    """Mean of |û|² `[mode]`, where cos x has |û|² = 1/4."""
    return jnp.mean(jnp.abs(jnp.fft.rfft(u) / NUM_POINTS) ** 2, axis=(0, 1, 2))


class Verdict(NamedTuple):
    """How a model did. `row` is its row of the table, see `COLUMNS`."""

    mse: np.ndarray  # [time]
    energy: np.ndarray  # of the modes of `MODES`, relative to the solver's
    row: np.ndarray


# Of each column: heading, format. The error of the spectrum is the largest of all `MODES`.
COLUMNS = {
    **{f"MSE t = {t}": "{:.1e}" for t in REPORT_TIMES},
    "nRMSE 0.3": "t = {:.1f}",
    "std u": "{:.3f}",
    "spectrum": "{:.1%}",
    "parameters": "{:.0f}",
    "training": "{:.0f} s",
}
MODES = slice(2, 25)  # the longest wave is sampled badly
STATISTICS_FROM = 200  # steps


def judge(u, reference, num_parameters=np.nan, seconds=np.nan):
    mse, error = (np.asarray(f(u, reference)) for f in (mean_squared_error, relative_error))
    energy, solver = (spectrum(v[:, STATISTICS_FROM:])[MODES] for v in (u, reference))
    too_large = np.append(~(error < 0.3), True)
    row = [mse[round(t / DT)] for t in REPORT_TIMES]
    row += [DT * np.argmax(too_large), np.std(u), np.max(np.abs(energy / solver - 1))]
    row = np.nan_to_num(row, nan=np.inf)  # what has diverged
    return Verdict(mse, energy / solver, np.array([*row, num_parameters, seconds]))


def print_table(rows):
    print(f"\n{'':<26}" + "".join(f"{heading:>12}" for heading in COLUMNS))
    for name, row in rows.items():
        cells = [
            "" if np.isnan(x) else format.format(x)
            for x, format in zip(row, COLUMNS.values(), strict=True)
        ]
        print(f"{name:<26}" + "".join(f"{cell:>12}" for cell in cells))


# Measured by benchmarks/ar_densed.py from their weights, commit adeb9f313d70, on this test.
PUBLISHED = Verdict(
    mse=np.array([6.0e-4, 8.8e-3, 6.6e-2, 0.56]),  # at REPORT_TIMES
    energy=np.fromstring(
        "0.910 0.951 0.953 0.988 0.961 0.938 0.968 0.937 0.978 0.938 0.922 0.937 "
        "0.989 0.910 0.908 0.939 0.902 0.872 0.890 0.911 0.889 0.872 0.867",
        sep=" ",
    ),
    row=np.array([6.0e-4, 8.8e-3, 6.6e-2, 0.56, 13.9, 1.275, 0.133, 4820, np.nan]),
)


def save_figure(path, reference, emulated, verdicts):
    """One trajectory in space and time; error over time and spectra of all rows."""
    pictures = {"solver": reference, "emulator": emulated, "difference": emulated - reference}
    figure = plt.figure(figsize=(11, 6.2), layout="constrained")
    axes = figure.subplot_mosaic([[*pictures], ["mse", "mse", "energy"]])
    extent = (0, DT * TEST_STEPS, 0, DOMAIN_EXTENT)
    style: dict[str, Any] = dict(vmin=-3.5, vmax=3.5, cmap="RdBu_r", aspect="auto")
    for title, u in pictures.items():
        axes[title].imshow(u[:, 0].T, extent=extent, origin="lower", **style)
        axes[title].set(title=title, xlabel="time t", ylabel="position x")
    figure.colorbar(axes[title].images[0], ax=axes[title], label="u")

    looks = zip(
        ("#CC79A7", "#D55E00", "#0072B2", "#009E73", "#777777"),  # Okabe and Ito, colour-
        ("o:", "-.", "--", "-", ":"),  # blind safe
        verdicts.items(),
        strict=True,
    )
    for color, line, (name, verdict) in looks:
        times = DT * np.arange(len(verdict.mse)) if name != "AR-DenseED" else REPORT_TIMES
        axes["mse"].semilogy(times, verdict.mse, line, color=color, label=name)
        axes["energy"].plot(np.arange(50)[MODES], verdict.energy, line, color=color)
    axes["mse"].set(title="error on the published test", xlabel="time t")
    axes["mse"].set(ylabel="mean squared error", ylim=(1e-9, 10))
    axes["energy"].set(title="spectrum over the solver's", xlabel="mode", ylim=(0.8, 1.2))
    for axis in (axes["mse"], axes["energy"]):
        axis.grid(alpha=0.3)
    axes["mse"].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    parser.add_argument("--updates", type=int, default=30_000, help="updates of each model")
    parser.add_argument("--rollout-steps", type=int, default=4)
    parser.add_argument(
        "--output", type=pathlib.Path, default="assets/kuramoto_sivashinsky.png"
    )
    parser.add_argument("--quick", action="store_true", help="20 updates, 8 trajectories")
    args = parser.parse_args()
    num_updates = 20 if args.quick else args.updates

    reference = published_test(8 if args.quick else NUM_TEST)
    start = reference[:, 0]
    limit = judge(rollout(crank_nicolson_step, start), reference)
    steps = args.rollout_steps
    models = {
        "1 step": dict(num_rollout_steps=1),
        f"{steps} steps": dict(num_rollout_steps=steps),
        f"{2 * steps} steps, bptt=1": dict(num_rollout_steps=2 * steps, cuts=Cuts(bptt=1)),
    }
    rows: dict[str, list] = {name: [] for name in models}
    for seed in args.seed:
        verdicts = {"AR-DenseED": PUBLISHED}
        for name, options in models.items():
            key = jax.random.key(seed)
            stepper, seconds = train(name, options, num_updates=num_updates, key=key)
            emulated = rollout(stepper, start)
            verdicts[name] = judge(emulated, reference, num_parameters(stepper), seconds)
            rows[name].append(verdicts[name].row)
        if seed == args.seed[0]:
            verdicts["exact Crank–Nicolson"] = limit
            save_figure(args.output, reference[0], emulated[0], verdicts)

    table = {"AR-DenseED": PUBLISHED.row}
    for name in models:
        table[name] = np.median(rows[name], axis=0)
        if len(args.seed) > 1:
            table[f"{name}, least"] = np.min(rows[name], axis=0)
            table[f"{name}, most"] = np.max(rows[name], axis=0)
    print_table(table | {"exact Crank–Nicolson": limit.row})
    print(f"\nstd u of the solver: {np.std(reference):.3f}. Figure: {args.output}")


if __name__ == "__main__":
    main()
