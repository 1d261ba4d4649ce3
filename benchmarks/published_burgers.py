"""Emulators of the 1D Burgers equation on the test of a published one, AR-DenseED. All of them
were trained on the residual of an implicit step, without data.

    ∂u/∂t + ½ ∂(u²)/∂x = ν ∂²u/∂x²,   x in [0, 1) periodic, ν = 0.0025

N. Geneva, N. Zabaras: Modeling the dynamics of PDE systems with physics-constrained deep
auto-regressive networks. J. Comput. Phys. 403, 109056 (2020), arXiv 1906.05747.

Three choices helped most: a replay buffer with states of all ages, because the error is
largest where shocks form; an emulator that runs in the frame that moves with the mean of u;
and, in long trainings, a residual of fourth order in time from two states alone (Hermite). The
solver is used only to evaluate the emulators. The numbers are in docs/published_emulator.md.

    python benchmarks/published_burgers.py --seed 0 1 2     median, least and most
    python benchmarks/published_burgers.py --ablation       one change at a time
    python benchmarks/published_burgers.py --quick          to see that it runs
"""

import pathlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import exponax as ex
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import published
import scipy.linalg
import study


# isort: split
from common import bilinear, COLORS, ConvNet, gated, LINES, rollout, save_figure, show

from residuum import Cuts


NUM_POINTS, DT = 512, 0.005
VISCOSITY = 0.0025
BUFFER_SIZE, BATCH_SIZE = 128, 8
NUM_TEST, TEST_STEPS = 200, 400
REPORT_TIMES = (0.25, 0.5, 1, 1.5, 2)


#
# The equation, for states `[1, NUM_POINTS]` on [0, 1)
#


def first_derivative(u):
    """Central differences of sixth order. The differences of a flux sum to zero."""
    pairs = ((1, 3 / 4), (2, -3 / 20), (3, 1 / 60))
    return NUM_POINTS * sum(c * (jnp.roll(u, -s, -1) - jnp.roll(u, s, -1)) for s, c in pairs)


def second_derivative(u):
    pairs = ((1, 3 / 2), (2, -3 / 20), (3, 1 / 90))
    around = sum(c * (jnp.roll(u, -s, -1) + jnp.roll(u, s, -1)) for s, c in pairs)
    return NUM_POINTS**2 * (around - 49 / 18 * u)


def time_derivative(u):
    return VISCOSITY * second_derivative(u) - first_derivative(u**2 / 2)


def hermite(u_next, u_prev):
    """Zero if `u_next` is one step of length `DT` after `u_prev`: of fourth order, from the
    first and second time derivatives of two states."""
    slope_0, bend_0 = jax.jvp(time_derivative, (u_prev,), (time_derivative(u_prev),))
    slope_1, bend_1 = jax.jvp(time_derivative, (u_next,), (time_derivative(u_next),))
    return u_next - u_prev - DT / 2 * (slope_0 + slope_1) - DT**2 / 12 * (bend_0 - bend_1)


def crank_nicolson(u_next, u_prev):
    return u_next - u_prev - DT / 2 * (time_derivative(u_prev) + time_derivative(u_next))


def published_residual(u_next, u_prev):
    """That of AR-DenseED: Crank–Nicolson with u ∂u/∂x as it stands, differences of second
    order, and a mesh width of 1/513 on a grid of 1/512."""
    width = 1 / (NUM_POINTS + 1)
    left, right = (lambda u: jnp.roll(u, 1, -1)), (lambda u: jnp.roll(u, -1, -1))

    def slope(u):
        advection = u * (right(u) - left(u)) / (2 * width)
        return VISCOSITY * (right(u) - 2 * u + left(u)) / width**2 - advection

    return u_next - u_prev - DT / 2 * (slope(u_prev) + slope(u_next))


def scaled(residuum_fn, relative=True):
    """Divided by the size of one step's change, so that all states count alike; or by its mean
    over states."""

    def residual(u_next, u_prev):
        change = DT * time_derivative(u_prev)
        size = jnp.sqrt(jnp.mean(change**2) + 1e-8) if relative else 0.02
        return residuum_fn(u_next, u_prev) / size

    return residual


