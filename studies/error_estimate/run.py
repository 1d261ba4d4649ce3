"""How well does `estimate_error` (examples/error_estimate.py) know the error of an emulator?

The problems are Burgers in one and in two dimensions, Kuramoto–Sivashinsky and the
shallow-water basins, each with its emulator. The study measures the ratio of estimated and true
error, against the exact step of the same residual, for unseen states like those of training and
for states unlike them; how much closer to the exact trajectory the corrected one is; and what
the estimate costs, compared with the exact step.

The study also makes 100 bad emulators of Burgers' equation: some were trained too briefly, some
see walls where the domain is periodic, and some have another viscosity. An estimate must not
call a bad emulator good.

    python -m studies.error_estimate.run             everything, an hour on busy cores
    python -m studies.error_estimate.run --quick     Burgers and four bad emulators
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import basin
import burgers
import burgers_2d
import equinox as eqx
import error_estimate
import jax
import jax.numpy as jnp
import numpy as np
import shallow_water
from common import to_float64
from jax.tree_util import Partial

from benchmarks import machine, tables
from residuum import residuum_loss
from studies import train_and_tabulate
from studies.ar_densed_kuramoto_sivashinsky import problem as ks, run as ks_study


REPORT_STEPS = (1, 10, 50, 200)
BELOW = (0.05, 0.2)  # true errors for which the ratio is reported


class Problem(NamedTuple):
    stepper: Callable
    residuum_fn: Callable
    exact_step: Callable
    tests: dict[str, tuple[Any, Any]]  # states `[sample, ...]`, inputs `[sample, time, ...]`
    num_steps: int
    fields: Callable = lambda state: state  # whose nRMSE is the error


#
# The problems
#


def burgers_problem(quick):
    keys = jax.random.split(jax.random.key(0), 3)
    stepper = train_burgers(20 if quick else 1500, keys[0], keys[1])
    tests = error_estimate.unseen_states(keys[2], 4 if quick else 32)
    tests = {name: (states, None) for name, states in tests.items()}
    exact = error_estimate.exact_step
    return Problem(stepper, burgers.crank_nicolson, exact, tests, 10 if quick else 200)


def train_burgers(num_updates, data_key, key):
    loss_fn = partial(
        residuum_loss, residuum_fn=burgers.crank_nicolson, num_rollout_steps=5, unroll=True
    )
    data = burgers.initial_conditions(burgers.NUM_TRAIN, data_key)[:, None]
    return burgers.train_emulator("Burgers", loss_fn, data, num_updates=num_updates, key=key)[0]


def burgers_2d_problem(_):
    weights, _ = burgers_2d.train_emulator(0, 20_000)
    states = burgers_2d.initial_conditions(32, jax.random.key(3))
    tests = {"like training": (states, None), "1.5 times as large": (1.5 * states, None)}
    shorter = jnp.tile(states[..., ::2, ::2], (1, 1, 2, 2))
    # Without the waves that the residual does not see.
    shorter = burgers_2d.to_fields(burgers_2d.to_waves(shorter))
    tests["half the wavelength"] = (shorter, None)
    stepper, residuum_fn = Partial(burgers_2d.emulator, weights), burgers_2d.crank_nicolson

    def exact_step(u_prev):  # more accurate than that of the example
        return jax.lax.fori_loop(0, 24, lambda _, u: u - residuum_fn(u, u_prev), u_prev)

    return Problem(stepper, residuum_fn, exact_step, tests, 200)


def kuramoto_sivashinsky_problem(_):
    recipe = ks_study.Recipe(num_rollout_steps=1)
    _, stepper, _ = ks_study.train_emulator(("Kuramoto–Sivashinsky", recipe, 0, 21_000))
    attractor = ks.published_test(num_samples=32, seed=2)[:, 0]
    rough = ks.initial_conditions(32, jax.random.key(3), long=1.0)
    tests = {"like training": (attractor, None), "1.5 times as large": (1.5 * attractor, None)}
    tests["rougher"] = (rough, None)
    residuum_fn = ks.preconditioned_crank_nicolson
    return Problem(stepper, residuum_fn, ks.crank_nicolson_step, tests, 200)


def basin_problem(_):
    stepper, _ = shallow_water.train_emulator(0, 3200)
    tests = {}
    for name, scale in {"like training": 1, "winds three times as strong": 3}.items():
        keys = jax.random.split(jax.random.key(7), 2)
        states, amplitudes = basin.random_samples(keys[0], 32)
        amplitudes = scale * basin.amplitude_series(amplitudes, 50, keys[1])
        tests[name] = (states, basin.wind_stress(amplitudes))
    exact_step = basin_exact_step
    fields = lambda state: state.fields / basin.FIELD_SIZE
    return Problem(stepper, shallow_water.scaled_residual, exact_step, tests, 50, fields)


def basin_exact_step(state, wind):
    """Solves as `basin.exact_step` does, but more accurately."""
    residual = lambda fields: basin.hermite(state._replace(fields=fields), state, wind)
    value, jacobian = jax.linearize(residual, state.fields)
    options = dict(tol=1e-8, restart=8, maxiter=60)
    change, _ = jax.scipy.sparse.linalg.gmres(jacobian, -value, **options)
    return state._replace(fields=state.fields + change)


PROBLEMS = {
    "Burgers": burgers_problem,
    "Burgers in 2D": burgers_2d_problem,
    "Kuramoto–Sivashinsky": kuramoto_sivashinsky_problem,
    "basin": basin_problem,
}
BAD = "bad emulators"
SOLVE = partial(error_estimate.gmres, tol=1e-8, restart=8, maxiter=60)


#
# Errors
#


def trajectories(problem, states, inputs):
    """The emulator's and the exact trajectory of all samples, and the estimated error, as
    fields `[sample, time, ...]`."""
    num_steps = problem.num_steps
    estimate = partial(
        error_estimate.estimate_error,
        problem.stepper,
        problem.residuum_fn,
        num_rollout_steps=num_steps,
        solve=SOLVE,
    )

    def exact(state, inputs):
        def step(state, inputs_t):
            args = [state] if inputs is None else [state, inputs_t]
            state = problem.exact_step(*args)
            return state, state

        return jax.lax.scan(step, state, inputs, length=num_steps)[1]

    emulated, errors = jax.jit(jax.vmap(estimate))(states, inputs)
    solution = jax.jit(jax.vmap(exact))(states, inputs)
    of_all = jax.vmap(jax.vmap(problem.fields))
    return of_all(emulated), of_all(solution), of_all(errors)


def norms(emulated, solution, errors):
    """nRMSE `[sample, time]`: the true one, the estimated one, that of the corrected states."""
    norm = lambda u: np.sqrt(np.sum(np.asarray(u) ** 2, axis=tuple(range(2, u.ndim))))
    scale = norm(solution)
    corrected = emulated - errors - solution
    return [norm(u) / scale for u in (emulated - solution, errors, corrected)]


def make_rows(name, problem):
    for test, (states, inputs) in problem.tests.items():
        true, estimated, corrected = norms(
            *trajectories(problem, to_float64(states), to_float64(inputs))
        )
        for n in (n for n in REPORT_STEPS if n <= problem.num_steps):
            row = {"problem": name, "states": test, "step": n}
            row["true"] = f"{np.median(true[:, n - 1]):.3g}"
            row["corrected"] = f"{np.median(corrected[:, n - 1]):.3g}"
            yield row | ratios(*(x[:, n - 1] for x in (true, estimated, corrected)))
        row = {"problem": name, "states": test, "step": "all"}
        yield row | ratios(true, estimated, corrected)


def ratios(true, estimated, corrected):
    """Least and largest ratio of estimate and truth, where the truth is small enough; and the
    least gain of the corrected states where the true error is below 0.02."""
    row = {}
    for bound in BELOW:
        ratio = (estimated / true)[true < bound]
        row[f"least, below {bound}"] = f"{np.min(ratio):.4g}" if ratio.size else ""
        row[f"largest, below {bound}"] = f"{np.max(ratio):.4g}" if ratio.size else ""
    gain = (true / corrected)[true < 0.02]
    return row | {"least gain, below 0.02": f"{np.min(gain):.3g}" if gain.size else ""}


def cost_row(name, problem):
    """Seconds for a step of one sample: of the emulator, of the estimate, of the exact step."""
    states, inputs = to_float64(next(iter(problem.tests.values())))
    # Arguments and not constants, for XLA computes with constants when it compiles.
    args = jax.tree.map(lambda x: x[0], [states] if inputs is None else [states, inputs])

    def one_step(step):
        first = lambda state, inputs=None: step(state, *[] if inputs is None else [inputs[0]])
        return jax.jit(first).lower(*args).compile()

    def estimate(state, inputs=None):
        inputs = None if inputs is None else inputs[:1]
        functions = problem.stepper, problem.residuum_fn
        return error_estimate.estimate_error(*functions, state, inputs, num_rollout_steps=1)

    compiled = {
        "emulator": one_step(problem.stepper),
        "exact step": one_step(problem.exact_step),
        "estimate and emulator": jax.jit(estimate).lower(*args).compile(),
    }
    calls = {k: lambda f=f: jax.block_until_ready(f(*args)) for k, f in compiled.items()}
    medians = machine.medians_in_turns(calls, lambda times: len(times) >= 50)
    row = {f"{k}, ms": f"{1e3 * seconds:.3g}" for k, seconds in medians.items()}
    return {"problem": name, **row, "machine": machine.describe("2 cores")}


#
# Bad emulators of Burgers' equation
#


class Walled(eqx.Module):
    """An emulator that sees zeros beyond both ends of the domain, which is periodic."""

    stepper: burgers.Emulator

    def __call__(self, u):
        beyond = ((0, 0), (12, 12))  # more than the network sees
        return self.stepper(jnp.pad(u, beyond))[:, 12:-12]


def with_viscosity(factor):
    """The exact step of the equation with another viscosity."""

    def step(u_prev):
        def residual(u):
            u_hat = lambda v: jnp.fft.rfft(v)
            laplacian = lambda v: jnp.fft.irfft(-(burgers.WAVENUMBERS**2) * u_hat(v))
            more = (factor - 1) * burgers.VISCOSITY * (laplacian(u) + laplacian(u_prev)) / 2
            return burgers.crank_nicolson(u, u_prev) - burgers.DT * more

        u = u_prev
        for _ in range(8):
            flat = lambda x: residual(x[None])[0]
            u -= jnp.linalg.solve(jax.jacfwd(flat)(u[0]), flat(u[0]))[None]
        return u

    return step


def bad_emulators(quick):
    """Yields the name and the stepper of each, in float32."""
    for seed, num_updates in enumerate(np.geomspace(5, 200, 2 if quick else 40).astype(int)):
        keys = jax.random.split(jax.random.key(300 + seed))
        yield f"{num_updates} updates", train_burgers(num_updates, *keys)
    for seed, num_updates in enumerate(np.geomspace(50, 500, 1 if quick else 30).astype(int)):
        keys = jax.random.split(jax.random.key(400 + seed))
        stepper = Walled(train_burgers(num_updates, *keys))
        yield f"walls, {num_updates} updates", stepper
    factors = np.concatenate([np.geomspace(0.1, 0.9, 15), np.geomspace(1.1, 10, 15)])
    for factor in factors[-1:] if quick else factors:
        yield f"viscosity × {factor:.2g}", with_viscosity(factor)


def first_above(error, bound=0.3):
    """The first step at which an error exceeds the bound, for each sample; one after the last
    step if there is none. NaN counts as infinite."""
    above = ~(error <= bound)
    return np.where(above.any(axis=1), above.argmax(axis=1), error.shape[1])


def second_estimate(problem, states, corrected):
    """Estimates the error that is left in the corrected states `[sample, time, ...]`."""
    given = lambda u, state: state
    residual = lambda u_next, u_prev, state: problem.residuum_fn(u_next, u_prev)
    options = dict(num_rollout_steps=problem.num_steps, solve=SOLVE)
    estimate = partial(error_estimate.estimate_error, given, residual, **options)
    return jax.jit(jax.vmap(estimate))(states, corrected)[1]


def bad_row(name, stepper, num_steps):
    """Counts trajectories whose true error exceeds 0.3, and how many of them are recognised at
    the same step or before: by an estimate above 0.3, or by a warning. A warning is an estimate
    above 0.2, or a second estimate above a fifth of the first. It is false if the true error
    stays below 0.1. If an estimate never exceeds 0.3, its delay lasts until the last step.
    Estimates are relative to the corrected states, as a user without a solver computes them."""
    with train_and_tabulate.float64():
        states = to_float64(burgers.initial_conditions(8, jax.random.key(6)))
        exact = error_estimate.exact_step
        problem = Problem(to_float64(stepper), burgers.crank_nicolson, exact, {}, num_steps)
        emulated, solution, errors = trajectories(problem, states, None)
        corrected = emulated - errors
        second = second_estimate(problem, states, corrected)
        true, _, _ = norms(emulated, solution, errors)
        _, estimated, _ = norms(emulated, corrected, errors)
        _, remaining, _ = norms(emulated, corrected, second)
    true_step, estimated_step = first_above(true), first_above(estimated)
    warning_step = np.minimum(
        first_above(estimated, 0.2), first_above(remaining / estimated, 0.2)
    )
    is_bad, is_good = true_step < num_steps, np.max(true, axis=1) < 0.1
    is_between, is_warned = ~(is_bad | is_good), warning_step < num_steps
    return {
        "emulator": name,
        "samples": len(true),
        "above 0.3": int(np.sum(is_bad)),
        "estimated in time": int(np.sum(is_bad & (estimated_step <= true_step))),
        "largest delay, steps": int(np.max((estimated_step - true_step)[is_bad], initial=0)),
        "warned in time": int(np.sum(is_bad & (warning_step <= true_step))),
        "below 0.1": int(np.sum(is_good)),
        "false warnings": int(np.sum(is_good & is_warned)),
        "between": int(np.sum(is_between)),
        "warned between": int(np.sum(is_between & is_warned)),
    }


COLUMNS = ("true", "least, below 0.05", "largest, below 0.05", "least, below 0.2",
           "largest, below 0.2", "corrected", "least gain, below 0.02")  # fmt: skip


def markdown(rows):
    lines = [
        [f"{row['problem']}, {row['states']}", row["step"], *(row.get(c, "") for c in COLUMNS)]
        for row in rows
    ]
    return tables.markdown(["problem, states", "step", *COLUMNS], lines, num_names=2)


def update_rows(path, name, new_rows, columns):
    """Puts the rows of a problem in the place of its old ones, in the order of `PROBLEMS`."""
    old = tables.read_csv(path) if path.exists() else []
    rows = [row for row in old if row["problem"] != name] + new_rows
    rows.sort(key=lambda row: list(PROBLEMS).index(row["problem"]))
    tables.write_csv(path, rows, columns)
    return rows


def main():
    parser = tables.make_parser(__doc__, quick="Burgers, and four bad emulators")
    names = [*PROBLEMS, BAD]
    parser.add_argument("--problems", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    folder, _ = tables.output_folders(args, __file__)
    for name in ["Burgers", BAD] if args.quick else args.problems:
        if name == BAD:
            bad = []
            for emulator, stepper in bad_emulators(args.quick):
                bad.append(bad_row(emulator, stepper, num_steps=10 if args.quick else 100))
                tables.write_csv(folder / "bad.csv", bad)
            continue
        problem = PROBLEMS[name](args.quick)
        with train_and_tabulate.float64():
            problem = problem._replace(stepper=to_float64(problem.stepper))
            update_rows(folder / "cost.csv", name, [cost_row(name, problem)], None)
            columns = ["problem", "states", "step", *COLUMNS]
            rows = update_rows(
                folder / "rows.csv", name, list(make_rows(name, problem)), columns
            )
        tables.write_table(folder / "table.md", markdown(rows))
        print(markdown(rows))


if __name__ == "__main__":
    main()
