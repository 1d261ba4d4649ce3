"""Which cut should you use, and when? The study compares every cut and rollout length on three
problems, for the same training time.

The problems are Burgers and Lorenz, as in the examples, and the 1D Kuramoto–Sivashinsky
equation of studies/ar_densed_kuramoto_sivashinsky. Each problem has its own equation, initial
conditions and network. The study compares nothing but the gradients:

- Each training run takes the same number of seconds, without compilation. The time of one
  update is measured first and gives the number of updates. Longer rollouts get fewer updates.
- All runs use the same batch size, Adam with gradient clipping to norm 1, and a learning rate
  that rises during the first twentieth of the updates and then falls to zero along a cosine.
  The loss is the mean over the time levels.
- All runs learn from the same states: a replay buffer that starts from initial conditions. The
  final states of each rollout go back into the buffer, so that even one-step rollouts reach the
  attractor. Diverged samples, and one in a hundred of the others, are replaced by new initial
  conditions. Burgers has no attractor, so all its samples are replaced.
- The error is the median over the test states, after a fixed time, relative to the solution of
  the implicit step to which the residual belongs. Hence the error of the time discretisation
  does not count, and zero is possible. The test starts from new initial conditions for Burgers,
  and from states on the attractor for the other two problems.

Some entries are the same program, because a cut that no gradient would cross changes nothing.
Each program is trained once. In a one-step rollout, `Cuts(next=True)` leaves no gradient.

Each training run is a process with a core of its own.

    python -m studies.which_cut.run             everything, about 25 minutes on two cores
    python -m studies.which_cut.run --quick     a selection, in a minute
    python -m studies.which_cut.draw            the figure and the table, from the rows
"""

import functools
import itertools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import burgers
import equinox as eqx
import jax
import jax.numpy as jnp
import lorenz
import optax
from canonical_convolutions import canonical_convolutions
from replay_buffer import diverged, put_back, sample
from tqdm import tqdm

from benchmarks import machine, tables
from residuum import Cuts, residuum_loss
from studies.ar_densed_kuramoto_sivashinsky import problem as kuramoto_sivashinsky


CUTS = {
    "no cut": Cuts(),
    "bptt=1": Cuts(bptt=1),
    "bptt=2": Cuts(bptt=2),
    "bptt=4": Cuts(bptt=4),
    "prev": Cuts(prev=True),
    "next": Cuts(next=True),
    "prev, bptt=1": Cuts(bptt=1, prev=True),
}
NUM_STEPS = (1, 2, 4, 8, 16)
SEEDS = (0, 1, 2)


def same_program(cut, num_rollout_steps):
    """Returns the first of `CUTS` with the same gradient, or None if that gradient is zero."""
    if num_rollout_steps == 1:  # the initial condition has no gradient anyway
        return None if cut == "next" else "no cut"
    if cut == "prev, bptt=1":  # the previous state is cut already
        return "bptt=1"
    if cut.startswith("bptt=") and CUTS[cut].bptt >= num_rollout_steps:
        return "no cut"  # no step follows the last cut
    return cut


#
# The problems
#


class Problem(NamedTuple):
    network: Callable[..., Any]  # key -> network
    residuum_fn: Callable[[jax.Array, jax.Array], jax.Array]
    initial_conditions: Callable[..., jax.Array]  # num_samples, key -> [num_samples, ...]
    test_states: Callable[..., jax.Array]  # num_samples, key -> [num_samples, ...]
    learning_rate: float
    num_test_steps: int
    evaluated_at: str
    bound: float  # a sample with a larger |u| has diverged
    apply: Callable[..., jax.Array] = lambda network, u: network(u)
    buffer_size: int = 512
    batch_size: int = 8
    fresh_share: float = 0.01  # share of fresh states among those that go back into the buffer


def on_attractor(solver, states):
    """Returns the states after a thousand steps of a solver."""
    step = jax.vmap(solver)
    return jax.lax.fori_loop(0, 1000, lambda _, u: step(u), states)


