"""Draws the figure of docs/first_steps.md: one good training run, and two bad ones.

Each run trains an emulator of the heat equation in implicit Euler steps, without data. One bad
run has a wrong sign in the residual, the other a learning rate that is too large.

    python examples/first_steps.py             trains for seconds, writes assets/first_steps.png
    python examples/first_steps.py --quick     the same with fewer updates
"""

from functools import partial

import common
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from residuum import residuum_loss


POINTS, DT, DIFFUSIVITY, NUM_STEPS = 32, 0.1, 5.0, 10


def right_hand_side(u):  # with a mesh width of 1
    return DIFFUSIVITY * (jnp.roll(u, 1) - 2 * u + jnp.roll(u, -1))


def heat_residuum(u_next, u_prev, sign=1.0):
    return u_next - u_prev - sign * DT * right_hand_side(u_next)


def solver_step(u):
    matrix = jnp.eye(POINTS) - DT * jax.jacobian(right_hand_side)(jnp.zeros(POINTS))
    return jnp.linalg.solve(matrix, u)


def emulate(params, u):
    return u + params["out"] @ jnp.tanh(params["in"] @ u)


def train(key, residuum_fn, learning_rate, num_updates):
    """Returns the parameters, and the history of the loss."""
    init_key, updates_key = jax.random.split(key)
    params = {"in": 0.2 * jax.random.normal(init_key, (64, POINTS))}
    params["out"] = jnp.zeros((POINTS, 64))
    optimizer = optax.adam(learning_rate)

    def update(carry, key):
        params, opt_state = carry
        data = jax.random.normal(key, (256, 1, POINTS))  # [batch, num_snapshots, points]
        loss = lambda params: residuum_loss(
            partial(emulate, params), data, residuum_fn, num_rollout_steps=3
        )
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), value

    carry, keys = (params, optimizer.init(params)), jax.random.split(updates_key, num_updates)
    (params, _), losses = jax.jit(lambda *args: jax.lax.scan(update, *args))(carry, keys)
    return params, losses


def main():
    args = common.parse_options(__doc__, "assets/first_steps.png", updates=(500, 20))
    train_key, test_key = jax.random.split(jax.random.key(args.seed))
    runs = {
        "good": (heat_residuum, 3e-3),
        "wrong sign": (partial(heat_residuum, sign=-1.0), 3e-3),
        "learning rate too large": (heat_residuum, 1.0),
    }
    results = {name: train(train_key, *run, args.updates) for name, run in runs.items()}
    u_0 = jax.random.normal(test_key, (64, POINTS))
    solution = common.rollout(solver_step, u_0, NUM_STEPS)
    fields = {"persistence": jnp.broadcast_to(u_0[:, None], solution.shape)}
    for name, (params, _) in results.items():
        fields[name] = common.rollout(partial(emulate, params), u_0, NUM_STEPS)
    errors = {name: common.error_over_time(u, solution) for name, u in fields.items()}
    rows = {name: [f"{error[n]:.2g}" for n in (1, NUM_STEPS)] for name, error in errors.items()}
    common.print_table("nRMSE after", ["step 1", f"step {NUM_STEPS}"], rows)

    figure, axes = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
    axes[0].plot(u_0[0], color="#777777", linestyle=":", label="initial condition")
    axes[0].plot(solution[0, 3], color="#0072B2", label="solver, step 3")
    axes[0].plot(fields["good"][0, 3], "--", color="#D55E00", label="emulator, step 3")
    axes[0].set(title="field", xlabel="point")
    extent = (NUM_STEPS, POINTS)
    common.show(axes[1], "rollout of the emulator", fields["good"][0], extent, vmin=-2, vmax=2)
    axes[1].set(xlabel="step", ylabel="point")
    for color, (name, (_, losses)) in zip(common.COLORS[1:], results.items(), strict=False):
        axes[2].semilogy(losses, color=color, label=name)
    axes[2].set(title="loss", xlabel="update")
    common.plot_errors(axes[3], 1, errors)
    axes[3].set(xlabel="step", ylim=(1e-2, 1e6))
    for axis in (axes[0], axes[2], axes[3]):
        axis.legend(fontsize="x-small")
    common.save_figure(args.output, figure)


if __name__ == "__main__":
    main()
