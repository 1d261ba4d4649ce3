"""Evaluates the emulator of examples/shallow_water.py in unseen basins, and compares it with
exact steps of the residuals and with a refined solution.

Training uses random winds. The test has two more kinds of wind: a gale that turns, and a wind
that stops. Further columns show whether the emulator conserves mass, stays finite under a
constant wind, and reproduces the slope of the surface in a closed channel and a
western-intensified gyre. The numbers are in docs/examples.md.

    python -m studies.shallow_water.run --seed 0 1 2     median, least and most
    python -m studies.shallow_water.run --ablation       one change at a time
    python -m studies.shallow_water.run --quick          to see that it runs
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import basin
import common
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.animation
import matplotlib.pyplot as plt
import numpy as np
from canonical_convolutions import canonical_convolutions
from shallow_water import Emulator, scaled_residual, train_emulator

from benchmarks import machine, tables
from residuum import Cuts
from studies import train_and_tabulate


#
# The emulators that are trained
#


class Recipe(NamedTuple):
    """Says what is trained, and how. The ablation changes one item at a time."""

    make_emulator: Callable = Emulator
    residuum_fn: Callable = scaled_residual
    num_rollout_steps: int = 1
    cuts: Cuts = Cuts()
    fresh_share: float = 0.01  # of the states of an update; with 1, there is no replay buffer


class FreeElevation(Emulator):
    """Uses the network's third output as the change of η, which then ignores continuity."""

    def correction(self, output, residual, state):
        walls = jnp.concatenate([basin.open_faces(state.mask), state.mask[None]])
        return walls * basin.CHANGE_SIZE * output[:3]


class RawFields(Emulator):
    """Shows fields and wind to the network instead of the residual, and corrects once."""

    def __init__(self, key):
        super().__init__(key)
        width = self.layers[0].out_channels
        self.layers[0] = eqx.nn.Conv2d(5, width, 3, padding="SAME", use_bias=False, key=key)

    def __call__(self, state, wind):
        seen = jnp.concatenate([state.fields / basin.FIELD_SIZE, wind / basin.WIND_SIZE])
        output = self.network(seen, self.gates(state))
        residual = scaled_residual(state, state, wind)
        return state._replace(fields=state.fields + self.correction(output, residual, state))


def scaled_crank_nicolson(u_next, u_prev, wind):
    return basin.crank_nicolson(u_next, u_prev, wind) / basin.CHANGE_SIZE


OURS, REFINED, EXACT = "residuum", "Runge–Kutta, dt / 32", "exact step, Hermite"
OTHERS = {  # with the references first
    REFINED: partial(basin.runge_kutta, num_substeps=32),
    EXACT: basin.exact_step(basin.hermite),
    "Runge–Kutta, dt / 16": basin.runge_kutta,
    "exact step, Crank–Nicolson": basin.exact_step(basin.crank_nicolson),
    "persistence": lambda state, wind: state,
}
ABLATION = {
    "nothing": Recipe(),
    "one correction": Recipe(partial(Emulator, num_corrections=1)),
    "one correction, from fields and wind rather than the residual": Recipe(RawFields),
    "η from the network, not from continuity": Recipe(FreeElevation),
    "Crank–Nicolson, not Hermite": Recipe(residuum_fn=scaled_crank_nicolson),
    "residual not scaled": Recipe(residuum_fn=basin.hermite),
    "4 steps": Recipe(num_rollout_steps=4),
    "4 steps, `bptt=1`": Recipe(num_rollout_steps=4, cuts=Cuts(bptt=1)),
    "5 % fresh states, not 1 %": Recipe(fresh_share=0.05),
    "no replay buffer": Recipe(fresh_share=1.0),
}

#
# Tests
#


class Tests(NamedTuple):
    """Sets the sizes of the tests, and a seed for basins and winds."""

    seed: int = 2211
    num_samples: int = 16
    num_steps: int = 200
    num_long: int = 32
    long_steps: int = 1000
    winds: tuple[str, ...] = ("random", "turning", "stopping")


