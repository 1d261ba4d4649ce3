"""This file of a user shows what type checkers know about an installed wheel. CI type-checks
it, and no test runs it."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from typing import assert_type

import equinox as eqx
import jax

from residuum import Cuts, residuum_loss, Rollout


class Emulator(eqx.Module):
    """Has a keyword argument with a default, like the layers of Equinox."""

    kernel: jax.Array

    def __call__(self, u_prev: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return self.kernel * u_prev


class ForcedEmulator(eqx.Module):
    kernel: jax.Array

    def __call__(self, u_prev: jax.Array, forcing: jax.Array) -> jax.Array:
        return self.kernel * u_prev + forcing


def difference(u_next: jax.Array, u_prev: jax.Array) -> jax.Array:
    return u_next - u_prev


def forced(u_next: jax.Array, u_prev: jax.Array, forcing: jax.Array) -> jax.Array:
    return u_next - u_prev - forcing


def loss(data: jax.Array) -> jax.Array:
    stepper = lambda u_prev: 0.9 * u_prev
    residuum_fn = lambda u_next, u_prev: u_next - u_prev
    cuts = Cuts(bptt=5, prev=[True, False], next=jax.numpy.array(True))
    value = residuum_loss(stepper, data, residuum_fn, num_rollout_steps=2, cuts=cuts)
    assert_type(value, jax.Array)
    pair = residuum_loss(stepper, data, residuum_fn, weights=[1.0], has_aux=True)
    assert_type(pair, tuple[jax.Array, Rollout])
    residuum_loss(Emulator(data), data, difference, checkpoint=5, unroll=True)
    either = residuum_loss(stepper, data, residuum_fn, has_aux=bool(data.size))
    assert_type(either, jax.Array | tuple[jax.Array, Rollout])
    residuum_loss(stepper, data, residuum_fn, num_rollout_steps="10")  # type: ignore
    residuum_loss(stepper, data)  # type: ignore
    residuum_loss(lambda: data, data, difference)  # type: ignore
    residuum_loss(Emulator(data), data, lambda u_next: u_next)  # type: ignore
    residuum_loss(stepper, data, difference, no_such_option=1)  # type: ignore
    return value


def forced_loss(data: jax.Array) -> jax.Array:
    inputs = {"forcing": data, "step": jax.numpy.arange(3)}
    stepper = lambda u_prev, inputs_t: u_prev + inputs_t["forcing"]
    value = residuum_loss(stepper, data, forced, inputs=inputs, axis_name="batch")
    assert_type(value, jax.Array)
    residuum_loss(ForcedEmulator(data), data, forced, inputs=data, axis_name="a")
    pair = residuum_loss(stepper, data, forced, inputs=data, has_aux=True)
    assert_type(pair, tuple[jax.Array, Rollout])
    residuum_loss(lambda u, x, y, z: u, data, forced, inputs=data)  # type: ignore
    residuum_loss(stepper, data, lambda n, p, x, y: n, inputs=data)  # type: ignore
    return value
