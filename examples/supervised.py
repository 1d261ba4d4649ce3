"""Trains the Burgers emulator of burgers.py with data and without, and compares the two.

The network, the number of updates and the rollout length are the same. One emulator is trained
on the residual, which needs initial conditions only. The other is trained with supervision, by
trainax, on trajectories that the solver of exponax has made beforehand.

The same solver evaluates both emulators, which favours supervision: the residual teaches the
Crank–Nicolson step, whose discretisation error in time differs from the solver's. The table and
the figure also show that step, which is the best that training on the residual can reach.

    python examples/supervised.py             trains and writes assets/supervised.png
    python examples/supervised.py --quick     the same in seconds, to see that it runs
"""

import time
from functools import partial

import exponax as ex
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import trainax
from burgers import (
    crank_nicolson,
    DT,
    initial_conditions,
    NUM_POINTS,
    NUM_TEST,
    NUM_TRAIN,
    reference_solver,
    REPORT_STEPS,
    TEST_STEPS,
    train_emulator,
)
from common import (
    error_over_time,
    parse_options,
    plot_errors,
    print_table,
    rollout,
    save_figure,
)

from residuum import residuum_loss


def newton_step(u_prev):
    """Solves the Crank–Nicolson step for `u_next`. Training does not need this solver."""

    def iterate(u_next, _):
        jacobian = jax.jacfwd(crank_nicolson)(u_next, u_prev).reshape(NUM_POINTS, NUM_POINTS)
        residual = crank_nicolson(u_next, u_prev).reshape(NUM_POINTS)
        return u_next - jnp.linalg.solve(jacobian, residual).reshape(u_next.shape), None

    return jax.lax.scan(iterate, u_prev, length=4)[0]


def make_data(states, num_steps):
    """Returns trajectories `[batch, num_steps + 1, 1, NUM_POINTS]` of the solver."""
    trajectory = jax.vmap(ex.rollout(reference_solver(), num_steps, include_init=True))
    compiled = jax.jit(trajectory).lower(states).compile()
    start = time.perf_counter()
    data = jax.block_until_ready(compiled(states))
    milliseconds = 1e3 * (time.perf_counter() - start)
    print(f"Data for supervision: {data.nbytes / 1e6:.2f} MB, made in {milliseconds:.0f} ms")
    return data


def main():
    args = parse_options(
        __doc__, "assets/supervised.png", updates=(1500, 20), rollout_steps=(5, 2)
    )
    train_key, test_key, model_key = jax.random.split(jax.random.key(args.seed), 3)
    train_set = initial_conditions(NUM_TRAIN, train_key)
    test_set = initial_conditions(NUM_TEST, test_key)
    reference = rollout(reference_solver(), test_set, TEST_STEPS)
    error = lambda stepper: error_over_time(rollout(stepper, test_set, TEST_STEPS), reference)

    steps = args.rollout_steps
    supervised_loss = trainax.configuration.Supervised(steps)
    residual_loss = partial(
        residuum_loss, residuum_fn=crank_nicolson, num_rollout_steps=steps, unroll=True
    )
    cases = {
        "supervised": (supervised_loss, make_data(train_set, steps)),
        "residual": (residual_loss, train_set[:, None]),
    }
    errors = {"Crank–Nicolson": error(newton_step)}
    costs: dict[str, list] = {"Crank–Nicolson": []}
    for name, (loss_fn, data) in cases.items():
        stepper, seconds = train_emulator(
            name, loss_fn, data, num_updates=args.updates, key=model_key
        )
        errors[name] = error(stepper)
        costs[name] = [f"{seconds:.0f} s", data.shape[1]]

    columns = [*(f"step {n}" for n in REPORT_STEPS), "trained in", "snapshots"]
    rows = {
        name: [*(f"{errors[name][n]:.4f}" for n in REPORT_STEPS), *costs[name]]
        for name in errors
    }
    print_table("nRMSE after", columns, rows)

    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    plot_errors(axis, DT, errors)
    axis.legend()
    save_figure(args.output, figure)


if __name__ == "__main__":
    main()
