"""Trains the Burgers emulator of burgers.py with data and without, and compares them.

The same network with the same number of updates and rollout steps is trained twice: on the
residuum, which needs initial conditions alone, and with supervision by trainax, on
trajectories that the solver of exponax has made before. Both are judged by that solver, which
is the one that has made the data, so supervision has it easier here: the residuum teaches the
Crank–Nicolson step, which differs from the solver's by its own error in time.

    python examples/supervised.py             trains and writes assets/supervised.png
    python examples/supervised.py --quick     the same in seconds, to see that it runs
"""

import argparse
import pathlib
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
    error_over_time,
    initial_conditions,
    NUM_POINTS,
    NUM_TEST,
    NUM_TRAIN,
    reference_solver,
    REPORT_STEPS,
    rollout,
    train,
)

from residuum import residuum_loss


def save_figure(path, errors):
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    styles = zip(
        ("#0072B2", "#D55E00", "#777777"), ("-", "--", ":"), errors.items(), strict=True
    )
    for color, line, (name, error) in styles:  # colours of Okabe and Ito, colour-blind safe
        time_axis = DT * jnp.arange(1, len(error))
        axis.semilogy(time_axis, error[1:], line, color=color, label=name)
    axis.set(title="unseen initial conditions", xlabel="time t", ylabel="nRMSE")
    axis.grid(alpha=0.3)
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=1500, help="updates of each emulator")
    parser.add_argument("--rollout-steps", type=int, default=5)
    parser.add_argument("--output", type=pathlib.Path, default="assets/supervised.png")
    parser.add_argument("--quick", action="store_true", help="20 updates of each emulator")
    args = parser.parse_args()
    num_steps = args.rollout_steps

    train_key, test_key, model_key = jax.random.split(jax.random.key(args.seed), 3)
    train_set = initial_conditions(NUM_TRAIN, train_key)
    test_set = initial_conditions(NUM_TEST, test_key)
    solver = reference_solver()
    make_data = jax.jit(jax.vmap(ex.rollout(solver, num_steps, include_init=True)))
    compiled = make_data.lower(train_set).compile()
    start = time.perf_counter()
    trajectories = jax.block_until_ready(compiled(train_set))
    seconds_of_data = time.perf_counter() - start

    options = dict(num_rollout_steps=num_steps, unroll=True)
    cases = {
        "residuum": (
            partial(residuum_loss, residuum_fn=crank_nicolson, **options),
            train_set[:, None],
        ),
        "supervised": (trainax.configuration.Supervised(num_steps), trajectories),
    }
    reference = rollout(solver, test_set)
    print(f"{'':<14}{'snapshots':>10}{'MB':>8}{'data':>10}{'training':>10}", end="")
    print("".join(f"{f'step {step}':>10}" for step in REPORT_STEPS))
    errors, rows = {}, []
    for name, (loss_fn, data) in cases.items():
        stepper, seconds = train(
            name,
            loss_fn,
            data,
            num_updates=20 if args.quick else args.updates,
            key=model_key,
        )
        errors[name] = error_over_time(rollout(stepper, test_set), reference)
        data_seconds = seconds_of_data if data is trajectories else 0.0
        cost = f"{data.shape[1]:>10}{data.nbytes / 1e6:>8.2f}{data_seconds:>8.3f} s"
        error = "".join(f"{errors[name][step]:>10.4f}" for step in REPORT_STEPS)
        rows.append(f"{name:<14}{cost}{seconds:>8.0f} s{error}")
    print("\n".join(rows))

    # What the residuum converges to: its own time step, solved by Newton's method.
    errors["Crank–Nicolson"] = error_over_time(rollout(newton_step, test_set), reference)
    error = "".join(f"{errors['Crank–Nicolson'][step]:>10.4f}" for step in REPORT_STEPS)
    print(f"{'Crank–Nicolson':<14}{'':>38}{error}")
    save_figure(args.output, errors)
    print(f"\nFigure: {args.output}")


def newton_step(u_prev):
    """Solves the Crank–Nicolson step for `u_next`, which no training needs."""

    def iterate(u_next, _):
        jacobian = jax.jacfwd(crank_nicolson)(u_next, u_prev).reshape(NUM_POINTS, NUM_POINTS)
        residuum = crank_nicolson(u_next, u_prev).reshape(NUM_POINTS)
        return u_next - jnp.linalg.solve(jacobian, residuum).reshape(u_next.shape), None

    return jax.lax.scan(iterate, u_prev, length=4)[0]


if __name__ == "__main__":
    main()
