"""Trains an emulator of the shallow-water equations (basin.py) in closed basins with coasts,
islands and an uneven bottom, under a wind that changes in time.

*Walls*: residual and emulator multiply by the mask of the faces, so nothing flows through them.
The emulator changes η by fluxes through faces, so it conserves mass. *Depth and coast* are
leaves of the state that never change. *The wind* is passed as `inputs`, one series for each
sample. *The residual* is that of a Hermite step from two states, of fourth order in time except
for the drag. Training needs no solver. The solvers only evaluate the emulator, in basins and
winds that are unseen in training.

    python examples/shallow_water.py             trains and writes assets/shallow_water.png
    python examples/shallow_water.py --quick     the same in seconds, to see that it runs
"""

from functools import partial

import basin
import common
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from canonical_convolutions import canonical_convolutions
from replay_buffer import diverged, put_back, sample

from residuum import residuum_loss


BUFFER_SIZE, BATCH_SIZE, NUM_TEST = 64, 4, 16
REPORT_STEPS = (1, 10, 50, 100)


def scaled_residual(u_next, u_prev, wind):
    """Scales the residual. Its mean square is then about 1 if nothing changes."""
    return basin.hermite(u_next, u_prev, wind) / basin.CHANGE_SIZE


#
# The emulator
#


class Emulator(eqx.Module):
    """Advances a `State` by one step. A network maps a residual to a correction of the fields:
    first the residual of no change, then the remaining one. It is linear in the residual, like
    the inverse of the step that it has to learn. The basin enters through gates."""

    basin_layers: list[eqx.nn.Conv2d]
    layers: list[eqx.nn.Conv2d]
    num_corrections: int = eqx.field(static=True)

    def __init__(self, key, *, width=16, depth=4, num_corrections=3):
        keys = jax.random.split(key, depth + 4)
        conv = partial(eqx.nn.Conv2d, padding="SAME")  # with zeros, as outside the basin
        gates = conv(16, depth * width, 1, key=keys[1])
        self.basin_layers = [conv(9, 16, 3, key=keys[0]), gates]
        layers = [conv(3, width, 3, key=keys[2], use_bias=False)]
        layers += [conv(width, width, 3, key=k, use_bias=False) for k in keys[3:-1]]
        last = jax.tree.map(jnp.zeros_like, conv(width, 4, 3, key=keys[-1], use_bias=False))
        self.layers = [*jax.tree.map(lambda x: 3**0.5 * x, layers), last]
        self.num_corrections = num_corrections

    def __call__(self, state, wind):
        gates = self.gates(state)

        def correct(u_next, _):
            residual = scaled_residual(state._replace(fields=u_next), state, wind)
            output = self.network(residual, gates)
            return u_next + self.correction(output, residual, state), None

        u_next, _ = jax.lax.scan(correct, state.fields, length=self.num_corrections)
        return state._replace(fields=u_next)

    def gates(self, state):
        """Computes gates `[depth, width, x, y]` from the quantities in the step's operator."""
        depths, shape = basin.face_depths(state.depth), state.mask.shape
        of_cells = jnp.stack([state.mask, 0.2 / state.depth, 5 * basin.coriolis(shape)])
        of_faces = [basin.open_faces(state.mask), depths, 20 * basin.drag(state.fields, depths)]
        first, second = self.basin_layers
        gates = 1 + second(jax.nn.gelu(first(jnp.concatenate([of_cells, *of_faces]))))
        return gates.reshape(len(self.layers) - 2, -1, *shape)

    def network(self, residual, gates):
        first, *middle, last = self.layers
        hidden = first(residual)
        for layer, gate in zip(middle, gates, strict=True):
            hidden += layer(gate * hidden)
        return last(hidden)

    def correction(self, output, residual, state):
        faces, depths = basin.open_faces(state.mask), basin.face_depths(state.depth)
        u_and_v, fluxes = (faces * x for x in jnp.split(output, 2))
        u_and_v *= basin.CHANGE_SIZE[:2]
        # η follows from continuity. The network adds the terms of fourth order.
        fluxes = basin.DT / 2 * depths * u_and_v + 0.1 * basin.CHANGE_SIZE[2] * fluxes
        eta = basin.inflow(*fluxes) - basin.CHANGE_SIZE[2, 0, 0] * residual[2]
        return jnp.concatenate([u_and_v, eta[None]])


#
# Training
#


