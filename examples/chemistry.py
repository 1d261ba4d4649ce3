"""Trains an emulator of the air-pollution chemistry POLLU (pollu.py): 20 species, 25 reactions,
and photolysis that follows the sun, which is passed as `inputs`.

*The residual* is that of a five-minute step of the two-stage Radau IIA method, multiplied by
the inverse of its Newton matrix. The result is the error of the state, to first order. The
first stage is a leaf of the state that the next step does not use. *The emulator* is a network
that corrects a cheap scheme. Concentrations stay positive, and atoms are conserved.

    python examples/chemistry.py             trains and writes assets/chemistry.png
    python examples/chemistry.py --quick     the same in a minute, to see that it runs
"""

from functools import partial
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


BUFFER_SIZE, BATCH_SIZE, NUM_UPDATES, NUM_TEST = 2048, 64, 120_000, 64
REPORT_STEPS = (1, 12, 72, 288)  # five minutes, 1, 6 and 24 hours


class State(NamedTuple):
    y: jax.Array  # [20]
    stage: jax.Array  # at a third of the last step


def robust(relative_error):
    """Computes the loss of a time level, a mean square with bounded terms. In the first step
    from a state far from balance, the residual itself is inaccurate: it should count little."""
    return jnp.mean(relative_error**2 / (1 + relative_error**2 / 9))


#
# The emulator
#


class Emulator(eqx.Module):
    """Advances a `State` by one step. A network corrects the logarithms of the cheap stages, in
    units of their typical error."""

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
        return State(*reversed(self.stages(state.y, day)))

    def stages(self, y, day):
        """Maps `[20, ...]` to the list of both stages."""
        cheap = pollu.computed_once(pollu.cheap_stages(y, day))
        before, after = (jnp.log(x / pollu.like(y, TYPICAL) + 1e-3) for x in (y, cheap[1]))
        light = jnp.stack([pollu.sun(day, c * DT) for c in (0, *pollu.NODES)] + [day.mean])
        hidden = jnp.concatenate([0.5 * before, 2 * (after - before), 2 * light])
        hidden = jax.nn.silu(apply(self.first, hidden))
        for layer in self.middle:
            hidden += jax.nn.silu(apply(layer, hidden))
        sizes = jax.lax.stop_gradient(self.error_sizes)
        outputs = [pollu.like(y, s) * apply(f, hidden) for s, f in zip(sizes, self.last)]  # noqa: B905
        # Without a bound, species that hardly change might grow for months.
        bound = 0.5 * jnp.abs(after - before) + 1e-4
        factors = [jnp.exp(jnp.clip(x, -bound, bound)) for x in outputs]
        return [pollu.conserve(x * factor, y) for x, factor in zip(cheap, factors, strict=True)]


def apply(layer, x):  # [channels, ...]
    return jnp.tensordot(layer.weight, x, 1) + pollu.like(x, layer.bias)


def fresh_samples(key, num_samples):
    """Draws initial states and days, `[num_samples, ...]`."""
    keys = jax.random.split(key)
    y = pollu.random_cells(keys[0], num_samples).T
    return State(y, y), pollu.random_days(keys[1], num_samples)


def error_sizes(key, num_cells=1024, num_steps=72):
    """Returns the typical relative errors `[2, 20]` of `pollu.cheap_stages`."""
    states, days = fresh_samples(key, num_cells)

    def step(y, n):
        day = pollu.later(days, n)
        stages = jnp.stack([pollu.conserve(x, y) for x in pollu.cheap_stages(y, day)])
        return stages[1], pollu.relative_error(stages, y, day)

    errors = jax.jit(lambda y: jax.lax.scan(step, y, jnp.arange(num_steps))[1])(states.y.T)
    return 1e-6 + jnp.quantile(jnp.abs(errors), 0.9, axis=(0, 3))


#
# Training
#


