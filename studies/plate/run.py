"""Which method is best for a plate of 50,000 nodes: an emulator, or a good classical solver?

The emulator is that of examples/plate.py, trained on a small, an intermediate or the large
mesh. It competes with the solvers of solvers.py on the large mesh, and on coarser meshes, from
which states are interpolated. All of them approximate the same implicit step. An error is the
nRMSE against Newton's method on the large mesh, as a mean over 4 unseen samples. A time is the
CPU time of one step of one sample on one core, as the median of runs in turns.

The rows named "floor" say which errors are worth resolving: how far solutions with a shorter
time step and on a finer mesh are from the exact step on the large mesh.

    taskset -c 0 python -m studies.plate.run     everything, about 30 minutes on one core
    python -m studies.plate.run --quick          small meshes and hardly any training
"""

import time

import conduction
import jax
import numpy as np
import plate as example
import pyamg
import scipy
import scipy.sparse.linalg as sla
from scipy.interpolate import LinearNDInterpolator

from benchmarks import machine, tables
from studies.plate import methods, solvers
from studies.plate.methods import COARSE_EMULATOR, EMULATOR, Method


NUM_TEST, NUM_RUNS, REPORT_STEPS = 4, 5, (10, 50)
LARGE, FINER, COARSER = 0.0042, 0.0021, (0.0084, 0.0168, 0.0336)  # spacings of the nodes
# The spacing, the batch size, the size of the replay buffer, the updates, and the numbers of
# corrections in the evaluation.
TRAINING = [
    (0.04, 4, 64, 1600, (4, 16)),
    (0.0137, 2, 64, 800, (4, 16)),
    (LARGE, 1, 8, 240, (4, 16)),
]
FLOOR = "floor"


#
# Training
#


def train(spacing, batch_size, buffer_size, num_updates):
    """Returns an emulator trained in float32, the CPU seconds, and the number of nodes."""
    plate = conduction.make_plate(*conduction.random_mesh(spacing, seed=0))
    start = time.process_time()
    options = dict(batch_size=batch_size, buffer_size=buffer_size)
    emulator, _ = example.train_emulator(plate, jax.random.key(0), num_updates, **options)
    return emulator, time.process_time() - start, len(plate.points)


#
# Exact steps and errors
#


def newton(problem):
    """Returns the exact step: Newton's method with BiCGSTAB and multigrid."""
    assembled = problem.assembled
    cycle = solvers.multigrid(problem.matrix).aspreconditioner().matvec
    options = dict(rtol=1e-5, derivative=True)
    divide = solvers.scipy_krylov(assembled, sla.bicgstab, cycle, **options)

    def step(u_prev, before, forcing):
        u, change = assembled.set_wall(u_prev, forcing), np.inf
        residual = assembled.residual(u_prev, forcing)
        while np.max(np.abs(change)) > 1e-7:  # the next change would be far below 1e-10
            change = divide(u, residual(u))
            u = u - change
        return u

    return step


def substeps(problem, num_substeps=10):
    """Returns a step that consists of shorter ones, each with two corrections by a fixed
    factorisation."""
    dt = conduction.DT / num_substeps
    assembled = solvers.Assembled(problem.plate, dt)
    lu = solvers.factorise(problem._replace(assembled=assembled).matrix)
    substep = solvers.scipy_stepper(assembled, lambda u, r: lu(r), 2, extrapolated=True)

    def step(u_prev, _, forcing):
        u, before = u_prev, u_prev
        for i in reversed(range(num_substeps)):
            now = forcing._replace(time=forcing.time - i * dt)
            u, before = substep(u, before, now), u
        return u

    return step


def rollout(method, num_steps):
    """Returns the states `[sample, time, nodes]`. The first two steps are not extrapolated,
    since the temperature of the wall jumps in the first one."""
    inputs = methods.to_dtype(method.problem.inputs, method.dtype)
    trajectories = []
    for sample, u in enumerate(method.problem.u_0.astype(method.dtype)):
        states = [u]
        for t in range(num_steps):
            forcing = jax.tree.map(lambda x, i=(sample, t): x[i], inputs)
            u, before = states[-1], states[-2 if t > 1 else -1]
            states.append(np.asarray(method.step(u, before, forcing)))
            assert states[-1].dtype == method.dtype, (method.family, states[-1].dtype)
        trajectories.append(states)
    return np.array(trajectories)


def interpolate(u, problem, target):
    """Interpolates states `[..., nodes]` from the mesh of a problem to that of another one."""
    if problem is target:
        return u
    values = np.moveaxis(np.asarray(u, np.float64), -1, 0)
    return np.moveaxis(
        LinearNDInterpolator(problem.plate.points, values)(target.plate.points), 0, -1
    )


def errors(u, expected, problem):
    """Returns the nRMSE of states `[sample, nodes]`."""
    norm = lambda u: np.sqrt(u**2 @ problem.assembled.plate.lumped_mass)
    return np.nan_to_num(norm(u - expected) / norm(expected), nan=np.inf)


def errors_of(method, states, expected, target, steps):
    """Returns the mean errors after the two steps, and the largest one after the second."""
    first, last = (
        errors(interpolate(states[:, n], method.problem, target), expected[:, n], target)
        for n in steps
    )
    columns = dict(error_first=np.mean(first), error_last=np.mean(last), worst=np.max(last))
    return {name: f"{x:.3g}" for name, x in columns.items()}


