"""A user's file: what type checkers know of an installed wheel. No test, but checked in CI."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from typing import assert_type

import jax

from residuum import Cuts, residuum_loss, Rollout


def loss(data: jax.Array) -> jax.Array:
    stepper = lambda u_prev: 0.9 * u_prev
    residuum_fn = lambda u_next, u_prev: u_next - u_prev
    cuts = Cuts(bptt=5, prev=[True, False], next=jax.numpy.array(True))
    value = residuum_loss(stepper, data, residuum_fn, num_rollout_steps=2, cuts=cuts)
    assert_type(value, jax.Array)
    pair = residuum_loss(stepper, data, residuum_fn, weights=[1.0], has_aux=True)
    assert_type(pair, tuple[jax.Array, Rollout])
    residuum_loss(stepper, data, residuum_fn, num_rollout_steps="10")  # type: ignore
    residuum_loss(stepper, data)  # type: ignore
    return value