def amplitudes(kind, first, num_steps, key):
    """Returns the amplitudes `[sample, time, 6]` of a kind of wind. Winds that are not random
    are uniform and three times as strong as a typical wind. They begin in another direction in
    each sample."""
    if kind == "random":
        return basin.amplitude_series(first, num_steps, key)
    time, turns = np.arange(num_steps), np.arange(len(first))[:, None] / len(first)
    turns = turns + time / 40 if kind == "turning" else turns + 0 * time
    strength = 3 * basin.WIND_SIZE * np.where((kind == "turning") | (time < 50), 1, 0)
    x, y = strength * np.cos(2 * np.pi * turns), strength * np.sin(2 * np.pi * turns)
    return jnp.stack([x, 0 * x, 0 * x, y, 0 * y, 0 * y], axis=-1)


def states_and_winds(tests):
    """Returns states, and winds `{kind: [sample, time, 2, x, y]}`."""
    states_key, wind_key = jax.random.split(jax.random.key(tests.seed))
    states, first = basin.random_samples(states_key, tests.num_samples)
    series = {kind: amplitudes(kind, first, tests.num_steps, wind_key) for kind in tests.winds}
    return states, {kind: basin.wind_stress(a) for kind, a in series.items()}


def after(num_steps, stepper, states, amplitudes):
    """Returns the states after `num_steps` steps under constant winds with amplitudes `[sample,
    6]`."""

    def last_state(state, wind):
        return jax.lax.fori_loop(0, num_steps, lambda _, state: stepper(state, wind), state)

    last_states = jax.jit(canonical_convolutions(jax.vmap(last_state)))
    return last_states(states, basin.wind_stress(amplitudes))


def rectangle(depth, width=basin.NUM_POINTS):
    """Returns a batch of one basin at rest, of uniform depth, whose extent in y is `width`."""
    shape = (1, basin.NUM_POINTS, basin.NUM_POINTS)
    mask = jnp.broadcast_to(jnp.where(jnp.arange(basin.NUM_POINTS) < width, 1.0, 0.0), shape)
    return basin.State(jnp.zeros((1, 3, *shape[1:])), jnp.full(shape, depth), mask)


def set_up(advance, depth=0.5, stress=0.00125):
    """Returns the slope of the surface divided by τ / (g h), under a wind along a channel with
    closed ends that was at rest."""
    state = advance(rectangle(depth, width=8), jnp.array([[stress, 0, 0, 0, 0, 0]]))
    eta = state.fields[0, 2, :, :8]
    slope = jnp.mean(eta[-1] - eta[0]) / (basin.NUM_POINTS - 1)
    return float(slope * basin.GRAVITY * depth / stress)


def gyre(advance, depth=0.6, stress=0.002):
    """Returns the stream function `[x, y]` of the transport in a square basin that was at rest.
    The wind blows to the west in the south and to the east in the north."""
    state = advance(rectangle(depth), jnp.array([[0, 0, -stress, 0, 0, 0]]))
    return -depth * np.cumsum(state.fields[0, 0], axis=1)


def mass_error(fields, states):
    """Returns the largest change of a basin's mean elevation, divided by the RMS elevation."""
    mean = jnp.sum(fields[:, :, 2], axis=(2, 3)) / jnp.sum(states.mask, axis=(1, 2))[:, None]
    return float(jnp.max(jnp.abs(mean - mean[:, :1])) / basin.FIELD_SIZE[2, 0, 0])


def num_finite(stepper, tests):
    """Counts how many of `tests.num_long` basins are finite after a long time of constant
    wind."""
    states, amplitudes = basin.random_samples(jax.random.key(tests.seed + 1), tests.num_long)
    fields = after(tests.long_steps, stepper, states, amplitudes).fields
    return int(jnp.sum(jnp.all(jnp.isfinite(fields), axis=(1, 2, 3))))


class Run(NamedTuple):
    """Holds the results of a stepper in the tests."""

    fields: dict  # {kind of wind: [sample, time, 3, x, y]}
    mass: float
    set_up: float
    gyre: np.ndarray
    finite: int | str = ""
    emulator: Emulator | None = None
    seconds: float = 0.0


