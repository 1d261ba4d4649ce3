"""Trains an emulator of the Gray–Scott equations: two fields that form patterns, at any feed
and kill rate of a range.

    ∂u/∂t = 0.16 ∇²u - uv² + feed (1 - u)
    ∂v/∂t = 0.08 ∇²v + uv² - (feed + kill) v,   (x, y) periodic, with a mesh width of 1

The residuum is one implicit–explicit Euler step: diffusion is implicit, the reaction explicit.
All that one does beyond writing the residuum is an item of `Recipe`: docs/your_own_problem.md
goes through them, benchmarks/gray_scott_ablation.py takes one away at a time. Training needs no
solver and no data but what patterns grow from: a pool of states goes on with the last states of
each update, so that the emulator grows its own patterns to train on.

    python examples/gray_scott.py             trains and writes the figure
    python examples/gray_scott.py --quick     in seconds, to see that it runs
"""

import argparse
import pathlib
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from convolutions_on_cpu import canonical_convolutions
from tqdm import tqdm

from residuum import Cuts, residuum_loss


NUM_POINTS = 64
DT = 1.0
DIFFUSIVITY = np.array([0.16, 0.08])[:, None, None]  # of u, v
LOWEST_RATES, HIGHEST_RATES = np.array([0.03, 0.057]), np.array([0.05, 0.063])  # feed, kill

NUM_TEST, TRANSIENT_STEPS, TEST_STEPS = 32, 200, 100
REPORT_STEPS = (1, 10, 50, 100)


class State(NamedTuple):
    """Of one sample. The rates are carried along: who sees the state sees them, too."""

    fields: jax.Array  # u and v, [2, NUM_POINTS, NUM_POINTS]
    rates: jax.Array  # feed and kill, [2]


#
# The equation
#

