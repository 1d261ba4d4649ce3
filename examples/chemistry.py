"""Trains an emulator of the air-pollution chemistry POLLU (pollu.py): 20 species, 25 reactions,
and photolysis that follows the sun.

*The residual* is that of a five-minute step of the two-stage Radau IIA method, multiplied by
the inverse of its Newton matrix. It then is, to first order, the error of the state. The first
stage is a leaf of the state, which the next step does not read. *The sun* is passed as
`inputs`. *Concentrations* stay positive, and atoms are conserved. *The emulator* is a small
network that improves a cheap scheme of first order. A solver is needed only to evaluate it.

    python examples/chemistry.py             trains and writes assets/chemistry.png
    python examples/chemistry.py --quick     the same in a minute, to see that it runs
"""

from typing import NamedTuple

import common
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pollu
from pollu import DT, SPECIES, TYPICAL
from replay_buffer import diverged, put_back, sample

from residuum import residuum_loss


BUFFER_SIZE, BATCH_SIZE, NUM_UPDATES, NUM_TEST = 2048, 64, 150_000, 64
REPORT_STEPS = (1, 12, 72, 288)  # five minutes, 1, 6 and 24 hours
REPORTED = ("NO2", "NO", "O3", "HCHO", "CO", "ALD", "PAN", "HNO3")
SWEEPS = 2
FLOOR = 0.03 * TYPICAL  # smaller concentrations matter less


class State(NamedTuple):
    y: jax.Array  # [20, ...], where further axes are cells
    stage: jax.Array  # at a third of the last step


def relative_error(u_next, u_prev, day):
    """Returns the corrections that Newton's method would make to both stages, relative to the
    concentrations, `[2, 20, ...]`."""
    stages = jnp.stack([u_next.stage, u_next.y])
    residual = pollu.radau_residual(stages, u_prev.y, day)
    correction = pollu.newton_correction(residual, stages, day)
    # With a constant Newton matrix, the derivative of the correction by the stages is the
    # identity. So no gradient has to pass through the solution of the linear system.
    constant = jax.lax.stop_gradient
    correction = constant(correction) + stages - constant(stages)
    return correction / constant(stages + pollu.like(stages[0], FLOOR))


def robust(residuum):
    """Computes the loss of a time level: the mean square, but bounded. Where the first step from
    a state far from balance is out of reach for the residual itself, the network learns nothing."""
    return jnp.mean(residuum**2 / (1 + residuum**2 / 9))


#
# The emulator
#


def cheap_stages(y, day):
    """Returns both stages by a scheme of first order, which the emulator improves."""
    return [
        pollu.euler_backward(y, pollu.sun(day, c * DT), c * DT, SWEEPS) for c in pollu.NODES
    ]


class Emulator(eqx.Module):
    """Advances a `State` by one step. A network changes the logarithms of the `cheap_stages`,
    in units of their typical error."""

    first: eqx.nn.Linear
    middle: list[eqx.nn.Linear]
    last: list[eqx.nn.Linear]  # one for each stage, at first with zeros
    error_sizes: jax.Array  # [2, 20]

    def __init__(self, key, error_sizes, *, width=32, depth=2):
        keys = jax.random.split(key, depth + 1)
        self.first = eqx.nn.Linear(2 * len(SPECIES) + 4, width, key=keys[0])
        self.middle = [eqx.nn.Linear(width, width, key=k) for k in keys[1:-1]]
        last = eqx.nn.Linear(width, len(SPECIES), key=keys[-1])
        self.last = 2 * [jax.tree.map(jnp.zeros_like, last)]
        self.error_sizes = error_sizes

    def __call__(self, state, day):
        stage, y = self.stages(state.y, day)
        return State(y, stage)

    def stages(self, y, day):
        """Maps `[20, ...]` to the list of both stages."""
        cheap = cheap_stages(y, day)
        logarithm = lambda y: jnp.log(y / pollu.like(y, TYPICAL) + 1e-3)
        change = logarithm(cheap[1]) - logarithm(y)
        light = jnp.stack([pollu.sun(day, c * DT) for c in (0, *pollu.NODES)] + [day.mean])
        hidden = jnp.concatenate([0.5 * logarithm(y), 2 * change, 2 * light])
        hidden = jax.nn.silu(apply(self.first, hidden))
        for layer in self.middle:
            hidden += jax.nn.silu(apply(layer, hidden))
        results = []
        sizes = jax.lax.stop_gradient(self.error_sizes)
        for x, layer, size in zip(cheap, self.last, sizes, strict=True):
            exponent = pollu.like(y, size) * apply(layer, hidden)
            results.append(pollu.conserve(x * jnp.exp(jnp.clip(exponent, -3, 3)), y))
        return results


def apply(layer, x):
    """Applies a layer to `[channels, ...]`."""
    return jnp.tensordot(layer.weight, x, 1) + pollu.like(x, layer.bias)


def error_sizes(key, num_cells=1024, num_steps=72):
    """Returns the typical relative error `[2, 20]` of `cheap_stages`, by their residual."""
    keys = jax.random.split(key)
    y, day = pollu.random_cells(keys[0], num_cells), pollu.random_days(keys[1], num_cells)

    def step(y, n):
        now = pollu.later(day, n)
        stage, y_next = (pollu.conserve(x, y) for x in cheap_stages(y, now))
        return y_next, relative_error(State(y_next, stage), State(y, y), now)

    errors = jax.jit(lambda y: jax.lax.scan(step, y, jnp.arange(num_steps))[1])(y)
    return 1e-6 + jnp.quantile(jnp.abs(errors), 0.9, axis=(0, 3))