def train_emulator(seed, num_updates, **options):
    """Returns a trained emulator, and the training time in seconds. The replay buffer holds
    states and days. Its first places get a fresh state after 20 steps on average, its last ones
    after 1000."""
    keys = jax.random.split(jax.random.key(seed), 4)
    sizes = error_sizes(keys[1])
    emulator, buffer = Emulator(keys[0], sizes, **options), fresh_samples(keys[2], BUFFER_SIZE)
    rate = optax.warmup_cosine_decay_schedule(0, 2e-3, num_updates // 20, num_updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))
    shares = jnp.geomspace(0.05, 1e-3, BUFFER_SIZE)
    loss_of = partial(residuum_loss, time_level_loss=robust, has_aux=True)

    def residuum_fn(u_next, u_prev, day):
        stages = jnp.stack([u_next.stage, u_next.y])
        return pollu.relative_error(stages, u_prev.y, day) / sizes

    def update(carry, key):
        emulator, opt_state, buffer = carry
        sample_key, fresh_key, replay_key = jax.random.split(key, 3)
        samples, (states, days) = sample(buffer, BATCH_SIZE, sample_key)
        data, inputs = jax.tree.map(lambda x: x[:, None], (states, days))  # one step
        loss_fn = lambda emulator: loss_of(emulator, data, residuum_fn, inputs=inputs)
        (loss, rollout), grads = jax.value_and_grad(loss_fn, has_aux=True)(emulator)
        updates, opt_state = optimizer.update(grads, opt_state)
        last, fresh = rollout.final_state, fresh_samples(fresh_key, BATCH_SIZE)
        fate = dict(lost=diverged(last.y, bound=10), share=shares[samples], key=replay_key)
        buffer = put_back(buffer, samples, (last, pollu.later(days, 1)), fresh, **fate)
        return (optax.apply_updates(emulator, updates), opt_state, buffer), loss

    @jax.jit
    def updates(carry, keys):
        carry, losses = jax.lax.scan(update, carry, keys)
        return carry, jnp.mean(losses)

    carry, chunk = (emulator, optimizer.init(emulator), buffer), min(200, num_updates)
    chunks = jax.random.split(keys[3], (num_updates // chunk, chunk))
    (emulator, *_), seconds = common.train(updates, carry, chunks, f"{chunk} updates each")
    return emulator, seconds


#
# Evaluation
#


def main():
    args = common.parse_options(__doc__, "assets/chemistry.png", updates=(NUM_UPDATES, 20))
    emulator, _ = train_emulator(args.seed, args.updates)
    num_test, num_steps = (4, REPORT_STEPS[1]) if args.quick else (NUM_TEST, REPORT_STEPS[-1])
    states, days = fresh_samples(jax.random.key(args.seed + 1), num_test)
    steppers = {
        "persistence": lambda y, day: y,
        "cheap scheme": lambda y, day: pollu.conserve(pollu.cheap_stages(y, day)[1], y),
        "emulator": lambda y, day: emulator.stages(y, day)[1],
    }
    start = states.y.T, days
    trajectories = {k: pollu.rollout(step, *start, num_steps) for k, step in steppers.items()}
    jax.config.update("jax_enable_x64", True)
    start = jax.tree.map(lambda x: x.astype(jnp.float64), start)
    solution = pollu.rollout(pollu.refined_solution, *start, num_steps)
    errors = {name: pollu.nrmse(y, solution) for name, y in trajectories.items()}
    for name, error in errors.items():
        steps = [n for n in REPORT_STEPS if n <= num_steps]
        rows = {f"{DT * n:.0f} minutes": [f"{x:.4f}" for x in error[n - 1]] for n in steps}
        common.print_table(f"nRMSE of {name} after", pollu.REPORTED, rows)

    figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    hours = DT / 60 * np.arange(1, num_steps + 1)
    for name, color in zip(("NO2", "NO", "O3", "PAN", "HNO3"), common.COLORS, strict=True):
        i = SPECIES.index(name)
        axes[0].plot(hours, 1000 * solution[:, i, 0], color=color, label=name)
        axes[0].plot(hours, 1000 * trajectories["emulator"][:, i, 0], ":", color="black")
    axes[0].set(title="solution, and emulator (dotted)", ylabel="[ppb]")
    largest = {k: np.insert(np.max(error, axis=1), 0, 0) for k, error in errors.items()}
    common.plot_errors(axes[1], DT / 60, largest, "unseen cells, worst of eight species")
    for axis in axes:
        axis.set(xlabel="time [h]")
        axis.legend(fontsize="small")
    common.save_figure(args.output, figure)


if __name__ == "__main__":
    main()