#
# Initial conditions, `[num_samples, 1, num_points]`
#


def published_states(runs, num_points=NUM_POINTS):
    """Those of the test, a run for each seed: nine random waves scaled to a maximum of 2, plus
    a random constant. The maximum is over 1024 points."""

    def waves(run, num_points):
        generator = np.random.RandomState(run)
        cosines, sines = generator.randn(2, 9)
        shift = generator.rand() - 0.5
        x = 2 * np.pi * np.outer(np.arange(-4, 5), np.arange(num_points) / num_points)
        return cosines @ np.cos(x) + sines @ np.sin(x), 2 * shift

    states = []
    for run in runs:
        (u, constant), (fine, _) = (waves(run, n) for n in (num_points, 1024))
        states.append(2 * u / np.max(np.abs(fine)) + constant)
    return np.stack(states)[:, None]


def initial_conditions(num_samples, key, with_mean=False):
    """The same distribution for the training, less the mean of each state or with it."""
    waves_key, shift_key = jax.random.split(key)
    phases = 2 * np.pi * np.outer(np.arange(-4, 5), np.arange(NUM_POINTS) / NUM_POINTS)
    cosines, sines = jax.random.normal(waves_key, (2, num_samples, 9))
    u = cosines @ np.cos(phases) + sines @ np.sin(phases)
    u = 2 * u / jnp.max(jnp.abs(u), axis=-1, keepdims=True)
    shift = jax.random.uniform(shift_key, (num_samples, 1), minval=-1.0)
    u = u + shift if with_mean else u - jnp.mean(u, axis=-1, keepdims=True)
    return u[:, None]


