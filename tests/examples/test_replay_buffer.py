"""examples/replay_buffer.py chooses the states from which training continues."""

import jax
import jax.numpy as jnp
import replay_buffer


def test_final_states_are_replaced_if_lost_and_a_share_of_the_others_by_chance():
    final = {"u": jnp.zeros((1000, 2, 3)), "n": jnp.zeros(1000, int)}
    fresh = jax.tree.map(lambda x: x + 1, final)
    lost = jnp.arange(1000) < 100
    for share, least, most in ((0.0, 100, 100), (1.0, 1000, 1000), (0.1, 150, 230)):
        options = dict(lost=lost, share=share, key=jax.random.key(0))
        states = replay_buffer.replay(final, fresh, **options)
        anew = states["n"] == 1
        assert jnp.all(anew[:100]) and least <= jnp.sum(anew) <= most
        assert jnp.array_equal(states["u"], jnp.where(anew[:, None, None], fresh["u"], 0))


def test_states_are_put_back_where_they_were_taken():
    buffer = {"u": jnp.arange(12.0).reshape(6, 2), "n": jnp.arange(6)}
    samples, states = replay_buffer.sample(buffer, 3, jax.random.key(0))
    assert len(set(samples.tolist())) == 3
    for name, x in buffer.items():
        assert jnp.array_equal(states[name], x[samples])

    moved = jax.tree.map(lambda x: x + 10, states)
    fresh = jax.tree.map(lambda x: x + 20, states)
    options = dict(lost=jnp.array([False, True, False]), share=0.0, key=jax.random.key(0))
    new_buffer = replay_buffer.put_back(buffer, samples, moved, fresh, **options)
    change = jnp.zeros(6, int).at[samples].set(jnp.array([10, 20, 10]))
    assert jnp.array_equal(new_buffer["n"], buffer["n"] + change)
    assert jnp.array_equal(new_buffer["u"], buffer["u"] + change[:, None])


def test_states_have_diverged_if_an_entry_is_too_large_or_not_a_number():
    u = jnp.zeros((4, 2, 3)).at[1, 0, 2].set(-2.0).at[2, 1, 1].set(jnp.nan)
    assert replay_buffer.diverged(u, 1.5).tolist() == [False, True, True, False]
    fields = {"u": u, "v": jnp.array([0.0, 0.0, 0.0, 2.0])}
    assert replay_buffer.diverged(fields, 1.5).tolist() == [False, True, True, True]
