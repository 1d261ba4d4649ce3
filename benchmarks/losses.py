"""Computes the same loss in several ways: by `residuum_loss`, and as one writes it by hand.

Each way is a function `(stepper, data, residuum_fn, num_steps, k)`, where `k` is the number of
steps between two cuts, or False. `stepper` and `residuum_fn` are functions of one sample.
"""

from functools import partial

import jax
import jax.numpy as jnp

from residuum import Cuts, residuum_loss


def with_residuum(stepper, data, residuum_fn, num_steps, k, **options):
    options |= dict(num_rollout_steps=num_steps, cuts=Cuts(bptt=k))
    return residuum_loss(stepper, data, residuum_fn, **options)


def with_plain_scan(stepper, data, residuum_fn, num_steps, k, scan=jax.lax.scan):
    """Scans over the steps, with `stop_gradient` under a mask."""

    def step(u_prev, cut):
        u_next = jax.vmap(stepper)(u_prev)
        level_loss = jnp.mean(jax.vmap(residuum_fn)(u_next, u_prev) ** 2)
        if k is not False:
            u_next = jnp.where(cut, jax.lax.stop_gradient(u_next), u_next)
        return u_next, level_loss

    cuts = (jnp.arange(num_steps) + 1) % (k or 1) == 0
    _, losses = scan(step, data[:, 0], cuts)
    return jnp.sum(losses)


def with_checkpointed_segments(stepper, data, residuum_fn, num_steps, k, length=1):
    """Scans over segments, each of which is a `jax.checkpoint` of a scan over its steps and
    ends in `stop_gradient`. If nothing is cut, the segments have `length` steps."""

    def step(u_prev, _):
        u_next = jax.vmap(stepper)(u_prev)
        return u_next, jnp.mean(jax.vmap(residuum_fn)(u_next, u_prev) ** 2)

    def segment_of(length):
        @partial(jax.checkpoint, prevent_cse=False)
        def segment(u, _):
            u, losses = jax.lax.scan(step, u, length=length)
            return u if k is False else jax.lax.stop_gradient(u), jnp.sum(losses)

        return segment

    length = k or length
    num_segments, remainder = divmod(num_steps, length)
    u, losses = jax.lax.scan(segment_of(length), data[:, 0], length=num_segments)
    loss = jnp.sum(losses)
    if remainder:
        loss += segment_of(remainder)(u, None)[1]
    return loss


def heat_residuum(u_next, u_prev, axes, roll=jnp.roll):
    """Computes the residual of an implicit Euler step of the heat equation, periodic in `axes`.
    `roll` is the function of JAX or of PyTorch."""
    laplacian = sum(roll(u_next, 1, a) - 2 * u_next + roll(u_next, -1, a) for a in axes)
    return u_next - u_prev - 0.01 * laplacian