def train_and_run(case):
    """Trains and tests a case (model, recipe, seed, number of updates, tests). A model without
    a recipe is one of `OTHERS`. Returns (model, seed) and a `Run`."""
    model, recipe, seed, num_updates, tests = case
    if recipe is None:
        stepper, trained = OTHERS[model], {}
    else:
        stepper, seconds = train_emulator(seed, num_updates, **recipe._asdict())
        trained = dict(finite=num_finite(stepper, tests), emulator=stepper, seconds=seconds)
    states, winds = states_and_winds(tests)
    fields = {
        kind: np.asarray(basin.rollout(stepper, states, wind)) for kind, wind in winds.items()
    }
    advance = partial(after, tests.long_steps, stepper)
    mass = mass_error(fields["random"], states)
    run = Run(fields, mass, set_up(advance), gyre(advance), **trained)
    return (model, seed), run


#
# Rows of the CSV files, and tables from them
#

REPORT_STEPS = (1, 10, 50, 200)
REFERENCES = {  # column: kind of wind, model to compare with
    "refined": ("random", REFINED),
    "exact": ("random", EXACT),
    "turning": ("turning", REFINED),
    "stopping": ("stopping", REFINED),
}


def error_columns(name, what, steps=REPORT_STEPS):
    return {f"{what}step {n}": (f"{name}_{n}", "{:.4f}") for n in steps}


TABLES = {  # by the names of their files
    "table": {
        **error_columns("refined", ""),
        **error_columns("exact", "from exact, ", (50, 200)),
        "parameters": ("parameters", "{:.0f}"),
        "updates": ("updates", "{:.0f}"),
        "training": ("seconds", "{:.0f} s"),
    },
    "table_winds": {
        **error_columns("turning", "gale, ", (10, 50, 200)),
        **error_columns("stopping", "stops, ", (10, 50, 200)),
    },
    "table_checks": {
        "mass": ("mass", "{:.0e}"),
        "finite": ("finite", "{:.0f}"),
        "set-up": ("set_up", "{:.4f}"),
        "gyre": ("gyre", "{:.1e}"),
        "centre": ("gyre_centre", "{:.2f}"),
    },
}
ABLATION_COLUMNS = {
    **error_columns("refined", ""),
    **error_columns("exact", "from exact, ", (50,)),
    "finite": ("finite", "{:.0f}"),
    "updates": ("updates", "{:.0f}"),
}


def make_row(model, seed, num_updates, run, runs):
    """Makes a row from a run and from the runs of the references, `{model: run}`."""
    row = {"model": model, "seed": seed}
    for name, (kind, reference) in REFERENCES.items():
        if kind in run.fields:
            errors = basin.relative_error(run.fields[kind], runs[reference].fields[kind])
            errors = np.nan_to_num(errors, nan=np.inf)  # if the emulator diverged
            last = len(errors) - 1  # less than 200 with --quick
            row |= {f"{name}_{n}": f"{errors[min(n, last)]:.3g}" for n in REPORT_STEPS}
    checks = dict.fromkeys(("mass", "set_up", "gyre", "gyre_centre"), "")
    if model != "persistence":
        exact = runs[EXACT].gyre
        difference = np.linalg.norm(run.gyre - exact) / np.linalg.norm(exact)
        centre = (np.argmax(np.max(np.abs(run.gyre), axis=1)) + 0.5) / basin.NUM_POINTS
        checks = {"mass": f"{run.mass:.1e}", "set_up": f"{run.set_up:.5f}"}
        checks |= {"gyre": f"{difference:.2g}", "gyre_centre": f"{centre:.3f}"}
    training = train_and_tabulate.training_columns(run.emulator, num_updates, run.seconds)
    return row | checks | {"finite": run.finite} | training


#
# Figure and animation of the first sample
#


