"""Evaluates the emulator of examples/burgers_2d.py, and changes one choice at a time.

The first command measures errors against a finer solver and against the exact step of the
residual, on a test set of 8 initial conditions that only this command uses. The second command
uses other initial conditions, fewer updates, and only the exact step as its reference.

    python -m studies.burgers_2d.run --seed 0 1 2     median, least and most
    python -m studies.burgers_2d.run --ablation       one change at a time
    python -m studies.burgers_2d.run --quick          to see that it runs
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import burgers_2d
import common
import equinox as eqx
import exponax as ex
import jax
import jax.numpy as jnp
import numpy as np
from burgers_2d import DT, to_fields, to_waves, WHITENING
from error_estimate import estimate_error, gmres
from jax.tree_util import Partial

from benchmarks import tables
from residuum import Cuts
from studies import train_and_tabulate


REPORT_STEPS = burgers_2d.REPORT_STEPS
OURS, FLOOR = "residuum", "exact step"

#
# The emulators that are trained. Each is a stepper whose leaves are its weights
#


def network(key):
    return Partial(burgers_2d.emulator, burgers_2d.random_weights(key))


def without_whitening(key):
    """Applies the same random weights to neighbours that are not whitened."""

    def step(weights, u):
        return burgers_2d.emulator(weights @ np.linalg.inv(WHITENING), u)

    return Partial(step, burgers_2d.random_weights(key))


def without_low_pass(key):
    def step(weights, u_prev):
        u = u_prev
        for layer in weights:
            u = u_prev + DT * burgers_2d.products(layer, u)
        return u

    return Partial(step, burgers_2d.random_weights(key))


def near_whitening():
    """Returns the matrix that whitens the neighbours up to two cells away among themselves. Its
    shape is `[19, 35]`; the columns for more distant neighbours are zero."""
    is_near = np.max(np.abs(burgers_2d.OFFSETS), axis=1) <= 2
    is_used = np.concatenate([is_near, is_near, [True]])
    matrix = np.zeros((np.sum(is_used), len(is_used)))
    matrix[:-1, np.flatnonzero(is_used)[:-1]] = np.kron(
        np.eye(2), burgers_2d.whitening(burgers_2d.OFFSETS[is_near])
    )
    matrix[-1, -1] = 1
    return matrix


def near_neighbours(key):
    def step(weights, u):
        return burgers_2d.emulator(weights @ near_whitening() @ np.linalg.inv(WHITENING), u)

    num_inputs = len(near_whitening())
    return Partial(step, burgers_2d.random_weights(key)[..., :num_inputs])


def one_layer(key):
    return Partial(burgers_2d.emulator, burgers_2d.random_weights(key, width=64)[:1])


class ConvNet(eqx.Module):
    """Adds the change that a ConvNet with products as activations predicts."""

    net: common.ConvNet

    def __init__(self, key):
        options = dict(activation=common.bilinear, zero_last=True, key=key)
        self.net = common.ConvNet(2, [2, 32, 32, 2], [7, 3, 3], **options)

    def __call__(self, u):
        return to_fields(to_waves(u + 10 * DT * self.net(u)))


def scaled_residual(u_next, u_prev):
    """Divides the residuals of all samples by the same number, not by that of persistence."""
    return burgers_2d.crank_nicolson(u_next, u_prev) / 0.005


class Recipe(NamedTuple):
    """Says what is trained, and how. The ablation changes one item at a time."""

    make_stepper: Callable = network
    residuum_fn: Callable = burgers_2d.relative_residual
    shares: np.ndarray = burgers_2d.SHARES
    batch_size: int = 1
    learning_rate: float = 2e-3
    num_rollout_steps: int = 1
    cuts: Cuts = Cuts()


ABLATION = {
    "nothing": Recipe(),
    "neighbours not whitened": Recipe(without_whitening),
    "neighbours not whitened, learning rate 1e-2": Recipe(
        without_whitening, learning_rate=1e-2
    ),
    "two cells in each direction, not four": Recipe(near_neighbours),
    "one layer of twice the width": Recipe(one_layer),
    "a ConvNet with 7, 3 and 3 points": Recipe(ConvNet),
    "no low-pass on the output": Recipe(without_low_pass),
    "one probability of a fresh state for all, 1/45": Recipe(shares=np.full(32, 1 / 45)),
    "no replay buffer": Recipe(shares=np.ones(32)),
    "one scale for all samples": Recipe(residuum_fn=scaled_residual),
    "learning rate 1e-2": Recipe(learning_rate=1e-2),
    "batches of 4, a quarter of the updates": Recipe(batch_size=4),
    "4 steps, `bptt=1`, a quarter of the updates": Recipe(
        num_rollout_steps=4, cuts=Cuts(bptt=1)
    ),
}


def train(case, initial_conditions=burgers_2d.initial_conditions):
    """Trains a case (model, recipe, seed, number of updates). Returns the stepper and the
    training time in seconds."""
    model, recipe, seed, num_updates = case
    keys = jax.random.split(jax.random.key(seed), 3)
    loss_fn = train_and_tabulate.on_replayed_states(
        recipe.residuum_fn,
        initial_conditions,
        batch_size=recipe.batch_size,
        fresh_share=jnp.asarray(recipe.shares),
        bound=5,
        num_rollout_steps=recipe.num_rollout_steps,
        cuts=recipe.cuts,
    )
    buffer = initial_conditions(burgers_2d.BUFFER_SIZE, keys[1])
    stepper, seconds = common.minimise(
        model,
        recipe.make_stepper(keys[0]),
        loss_fn,
        buffer,
        keys[2],
        num_updates=num_updates // (recipe.batch_size * recipe.num_rollout_steps),
        learning_rate=recipe.learning_rate,
    )
    return stepper, seconds


#
# Errors
#


class Tests(NamedTuple):
    """Holds states that are unseen in training, and the trajectories to compare with."""

    states: jax.Array
    num_steps: int
    exact: jax.Array  # [sample, time, 2, x, y]
    finer: jax.Array | None


def make_tests(seed, num_samples, num_steps, *, with_solver):
    states = burgers_2d.initial_conditions(num_samples, jax.random.key(seed))
    exact = common.rollout(burgers_2d.exact_step, states, num_steps)
    finer = None
    if with_solver:
        upsample = partial(ex.map_between_resolutions, new_num_points=192)
        solver = burgers_2d.solver(192, 2)
        finer = common.rollout(solver, jax.vmap(upsample)(states), num_steps)[..., ::3, ::3]
    return Tests(states, num_steps, exact, finer)


def error_columns(trajectory, tests):
    """Returns the mean and the largest error of the samples, or `inf` if a sample diverged."""
    norm = lambda u: np.linalg.norm(np.asarray(u).reshape(*u.shape[:2], -1), axis=2)
    columns = {}
    for name, reference in {"finer": tests.finer, "exact": tests.exact}.items():
        if reference is not None:
            error = norm(trajectory - reference) / np.maximum(norm(reference), 1e-30)
            error = np.nan_to_num(error, nan=np.inf)
            for n in REPORT_STEPS:
                at = error[:, min(n, tests.num_steps)]
                columns[f"{name}_{n}"] = f"{np.mean(at):.3g}"
                columns[f"{name}_{n}_worst"] = f"{np.max(at):.3g}"
    return columns


ESTIMATE = ("estimate_least", "estimate_largest", "gain_least")


def estimate_columns(stepper, tests):
    """Returns the least and the largest ratio of the estimated to the true error, and the least
    ratio of the error to the corrected error, over all samples and steps."""
    estimate = partial(
        estimate_error,
        stepper,
        burgers_2d.crank_nicolson,
        num_rollout_steps=tests.num_steps,
        solve=partial(gmres, restart=4, maxiter=1),
    )
    emulated, estimated = jax.jit(jax.vmap(estimate))(tests.states)
    norm = lambda u: jnp.linalg.norm(u.reshape(*u.shape[:2], -1), axis=2)
    exact = tests.exact[:, 1:]
    true = norm(emulated - exact)
    ratio = norm(estimated) / true
    gain = true / norm(emulated - estimated - exact)
    numbers = jnp.min(ratio), jnp.max(ratio), jnp.min(gain)
    return {name: f"{x:.4g}" for name, x in zip(ESTIMATE, numbers, strict=True)}


def columns_of(name, what, steps):
    return {f"{what}step {n}": (f"{name}_{n}", "{:.2g}") for n in steps}


TRAINING = {
    "parameters": ("parameters", "{:.0f}"),
    "updates": ("updates", "{:.0f}"),
    "training": ("seconds", "{:.0f} s"),
}
COLUMNS = {
    **columns_of("finer", "", (10, 50, 200, 1000)),
    "worst sample, step 200": ("finer_200_worst", "{:.2g}"),
    **columns_of("exact", "from exact, ", (10, 50, 200, 1000)),
    **TRAINING,
}
ABLATION_COLUMNS = columns_of("exact", "", REPORT_STEPS) | TRAINING


def main():
    parser = tables.make_parser(__doc__, quick="20 updates, 2 samples, 10 steps")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    parser.add_argument("--updates", type=int, help="of each emulator: 20000, or 5000")
    parser.add_argument("--ablation", action="store_true", help="on other initial conditions")
    args = parser.parse_args()
    folder, _ = tables.output_folders(args, __file__)
    num_updates = 20 if args.quick else args.updates or (5000 if args.ablation else 20_000)
    recipes = ABLATION if args.ablation else {OURS: Recipe()}
    if args.quick:
        recipes = dict(list(recipes.items())[:2])
    cases = [
        (model, x, seed, num_updates) for model, x in recipes.items() for seed in args.seed
    ]
    trained = [train(case) for case in cases]

    sizes = (2, 10) if args.quick else (8, REPORT_STEPS[-1])
    test_seed = 77 if args.ablation else 1000
    tests = make_tests(test_seed, *sizes, with_solver=not args.ablation)
    rows = []
    if not args.ablation:
        persistence = jnp.broadcast_to(tests.states[:, None], tests.exact.shape)
        for model, trajectory in {"persistence": persistence, FLOOR: tests.exact}.items():
            training = train_and_tabulate.training_columns(None, "", "")
            row = {"model": model, "seed": ""}
            no_estimate = dict.fromkeys(ESTIMATE, "")
            row |= error_columns(trajectory, tests) | no_estimate | training
            rows.append(row)
    for (model, _, seed, updates), (stepper, seconds) in zip(cases, trained, strict=True):
        row = {"model": model, "seed": seed}
        row |= error_columns(common.rollout(stepper, tests.states, tests.num_steps), tests)
        if not args.ablation:
            row |= estimate_columns(stepper, tests)
        rows.append(row | train_and_tabulate.training_columns(stepper, updates, seconds))
    columns = ABLATION_COLUMNS if args.ablation else COLUMNS
    train_and_tabulate.write(folder, rows, columns, "ablation" if args.ablation else "")


if __name__ == "__main__":
    main()
