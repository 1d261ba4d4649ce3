"""The recipe of examples/gray_scott.py: its residuum is that of its solver, and each item does
what docs/your_own_problem.md says."""

import csv
import importlib.util
import os
import subprocess
import sys

import equinox as eqx
import gray_scott as example
import jax
import jax.numpy as jnp
import pytest
from common import config, ROOT
from gray_scott import ConvNet, make_residuum_fn, Recipe, State

from residuum import residuum_loss
from test_residuum import slow


pytestmark = slow

PLAIN = Recipe(scale_residua=False, precondition=False)
PRECONDITIONED = PLAIN._replace(precondition=True)


def as_dtype(dtype, tree):
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree)


@pytest.fixture(scope="module")
def states():
    """Patterns in float64, at 4 rates."""
    seeds = as_dtype(jnp.float64, example.random_states(jax.random.key(0), 4))
    step = lambda states, _: (jax.vmap(example.solver)(states), None)
    return jax.jit(lambda states: jax.lax.scan(step, states, length=100)[0])(seeds)


def loss(stepper, states, recipe, **options):
    data = jax.tree.map(lambda x: x[:, None], states)
    return residuum_loss(stepper, data, make_residuum_fn(recipe), **options)


def standing_still(state):
    return state


#
# The equation
#


@pytest.mark.parametrize("recipe", [PLAIN, Recipe()], ids=["plain", "recipe"])
def test_the_solvers_own_steps_have_no_residuum(states, recipe):
    assert loss(example.solver, states, recipe, num_rollout_steps=3) < 1e-18
    assert loss(standing_still, states, recipe) > 1e-8


def test_the_laplacian_is_that_of_its_symbol(states):
    spectral = jnp.fft.irfft2(example.LAPLACIAN * jnp.fft.rfft2(states.fields))
    assert jnp.allclose(jax.vmap(example.laplacian)(states.fields), spectral, atol=1e-12)


def test_a_step_is_consistent_with_the_equation():
    """Where there are no waves, it is explicit Euler of the reaction as one writes it down."""
    u, v, feed, kill = 0.6, 0.2, 0.04, 0.06
    flat = (
        jnp.ones((2, example.NUM_POINTS, example.NUM_POINTS)) * jnp.array([u, v])[:, None, None]
    )
    u_next, v_next = example.solver(State(flat, jnp.array([feed, kill]))).fields
    assert jnp.allclose(u_next, u + feed * (1 - u) - u * v * v, atol=1e-12)
    assert jnp.allclose(v_next, v + u * v * v - (feed + kill) * v, atol=1e-12)


def test_initial_conditions_are_what_patterns_grow_from():
    states = example.random_states(jax.random.key(0), 256)
    u, v = jnp.moveaxis(states.fields, 1, 0)
    assert jnp.all((u > 0) & (u <= 1) & (v >= 0) & (v < 0.5))
    for rates, low, high in zip(
        states.rates.T, example.LOWEST_RATES, example.HIGHEST_RATES, strict=True
    ):
        assert jnp.all((rates > low) & (rates < high))
        assert jnp.ptp(rates) > 0.9 * (high - low)
    assert len(jnp.unique(states.rates)) == 512  # a rate for each sample


#
# The recipe
#


def test_the_preconditioned_residuum_is_the_difference_to_the_solver(states):
    """Exactly, since the implicit part of the step is linear and wholly inverted."""
    shifted = State(jnp.roll(states.fields, 1, axis=-1) ** 2, states.rates)
    residuum = jax.vmap(make_residuum_fn(PRECONDITIONED))(shifted, states)
    difference = shifted.fields - jax.vmap(example.solver)(states).fields
    assert jnp.allclose(residuum, difference, atol=1e-12)
    plain = jax.vmap(make_residuum_fn(PLAIN))(shifted, states)
    assert not jnp.allclose(plain, difference, atol=1e-3)


def test_scaled_residua_are_those_in_units_of_the_change_by_field(states):
    scaled, unscaled = (
        jax.vmap(make_residuum_fn(recipe))(states, states)
        for recipe in (Recipe(), PRECONDITIONED)
    )
    sizes = jnp.array([example.CHANGE_SIZE[0, 0, 0], example.CHANGE_SIZE[1, 0, 0]])
    assert jnp.allclose(scaled, unscaled / sizes[:, None, None], atol=1e-12)


def test_standing_still_costs_about_one_in_each_field(states):
    seeds = example.random_states(jax.random.key(0), 64)
    for start in (states, seeds):
        residuum = jax.vmap(make_residuum_fn(Recipe()))(start, start)
        assert jnp.all(jnp.abs(jnp.log(jnp.mean(residuum**2, axis=(0, 2, 3)))) < jnp.log(4))