def make_training(stepper, key, num_updates, *, residuum_fn=scaled_residual,
                  num_rollout_steps=1, fresh_share=0.01, **options):  # fmt: skip
    """Returns (arrays of the stepper, optimizer, replay buffer) and `updates: carry, keys ->
    carry, loss`. Besides the states, the buffer holds the amplitudes of the winds."""
    rate = optax.warmup_cosine_decay_schedule(0, 3e-3, num_updates // 20, num_updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))
    optimizer = optax.apply_if_finite(optimizer, num_updates)  # skips bad updates
    arrays, static = eqx.partition(stepper, eqx.is_array)

    def update(carry, key):
        arrays, opt_state, buffer = carry
        sample_key, wind_key, replay_key, states_key = jax.random.split(key, 4)
        samples, (states, amplitudes) = sample(buffer, BATCH_SIZE, sample_key)
        amplitudes = basin.amplitude_series(amplitudes, num_rollout_steps, wind_key)
        data = jax.tree.map(lambda x: x[:, None], states)  # [batch, num_snapshots, ...]
        inputs = basin.wind_stress(amplitudes)  # [batch, num_rollout_steps, 2, x, y]

        def loss_fn(arrays):
            return residuum_loss(
                eqx.combine(arrays, static), data, residuum_fn, inputs=inputs, has_aux=True,
                num_rollout_steps=num_rollout_steps, **options,
            )  # fmt: skip

        (loss, rollout), grads = jax.value_and_grad(loss_fn, has_aux=True)(arrays)
        updates, opt_state = optimizer.update(grads, opt_state, arrays)
        lost = diverged(rollout.final_state.fields / basin.FIELD_SIZE, bound=20)
        buffer = put_back(
            buffer,
            samples,
            (rollout.final_state, amplitudes[:, -1]),
            basin.random_samples(states_key, BATCH_SIZE),
            lost=lost,
            share=fresh_share,
            key=replay_key,
        )
        return (optax.apply_updates(arrays, updates), opt_state, buffer), loss

    @jax.jit
    @canonical_convolutions
    def updates(carry, keys):
        carry, losses = jax.lax.scan(update, carry, keys)
        return carry, jnp.mean(losses)

    return (arrays, optimizer.init(arrays), basin.random_samples(key, BUFFER_SIZE)), updates


def train_emulator(seed, num_updates, *, make_emulator=Emulator, **options):
    """Returns a trained emulator, and the training time in seconds."""
    keys = jax.random.split(jax.random.key(seed), 3)
    emulator = make_emulator(keys[0])
    carry, updates = make_training(emulator, keys[1], num_updates, **options)
    chunks = jax.random.split(keys[2], (num_updates // 20, 20))
    (arrays, *_), seconds = common.train(updates, carry, chunks, "20 updates each")
    return eqx.combine(arrays, emulator), seconds


#
# Evaluation
#


def main():
    args = common.parse_options(__doc__, "assets/shallow_water.png", updates=(3200, 20))
    emulator, _ = train_emulator(args.seed, args.updates)
    num_test, num_steps = (2, 10) if args.quick else (NUM_TEST, REPORT_STEPS[-1])
    keys = jax.random.split(jax.random.key(args.seed + 1), 2)
    states, amplitudes = basin.random_samples(keys[0], num_test)
    winds = basin.wind_stress(basin.amplitude_series(amplitudes, num_steps, keys[1]))
    steppers = {
        "Runge–Kutta": basin.runge_kutta,
        "persistence": lambda state, wind: state,
        "exact Crank–Nicolson": basin.exact_step(basin.crank_nicolson),
        "exact Hermite": basin.exact_step(basin.hermite),
        "emulator": emulator,
    }
    fields = {name: basin.rollout(stepper, states, winds) for name, stepper in steppers.items()}
    solution = fields.pop("Runge–Kutta")
    errors = {name: basin.relative_error(x, solution) for name, x in fields.items()}
    steps = [n for n in REPORT_STEPS if n <= num_steps]
    rows = {name: [f"{error[n]:.4f}" for n in steps] for name, error in errors.items()}
    common.print_table("nRMSE after", [f"step {n}" for n in steps], rows)
    figure, axes = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
    n = num_steps // 2
    pictures = {"solver": solution[0, n], "emulator": fields["emulator"][0, n]}
    pictures["difference × 10"] = 10 * (pictures["emulator"] - pictures["solver"])
    for axis, (name, x) in zip(axes, pictures.items(), strict=False):
        image = basin.show_basin(axis, f"η, {name}, step {n}", states.mask[0], x)
    figure.colorbar(image, ax=axes[2], shrink=0.8)
    common.plot_errors(axes[3], basin.DT, errors, "unseen basins and winds")
    axes[3].legend(fontsize="small")
    common.save_figure(args.output, figure)


if __name__ == "__main__":
    main()