PROBLEMS = {
    "Burgers": Problem(
        network=burgers.Emulator,
        residuum_fn=burgers.crank_nicolson,
        initial_conditions=burgers.initial_conditions,
        test_states=burgers.initial_conditions,
        learning_rate=3e-3,
        num_test_steps=50,
        evaluated_at="step 50",
        buffer_size=8,
        fresh_share=1.0,
        bound=10.0,
    ),
    "Kuramoto–Sivashinsky": Problem(
        network=lambda key: kuramoto_sivashinsky.ConvNet(key=key),
        residuum_fn=kuramoto_sivashinsky.preconditioned_crank_nicolson,
        initial_conditions=kuramoto_sivashinsky.initial_conditions,
        test_states=lambda n, key: on_attractor(
            kuramoto_sivashinsky.reference_solver(),
            kuramoto_sivashinsky.initial_conditions(n, key),
        ),
        learning_rate=5e-3,
        num_test_steps=50,
        evaluated_at="t = 5",
        bound=10.0,
    ),
    "Lorenz": Problem(
        network=lorenz.init_params,
        apply=lorenz.emulate,
        residuum_fn=lorenz.implicit_midpoint,
        initial_conditions=lambda n, key: lorenz.random_states(key, n),
        test_states=lambda n, key: on_attractor(
            lorenz.runge_kutta, lorenz.random_states(key, n)
        ),
        learning_rate=3e-3,
        num_test_steps=55,
        evaluated_at="t = 1.1, a Lyapunov time",
        batch_size=64,
        bound=75.0,
    ),
}
NUM_TEST = 64


#
# Training
#


class State(NamedTuple):
    params: Any
    opt_state: Any
    buffer: jax.Array


def make_training(problem, cuts, num_rollout_steps, key):
    """Returns the initial `State`, and `update(state, i, num_updates) -> (state, loss)`."""
    network_key, buffer_key, updates_key = jax.random.split(key, 3)
    params, static = eqx.partition(problem.network(network_key), eqx.is_array)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99))
    options = dict(num_rollout_steps=num_rollout_steps, cuts=cuts, has_aux=True)
    options |= dict(weights=jnp.full(num_rollout_steps, 1 / num_rollout_steps))

    @jax.jit
    @canonical_convolutions
    def update(state, i, num_updates):
        params, opt_state, buffer = state
        keys = jax.random.split(jax.random.fold_in(updates_key, i), 3)
        samples, states = sample(buffer, problem.batch_size, keys[0])

        def loss_fn(params):
            stepper = functools.partial(problem.apply, eqx.combine(params, static))
            return residuum_loss(stepper, states[:, None], problem.residuum_fn, **options)

        (loss, rollout), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        direction, opt_state = optimizer.update(grads, opt_state)
        # The schedule is written out, because `num_updates` is an argument: a single program
        # serves any number of updates, and this number is known only after some updates have
        # been timed.
        progress = i / num_updates
        schedule = jnp.minimum(20 * progress, (1 + jnp.cos(jnp.pi * progress)) / 2)
        rate = problem.learning_rate * schedule
        params = jax.tree.map(lambda p, d: p - rate * d, params, direction)

        buffer = put_back(
            buffer,
            samples,
            rollout.final_state,
            fresh=problem.initial_conditions(problem.batch_size, keys[2]),
            lost=diverged(rollout.final_state, problem.bound),
            share=problem.fresh_share,
            key=keys[1],
        )
        return State(params, opt_state, buffer), loss

    buffer = problem.initial_conditions(problem.buffer_size, buffer_key)
    return State(params, optimizer.init(params), buffer), update


def run(update, state, num_updates):
    """Returns the state, the loss, and the seconds that these updates took."""
    start = time.perf_counter()
    for i in range(num_updates):
        state, loss = update(state, i, num_updates)
    state, loss = jax.block_until_ready((state, loss))
    return state, loss, time.perf_counter() - start


