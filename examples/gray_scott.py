"""Trains an emulator of the Gray–Scott equations, two fields that form patterns, for a range of
feed and kill rates: a problem that does not train at the first attempt.

    ∂u/∂t = 0.16 ∇²u − uv² + feed (1 − u)
    ∂v/∂t = 0.08 ∇²v + uv² − (feed + kill) v,   (x, y) periodic, with a mesh width of 1

The residual is that of one Euler step, implicit in the diffusion and explicit in the reaction.
What makes it train: scaled fields and residuals, preconditioning, a bilinear emulator that
starts as the identity, small batches, and a replay buffer, so that the emulator learns from
patterns that it has grown itself. docs/your_own_problem.md explains and measures each of these.

    python examples/gray_scott.py             trains and writes assets/gray_scott.png
    python examples/gray_scott.py --quick     the same in seconds, to see that it runs
"""

from itertools import product
from typing import NamedTuple

import common
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from canonical_convolutions import canonical_convolutions

from residuum import residuum_loss


NUM_POINTS, DT = 64, 1.0
DIFFUSIVITY = np.array([0.16, 0.08])[:, None, None]  # of u, v
LOWEST_RATES, HIGHEST_RATES = np.array([0.03, 0.057]), np.array([0.05, 0.063])  # feed, kill
BUFFER_SIZE, BATCH_SIZE = 64, 4
NUM_TEST, TRANSIENT_STEPS, TEST_STEPS, REPORT_STEPS = 32, 200, 100, (1, 10, 50, 100)
FIELDS = {"u and v": slice(0, 2), "u": slice(0, 1), "v": slice(1, 2)}  # for the errors


class State(NamedTuple):  # with the rates, which both emulator and residual need
    fields: jax.Array  # u and v, [2, NUM_POINTS, NUM_POINTS]
    rates: jax.Array  # feed and kill, [2]


#
# The equation
#

