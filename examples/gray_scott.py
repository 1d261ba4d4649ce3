"""Trains an emulator of the Gray–Scott equations, two fields that form patterns, for a range of
feed and kill rates: a problem that does not train at the first attempt.

    ∂u/∂t = 0.16 ∇²u − uv² + feed (1 − u)
    ∂v/∂t = 0.08 ∇²v + uv² − (feed + kill) v,   (x, y) periodic, with a mesh width of 1

The residual is that of one Euler step, implicit in the diffusion and explicit in the reaction.
Training needs scaled fields and residuals, an emulator that starts as the identity, small
batches, and above all a replay buffer, so that the emulator learns from patterns it has grown
itself (docs/your_own_problem.md). Preconditioning and bilinearity cost nothing and gain little.

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
from replay_buffer import diverged, put_back, sample

from residuum import residuum_loss


NUM_POINTS, DT = 64, 1.0
DIFFUSIVITY = np.array([0.16, 0.08])[:, None, None]  # of u, v
LOWEST_RATES, HIGHEST_RATES = np.array([0.03, 0.057]), np.array([0.05, 0.063])  # feed, kill
NUM_TEST, TRANSIENT_STEPS, TEST_STEPS = 32, 200, 100
REPORT_STEPS = (1, 10, 50, 100)
FIELDS = {"u and v": slice(0, 2), "u": slice(0, 1), "v": slice(1, 2)}  # for the errors


class State(NamedTuple):
    """Holds two fields, and the rates of this sample, which both emulator and residual need."""

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


def imex_euler(u_next, u_prev):
    """Returns zero for each field if `u_next` is one step of length `DT` after `u_prev`."""
    slope = DIFFUSIVITY * laplacian(u_next.fields) + reaction(u_prev)
    return u_next.fields - u_prev.fields - DT * slope


def invert_diffusion(fields):
    """Applies (1 − DT · DIFFUSIVITY · ∇²)⁻¹ to fields `[2, NUM_POINTS, NUM_POINTS]`."""
    return jnp.fft.irfft2(jnp.fft.rfft2(fields) / (1 - DT * DIFFUSIVITY * LAPLACIAN))


def solver(state):
    """Returns the state after one step. Only the evaluation uses this solver."""
    return State(invert_diffusion(state.fields + DT * reaction(state)), state.rates)


def random_states(key, num_samples):
    """Draws initial conditions that grow patterns: u = 1 and v = 0, except in twelve spots."""
    keys = jax.random.split(key, 4)
    centre = jax.random.uniform(keys[0], (num_samples, 12, 2, 1), maxval=NUM_POINTS)
    width = jax.random.uniform(keys[1], (num_samples, 12, 1, 1), minval=2, maxval=4)
    height = jax.random.uniform(keys[2], (num_samples, 12, 1, 1), minval=0.2, maxval=0.4)
    distance = (jnp.arange(NUM_POINTS) - centre + NUM_POINTS / 2) % NUM_POINTS - NUM_POINTS / 2
    x, y = jnp.moveaxis(jnp.exp(-((distance / width) ** 2) / 2), 2, 0)
    v = jnp.max(height * x[..., :, None] * y[..., None, :], axis=1)
    rates = jax.random.uniform(keys[3], (num_samples, 2), float, LOWEST_RATES, HIGHEST_RATES)
    return State(jnp.stack([1 - 2 * v, v], axis=1), rates)


#
# The emulator
#

# Measured once: mean and standard deviation of u and v in patterns, RMS change in one step.
FIELD_MEAN = np.array([0.75, 0.10])[:, None, None]
FIELD_SIZE = np.array([0.25, 0.13])[:, None, None]
CHANGE_SIZE = np.array([2e-3, 1.5e-3])[:, None, None]


def scaled_residual(u_next, u_prev):
    """Preconditions the residual. Its mean square is then about 1 if nothing changes."""
    return invert_diffusion(imex_euler(u_next, u_prev)) / CHANGE_SIZE


class Emulator(eqx.Module):
    """Advances a `State` by one time step. Before training, it leaves the state unchanged."""

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


def make_training(stepper, key, *, num_updates, learning_rate=1e-2, residuum_fn=scaled_residual,
                  buffer_size=64, batch_size=4, fresh_share=0.01, **options):  # fmt: skip
    """Returns (stepper, optimizer, replay buffer) and `update: carry, key -> carry, loss`."""
    schedule = optax.cosine_decay_schedule(learning_rate, num_updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    opt_state = optimizer.init(eqx.filter(stepper, eqx.is_array))

    @eqx.filter_jit
    @canonical_convolutions
    def update(carry, key):
        stepper, opt_state, buffer = carry
        sample_key, replay_key, states_key = jax.random.split(key, 3)
        samples, states = sample(buffer, batch_size, sample_key)
        data = jax.tree.map(lambda x: x[:, None], states)  # [batch, num_snapshots, ...]
        loss_fn = lambda model: residuum_loss(model, data, residuum_fn, has_aux=True, **options)
        (loss, rollout), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(stepper)
        updates, opt_state = optimizer.update(grads, opt_state)
        stepper = eqx.apply_updates(stepper, updates)
        final_state, fresh = rollout.final_state, random_states(states_key, batch_size)
        which = dict(lost=diverged(final_state.fields, bound=2), share=fresh_share)
        buffer = put_back(buffer, samples, final_state, fresh, **which, key=replay_key)
        return (stepper, opt_state, buffer), loss

    return (stepper, opt_state, random_states(key, buffer_size)), update


#
# Evaluation
#


def evaluation_states(key, num_samples):
    """Returns unseen initial conditions with unseen rates, and the patterns grown from them."""
    seeds = random_states(key, num_samples)
    grow = lambda state: jax.lax.fori_loop(0, TRANSIENT_STEPS, lambda _, s: solver(s), state)
    return {"seeds": seeds, "patterns": jax.jit(jax.vmap(grow))(seeds)}


def evaluate(stepper, states):
    """Returns the fields of solver, persistence and emulator, `{name: [sample, time, 2, x,
    y]}`, and the nRMSE of persistence and of the emulator, `{"field, name": [time]}`."""
    steppers = {"solver": solver, "persistence": lambda state: state, "emulator": stepper}
    u = {name: common.rollout(f, states, TEST_STEPS).fields for name, f in steppers.items()}
    errors = {}
    for (field, i), name in product(FIELDS.items(), ("persistence", "emulator")):
        pair = u[name][:, :, i], u["solver"][:, :, i]
        errors[f"{field}, {name}"] = common.error_over_time(*pair)
    return u, errors


def main():
    args = common.parse_options(__doc__, "assets/gray_scott.png", updates=(10000, 10))
    keys = jax.random.split(jax.random.key(args.seed), 4)
    carry, update = make_training(Emulator(keys[0]), keys[1], num_updates=args.updates)
    (stepper, *_), _ = common.train(update, carry, jax.random.split(keys[2], args.updates))
    tests = evaluation_states(keys[3], 4 if args.quick else NUM_TEST)
    results = {start: evaluate(stepper, states) for start, states in tests.items()}
    for start, (_, errors) in results.items():
        rows = {name: [f"{e[n]:.4f}" for n in REPORT_STEPS] for name, e in errors.items()}
        common.print_table(f"nRMSE from {start}", [f"step {n}" for n in REPORT_STEPS], rows)

    fields, errors = results["patterns"]
    figure, axes = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
    pictures = {name: fields[name][0, 50, 1] for name in ("solver", "emulator")}
    pictures["difference"] = pictures["emulator"] - pictures["solver"]
    for axis, (name, v) in zip(axes, pictures.items(), strict=False):
        image = common.show(axis, f"v, {name}, step 50", v, v.shape, cmap="viridis")
        figure.colorbar(image, ax=axis, shrink=0.8)
    names = ("u, persistence", "u, emulator", "v, persistence", "v, emulator")
    common.plot_errors(axes[3], DT, {name: errors[name] for name in names})
    axes[3].legend(fontsize="small")
    common.save_figure(args.output, figure)


if __name__ == "__main__":
    main()
