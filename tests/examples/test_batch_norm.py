"""The running statistics of examples/batch_norm.py are those of the whole batch."""

import batch_norm
import chex
import jax
import jax.numpy as jnp
import pytest

from tests.common import config, ROOT, run_program


def running_statistics(u, w_in, b_in, w_out, b_out):
    """Computes the running statistics of three steps of the emulator by hand, with momentum
    0.99."""
    mean, variance = 0, 1
    for _ in range(3):
        hidden = u @ w_in + b_in
        batch_mean, batch_variance = jnp.mean(hidden, axis=0), jnp.var(hidden, axis=0)
        mean = 0.99 * mean + 0.01 * batch_mean
        variance = 0.99 * variance + 0.01 * batch_variance
        normed = (hidden - batch_mean) / jnp.sqrt(batch_variance + 1e-5)
        u = u + jnp.tanh(normed) @ w_out + b_out
    return mean, variance


def layers_of(library, network):
    hidden, out = network.hidden, network.out
    if library == "equinox":
        return hidden.weight.T, hidden.bias, out.weight.T, out.bias
    return [x[...] for x in (hidden.kernel, hidden.bias, out.kernel, out.bias)]


@pytest.mark.parametrize("library", ["equinox", "flax"])
@config("jax_enable_x64", False)
def test_statistics_are_those_of_the_whole_batch(library):
    data = jax.random.normal(jax.random.key(0), (64, 1, 32))
    network, grads, statistics = getattr(batch_norm, f"with_{library}")(data)
    expected = running_statistics(data[:, 0], *layers_of(library, network))
    mean, variance = [x for x in jax.tree.leaves(statistics) if x.shape == (64,)]
    chex.assert_trees_all_close((mean, variance), expected, rtol=1e-3, atol=1e-5)
    assert any(jnp.any(g != 0) for g in jax.tree.leaves(grads))


def test_it_runs(tmp_path):
    output = run_program(ROOT / "examples" / "batch_norm.py", cwd=tmp_path)
    assert [line.split(":")[0] for line in output.splitlines()] == ["Equinox", "Flax NNX"]