#
# Training
#


def fresh_samples(key, num_samples):
    """Draws initial states and days, `[num_samples, ...]`."""
    keys = jax.random.split(key)
    y = pollu.random_cells(keys[0], num_samples).T
    return State(y, y), pollu.random_days(keys[1], num_samples)


def make_training(emulator, key, num_updates):
    """Returns (arrays of the emulator, optimizer, replay buffer) and `updates: carry, keys ->
    carry, loss`. The buffer holds states and days. Its first places get a fresh state after
    five steps on average, its last ones after a thousand."""
    rate = optax.warmup_cosine_decay_schedule(0, 2e-3, num_updates // 20, num_updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))
    optimizer = optax.apply_if_finite(optimizer, num_updates)  # skips bad updates
    shares = jnp.geomspace(0.2, 1e-3, BUFFER_SIZE)
    sizes = emulator.error_sizes

    def update(carry, key):
        emulator, opt_state, buffer = carry
        sample_key, fresh_key, replay_key = jax.random.split(key, 3)
        samples, (states, days) = sample(buffer, BATCH_SIZE, sample_key)
        data, inputs = jax.tree.map(lambda x: x[:, None], (states, days))  # one step

        def loss_fn(emulator):
            return residuum_loss(
                emulator,
                data,
                lambda u_next, u_prev, day: relative_error(u_next, u_prev, day) / sizes,
                inputs=inputs,
                time_level_loss=robust,
                has_aux=True,
            )

        (loss, rollout), grads = jax.value_and_grad(loss_fn, has_aux=True)(emulator)
        updates, opt_state = optimizer.update(grads, opt_state)
        buffer = put_back(
            buffer,
            samples,
            (rollout.final_state, pollu.later(days, 1)),
            fresh_samples(fresh_key, BATCH_SIZE),
            lost=diverged(rollout.final_state.y, bound=10),
            share=shares[samples],
            key=replay_key,
        )
        return (optax.apply_updates(emulator, updates), opt_state, buffer), loss

    @jax.jit
    def updates(carry, keys):
        carry, losses = jax.lax.scan(update, carry, keys)
        return carry, jnp.mean(losses)

    return (emulator, optimizer.init(emulator), fresh_samples(key, BUFFER_SIZE)), updates


def train_emulator(seed, num_updates, **options):
    """Returns a trained emulator, and the training time in seconds."""
    keys = jax.random.split(jax.random.key(seed), 4)
    emulator = Emulator(keys[0], error_sizes(keys[1]), **options)
    carry, updates = make_training(emulator, keys[2], num_updates)
    chunk = min(200, num_updates)
    chunks = jax.random.split(keys[3], (num_updates // chunk, chunk))
    (emulator, *_), seconds = common.train(updates, carry, chunks, f"{chunk} updates each")
    return emulator, seconds


#
# Evaluation
#


def nrmse(y, solution):
    """Returns the errors `[time, species]` of the reported species, over all cells."""
    indices = [SPECIES.index(name) for name in REPORTED]
    norm = lambda x: np.linalg.norm(np.asarray(x, np.float64)[:, indices], axis=2)
    return norm(y - solution) / norm(solution)


def main():
    args = common.parse_options(__doc__, "assets/chemistry.png", updates=(NUM_UPDATES, 20))
    emulator, _ = train_emulator(args.seed, args.updates)
    num_test, num_steps = (4, REPORT_STEPS[1]) if args.quick else (NUM_TEST, REPORT_STEPS[-1])
    states, days = fresh_samples(jax.random.key(args.seed + 1), num_test)

    def rollout(step, y, days):
        return jax.jit(lambda y: pollu.rollout(step, y, days, num_steps))(y)

    steppers = {
        "persistence": lambda y, day: y,
        "cheap scheme": lambda y, day: pollu.conserve(cheap_stages(y, day)[1], y),
        "emulator": lambda y, day: emulator.stages(y, day)[1],
    }
    trajectories = {name: rollout(step, states.y.T, days) for name, step in steppers.items()}
    jax.config.update("jax_enable_x64", True)
    double = jax.tree.map(lambda x: x.astype(jnp.float64), (states.y.T, days))
    solution = rollout(pollu.refined_radau, *double)
    errors = {name: nrmse(y, solution) for name, y in trajectories.items()}
    for name, error in errors.items():
        steps = [n for n in REPORT_STEPS if n <= num_steps]
        rows = {
            f"after {DT * n:.0f} minutes": [f"{x:.4f}" for x in error[n - 1]] for n in steps
        }
        common.print_table(f"nRMSE, {name}", REPORTED, rows)

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    hours = DT / 60 * np.arange(1, num_steps + 1)
    for cell, axis in enumerate(axes[:2]):
        for name, color in zip(("NO2", "NO", "O3", "PAN", "HNO3"), common.COLORS, strict=True):
            i = SPECIES.index(name)
            axis.plot(hours, 1000 * solution[:, i, cell], color=color, label=name)
            axis.plot(hours, 1000 * trajectories["emulator"][:, i, cell], ":", color="black")
        axis.set(title="solver, and emulator (dotted)", ylabel="concentration [ppb]")
    axes[0].legend(fontsize="small")
    largest = {name: np.max(error, axis=1) for name, error in errors.items()}
    largest = {name: np.concatenate([[0], error]) for name, error in largest.items()}
    common.plot_errors(axes[2], DT / 60, largest, "unseen cells, worst of eight species")
    axes[2].legend(fontsize="small")
    for axis in axes:
        axis.set(xlabel="time [h]")
    common.save_figure(args.output, figure)


if __name__ == "__main__":
    main()
