"""The ablation in studies/gray_scott has the example's recipe as its baseline, and each row
changes one item of that recipe."""

import equinox as eqx
import gray_scott as example
import jax
import jax.numpy as jnp
import pytest

from benchmarks.tables import read_csv
from studies.gray_scott import run as ablation
from studies.gray_scott.run import Emulator, make_residuum_fn, make_training, Recipe
from tests.common import config, ROOT, run_module, slow


@pytest.fixture(autouse=True)
def single_precision():
    """Sets single precision, in which the example trains."""
    with config("jax_enable_x64", False):
        yield


@slow
def test_the_recipe_is_what_the_example_trains():
    key = jax.random.key(0)
    model_key, buffer_key = jax.random.split(key)
    options = dict(num_updates=3)
    trained = []
    for carry, update in (
        example.make_training(example.Emulator(model_key), buffer_key, **options),
        make_training(Recipe(), key, **options),
    ):
        for update_key in jax.random.split(jax.random.key(1), 3):
            carry, _ = update(carry, update_key)
        stepper, _, buffer = carry
        trained.append(jax.tree.leaves((buffer, stepper.network)))
    assert jnp.any(trained[0][-1] != 0)  # zero before training
    for x, y in zip(*trained, strict=True):
        assert jnp.array_equal(x, y)


def test_each_row_changes_the_recipe():
    rows = dict(ablation.ROWS)
    assert rows.pop("the recipe") == {}
    for changes in rows.values():
        assert changes and all(getattr(Recipe(), name) != x for name, x in changes.items())


def test_residuals_are_scaled_and_preconditioned_separately():
    states = example.random_states(jax.random.key(0), 2)
    plain, scaled, preconditioned = (
        jax.vmap(make_residuum_fn(Recipe(scale_residuals=scale, precondition=precondition)))(
            states, states
        )
        for scale, precondition in ((False, False), (True, False), (False, True))
    )
    assert jnp.allclose(plain, jax.vmap(example.imex_euler)(states, states), atol=1e-7)
    assert jnp.allclose(scaled * example.CHANGE_SIZE, plain, atol=1e-7)
    difference = states.fields - jax.vmap(example.solver)(states).fields
    assert jnp.allclose(preconditioned, difference, atol=1e-6)
    assert not jnp.allclose(plain, difference, atol=1e-4)


@pytest.mark.parametrize("start_at_identity", [True, False])
def test_training_starts_at_the_identity(start_at_identity):
    states = example.random_states(jax.random.key(0), 2)
    stepper = Emulator(Recipe(start_at_identity=start_at_identity), jax.random.key(1))
    is_identity = (jax.vmap(stepper)(states).fields == states.fields).all()
    assert is_identity == start_at_identity


def drifting(recipe, key):
    """Adds the typical change of a step at every step, as an emulator that drifts."""
    bias = lambda x: x.network.layers[-1].bias
    return eqx.tree_at(bias, Emulator(recipe, key), jnp.ones((2, 1, 1)))


@slow
@pytest.mark.parametrize("buffer_size", [8, 0])
def test_the_replay_buffer_continues_where_the_rollout_ended(buffer_size):
    recipe = Recipe(buffer_size=buffer_size, batch_size=4, num_rollout_steps=2)
    (_, opt_state, buffer), update = make_training(recipe, jax.random.key(0), num_updates=10)
    carry = drifting(recipe, jax.random.key(1)), opt_state, buffer
    (*_, new_buffer), _ = update(carry, jax.random.key(3))
    kept = (new_buffer.rates == buffer.rates).all(axis=1)
    moved = (new_buffer.fields != buffer.fields).any(axis=(1, 2, 3))
    if buffer_size:
        assert kept.all() and moved.sum() == recipe.batch_size
        expected = buffer.fields[moved] + recipe.num_rollout_steps * example.CHANGE_SIZE
        assert jnp.allclose(new_buffer.fields[moved], expected, atol=1e-6)
    else:
        assert moved.all() and not kept.any()


@slow
def test_diverged_states_are_replaced():
    recipe = Recipe(buffer_size=4, batch_size=4)
    carry, update = make_training(recipe, jax.random.key(0), num_updates=10)
    stepper, opt_state, buffer = carry
    diverged = buffer._replace(fields=buffer.fields.at[0].set(jnp.nan).at[1].set(3.0))
    (*_, new_buffer), _ = update((stepper, opt_state, diverged), jax.random.key(3))
    assert jnp.all(jnp.abs(new_buffer.fields) < 2)


@slow
def test_quick_ablation_runs(tmp_path):
    options = ("--quick", "--output", str(tmp_path))
    output = run_module("studies.gray_scott.run", *options, cwd=tmp_path)
    rows = read_csv(tmp_path / "ablation.csv")
    assert [row["row"] for row in rows] == ["persistence", "no replay buffer"]
    assert list(rows[0]) == list(read_csv(ROOT / "studies" / "gray_scott" / "ablation.csv")[0])
    assert float(rows[0]["patterns, u and v, 50"]) > 0.1
    assert "| no replay buffer |" in output