def train(problem, cuts, num_rollout_steps, key, seconds):
    """Trains for about `seconds`. Returns the parameters, and columns of the table."""
    state, update = make_training(problem, cuts, num_rollout_steps, key)
    run(update, state, 1)  # compiles
    block, elapsed = 1, 0.0
    while elapsed < seconds / 20:
        block *= 2
        *_, elapsed = run(update, state, block)
    num_updates = max(1, round(seconds * block / elapsed))
    state, loss, elapsed = run(update, state, num_updates)
    columns = dict(loss=float(loss), updates=num_updates, seconds=round(elapsed, 2))
    return state.params, columns


#
# Evaluation
#


@functools.cache
def make_evaluation(name):
    """Returns a function of the parameters that computes the median error over the test
    states."""
    problem = PROBLEMS[name]
    _, static = eqx.partition(problem.network(jax.random.key(0)), eqx.is_array)
    u_0 = jax.jit(problem.test_states, static_argnums=0)(NUM_TEST, jax.random.key(1))

    def roll_out(stepper):
        step = jax.vmap(stepper)
        return jax.lax.fori_loop(0, problem.num_test_steps, lambda _, u: step(u), u_0)

    solution = jax.jit(lambda: roll_out(functools.partial(solve_step, problem.residuum_fn)))()

    @jax.jit
    @canonical_convolutions
    def evaluate(params):
        u = roll_out(functools.partial(problem.apply, eqx.combine(params, static)))
        norm = lambda u: jnp.linalg.norm(u.reshape(NUM_TEST, -1), axis=1)
        return jnp.median(norm(u - solution) / norm(solution))

    return evaluate


def solve_step(residuum_fn, u_prev):
    """Returns the next state, by Newton's method with the matrix of its first iteration."""
    residuum = lambda u: jnp.ravel(residuum_fn(u.reshape(u_prev.shape), u_prev))
    u = jnp.ravel(u_prev)
    inverse = jnp.linalg.inv(jax.jacfwd(residuum)(u))
    for _ in range(8):
        u -= inverse @ residuum(u)
    return u.reshape(u_prev.shape)


#
# All training runs
#


def select_cases(problems, steps, seeds, seconds):
    """Returns the arguments of `run_case` for each program that is trained."""
    return [
        (name, cut, num_rollout_steps, seed, seconds)
        for seed, name, num_rollout_steps, cut in itertools.product(
            seeds, problems, steps, CUTS
        )
        if same_program(cut, num_rollout_steps) == cut
    ]


def run_case(case):
    """Returns a row of the CSV file."""
    name, cut, num_rollout_steps, seed, seconds = case
    key = jax.random.key(seed)
    params, columns = train(PROBLEMS[name], CUTS[cut], num_rollout_steps, key, seconds)
    row = dict(problem=name, cut=cut, num_rollout_steps=num_rollout_steps, seed=seed)
    row |= dict(error=float(make_evaluation(name)(params)))
    return row | columns | dict(machine=machine.describe("a core each"))


def main():
    parser = tables.make_parser(__doc__, quick="Lorenz, two lengths, one seed")
    parser.add_argument(
        "--problems", nargs="+", choices=tuple(PROBLEMS), default=tuple(PROBLEMS)
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="of each training run")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    folder, _ = tables.output_folders(args, __file__)
    steps, seeds = NUM_STEPS, SEEDS
    if args.quick:
        args.problems, args.seconds, steps, seeds = ("Lorenz",), 0.1, (1, 2), (0,)

    path = folder / "rows.csv"
    rows = tables.read_csv(path) if path.exists() else []
    rows = [row for row in rows if row["problem"] not in args.problems]
    cases = select_cases(args.problems, steps, seeds, args.seconds)
    finished = machine.on_single_cores(run_case, cases, args.workers)
    for row in tqdm(finished, total=len(cases)):
        rows.append(row)
        tables.write_csv(path, rows)


if __name__ == "__main__":
    main()
