"""With symbolic sizes, `jax.export` makes one program for every batch and every grid."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from residuum import Cuts, residuum_loss
from test_residuum import assert_close, EXTRA, textbook_loss
from tests.common import slow


jax_export = pytest.importorskip("jax.export", reason="needs a newer JAX")

NUM_STEPS = 4
OPTIONS = [*EXTRA, {"has_aux": True}, {"axis_name": "batch"}]


def loss(loss_fn, w, data, forcing, weights, bptt, **options):
    """Evaluates the loss for any batch size and any grid size, since the network is a
    convolution."""

    def stepper(u, f):
        halo = jnp.concatenate([u[-1:], u, u[:1]])
        return jnp.tanh(w[0] * halo[:-2] + w[1] * u + w[2] * halo[2:]) + f

    residuum_fn = lambda u_next, u_prev, f: u_next - u_prev * jnp.roll(f, 1)
    prev = np.array([True, False, True, False])
    options |= dict(num_rollout_steps=NUM_STEPS, weights=weights, cuts=Cuts(bptt, prev))
    result = loss_fn(stepper, data, residuum_fn, inputs=forcing, **options)
    return result[0] if "has_aux" in options else result


def arguments(batch, size):
    normal = np.random.default_rng(0).normal
    shapes = (3,), (batch, 2, size), (batch, NUM_STEPS, size), (NUM_STEPS,)
    return [jnp.asarray(normal(size=shape)) for shape in shapes]


BPTT = (False, 1, 2, 3, [True, False, True, False])
ALL = [pytest.param(*case, marks=slow) for case in itertools.product(BPTT, OPTIONS)]


@pytest.mark.parametrize("bptt, options", [(False, {}), (1, {"checkpoint": 2}), *ALL], ids=str)
def test_an_exported_gradient_is_that_of_every_batch_and_grid(bptt, options):
    scope = jax_export.SymbolicScope(["n >= 2"])
    b, n = jax_export.symbolic_shape("b, n", scope=scope)
    shapes = (3,), (b, 2, n), (b, NUM_STEPS, n), (NUM_STEPS,)

    def value_and_grad(loss_fn, *args, **options):
        f = lambda *args: loss(loss_fn, *args, bptt, **options)
        return jax.value_and_grad(f, (0, 1, 2, 3))(*args)

    ours = jax.jit(lambda *args: value_and_grad(residuum_loss, *args, **options))
    exported = jax_export.export(ours)(*[jax.ShapeDtypeStruct(s, float) for s in shapes])
    for sizes in [(1, 5), (3, 8)]:
        args = arguments(*sizes)
        expected = jax.jit(lambda *args: value_and_grad(textbook_loss, *args))(*args)
        assert_close(exported.call(*args), expected, what=sizes)