COSINES = 2 * np.cos(2 * np.pi * np.arange(NUM_POINTS) / NUM_POINTS)
LAPLACIAN = COSINES[:, None] + COSINES[: NUM_POINTS // 2 + 1] - 4  # symbol of the one below


def laplacian(fields):
    neighbours = [jnp.roll(fields, shift, axis) for shift in (1, -1) for axis in (1, 2)]
    return sum(neighbours) - 4 * fields


def reaction(state):
    (u, v), (feed, kill) = state
    return jnp.stack([feed * (1 - u) - u * v**2, u * v**2 - (feed + kill) * v])


def imex_euler(next, prev):
    """Zero if `next` is one step of length `DT` after `prev`. `[2, NUM_POINTS, NUM_POINTS]`"""
    slope = DIFFUSIVITY * laplacian(next.fields) + reaction(prev)
    return next.fields - prev.fields - DT * slope


def invert_diffusion(fields):
    """(1 - DT · DIFFUSIVITY · ∇²)⁻¹ of fields `[2, NUM_POINTS, NUM_POINTS]`."""
    return jnp.fft.irfft2(jnp.fft.rfft2(fields) / (1 - DT * DIFFUSIVITY * LAPLACIAN))


def solver(state):
    """The state after one step: the judge."""
    return State(invert_diffusion(state.fields + DT * reaction(state)), state.rates)


def random_states(key, num_samples):
    """What patterns grow from: u = 1 and v = 0, but for a dozen of spots."""

    def random_state(key):
        keys = jax.random.split(key, 4)
        centre = jax.random.uniform(keys[0], (12, 2, 1), maxval=NUM_POINTS)
        width = jax.random.uniform(keys[1], (12, 1, 1), minval=2, maxval=4)
        height = jax.random.uniform(keys[2], (12, 1, 1), minval=0.2, maxval=0.4)
        distance = jnp.abs(jnp.arange(NUM_POINTS) - centre)
        distance = jnp.minimum(distance, NUM_POINTS - distance)
        profile = jnp.exp(-((distance / width) ** 2) / 2)
        v = jnp.max(height * profile[:, 0, :, None] * profile[:, 1, None, :], axis=0)
        rates = jax.random.uniform(keys[3], (2,), minval=LOWEST_RATES, maxval=HIGHEST_RATES)
        return State(jnp.stack([1 - 2 * v, v]), rates)

    return jax.vmap(random_state)(jax.random.split(key, num_samples))


#
# The emulator
#


class Recipe(NamedTuple):
    scale_fields: bool = True
    scale_residua: bool = True
    begin_at_identity: bool = True
    precondition: bool = True
    products: bool = True  # as hidden channels of the network; else GELU
    num_rollout_steps: int = 1  # with a pool, the next update goes on where this one ends
    cuts: Cuts = Cuts()
    pool_size: int = 64  # 0: new random states for each update
    batch_size: int = 4


# Measured once: mean and standard deviation of u and v where there are patterns, and the size
# of the residuum where u_next is u_prev, i.e., of what one step changes.
FIELD_MEAN, FIELD_SIZE = np.array([[0.75, 0.10], [0.25, 0.13]])[..., None, None]
CHANGE_SIZE = np.array([2e-3, 1.5e-3])[:, None, None]


def make_residuum_fn(recipe):
    def residuum_fn(next, prev):
        residuum = imex_euler(next, prev)
        if recipe.precondition:
            residuum = invert_diffusion(residuum)
        return residuum / CHANGE_SIZE if recipe.scale_residua else residuum

    return residuum_fn


class ConvNet(eqx.Module):
    """Advances a state. Its hidden channels are products of two, as the reaction is one."""

    layers: list[eqx.nn.Conv2d]
    recipe: Recipe = eqx.field(static=True)

    def __init__(self, recipe, *, width=32, kernel_sizes=(3, 1, 3), key):
        hidden = width // 2 if recipe.products else width
        channels_in, channels_out = (4, hidden, hidden), (width, width, 2)
        keys = jax.random.split(key, 3)
        layers = [
            eqx.nn.Conv2d(
                c_in, c_out, size, padding="SAME", padding_mode="CIRCULAR", key=layer_key
            )
            for c_in, c_out, size, layer_key in zip(
                channels_in, channels_out, kernel_sizes, keys, strict=True
            )
        ]
        # Equinox's weights have a third of the variance 1 / fan_in, and train more slowly.
        self.layers = jax.tree.map(lambda x: 3**0.5 * x, layers)
        if recipe.begin_at_identity:
            self.layers[-1] = jax.tree.map(jnp.zeros_like, self.layers[-1])
        self.recipe = recipe

    def __call__(self, state):
        fields, rates = state
        if self.recipe.scale_fields:
            fields = (fields - FIELD_MEAN) / FIELD_SIZE
            rates = 2 * (rates - LOWEST_RATES) / (HIGHEST_RATES - LOWEST_RATES) - 1
        rates = jnp.broadcast_to(rates[:, None, None], fields.shape)
        hidden = jnp.concatenate([fields, rates])
        for layer in self.layers[:-1]:
            hidden = layer(hidden)
            if self.recipe.products:
                a, b = jnp.split(hidden, 2)
                hidden = a * b
            else:
                hidden = jax.nn.gelu(hidden)
        output = self.layers[-1](hidden)
        if self.recipe.begin_at_identity:
            size = CHANGE_SIZE if self.recipe.scale_fields else 1.0
            return State(state.fields + size * output, state.rates)
        mean, size = (FIELD_MEAN, FIELD_SIZE) if self.recipe.scale_fields else (0.0, 1.0)
        return State(mean + size * output, state.rates)


#
# Training
#


def make_update(recipe, num_updates, learning_rate=1e-2):
    """Returns `start: key -> carry` and `update: (*carry, key) -> (*carry, loss)`, where the
    carry is the stepper, the state of the optimizer and the pool of states."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(learning_rate, num_updates)),
    )
    residuum_fn = make_residuum_fn(recipe)

    def start(key):
        stepper = ConvNet(recipe, key=key)
        opt_state = optimizer.init(eqx.filter(stepper, eqx.is_array))
        return stepper, opt_state, random_states(key, recipe.pool_size or recipe.batch_size)

    @eqx.filter_jit
    @canonical_convolutions  # without which they are slow in a loop on a CPU
    def update(stepper, opt_state, pool, key):
        choice_key, anew_key, states_key = jax.random.split(key, 3)
        size = len(pool.rates)
        chosen = jax.random.choice(choice_key, size, (recipe.batch_size,), replace=False)

        def loss_fn(stepper):
            return residuum_loss(
                stepper,
                jax.tree.map(lambda x: x[chosen, None], pool),
                residuum_fn,
                num_rollout_steps=recipe.num_rollout_steps,
                cuts=recipe.cuts,
                has_aux=True,
            )

        (loss, rollout), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(stepper)
        updates, opt_state = optimizer.update(grads, opt_state)
        stepper = eqx.apply_updates(stepper, updates)

        # The states go on in the pool. Some start anew, and those that went astray.
        last = rollout.final_state
        anew = jax.random.uniform(anew_key, (recipe.batch_size,)) < 0.01
        anew |= ~jnp.all(jnp.abs(last.fields) < 2, axis=(1, 2, 3))  # also where not a number
        anew |= recipe.pool_size == 0
        first = random_states(states_key, recipe.batch_size)
        choose = jax.vmap(lambda anew, *states: jax.tree.map(partial(jnp.where, anew), *states))
        states = choose(anew, first, last)
        pool = jax.tree.map(lambda x, y: x.at[chosen].set(y), pool, states)
        return stepper, opt_state, pool, loss / recipe.num_rollout_steps

    return start, update


def train(recipe, *, num_updates, key, learning_rate=1e-2):
    start_key, updates_key = jax.random.split(key)
    start, update = make_update(recipe, num_updates, learning_rate)
    carry = start(start_key)
    progress = tqdm(jax.random.split(updates_key, num_updates))
    for i, update_key in enumerate(progress):
        *carry, loss = update(*carry, update_key)
        if i % 20 == 0 or i == num_updates - 1:
            progress.set_postfix(loss=f"{loss:.1e}")
    return carry[0]


#
# The judgement
#


@eqx.filter_jit
@canonical_convolutions
def rollout(stepper, states):
    """Fields `[batch, TEST_STEPS + 1, 2, NUM_POINTS, NUM_POINTS]`."""
    step = lambda states, _: (jax.vmap(stepper)(states), states.fields)
    return jnp.moveaxis(jax.lax.scan(step, states, length=TEST_STEPS + 1)[1], 0, 1)


def test_states(key, num_samples=NUM_TEST):
    """Unseen initial conditions with unseen rates, and the patterns that grow from them."""
    seeds = random_states(key, num_samples)
    advance = lambda state: jax.lax.fori_loop(0, TRANSIENT_STEPS, lambda _, s: solver(s), state)
    return {"seeds": seeds, "patterns": jax.jit(jax.vmap(advance))(seeds)}


def error_over_time(fields, reference):
    """nRMSE `[time]`: ‖fields - reference‖ / ‖reference‖, mean over samples."""
    difference, size = (
        jnp.sqrt(jnp.sum(x**2, axis=(-3, -2, -1))) for x in (fields - reference, reference)
    )
    return jnp.mean(difference / size, axis=0)


FIELDS = {"u and v": slice(0, 2), "u": slice(0, 1), "v": slice(1, 2)}


def judge(trajectories):
    """Error over time by field and name, of trajectories by name, "solver" one of them."""
    reference = trajectories["solver"]
    return {
        (field, name): error_over_time(fields[:, :, channels], reference[:, :, channels])
        for field, channels in FIELDS.items()
        for name, fields in trajectories.items()
        if name != "solver"
    }


def print_table(start, errors):
    steps = "".join(f"{f'step {n}':>10}" for n in REPORT_STEPS)
    print(f"\n{f'nRMSE from {start} after':<28}{steps}")
    for (field, name), error in errors.items():
        row = "".join(f"{error[n]:>10.4f}" for n in REPORT_STEPS)
        print(f"{field:<14}{name:<14}{row}")
    better = all(
        jnp.all(errors[field, "emulator"][1:] < errors[field, "persistence"][1:])
        for field in FIELDS
    )
    verb = "is" if better else "is NOT"
    print(f"The emulator {verb} better than persistence at every step, in every field.")


def save_figure(path, trajectories, errors):
    """v of one sample at step 50, and the error over time by field."""
    figure, axes = plt.subplots(
        1, 4, figsize=(13, 3.3), width_ratios=(1, 1, 1, 1.3), layout="constrained"
    )
    v, v_emulated = (trajectories[name][0, 50, 1] for name in ("solver", "emulator"))
    pictures = {"solver": v, "emulator": v_emulated, "difference": v_emulated - v}
    for axis, (name, field) in zip(axes, pictures.items(), strict=False):
        style = dict(vmin=0, vmax=v.max(), cmap="viridis")
        if name == "difference":
            limit = jnp.max(jnp.abs(field))
            style = dict(vmin=-limit, vmax=limit, cmap="RdBu_r")
        image = axis.imshow(field.T, origin="lower", **style)
        axis.set(title=f"v, {name}, step 50", xticks=[], yticks=[])
        figure.colorbar(image, ax=axis, shrink=0.8)
    for field, color in (("u", "#0072B2"), ("v", "#D55E00")):  # colour-blind safe
        for name, line in (("persistence", ":"), ("emulator", "-")):
            error = errors[field, name]
            label = f"{field}, {name}"
            axes[3].semilogy(
                np.arange(1, len(error)), error[1:], line, color=color, label=label
            )
    axes[3].set(title="unseen patterns and rates", xlabel="step", ylabel="nRMSE")
    axes[3].grid(alpha=0.3)
    axes[3].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=10000)
    parser.add_argument("--output", type=pathlib.Path, default="assets/gray_scott.png")
    parser.add_argument("--quick", action="store_true", help="10 updates, 4 test samples")
    args = parser.parse_args()

    train_key, test_key = jax.random.split(jax.random.key(args.seed))
    num_updates = 10 if args.quick else args.updates
    stepper = train(Recipe(), num_updates=num_updates, key=train_key)

    steppers = {"solver": solver, "persistence": lambda state: state, "emulator": stepper}
    num_test = 4 if args.quick else NUM_TEST
    for start, states in test_states(test_key, num_test).items():
        trajectories = {name: rollout(s, states) for name, s in steppers.items()}
        errors = judge(trajectories)
        print_table(start, errors)
    save_figure(args.output, trajectories, errors)
    print(f"\nFigure: {args.output}")


if __name__ == "__main__":
    main()