COSINES = 2 * np.cos(2 * np.pi * np.arange(NUM_POINTS) / NUM_POINTS)
LAPLACIAN = COSINES[:, None] + COSINES[: NUM_POINTS // 2 + 1] - 4  # in Fourier space


def laplacian(fields):
    return sum(jnp.roll(fields, s, axis) for s in (1, -1) for axis in (1, 2)) - 4 * fields


def reaction(state):
    (u, v), (feed, kill) = state
    return jnp.stack([feed * (1 - u) - u * v**2, u * v**2 - (feed + kill) * v])


def imex_euler(next, prev):
    """Zero if `next` is one step of length `DT` after `prev`. `[2, NUM_POINTS, NUM_POINTS]`"""
    slope = DIFFUSIVITY * laplacian(next.fields) + reaction(prev)
    return next.fields - prev.fields - DT * slope


def invert_diffusion(fields):
    """(1 − DT · DIFFUSIVITY · ∇²)⁻¹ of fields `[2, NUM_POINTS, NUM_POINTS]`."""
    return jnp.fft.irfft2(jnp.fft.rfft2(fields) / (1 - DT * DIFFUSIVITY * LAPLACIAN))


def solver(state):
    """The state after one step. Only the evaluation uses it."""
    return State(invert_diffusion(state.fields + DT * reaction(state)), state.rates)


def random_states(key, num_samples):
    """Initial conditions from which patterns grow: u = 1 and v = 0, except for twelve spots."""

    def random_state(key):
        keys = jax.random.split(key, 4)
        centre = jax.random.uniform(keys[0], (12, 2, 1), maxval=NUM_POINTS)
        width = jax.random.uniform(keys[1], (12, 1, 1), minval=2, maxval=4)
        height = jax.random.uniform(keys[2], (12, 1, 1), minval=0.2, maxval=0.4)
        distance = jnp.abs(jnp.arange(NUM_POINTS) - centre)
        distance = jnp.minimum(distance, NUM_POINTS - distance) / width
        profile = jnp.exp(-(distance**2) / 2)
        v = jnp.max(height * profile[:, 0, :, None] * profile[:, 1, None, :], axis=0)
        rates = jax.random.uniform(keys[3], (2,), minval=LOWEST_RATES, maxval=HIGHEST_RATES)
        return State(jnp.stack([1 - 2 * v, v]), rates)

    return jax.vmap(random_state)(jax.random.split(key, num_samples))


#
# The emulator
#

# Measured once: mean and standard deviation of u and v in patterns, and the root mean square of
# the residual of `next = prev`, i.e., of what one step changes.
FIELD_MEAN, FIELD_SIZE = np.array([[0.75, 0.10], [0.25, 0.13]])[..., None, None]
CHANGE_SIZE = np.array([2e-3, 1.5e-3])[:, None, None]


def scaled_residual(next, prev):
    """Preconditioned, and with a mean square of about 1 if `next = prev` (persistence)."""
    return invert_diffusion(imex_euler(next, prev)) / CHANGE_SIZE


class Emulator(eqx.Module):
    """Advances a `State` by one time step; before training, leaves it as it is."""

    network: common.ConvNet

    def __init__(self, key):
        options = dict(activation=common.bilinear, gain=3**0.5, zero_last=True, key=key)
        self.network = common.ConvNet(2, (4, 16, 16, 2), (3, 1, 3), **options)

    def __call__(self, state):
        fields = (state.fields - FIELD_MEAN) / FIELD_SIZE
        rates = 2 * (state.rates - LOWEST_RATES) / (HIGHEST_RATES - LOWEST_RATES) - 1
        rates = jnp.broadcast_to(rates[:, None, None], fields.shape)
        change = CHANGE_SIZE * self.network(jnp.concatenate([fields, rates]))
        return State(state.fields + change, state.rates)


def train_emulator(*, num_updates, key):
    init_key, updates_key = jax.random.split(key)
    stepper, buffer = Emulator(init_key), random_states(init_key, BUFFER_SIZE)
    schedule = optax.cosine_decay_schedule(1e-2, num_updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    carry = stepper, optimizer.init(eqx.filter(stepper, eqx.is_array)), buffer

    @eqx.filter_jit
    @canonical_convolutions
    def update(carry, key):
        stepper, opt_state, buffer = carry
        sample_key, replay_key, states_key = jax.random.split(key, 3)
        samples = jax.random.choice(sample_key, BUFFER_SIZE, (BATCH_SIZE,), replace=False)
        data = jax.tree.map(lambda x: x[samples, None], buffer)  # [batch, num_snapshots, ...]
        loss_fn = lambda stepper: residuum_loss(stepper, data, scaled_residual, has_aux=True)
        (loss, aux), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(stepper)
        updates, opt_state = optimizer.update(grads, opt_state)

        fresh, final = random_states(states_key, BATCH_SIZE), aux.final_state
        lost = ~jnp.all(jnp.abs(final.fields) < 2, axis=(1, 2, 3))  # diverged, NaN included
        states = common.replay(final, fresh, lost=lost, share=0.01, key=replay_key)
        buffer = jax.tree.map(lambda x, y: x.at[samples].set(y), buffer, states)
        return (eqx.apply_updates(stepper, updates), opt_state, buffer), loss

    (stepper, *_), _ = common.train(update, carry, jax.random.split(updates_key, num_updates))
    return stepper


#
# Evaluation
#


def test_states(key, num_samples):
    """Unseen initial conditions with unseen rates, and the patterns that grow from them."""
    seeds = random_states(key, num_samples)
    grow = lambda state: jax.lax.fori_loop(0, TRANSIENT_STEPS, lambda _, s: solver(s), state)
    return {"seeds": seeds, "patterns": jax.jit(jax.vmap(grow))(seeds)}


def evaluate(stepper, states):
    """Fields `{name: [sample, time, 2, NUM_POINTS, NUM_POINTS]}` of solver, persistence and
    emulator, and the nRMSE of the latter two, `{"field, name": [time]}`."""
    steppers = {"solver": solver, "persistence": lambda state: state, "emulator": stepper}
    fields = {k: common.rollout(f, states, TEST_STEPS).fields for k, f in steppers.items()}
    errors = {}
    for (field, i), name in product(FIELDS.items(), ("persistence", "emulator")):
        pair = fields[name][:, :, i], fields["solver"][:, :, i]
        errors[f"{field}, {name}"] = common.error_over_time(*pair)
    return fields, errors


def main():
    args = common.parse_options(__doc__, "assets/gray_scott.png", updates=(10000, 10))
    train_key, test_key = jax.random.split(jax.random.key(args.seed))
    stepper = train_emulator(num_updates=args.updates, key=train_key)
    for start, states in test_states(test_key, 4 if args.quick else NUM_TEST).items():
        fields, errors = evaluate(stepper, states)
        rows = {name: [f"{e[n]:.4f}" for n in REPORT_STEPS] for name, e in errors.items()}
        common.print_table(f"nRMSE from {start}", [f"step {n}" for n in REPORT_STEPS], rows)

    figure, axes = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
    pictures = {name: fields[name][0, 50, 1] for name in ("solver", "emulator")}
    pictures["difference"] = pictures["emulator"] - pictures["solver"]
    for axis, (name, v) in zip(axes, pictures.items(), strict=False):
        image = common.show(axis, f"v, {name}, step 50", v, v.shape, cmap="viridis")
        figure.colorbar(image, ax=axis, shrink=0.8)
    common.plot_errors(axes[3], DT, {x: e for x, e in errors.items() if "and" not in x})
    axes[3].legend(fontsize="small")
    common.save_figure(args.output, figure)


if __name__ == "__main__":
    main()