def test_what_the_network_sees_is_of_size_one(states):
    fields = (states.fields - example.FIELD_MEAN) / example.FIELD_SIZE
    assert jnp.all(jnp.abs(jnp.mean(fields, axis=(0, 2, 3))) < 0.5)
    assert jnp.all(jnp.abs(jnp.log(jnp.std(fields, axis=(0, 2, 3)))) < jnp.log(1.5))


@pytest.fixture
def single():
    """float32, in which the example trains."""
    with config("jax_enable_x64", False):
        yield


def drifting(recipe, key):
    """A network that adds the size of a change at every step."""
    stepper = ConvNet(recipe, key=key)
    return eqx.tree_at(lambda x: x.layers[-1].bias, stepper, jnp.ones((2, 1, 1)))


@pytest.mark.parametrize("begin_at_identity", [True, False])
def test_training_begins_at_the_identity(begin_at_identity, single):
    states = example.random_states(jax.random.key(0), 2)
    stepper = ConvNet(Recipe(begin_at_identity=begin_at_identity), key=jax.random.key(1))
    stands_still = (jax.vmap(stepper)(states).fields == states.fields).all()
    assert stands_still == begin_at_identity


def test_rates_are_carried_unchanged_and_matter(single):
    states = example.random_states(jax.random.key(0), 2)
    other = State(states.fields, states.rates + 1e-3)
    network = ConvNet(Recipe(begin_at_identity=False), key=jax.random.key(1))
    for stepper in (network, example.solver):
        next_states, next_other = (jax.vmap(stepper)(x) for x in (states, other))
        assert (next_states.rates == states.rates).all()
        assert not jnp.allclose(next_states.fields, next_other.fields, atol=1e-6)


@pytest.mark.parametrize("pool_size", [8, 0])
def test_the_pool_goes_on_where_the_rollout_ended(pool_size, single):
    recipe = Recipe(pool_size=pool_size, batch_size=4, num_rollout_steps=2)
    start, update = example.make_update(recipe, num_updates=10)
    _, opt_state, pool = start(jax.random.key(0))
    stepper = drifting(recipe, jax.random.key(1))
    *_, new_pool, _ = update(stepper, opt_state, pool, jax.random.key(3))
    kept = (new_pool.rates == pool.rates).all(axis=1)
    moved = (new_pool.fields != pool.fields).any(axis=(1, 2, 3))
    if pool_size:
        assert kept.all() and moved.sum() == recipe.batch_size
        expected = pool.fields[moved] + recipe.num_rollout_steps * example.CHANGE_SIZE
        assert jnp.allclose(new_pool.fields[moved], expected, atol=1e-6)
    else:
        assert moved.all() and not kept.any()


def test_states_that_went_astray_start_anew(single):
    recipe = Recipe(pool_size=4, batch_size=4)
    start, update = example.make_update(recipe, num_updates=10)
    stepper, opt_state, pool = start(jax.random.key(0))
    astray = pool._replace(fields=pool.fields.at[0].set(jnp.nan).at[1].set(3.0))
    *_, new_pool, _ = update(stepper, opt_state, astray, jax.random.key(3))
    assert jnp.all(jnp.abs(new_pool.fields) < 2)


#
# Judgement
#


def test_errors_are_relative_to_the_solver_by_field():
    reference = jnp.ones((3, 5, 2, 4, 4)).at[:, :, 1].set(0.5)
    emulated = reference.at[:, 2, 1].set(1.0)  # v is 100 % off at step 2
    errors = example.judge({"solver": reference, "emulator": emulated})
    assert jnp.allclose(errors["v", "emulator"], jnp.array([0, 0, 1.0, 0, 0]))
    assert jnp.allclose(errors["u", "emulator"], 0)
    expected = (0.25 / 1.25) ** 0.5
    assert jnp.allclose(errors["u and v", "emulator"][2], expected)


def test_quick_ablation_runs(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    environment.pop("XLA_FLAGS", None)
    script = ROOT / "benchmarks" / "gray_scott_ablation.py"
    path = tmp_path / "ablation.csv"
    command = [sys.executable, str(script), "--quick", "--output", str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = list(csv.DictReader(path.open()))
    assert [row["row"] for row in rows] == ["persistence", "no pool"]
    assert float(rows[0]["patterns, u and v, 50"]) > 0.1
    assert "| no pool |" in result.stdout


def load_ablation():
    path = ROOT / "benchmarks" / "gray_scott_ablation.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_table_of_the_file():
    with (ROOT / "benchmarks" / "gray_scott_ablation.csv").open() as file:
        table = load_ablation().markdown(list(csv.DictReader(file))).splitlines()
    assert len(table) > 10
    page = (ROOT / "docs" / "your_own_problem.md").read_text()
    assert all(line in page for line in table)


def test_each_row_of_the_ablation_changes_the_recipe():
    rows = dict(load_ablation().ROWS)
    assert rows.pop("the recipe") == {}
    for changes in rows.values():
        assert changes and all(getattr(Recipe(), name) != x for name, x in changes.items())
