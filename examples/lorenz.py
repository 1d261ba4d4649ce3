"""Trains an emulator of the Lorenz system, an ODE with a strange attractor, in plain JAX.

    dx/dt = σ(y - x),   dy/dt = x(ρ - z) - y,   dz/dt = xy - βz

The network is a dictionary of parameters and a function. Its residuum is the implicit
midpoint rule. There is no data at all: training begins with random states, and each update
goes on from where the last one left its states (`Rollout.final_state`), so that they find the
attractor by themselves. That needs `Cuts(bptt=True)`: with gradients through the steps, the
emulator learns to steer into a fixed point of the equation, where the residuum is zero
without effort (`--no-cut` shows it). Chaos forbids to compare trajectories for long; what is
compared with a Runge-Kutta solver is the attractor, its moments and its Lyapunov exponent.

    python examples/lorenz.py             trains and writes assets/lorenz.png
    python examples/lorenz.py --quick     the same in seconds, to see that it runs
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

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
    """Zero if `u_next` is one step of length `DT` after `u_prev`."""
    return u_next - u_prev - DT * time_derivative((u_next + u_prev) / 2)


def runge_kutta(u, num_substeps=4):
    """The reference: classical Runge-Kutta, `num_substeps` for each time step."""
    dt = DT / num_substeps
    for _ in range(num_substeps):
        k1 = time_derivative(u)
        k2 = time_derivative(u + dt / 2 * k1)
        k3 = time_derivative(u + dt / 2 * k2)
        k4 = time_derivative(u + dt * k3)
        u = u + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return u


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
    """One time step of a state `[3]`."""
    hidden = (u - CENTER) / EXTENT
    *inner, last = params.values()
    for layer in inner:
        hidden = jnp.tanh(layer["weight"] @ hidden + layer["bias"])
    return u + last["weight"] @ hidden + last["bias"]


def random_states(key, num_samples):
    return CENTER + EXTENT * jax.random.normal(key, (num_samples, 3))


def train(*, num_updates, num_rollout_steps, cuts, key):
    params_key, states_key, restart_key = jax.random.split(key, 3)
    params = init_params(params_key)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, num_updates))
    opt_state = optimizer.init(params)

    @jax.jit
    def update(params, opt_state, states, key):
        def loss_fn(params):
            stepper = lambda u: emulate(params, u)
            data = states[:, None]  # [batch, num_snapshots, 3]
            options = dict(num_rollout_steps=num_rollout_steps, cuts=cuts)
            return residuum_loss(stepper, data, implicit_midpoint, has_aux=True, **options)

        (loss, rollout), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        # Go on from the last states; anew where they left the region of interest, and for one
        # sample in a hundred, lest the emulator forgets how to come back to the attractor.
        anew_key, choice_key = jax.random.split(key)
        anew = jax.random.uniform(choice_key, (BATCH_SIZE, 1)) < 0.01
        escaped = jnp.abs((rollout.final_state - CENTER) / EXTENT) > 5
        anew |= escaped.any(axis=1, keepdims=True)
        states = jnp.where(anew, random_states(anew_key, BATCH_SIZE), rollout.final_state)
        return optax.apply_updates(params, updates), opt_state, states, loss

    states = random_states(states_key, BATCH_SIZE)
    progress = tqdm(jax.random.split(restart_key, num_updates))
    for i, update_key in enumerate(progress):
        params, opt_state, states, loss = update(params, opt_state, states, update_key)
        if i % 100 == 0 or i == num_updates - 1:
            progress.set_postfix(loss=f"{loss:.1e}")
    return params


#
# The judgement
#


def trajectory(stepper, num_steps, num_transient=1000):
    """States `[num_steps, 3]` on the attractor, and the largest Lyapunov exponent there: the
    mean rate at which a small perturbation grows, per unit of time."""

    def step(carry, _):
        u, perturbation = carry
        u, perturbation = jax.jvp(stepper, (u,), (perturbation,))
        growth = jnp.linalg.norm(perturbation)
        return (u, perturbation / growth), (u, jnp.log(growth) / DT)

    start = jnp.array([1.0, 1.0, 25.0]), jnp.array([1.0, 0.0, 0.0])
    _, (states, rates) = jax.lax.scan(step, start, length=num_transient + num_steps)
    return np.asarray(states[num_transient:]), float(jnp.mean(rates[num_transient:]))


def print_table(results):
    print(f"\n{'':<16}{'mean z':>10}{'std x':>10}{'std z':>10}{'Lyapunov exponent':>20}")
    for name, (states, exponent) in results.items():
        moments = (states[:, 2].mean(), states[:, 0].std(), states[:, 2].std())
        row = "".join(f"{moment:>10.2f}" for moment in moments)
        print(f"{name:<16}{row}{exponent:>20.3f}")


def save_figure(path, results):
    """The attractors, and how often each height z is visited."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    styles = zip(("#0072B2", "#D55E00"), ("-", "--"), results.items(), strict=True)
    for axis, (color, line, (name, (states, exponent))) in zip(axes, styles, strict=False):
        axis.plot(*states[:3000, [0, 2]].T, color=color, linewidth=0.5)
        axis.set(title=name, xlabel="x", ylabel="z", xlim=(-22, 22), ylim=(0, 52))
        label = f"{name}, Lyapunov exponent {exponent:.2f}"
        bins = np.linspace(0, 52, 53)
        density, _ = np.histogram(states[:, 2], bins, density=True)
        axes[2].plot((bins[1:] + bins[:-1]) / 2, density, line, color=color, label=label)
    axes[2].set(title="visits", xlabel="z", ylabel="density", ylim=(0, 0.075))
    axes[2].legend(loc="upper left", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=8000)
    parser.add_argument("--rollout-steps", type=int, default=8)
    parser.add_argument("--no-cut", action="store_true", help="see above")
    parser.add_argument("--output", type=pathlib.Path, default="assets/lorenz.png")
    parser.add_argument("--quick", action="store_true", help="50 updates")
    args = parser.parse_args()

    params = train(
        num_updates=50 if args.quick else args.updates,
        num_rollout_steps=args.rollout_steps,
        cuts=Cuts(bptt=not args.no_cut),
        key=jax.random.key(args.seed),
    )
    num_steps = 1000 if args.quick else 100_000
    results = {
        "Runge-Kutta": trajectory(runge_kutta, num_steps),
        "emulator": trajectory(lambda u: emulate(params, u), num_steps),
    }
    print_table(results)
    save_figure(args.output, results)
    print(f"\nFigure: {args.output}")


if __name__ == "__main__":
    main()
