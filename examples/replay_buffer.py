"""Keeps a replay buffer: training continues from the final states of earlier rollouts.

The emulator is then trained along its own trajectories, as in a long rollout whose gradient is
cut between the updates. The buffer is a PyTree of states with leaves `[buffer_size, ...]`. Each
update takes a few states out of the buffer and puts `Rollout.final_state` back.
"""

import jax
import jax.numpy as jnp


def sample(buffer, batch_size, key):
    """Draws random states from the buffer, without replacement. Returns their indices and the
    states."""
    buffer_size = len(jax.tree.leaves(buffer)[0])
    samples = jax.random.choice(key, buffer_size, (batch_size,), replace=False)
    return samples, jax.tree.map(lambda x: x[samples], buffer)


def diverged(states, bound):
    """Returns `bool[batch]`: whether a state of `[batch, ...]` exceeds the bound or has a
    NaN."""
    is_fine = lambda x: jnp.all(jnp.abs(x) < bound, axis=tuple(range(1, x.ndim)))
    return ~jnp.all(jnp.stack([is_fine(x) for x in jax.tree.leaves(states)]), axis=0)


def replay(final_state, fresh, *, lost, share, key):
    """Returns the states from which training continues, with leaves `[batch, ...]`. These are
    the final states of a rollout, but fresh states replace the ones that are `lost` and a
    random `share` of the others. The share is a number, or one number for each state."""
    anew = lost | (jax.random.uniform(key, lost.shape) < share)
    choose = lambda x, y: jnp.where(anew.reshape(-1, *[1] * (x.ndim - 1)), x, y)
    return jax.tree.map(choose, fresh, final_state)


def put_back(buffer, samples, final_state, fresh, *, lost, share, key):
    """Returns the buffer with the states that `replay` returns in place of the `samples`."""
    states = replay(final_state, fresh, lost=lost, share=share, key=key)
    return jax.tree.map(lambda x, y: x.at[samples].set(y), buffer, states)
