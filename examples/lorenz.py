"""Trains an emulator of the Lorenz system, a chaotic ODE, in plain JAX and without any data.

    dx/dt = σ(y - x),   dy/dt = x(ρ - z) - y,   dz/dt = xy - βz

The network is a dictionary of parameters and a function. The residual is that of the implicit
midpoint rule. Training starts from random states, and every update continues from the final
states of the previous one (`Rollout.final_state`), so the states settle on the attractor.
Truncated backpropagation through time, `Cuts(bptt=True)`, makes the training reliable. If
gradients cross the steps, the emulator may learn to run into a fixed point of the equation,
where the residual is zero. With `--no-cut`, this happens for one of three seeds, and with
`--rollout-steps 16` in addition, it also happens for seed 0.

Chaotic trajectories cannot be compared for long. The example instead compares the attractor of
the emulator with that of a Runge–Kutta solver: its moments and its Lyapunov exponent.

    python examples/lorenz.py             trains and writes assets/lorenz.png
    python examples/lorenz.py --quick     the same in seconds, to see that it runs
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import COLORS, parse_options, print_table, save_figure, train
from replay_buffer import diverged, replay

from residuum import Cuts, residuum_loss


SIGMA, RHO, BETA = 10.0, 28.0, 8 / 3
DT = 0.02
CENTER, EXTENT = np.array([0.0, 0.0, 25.0]), np.array([10.0, 10.0, 10.0])
BATCH_SIZE = 512


#
# The equation
#


def time_derivative(u):
    x, y, z = u
    return jnp.stack([SIGMA * (y - x), x * (RHO - z) - y, x * y - BETA * z])


def implicit_midpoint(u_next, u_prev):
    """Returns zero if `u_next` is one step of length `DT` after `u_prev`."""
    return u_next - u_prev - DT * time_derivative((u_next + u_prev) / 2)


def runge_kutta(u, num_substeps=4):
    """Takes one time step of the reference solver, as `num_substeps` of classical
    Runge–Kutta."""
    dt = DT / num_substeps
    for _ in range(num_substeps):
        k1 = time_derivative(u)
        k2 = time_derivative(u + dt / 2 * k1)
        k3 = time_derivative(u + dt / 2 * k2)
        k4 = time_derivative(u + dt * k3)
        u = u + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return u


def random_states(key, num_samples):
    return CENTER + EXTENT * jax.random.normal(key, (num_samples, 3))


#
# The emulator
#


def init_params(key, *, width=128, depth=3):
    sizes = [3] + [width] * (depth - 1) + [3]
    keys = jax.random.split(key, depth)
    return {
        f"layer {i}": {
            "weight": jax.random.normal(key, (n_out, n_in)) / np.sqrt(n_in),
            "bias": jnp.zeros(n_out),
        }
        for i, (key, n_in, n_out) in enumerate(zip(keys, sizes[:-1], sizes[1:], strict=True))
    }


def emulate(params, u):
    """Advances a state `[3]` by one time step."""
    hidden = (u - CENTER) / EXTENT
    *inner, last = params.values()
    for layer in inner:
        hidden = jnp.tanh(layer["weight"] @ hidden + layer["bias"])
    return u + last["weight"] @ hidden + last["bias"]


def train_emulator(*, num_updates, num_rollout_steps, cuts, key):
    params_key, states_key, updates_key = jax.random.split(key, 3)
    params = init_params(params_key)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, num_updates))
    options = dict(num_rollout_steps=num_rollout_steps, cuts=cuts, has_aux=True)

    @jax.jit
    def update(carry, key):
        params, opt_state, states = carry

        def loss_fn(params):
            stepper = lambda u: emulate(params, u)
            data = states[:, None]  # [batch, num_snapshots, 3]
            return residuum_loss(stepper, data, implicit_midpoint, **options)

        (loss, rollout), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, updates)

        # States that left the region of interest are replaced, and so is 1 % of the others: the
        # emulator has to remember the way from anywhere to the attractor.
        states = rollout.final_state
        escaped = diverged((states - CENTER) / EXTENT, bound=5)
        fresh_key, choice_key = jax.random.split(key)
        fresh = random_states(fresh_key, BATCH_SIZE)
        states = replay(states, fresh, lost=escaped, share=0.01, key=choice_key)
        return (params, opt_state, states), loss

    carry = params, optimizer.init(params), random_states(states_key, BATCH_SIZE)
    (params, _, _), _ = train(update, carry, jax.random.split(updates_key, num_updates))
    return params


#
# Evaluation
#


def attractor(stepper, num_steps, num_transient=1000):
    """Returns states `[num_steps, 3]` on the attractor, and the largest Lyapunov exponent
    there, i.e., the mean rate at which a small perturbation grows, per unit of time."""

    def step(carry, _):
        u, perturbation = carry
        u, perturbation = jax.jvp(stepper, (u,), (perturbation,))
        growth = jnp.linalg.norm(perturbation)
        return (u, perturbation / growth), (u, jnp.log(growth) / DT)

    start = jnp.array([1.0, 1.0, 25.0]), jnp.array([1.0, 0.0, 0.0])
    _, (states, rates) = jax.lax.scan(step, start, length=num_transient + num_steps)
    return np.asarray(states[num_transient:]), float(jnp.mean(rates[num_transient:]))


def plot(results):
    """Draws the attractors, and how often each height z is visited."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    styles = zip((COLORS[2], COLORS[1]), ("-", "--"), results.items(), strict=True)
    for axis, (color, line, (name, (states, exponent))) in zip(axes, styles, strict=False):
        axis.plot(*states[:3000, [0, 2]].T, color=color, linewidth=0.5)
        axis.set(title=name, xlabel="x", ylabel="z", xlim=(-22, 22), ylim=(0, 52))
        label = f"{name}, Lyapunov exponent {exponent:.2f}"
        bins = np.linspace(0, 52, 53)
        density, _ = np.histogram(states[:, 2], bins, density=True)
        axes[2].plot((bins[1:] + bins[:-1]) / 2, density, line, color=color, label=label)
    axes[2].set(title="visits", xlabel="z", ylabel="density", ylim=(0, 0.075))
    axes[2].legend(loc="upper left", fontsize="small")
    return figure


def main():
    defaults = dict(updates=(8000, 50), rollout_steps=8, test_steps=(100_000, 1000), cut=True)
    args = parse_options(__doc__, "assets/lorenz.png", **defaults)
    params = train_emulator(
        num_updates=args.updates,
        num_rollout_steps=args.rollout_steps,
        cuts=Cuts(bptt=args.cut),
        key=jax.random.key(args.seed),
    )
    results = {
        "Runge–Kutta": attractor(runge_kutta, args.test_steps),
        "emulator": attractor(lambda u: emulate(params, u), args.test_steps),
    }
    rows = {}
    for name, (states, exponent) in results.items():
        moments = states[:, 2].mean(), states[:, 0].std(), states[:, 2].std()
        rows[name] = [*(f"{moment:.2f}" for moment in moments), f"{exponent:.3f}"]
    print_table("on the attractor", ["mean z", "std x", "std z", "Lyapunov"], rows)
    save_figure(args.output, plot(results))


if __name__ == "__main__":
    main()