def draw(runs, states, step):
    """Draws states and stream functions, and errors relative to the refined solution."""
    figure = plt.figure(figsize=(13, 6.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    axes = top.subplots(1, 5)
    solver, emulator = (runs[model].fields["turning"][0, step] for model in (REFINED, OURS))
    pictures = {"solver": solver, "emulator": emulator}
    pictures["difference × 10"] = 10 * (emulator - solver)
    for axis, (name, fields) in zip(axes, pictures.items(), strict=False):
        image = basin.show_basin(axis, f"{name}, step {step}", states.mask[0], fields)
    top.colorbar(image, ax=axes[:3], label="η", shrink=0.8)
    for axis, model in zip(axes[3:], (EXACT, OURS), strict=True):
        name = "exact Hermite step" if model == EXACT else "emulator"
        image = common.show(axis, f"gyre, {name}", runs[model].gyre, 2 * [basin.NUM_POINTS])
    top.colorbar(image, ax=axes[3:], label="stream function", shrink=0.8)
    for axis in axes:
        axis.set(xticks=[], yticks=[], aspect="equal")
    titles = {"random": "random winds", "turning": "a gale that turns"}
    titles["stopping"] = "a wind that stops after 50 steps"
    models = ("persistence", "exact step, Crank–Nicolson", EXACT, OURS)
    for axis, (kind, title) in zip(
        bottom.subplots(1, 3, sharey=True), titles.items(), strict=True
    ):
        solution = runs[REFINED].fields[kind]
        errors = {m: basin.relative_error(runs[m].fields[kind], solution) for m in models}
        common.plot_errors(axis, basin.DT, errors, title)
        axis.lines[-1].set(linewidth=4, alpha=0.4, zorder=1)  # below the line of the exact step
    bottom.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def animate(path, runs, states, num_steps=120):
    """Writes a GIF of the solver and the emulator under a gale that turns."""
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 3.5), layout="constrained")
    trajectories = {"solver": runs[REFINED], "emulator": runs[OURS]}

    def frame(n):
        for axis, (name, run) in zip(axes, trajectories.items(), strict=True):
            axis.clear()
            fields = run.fields["turning"][0, n]
            basin.show_basin(axis, f"{name}, step {n}", states.mask[0], fields)
            axis.set(xticks=[], yticks=[], aspect="equal")

    steps = range(0, min(num_steps, len(runs[OURS].fields["turning"][0])), 3)
    animation = matplotlib.animation.FuncAnimation(figure, frame, steps)
    animation.save(path, writer="pillow", fps=8, dpi=60)
    print(f"Animation: {path}")


def main():
    parser = tables.make_parser(__doc__, quick="20 updates, 2 basins, 20 steps")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    parser.add_argument("--updates", type=int, help="of each emulator: 3200, or 1500")
    parser.add_argument("--ablation", action="store_true", help="in other basins")
    args = parser.parse_args()
    folder, figures = tables.output_folders(args, __file__)
    num_updates = 20 if args.quick else args.updates or (1500 if args.ablation else 3200)

    tests = Tests(1234, winds=("random",)) if args.ablation else Tests()
    if args.quick:
        tests = tests._replace(num_samples=2, num_steps=20, num_long=2, long_steps=20)
    recipes = ABLATION if args.ablation else {OURS: Recipe()}
    trained = [  # fewer updates for longer rollouts keep the time the same
        (model, recipe, seed, max(20, num_updates // recipe.num_rollout_steps), tests)
        for model, recipe in recipes.items()
        for seed in args.seed
    ]
    others = list(OTHERS)[:2] if args.ablation else OTHERS
    cases = [(model, None, "", "", tests) for model in others]
    cases += trained[:2] if args.quick else trained
    results = dict(machine.on_single_cores(train_and_run, cases))
    rows, runs = [], {}
    for model, _, seed, updates, _ in cases:
        runs.setdefault(model, results[model, seed])  # keeps the run of the first seed
        if model != REFINED:
            rows.append(make_row(model, seed, updates, results[model, seed], runs))
    if args.ablation:
        train_and_tabulate.write(folder, rows, ABLATION_COLUMNS, "ablation")
        return
    tables.write_csv(folder / "rows.csv", rows)
    for name, columns in TABLES.items():
        table = train_and_tabulate.markdown(rows, columns)
        print(f"\n{table}")
        tables.write_table(folder / f"{name}.md", table)
    states, _ = states_and_winds(tests)
    figure = draw(runs, states, min(50, tests.num_steps))
    common.save_figure(figures / "shallow_water_study.png", figure)
    animate(figures / "shallow_water_study.gif", runs, states)


if __name__ == "__main__":
    main()
