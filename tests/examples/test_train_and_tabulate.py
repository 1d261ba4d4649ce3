"""These tests verify what the studies share in studies/train_and_tabulate.py."""

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from studies import train_and_tabulate


def test_each_place_of_the_buffer_has_its_own_share_of_fresh_states():
    """Each place of the buffer has its own share of fresh states. Here every state grows by 1
    in each update, fresh states are 100, and states above 10 are lost."""
    loss_fn = train_and_tabulate.on_replayed_states(
        lambda u_next, u_prev: u_next - u_prev,
        lambda num_samples, key: jnp.full((num_samples, 1), 100.0),
        batch_size=4,
        fresh_share=jnp.array([0.0, 0.0, 0.0, 1.0]),
        bound=10,
    )
    buffer = jnp.array([[1.0], [2.0], [9.5], [4.0]])
    loss, buffer = loss_fn(lambda u: u + 1, buffer, jax.random.key(0))
    assert loss == 1
    assert jnp.all(buffer == jnp.array([[2.0], [3.0], [100.0], [100.0]]))


def test_minimise_remembers_and_minimises():
    """`minimise` passes its memory from update to update and minimises the loss. The memory
    counts the updates, each of which is a step of Adam towards the minimum."""
    target = jnp.array([1.0, -2.0])
    loss_fn = lambda x, memory, key: (jnp.sum((x - target) ** 2), memory + 1)
    counted = []

    def loss_and_count(x, memory, key):
        jax.debug.callback(lambda n: counted.append(int(n)), memory)
        return loss_fn(x, memory, key)

    options = dict(num_updates=400, learning_rate=0.1)
    x, seconds = common.minimise(
        "test", jnp.zeros(2), loss_and_count, jnp.array(0), jax.random.key(0), **options
    )
    jax.effects_barrier()
    assert jnp.allclose(x, target, atol=1e-2) and seconds > 0
    assert sorted(counted) == list(range(400))


@pytest.mark.parametrize("before", [False, True])
def test_float64_is_on_inside_and_as_before_outside(before):
    outside = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", before)
    try:
        with train_and_tabulate.float64():
            assert jnp.zeros(3).dtype == np.float64
        assert jax.config.jax_enable_x64 == before
    finally:
        jax.config.update("jax_enable_x64", outside)


def test_tables_have_medians_and_ranges():
    rows = [
        dict(model="a", seed=0, error="0.1", updates="5"),
        dict(model="a", seed=1, error="0.4", updates="5"),
        dict(model="a", seed=2, error="0.2", updates="5"),
        dict(model="b", seed="", error="3", updates=""),
    ]
    columns = {"error": ("error", "{:.1f}"), "updates": ("updates", "{:.0f}")}
    assert train_and_tabulate.medians(rows, "error") == {
        "a": (0.2, 0.1, 0.4),
        "b": (3.0, 3.0, 3.0),
    }
    lines = train_and_tabulate.markdown(rows, columns).splitlines()
    assert lines[2:] == ["| a | 0.2 | 5 |", "| *least, most* | 0.1, 0.4 |  |", "| b | 3.0 |  |"]