def reference(states, substeps=25, num_steps=TEST_STEPS):
    """The solver's trajectories `[run, num_steps + 1, 1, NUM_POINTS]` from states on as many
    points or on a multiple: fourth order in time, spectral in space, in float64."""
    num_points = states.shape[-1]
    with published.float64():
        solver = ex.stepper.Burgers(
            1, 1.0, num_points, DT / substeps, diffusivity=VISCOSITY, order=4
        )
        step = jax.jit(jax.vmap(ex.repeat(solver, substeps)))
        times = [jnp.asarray(states, jnp.float64)]
        for _ in range(num_steps):
            times.append(step(times[-1]))
        return np.stack(times, axis=1)[..., :: num_points // NUM_POINTS]


#
# Burgers' equation is the same in a frame that moves with the mean of u (Galilean invariance).
#


def translate(u, distance):
    """States `[..., NUM_POINTS]` moved to the right, between the points by Fourier series."""
    wavenumbers = 2j * np.pi * np.arange(NUM_POINTS // 2 + 1)
    u_hat = jnp.fft.rfft(u) * jnp.exp(-wavenumbers * distance[..., None])
    return jnp.fft.irfft(u_hat).astype(u.dtype)


def in_moving_frame(advance, u):
    """`advance(u)` of trajectories, or of first states, `[run, time, 1, NUM_POINTS]`, in the
    frame where their mean is 0. The trajectories that it returns are moved back."""
    mean = jnp.mean(u[:, :1], axis=-1, keepdims=True)
    distance = lambda u: mean[..., 0] * DT * jnp.arange(u.shape[1])[:, None]
    u = advance(translate(u - mean, -distance(u)))
    return translate(u, distance(u)) + mean


def solved_exactly(residuum_fn, reference):
    """Trajectories from the first states of the reference, by Newton's method in float64, with
    the matrix at the reference's next state, where the iteration begins."""
    colors = np.tile(np.eye(16), NUM_POINTS // 16)[:, None]  # no stencil has 16 points

    @jax.jit
    @jax.vmap
    def jacobian(u, u_prev):
        jvp = jax.linearize(lambda u: residuum_fn(u, u_prev), u)[1]
        return jax.vmap(jvp)(colors)[:, 0]

    residual = jax.jit(jax.vmap(residuum_fn))
    reference = np.asarray(reference)
    with published.float64():
        states = [reference[:, 0]]
        for u in reference[:, 1:].swapaxes(0, 1):
            columns = np.asarray(jacobian(u, states[-1]))
            for _ in range(50):
                r = np.asarray(residual(u, states[-1]))
                if np.max(np.abs(r)) < 1e-10:
                    break
                u = u - solve_periodic_band(columns, r[:, 0])[:, None]
            else:
                raise RuntimeError("Newton's method does not converge")
            states.append(u)
    return np.stack(states, axis=1)


def solve_periodic_band(columns, residuals, width=6):
    """Solves J x = r for each run, where `columns[c, i]` is the entry of row i in that column
    c, c + 16, ... which is at most `width` points away. Points in the order 0, -1, 1, -2, ...
    make a band of the periodic one."""
    point = np.arange(NUM_POINTS)
    place = np.minimum(2 * point, 2 * (NUM_POINTS - 1 - point) + 1)
    order = np.argsort(place)
    i = point[:, None]
    j = (i + np.arange(-width, width + 1)) % NUM_POINTS
    band = np.zeros((len(residuals), 4 * width + 1, NUM_POINTS))
    band[:, 2 * width + place[i] - place[j], place[j]] = columns[:, j % 16, i]
    solve = partial(scipy.linalg.solve_banded, (2 * width, 2 * width))
    solutions = [solve(*pair) for pair in zip(band, residuals[:, order], strict=True)]
    return np.stack(solutions)[:, place]


#
# The emulator
#


class Recipe(NamedTuple):
    """What is trained, and on what. The ablation changes one item at a time."""

    residuum_fn: Callable = hermite
    relative: bool = True  # else divided by a constant, the size of a typical step's change
    moving_frame: bool = True  # else the emulator sees u together with its mean
    fresh_shares: tuple[float, float] = (0.02, 0.5)  # over the buffer; 1: no replay buffer
    num_rollout_steps: int = 1
    cuts: Cuts = Cuts()
    activation: Callable = gated
    width: int = 18


class Emulator(eqx.Module):
    """Advances a state `[1, NUM_POINTS]` by differences of a flux, which keep its mean."""

    network: ConvNet

    def __init__(self, recipe, key):
        options = dict(activation=recipe.activation, gain=3**0.5, zero_last=True, key=key)
        self.network = ConvNet(1, (1, *3 * [recipe.width], 1), 4 * [9], **options)

    def __call__(self, u):
        flux = self.network(u)
        return u - 0.05 * (flux - jnp.roll(flux, 1, -1))


def train_emulator(case):
    """Of the case (model, recipe, seed, number of updates). Returns the case, the emulator, and
    the seconds that its training took."""
    model, recipe, seed, num_updates = case
    init_key, buffer_key, updates_key = jax.random.split(jax.random.key(seed), 3)
    fresh = partial(initial_conditions, with_mean=not recipe.moving_frame)
    loss_fn = published.on_replayed_states(
        scaled(recipe.residuum_fn, recipe.relative),
        fresh,
        batch_size=BATCH_SIZE,
        fresh_share=np.geomspace(*recipe.fresh_shares, BUFFER_SIZE),
        bound=10,
        num_rollout_steps=recipe.num_rollout_steps,
        cuts=recipe.cuts,
    )
    emulator, seconds = published.minimise(
        model,
        Emulator(recipe, init_key),
        loss_fn,
        fresh(BUFFER_SIZE, buffer_key),
        updates_key,
        num_updates=num_updates,
        learning_rate=3e-3,
    )
    return case, emulator, seconds


def trajectories(stepper, states, moving_frame=True):
    """`[run, TEST_STEPS + 1, 1, NUM_POINTS]`, in float32."""
    states = jnp.asarray(states, jnp.float32)[:, None]
    advance = lambda u: rollout(stepper, u[:, 0], TEST_STEPS)
    return in_moving_frame(advance, states) if moving_frame else advance(states)


#
# The evaluation
#

COLUMNS = {
    **{f"t = {t:g}": (f"mse_{t:g}", "{:.1e}") for t in REPORT_TIMES},
    "largest": ("mse_largest", "{:.1e}"),
    "parameters": ("parameters", "{:.0f}"),
    "updates": ("updates", "{:.0f}"),
    "training": ("seconds", "{:.0f} s"),
}
# Which the rows of the ablation share, apart from the GELU.
SHARED = ("parameters", "training")
ABLATION_COLUMNS = {name: x for name, x in COLUMNS.items() if name not in SHARED}


def mean_squared_error(u, reference):
    """`[time]`, the mean over runs and space."""
    return np.mean((np.asarray(u, np.float64) - reference) ** 2, axis=(0, 2, 3))


def make_row(model, mse, seed="", emulator=None, updates="", seconds=""):
    """A row of the CSV file."""
    mse = np.nan_to_num(mse, nan=np.inf)  # where the emulator diverged
    row = {"model": model, "seed": seed}
    row |= {f"mse_{t:g}": f"{mse[round(t / DT)]:.3g}" for t in REPORT_TIMES}
    row["mse_largest"] = f"{np.max(mse):.3g}"
    return row | published.training_columns(emulator, updates, seconds)


#
# Models, rows, figure
#

OURS = "residuum"
PUBLISHED = "AR-DenseED"
EXACT = {  # residual, and whether the step is solved in the moving frame
    "exact step, published residual": (published_residual, False),
    "exact step, Crank–Nicolson": (crank_nicolson, False),
    "exact step, Hermite": (hermite, False),
    "exact step, Crank–Nicolson, moving frame": (crank_nicolson, True),
    "exact step, Hermite, moving frame": (hermite, True),
}
ABLATION = {
    "nothing": Recipe(),
    "Crank–Nicolson, differences of sixth order": Recipe(residuum_fn=crank_nicolson),
    "the published residual": Recipe(residuum_fn=published_residual),
    "divided by a constant, not by the size of the change": Recipe(relative=False),
    "4 steps": Recipe(num_rollout_steps=4),
    "4 steps, `bptt=1`": Recipe(num_rollout_steps=4, cuts=Cuts(bptt=1)),
    "the same share of fresh states throughout, 10 %": Recipe(fresh_shares=(0.1, 0.1)),
    "older states, 2 %": Recipe(fresh_shares=(0.02, 0.02)),
    "younger states, 50 %": Recipe(fresh_shares=(0.5, 0.5)),
    "no replay buffer": Recipe(fresh_shares=(1, 1)),
    "no replay buffer, 4 steps": Recipe(fresh_shares=(1, 1), num_rollout_steps=4),
    "no replay buffer, 16 steps, `bptt=1`": Recipe(
        fresh_shares=(1, 1), num_rollout_steps=16, cuts=Cuts(bptt=1)
    ),
    "the frame at rest, u with its mean": Recipe(moving_frame=False),
    "products that are not bounded": Recipe(activation=bilinear),
    "GELU, of 26 channels": Recipe(activation=jax.nn.gelu, width=26),
}
FOLDER = pathlib.Path("benchmarks")
CSV, ABLATION_CSV, ERROR_CSV = (
    FOLDER / f"published_burgers{which}.csv" for which in ("", "_ablation", "_error")
)
AR_DENSED_CSV = study.ROOT / "benchmarks" / "ar_densed_burgers.csv"  # of its published weights


def train_and_evaluate(cases, reference, workers):
    """Yields (row of the CSV file, MSE over time, trajectories) of each case."""
    start = reference[:, 0]
    for (model, recipe, seed, updates), emulator, seconds in study.on_single_cores(
        train_emulator, cases, workers
    ):
        u = trajectories(emulator, start, recipe.moving_frame)
        mse = mean_squared_error(u, reference)
        yield make_row(model, mse, seed, emulator, updates, seconds), mse, u


def draw(pictures, errors):
    """One run in space and time; errors over time `{column: [time]}`."""
    figure = plt.figure(figsize=(11, 6.2), layout="constrained")
    axes = figure.subplot_mosaic([[*pictures], 3 * ["error"]])
    for title, u in pictures.items():
        image = show(axes[title], title, u[:, 0], (DT * TEST_STEPS, 1), vmin=-2.5, vmax=2.5)
        axes[title].set(xlabel="time t", ylabel="position x")
    figure.colorbar(image, ax=axes[title], label="u")
    axis = axes["error"]
    exact = [model for model, (_, moving_frame) in EXACT.items() if not moving_frame]
    models = ("persistence", PUBLISHED, *exact, OURS)
    styles = zip(models, (*COLORS, "#E69F00"), (*LINES, (0, (5, 1))), strict=True)
    for model, color, line in styles:
        axis.semilogy(errors["time"], errors[model], color=color, linestyle=line, label=model)
    least, most = (errors[f"{OURS}, {which}"] for which in ("least", "most"))
    axis.fill_between(errors["time"], least, most, color=color, alpha=0.3)
    axis.set(title="error on the published test", xlabel="time t", xlim=(0, 2))
    axis.set(ylabel="mean squared error", ylim=(1e-13, 10))
    axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def main():
    figure = "assets/published_burgers.png"
    parser = study.make_parser(__doc__, figure, CSV, quick="20 updates, 2 runs")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    parser.add_argument("--updates", type=int, help="of each emulator: 20000, or 3000")
    parser.add_argument("--ablation", action="store_true", help="on runs of other seeds")
    parser.add_argument("--workers", type=int, help="trainings at a time; one for each core")
    args = parser.parse_args()
    num_updates = 20 if args.quick else args.updates or (3000 if args.ablation else 20_000)

    runs = range(1000, 1048) if args.ablation else range(NUM_TEST)
    solver = reference(published_states(runs[:2] if args.quick else runs, 1024))
    models = ABLATION if args.ablation else {OURS: Recipe()}
    cases = [  # in the ablation, longer rollouts have fewer updates, and so take as long
        (model, recipe, seed, max(20, num_updates // recipe.num_rollout_steps))
        for model, recipe in models.items()
        for seed in args.seed
    ]
    results = list(train_and_evaluate(cases[:2] if args.quick else cases, solver, args.workers))
    order = {(model, seed): i for i, (model, _, seed, _) in enumerate(cases)}
    results.sort(key=lambda result: order[result[0]["model"], result[0]["seed"]])
    rows = [row for row, _, _ in results]
    path = args.csv or (ABLATION_CSV if args.ablation else CSV)
    if args.ablation:
        print(published.markdown(rows, ABLATION_COLUMNS))
        if args.csv or not args.quick:
            study.write_csv(path, rows)
            study.write_table(path, published.markdown(rows, ABLATION_COLUMNS))
        return

    u = np.broadcast_to(solver[:, :1], solver.shape)
    errors = {"time": DT * np.arange(TEST_STEPS + 1)}
    errors["persistence"] = mean_squared_error(u, solver)
    for model, (residuum_fn, moving_frame) in EXACT.items():
        advance = partial(solved_exactly, residuum_fn)
        with published.float64():
            u = in_moving_frame(advance, solver) if moving_frame else advance(solver)
        errors[model] = mean_squared_error(u, solver)
    others = [make_row(model, errors[model]) for model in ("persistence", *EXACT)]
    published_error = study.read_csv(AR_DENSED_CSV)
    errors[PUBLISHED] = np.array([float(row["mse"]) for row in published_error])
    others.insert(1, make_row(PUBLISHED, errors[PUBLISHED]) | dict(parameters=13_441))
    curves = np.array([mse for _, mse, _ in results])
    for which, f in {"": np.median, ", least": np.min, ", most": np.max}.items():
        errors[OURS + which] = f(curves, axis=0)
    rows = others[:2] + rows + others[2:]
    print(published.markdown(rows, COLUMNS))
    if args.csv or not args.quick:
        study.write_csv(path, rows)
        study.write_table(path, published.markdown(rows, COLUMNS))
        columns = [[f"{x:.4g}" for x in column] for column in errors.values()]
        table = [dict(zip(errors, x, strict=True)) for x in zip(*columns, strict=True)]
        study.write_csv(path.with_stem(f"{path.stem}_error"), table)
    shown = np.argmax(np.std(solver[:, TEST_STEPS // 4, 0], axis=-1))  # with strong shocks
    u, ours = solver[shown], np.asarray(results[0][2][shown])
    pictures = {"solver": u, "emulator": ours, "difference × 100": 100 * (ours - u)}
    save_figure(args.output, draw(pictures, errors))


if __name__ == "__main__":
    main()