def program(method, states, t):
    """Returns a function that takes one step of each sample, from the middle of a rollout."""
    inputs = methods.to_dtype(method.problem.inputs, method.dtype)
    cases = [
        (u[t].copy(), u[t - 1].copy(), jax.tree.map(lambda x, i=(sample, t): x[i], inputs))
        for sample, u in enumerate(states)
    ]
    return lambda: [jax.block_until_ready(method.step(*case)) for case in cases]


def make_rows(compared, expected, target, steps, num_runs):
    """Returns a row for each method, of which those with an error below 1 are timed."""
    rows, programs = [], {}
    for i, method in enumerate(compared):
        states = rollout(method, steps[-1])
        row = {"family": method.family, "variant": method.variant}
        row |= errors_of(method, states, expected, target, steps)
        print(*row.values(), sep=", ", flush=True)
        row |= {"ms": "", "setup_s": f"{method.setup:.3g}"}
        rows.append(row | {"machine": machine.describe("one core", scipy, pyamg)})
        if float(row["error_last"]) < 1:
            programs[i] = program(method, states, steps[0])
    is_measured = lambda times: len(times) >= num_runs
    medians = machine.medians_in_turns(programs, is_measured, time.process_time)
    for i, seconds in medians.items():
        rows[i]["ms"] = f"{1000 * seconds / len(target.u_0):.3g}"
    return rows


def floors(target, finer, expected, steps):
    """Returns the rows of the errors that are worth resolving."""
    lu = solvers.factorise(finer.matrix)
    step = solvers.scipy_stepper(finer.assembled, lambda u, r: lu(r), 3, extrapolated=True)
    for name, stepper, problem in (
        ("a tenth of the time step", substeps(target), target),
        (f"a mesh of {len(finer.plate.points)} nodes", step, finer),
    ):
        method = Method(FLOOR, name, stepper, problem, dtype=np.float64)
        states = rollout(method, steps[-1])
        row = {"family": FLOOR, "variant": name}
        yield row | errors_of(method, states, expected, target, steps)


#
# Tables
#


def pareto(rows):
    """Returns the rows that no other row beats in time and last error, the fastest first."""
    front: list[dict] = []
    for row in sorted((row for row in rows if row["ms"]), key=lambda row: float(row["ms"])):
        if not front or float(row["error_last"]) < float(front[-1]["error_last"]):
            front.append(row)
    return front


COLUMNS = {
    "error_first": "error at step 10",
    "error_last": "at step 50",
    "worst": "worst at step 50",
    "ms": "ms / step",
    "setup_s": "setup or training [s]",
}


def markdown(rows):
    """Returns a table of the Pareto front on the large mesh, all emulators, the front of all
    meshes, and the floors."""
    is_emulator = lambda row: row["family"] in (EMULATOR, COARSE_EMULATOR)
    is_on_large = lambda row: not row["family"].startswith("coarser")
    shown = pareto([row for row in rows if is_on_large(row) and not is_emulator(row)])
    shown += [row for row in rows if is_emulator(row)]
    shown += [row for row in pareto(rows) if row not in shown]
    shown += [row for row in rows if row["family"] == FLOOR]
    lines = [
        [f"{row['family']}, {row['variant']}".strip(", "), *(row[c] for c in COLUMNS)]
        for row in shown
    ]
    return tables.markdown(["", *COLUMNS.values()], lines)


def all_methods(target, coarser, emulators):
    yield Method("persistence", "", lambda u, *_: u, target)
    yield from methods.fixed_methods(target)
    yield from methods.krylov_methods(target)
    for problem in coarser:
        yield from methods.coarser_methods(problem)
    yield from methods.emulator_methods(COARSE_EMULATOR, coarser[-1], *emulators[0])
    for emulator in emulators:
        yield from methods.emulator_methods(EMULATOR, target, *emulator)


def main():
    parser = tables.make_parser(__doc__, quick="small meshes, 20 updates, one of each family")
    args = parser.parse_args()
    folder, _ = tables.output_folders(args, __file__)
    scale, num_test, steps = (10, 2, (2, 4)) if args.quick else (1, NUM_TEST, REPORT_STEPS)
    if args.quick:
        emulators = [(*train(0.1, 4, 64, 20), (4,))]
    else:
        emulators = [(*train(*options), corrections) for *options, corrections in TRAINING]

    jax.config.update("jax_enable_x64", True)
    target, finer, *coarser = (
        methods.make_problem(spacing * scale, num_test, steps[-1])
        for spacing in (LARGE, FINER, *COARSER[: 1 if args.quick else None])
    )
    exact = Method("", "", newton(target), target, dtype=np.float64)
    expected = rollout(exact, steps[-1])
    compared = list(all_methods(target, coarser, emulators))
    if args.quick:
        compared = list({method.family: method for method in compared}.values())
    rows = make_rows(compared, expected, target, steps, 2 if args.quick else NUM_RUNS)
    floor = floors(target, finer, expected, steps)
    rows += [dict.fromkeys(rows[0], "") | row for row in floor]
    tables.write_csv(folder / "rows.csv", rows)
    print(markdown(rows))
    tables.write_table(folder / "table.md", markdown(rows))


if __name__ == "__main__":
    main()
