"""Emulators of the 1D Kuramoto–Sivashinsky equation on the test of a published one, AR-DenseED.
All of them were trained on the residual of a Crank–Nicolson step, without data.

    ∂u/∂t + ½ ∂(u²)/∂x + ∂²u/∂x² + ∂⁴u/∂x⁴ = 0,   x in [0, 22π) periodic

N. Geneva, N. Zabaras: Modeling the dynamics of PDE systems with physics-constrained deep
auto-regressive networks. J. Comput. Phys. 403, 109056 (2020), arXiv 1906.05747.

Three choices helped most: a network that multiplies channels, because the equation is
quadratic; small batches and many updates; and initial conditions that are not periodic within
the domain, unlike those of the original training. The training states come from a replay
buffer, which is refilled with the final states of the emulator's own rollouts
(`Rollout.final_state`), so even one-step rollouts visit the attractor. The solver is used only
to evaluate the emulators. The numbers are in docs/published_emulator.md.

    python benchmarks/published_kuramoto_sivashinsky.py                  one seed, 5 minutes
    python benchmarks/published_kuramoto_sivashinsky.py --seed 0 1 2     median, least and most
    python benchmarks/published_kuramoto_sivashinsky.py --quick          to see that it runs
"""

import pathlib
from typing import NamedTuple

import equinox as eqx
import exponax as ex
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import study
from published import minimise, num_parameters, on_replayed_states


# isort: split
from common import (
    bilinear,
    COLORS,
    error_over_time as relative_error,
    LINES,
    print_table as print_texts,
    rollout,
    save_figure,
    show,
)

from residuum import Cuts


NUM_POINTS = 96
DOMAIN_EXTENT = 22 * np.pi
DT = 0.1
BUFFER_SIZE = 512
NUM_TEST, TRANSIENT_STEPS, TEST_STEPS = 200, 1000, 1000
REPORT_TIMES = (1, 5, 10, 20)
CSV = pathlib.Path("benchmarks/published_kuramoto_sivashinsky.csv")


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
    """Zero if `u_next` is one Crank–Nicolson step of length `DT` after `u_prev`. To first
    order it is the error of `u_next`, because the linear part of the step is inverted."""
    slope = (time_derivative(u_next) + time_derivative(u_prev)) / 2
    residual = jnp.fft.rfft(u_next - u_prev) - DT * slope
    return jnp.fft.irfft(residual / (1 - DT / 2 * LINEAR))


def crank_nicolson_step(u_prev):
    """Solves that step; each iteration reduces the error to a fifth."""
    correct = lambda _, u: u - preconditioned_crank_nicolson(u, u_prev)
    return jax.lax.fori_loop(0, 12, correct, u_prev)


def reference_solver():
    """Fourth order in time and, like that of the authors, without dealiasing."""
    return ex.stepper.KuramotoSivashinskyConservative(
        1, DOMAIN_EXTENT, NUM_POINTS, DT, order=4, dealiasing_fraction=1.0
    )


#
# Initial conditions of training and test, `[num_samples, 1, NUM_POINTS]`
#


def long_waves(num_samples, key):
    """The two longest waves, with random coefficients, as in the published test."""
    real, imaginary = jax.random.uniform(key, (2, num_samples, 1, 2))
    u_hat = jnp.zeros((num_samples, 1, NUM_POINTS // 2 + 1), complex)
    return jnp.fft.irfft(u_hat.at[..., 1:3].set(NUM_POINTS * (real - 1j * imaginary)))


def initial_conditions(num_samples, key):
    """The random waves of the published training. Their period is about a seventh of the
    domain, and a convolutional emulator preserves it: adding a tenth of `long_waves` breaks
    the symmetry."""
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
    after the transient. The emulators start from their first states."""
    solver = reference_solver()
    start = long_waves(num_samples, jax.random.key(seed))
    start = rollout(solver, start, TRANSIENT_STEPS)[:, -1]
    return rollout(solver, start, TEST_STEPS)


#
# The emulator
#


class ConvNet(eqx.Module):
    """Advances a state `[1, NUM_POINTS]`: adds the output of a periodic ConvNet with dense
    connections. Its activations are products of channels, because the equation is quadratic."""

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
        # Equinox initialises with a third of the variance 1 / fan_in, which trains more slowly.
        self.layers = jax.tree.map(lambda x: 3**0.5 * x, layers[:-1])
        # With these zeros, the emulator starts as the identity.
        self.layers += jax.tree.map(jnp.zeros_like, layers[-1:])

    def __call__(self, u):
        hidden = jnp.clip(u, -5, 5) / 2  # so that no rollout can overflow
        for layer in self.layers[:-1]:
            hidden = jnp.concatenate([hidden, bilinear(layer(hidden))])
        return u + self.layers[-1](hidden)


def train_emulator(name, options, *, num_updates, key):
    """Trains a fresh emulator, with `options` of `residuum_loss`. Returns it and the seconds
    that this took, compilation included."""
    init_key, buffer_key, updates_key = jax.random.split(key, 3)
    loss_fn = on_replayed_states(
        preconditioned_crank_nicolson,
        initial_conditions,
        batch_size=8,
        fresh_share=0.001,
        bound=10,
        **options,
    )
    return minimise(
        name,
        ConvNet(key=init_key),
        loss_fn,
        initial_conditions(BUFFER_SIZE, buffer_key),
        updates_key,
        num_updates=num_updates,
        learning_rate=5e-3,
    )


#
# The evaluation
#


def mean_squared_error(u, reference):
    """`[time]`, the mean over samples and space."""
    return jnp.mean((u - reference) ** 2, axis=(0, 2, 3))


def spectrum(u):
    """The mean of |û|² `[mode]`; that of cos x is 1/4."""
    return jnp.mean(jnp.abs(jnp.fft.rfft(u) / NUM_POINTS) ** 2, axis=(0, 1, 2))


class Scores(NamedTuple):
    """Of one emulator. `row` is its row of the table, with the columns of `COLUMNS`."""

    mse: np.ndarray  # [time]
    energy: np.ndarray  # of the modes of `MODES`, relative to the solver's
    row: np.ndarray


# Heading of each column: name in the CSV file, format. The error of the spectrum is the
# largest one of all `MODES`.
COLUMNS = {
    **{f"MSE t = {t}": (f"mse_{t}", "{:.1e}") for t in REPORT_TIMES},
    "nRMSE 0.3": ("time_of_nrmse_0.3", "t = {:.1f}"),
    "std u": ("std", "{:.3f}"),
    "spectrum": ("spectrum", "{:.1%}"),
    "parameters": ("parameters", "{:.0f}"),
    "training": ("seconds", "{:.0f} s"),
}
MODES = slice(2, 25)  # without the longest wave, of which there are too few samples
STATISTICS_FROM = 200  # steps


def evaluate(u, reference, num_parameters=np.nan, seconds=np.nan):
    mse, error = (np.asarray(f(u, reference)) for f in (mean_squared_error, relative_error))
    energy, solver = (spectrum(v[:, STATISTICS_FROM:])[MODES] for v in (u, reference))
    too_large = np.append(~(error < 0.3), True)
    row = [mse[round(t / DT)] for t in REPORT_TIMES]
    row += [DT * np.argmax(too_large), np.std(u), np.max(np.abs(energy / solver - 1))]
    row = np.nan_to_num(row, nan=np.inf)  # where the emulator diverged
    return Scores(mse, energy / solver, np.array([*row, num_parameters, seconds]))


def csv_row(name, seed, row):
    texts = ["" if np.isnan(x) else f"{x:.6g}" for x in row]
    columns = [column for column, _ in COLUMNS.values()]
    return {"emulator": name, "seed": seed, **dict(zip(columns, texts, strict=True))}


def print_table(rows):
    formats = [format for _, format in COLUMNS.values()]
    texts = {
        name: [
            "" if np.isnan(x) else format.format(x)
            for x, format in zip(row, formats, strict=True)
        ]
        for name, row in rows.items()
    }
    print_texts("", COLUMNS, texts)


# Measured by benchmarks/ar_densed.py from the published weights, commit adeb9f313d70.
PUBLISHED = Scores(
    mse=np.array([6.0e-4, 8.8e-3, 6.6e-2, 0.56]),  # at REPORT_TIMES
    energy=np.fromstring(
        "0.910 0.951 0.953 0.988 0.961 0.938 0.968 0.937 0.978 0.938 0.922 0.937 "
        "0.989 0.910 0.908 0.939 0.902 0.872 0.890 0.911 0.889 0.872 0.867",
        sep=" ",
    ),
    row=np.array([6.0e-4, 8.8e-3, 6.6e-2, 0.56, 13.9, 1.275, 0.133, 4820, np.nan]),
)


def draw(reference, emulated, scores):
    """One trajectory in space and time; errors over time and spectra of all emulators."""
    pictures = {"solver": reference, "emulator": emulated, "difference": emulated - reference}
    figure = plt.figure(figsize=(11, 6.2), layout="constrained")
    axes = figure.subplot_mosaic([[*pictures], ["mse", "mse", "energy"]])
    extent = (DT * TEST_STEPS, DOMAIN_EXTENT)
    for title, u in pictures.items():
        image = show(axes[title], title, u[:, 0], extent, vmin=-3.5, vmax=3.5)
        axes[title].set(xlabel="time t", ylabel="position x")
    figure.colorbar(image, ax=axes[title], label="u")

    for color, line, (name, score) in zip(COLORS, LINES, scores.items(), strict=True):
        style = dict(color=color, linestyle=line)
        if name == "AR-DenseED":
            axes["mse"].semilogy(REPORT_TIMES, score.mse, marker="o", label=name, **style)
        else:
            times = DT * np.arange(len(score.mse))
            axes["mse"].semilogy(times, score.mse, label=name, **style)
        axes["energy"].plot(np.arange(50)[MODES], score.energy, **style)
    axes["mse"].set(title="error on the published test", xlabel="time t")
    axes["mse"].set(ylabel="mean squared error", ylim=(1e-9, 10))
    axes["energy"].set(title="spectrum over the solver's", xlabel="mode", ylim=(0.8, 1.2))
    for axis in (axes["mse"], axes["energy"]):
        axis.grid(alpha=0.3)
    axes["mse"].legend(frameon=False)
    return figure


def main():
    figure = "assets/kuramoto_sivashinsky.png"
    parser = study.make_parser(__doc__, figure, CSV, quick="20 updates, 8 trajectories")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    parser.add_argument("--updates", type=int, default=30_000, help="updates of each model")
    parser.add_argument("--rollout-steps", type=int, default=4)
    args = parser.parse_args()
    num_updates = 20 if args.quick else args.updates

    reference = published_test(8 if args.quick else NUM_TEST)
    start = reference[:, 0]
    steps = args.rollout_steps
    models = {
        "1 step": dict(num_rollout_steps=1),
        f"{steps} steps": dict(num_rollout_steps=steps),
        f"{2 * steps} steps, bptt=1": dict(num_rollout_steps=2 * steps, cuts=Cuts(bptt=1)),
    }
    exact = evaluate(rollout(crank_nicolson_step, start, TEST_STEPS), reference)
    first, rows = {"exact Crank–Nicolson": exact}, {name: [] for name in models}
    for seed in args.seed:
        for name, options in models.items():
            stepper, seconds = train_emulator(
                name, options, num_updates=num_updates, key=jax.random.key(seed)
            )
            u = rollout(stepper, start, TEST_STEPS)
            scores = evaluate(u, reference, num_parameters(stepper), seconds)
            rows[name].append(scores.row)
            if seed == args.seed[0]:
                emulated, first[name] = u[0], scores

    table = {"AR-DenseED": PUBLISHED.row}
    for name in models:
        columns = zip(*rows[name], strict=True)
        table[name], least, most = zip(*map(study.over_seeds, columns), strict=True)
        if len(args.seed) > 1:
            table |= {f"{name}, least": least, f"{name}, most": most}
    print_table(table | {"exact Crank–Nicolson": exact.row})
    print(f"\nstd u of the solver: {np.std(reference):.3f}")
    if args.csv or not args.quick:
        rows = [(name, *x) for name in models for x in zip(args.seed, rows[name], strict=True)]
        rows.append(("exact Crank–Nicolson", "", exact.row))
        study.write_csv(args.csv or CSV, [csv_row(*row) for row in rows])
    save_figure(args.output, draw(reference[0], emulated, first | {"AR-DenseED": PUBLISHED}))


if __name__ == "__main__":
    main()
