"""One oracle judges everything: the textbook Python loop below, in float64, to 1e-9.

A second, independent witness is trainax, whose `Residuum` this library reimagines.
"""

import ast
import contextlib
import functools
import importlib.util
import io
import itertools
import os
import pathlib
import re
import subprocess
import sys
import traceback
import unittest

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
import trainax
from absl.testing import parameterized
from hypothesis import given, settings, strategies as st
from jax import export
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import residuum
from residuum import Cuts, mse, residuum_loss, Rollout


# Several CPU devices for `pmap`; takes effect as long as no computation ran before.
chex.set_n_cpu_devices(4)
jax.config.update("jax_enable_x64", True)

ROOT = pathlib.Path(__file__).parent
# Of float64 everywhere, and of float32. An accelerator would by default multiply float32
# matrices in a format of 10 bits (tf32, bf16); the library leaves that choice to its user,
# the tests want the digits.
TOLERANCE, SINGLE_TOLERANCE = 1e-9, 2e-5
jax.config.update("jax_default_matmul_precision", "highest")
# Which here cost more time than they save: nearly every program runs once. What a program
# allocates does not depend on them.
jax.config.update("jax_disable_most_optimizations", True)
FLAGS = (False, True)

# More of the same, at length: `-m "not slow"` leaves it out.
slow = pytest.mark.slow


def also_slow(*values, slowly):
    """Parameters of a test, the last ones of which are left out by `-m "not slow"`."""
    return [*values, *(pytest.param(value, marks=slow) for value in slowly)]


# Set when the module is imported through jaxtyping's import hook.
RUNTIME_TYPECHECKING = hasattr(residuum_loss, "__wrapped__")


def assert_close(actual, expected, tolerance=TOLERANCE, what=None):
    message = None if what is None else str(what)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected, custom_message=message)
    chex.assert_trees_all_close(
        actual, expected, rtol=tolerance, atol=tolerance, custom_message=message
    )


#
# The oracle
#


def textbook_loss(
    stepper,
    data,
    residuum_fn,
    *,
    num_rollout_steps=1,
    cuts=Cuts(),
    weights=None,
    time_level_loss=None,
):
    """What `residuum_loss` must equal in value and in every derivative."""
    if weights is None:
        weights = np.ones(num_rollout_steps)
    if time_level_loss is None:
        time_level_loss = textbook_mse
    loss = 0.0
    u_prev = jax.tree.map(lambda leaf: leaf[:, 0], data)
    for t in range(num_rollout_steps):
        u_next = jax.vmap(stepper)(u_prev)
        seen_next = jax.lax.stop_gradient(u_next) if at(cuts.next, t) else u_next
        seen_prev = jax.lax.stop_gradient(u_prev) if at(cuts.prev, t) else u_prev
        residuum = jax.vmap(residuum_fn)(seen_next, seen_prev)
        loss = loss + weights[t] * jnp.mean(jax.vmap(time_level_loss)(residuum))
        if cuts.bptt is True:
            cut = True
        elif cuts.bptt is False:
            cut = False
        elif isinstance(cuts.bptt, int):
            cut = (t + 1) % cuts.bptt == 0
        else:
            cut = cuts.bptt[t]
        u_prev = jax.lax.stop_gradient(u_next) if cut else u_next
    return loss


def at(cut, t):
    return cut[t] if np.ndim(cut) == 1 else bool(cut)


def textbook_mse(residuum):
    entries = [jnp.ravel(leaf) for leaf in jax.tree.leaves(residuum)]
    entries = jnp.concatenate(entries)
    return jnp.mean(entries.real**2 + entries.imag**2)


#
# A small problem that has everything: a state of several leaves, a nonlinear stepper with
# parameters, a nonlinear residuum with a coefficient that it closes over, and weights
#


def problem(num_rollout_steps, *, batch=2, seed=0):
    """The differentiable inputs: params, data, weights, coefficient."""
    keys = iter(jax.random.split(jax.random.key(seed), 6))
    params = {
        "w": jax.random.normal(next(keys), (3, 3)),
        "b": 0.5 * jax.random.normal(next(keys), (2,)),
    }
    data = {
        "u": jax.random.normal(next(keys), (batch, 2, 3)),
        "v": jax.random.normal(next(keys), (batch, 2, 2)),
    }
    weights = jax.random.normal(next(keys), (num_rollout_steps,))
    coefficient = jax.random.normal(next(keys), ())
    return params, data, weights, coefficient


def evaluate(loss_fn, params, data, weights, coefficient, **options):
    """`loss_fn`, either the oracle or the library, as a function of all that it can be
    differentiated by."""

    def stepper(state):
        u = jnp.tanh(params["w"] @ state["u"] + state["v"][0])
        return {"u": u, "v": params["b"] * state["v"] + u[:2]}

    def residuum_fn(u_next, u_prev):
        return coefficient * u_next["u"] - u_prev["u"] ** 2, u_next["v"] * u_prev["v"]

    return loss_fn(stepper, data, residuum_fn, weights=weights, **options)


def value_and_grad(loss_fn, inputs, *, weighted=True, **options):
    def loss(params, data, weights, coefficient):
        weights = weights if weighted else None
        return evaluate(loss_fn, params, data, weights, coefficient, **options)

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*inputs)


MASK = np.array([False, True, True, False, True, False, False])
BPTT = {"none": False, "every": True, "2": 2, "3": 3, "9": 9, "mask": "mask"}


def cuts_of(num_rollout_steps, bptt, prev=False, next=False):
    bptt = MASK[:num_rollout_steps] if bptt == "mask" else BPTT[bptt]
    return Cuts(bptt, prev, next)


#
# Values and derivatives
#


@pytest.mark.parametrize("bptt", also_slow("2", slowly=["none", "every", "3", "9", "mask"]))
@pytest.mark.parametrize("num_rollout_steps", also_slow(5, slowly=[1, 2, 7]))
def test_value_and_gradient_equal_the_textbook_loop(num_rollout_steps, bptt):
    inputs = problem(num_rollout_steps)
    # prev, next, weighted; no weights are ones before anything else is done with them
    combinations = [*itertools.product(FLAGS, FLAGS, [True]), (False, False, False)]

    def all_values_and_grads(loss_fn, inputs, **options):
        return [
            value_and_grad(
                loss_fn,
                inputs,
                weighted=weighted,
                num_rollout_steps=num_rollout_steps,
                cuts=cuts_of(num_rollout_steps, bptt, prev, next),
                **options,
            )
            for prev, next, weighted in combinations
        ]

    expected = all_values_and_grads(textbook_loss, inputs)
    for unroll in (1, True):

        def actual(inputs, unroll=unroll):  # compiled once for all, which saves most time
            options = [dict(checkpoint=checkpoint, unroll=unroll) for checkpoint in FLAGS]
            return [all_values_and_grads(residuum_loss, inputs, **o) for o in options]

        for checkpoint, values_and_grads in zip(FLAGS, jax.jit(actual)(inputs), strict=True):
            for what, *pair in zip(combinations, values_and_grads, expected, strict=True):
                assert_close(*pair, what=(unroll, checkpoint, what))


@pytest.mark.parametrize("unroll", also_slow(3, slowly=[2, 4]))
@pytest.mark.parametrize("bptt", [False, 2, 3])
def test_unroll_that_does_not_divide_equals_the_textbook_loop(bptt, unroll):
    inputs, options = problem(7), dict(num_rollout_steps=7, cuts=Cuts(bptt))
    f = functools.partial(value_and_grad, residuum_loss, unroll=unroll, **options)
    assert_close(jax.jit(f)(inputs), value_and_grad(textbook_loss, inputs, **options))


@pytest.mark.parametrize("shape", [(), (5,)], ids=["scalar", "per level"])
@pytest.mark.parametrize("bptt", ["none", "2", "mask"])
def test_traced_masks_equal_the_textbook_loop(bptt, shape):
    rng = np.random.default_rng(0)
    inputs = problem(5)

    @jax.jit
    def traced(prev, next):
        cuts = cuts_of(5, bptt, prev, next)
        return value_and_grad(residuum_loss, inputs, num_rollout_steps=5, cuts=cuts)

    for _ in range(3):
        prev, next = rng.integers(2, size=(2, *shape)).astype(bool)
        cuts = cuts_of(5, bptt, prev, next)
        expected = value_and_grad(textbook_loss, inputs, num_rollout_steps=5, cuts=cuts)
        assert_close(traced(prev, next), expected)


HIGHER_ORDER = [
    dict(num_rollout_steps=1),
    dict(num_rollout_steps=3),
    dict(num_rollout_steps=3, cuts=Cuts(bptt=True)),
    dict(num_rollout_steps=5, cuts=Cuts(bptt=2)),
    dict(num_rollout_steps=4, cuts=Cuts(bptt=2, prev=True)),
    dict(num_rollout_steps=4, cuts=Cuts(bptt=3, next=True)),
    dict(num_rollout_steps=5, cuts=Cuts(bptt=MASK[:5], next=MASK[:5])),
]


OTHERS = HIGHER_ORDER[:3] + HIGHER_ORDER[4:]


def flat_losses(options):
    """The library and the oracle as functions of one flat vector of all inputs."""
    flat, unravel = ravel_pytree(problem(options["num_rollout_steps"], batch=1))

    def flat_loss(loss_fn, **more):
        return lambda flat: evaluate(loss_fn, *unravel(flat), **options, **more)

    return flat, flat_loss


EXTRA = [{}, {"checkpoint": True, "unroll": 2}, {"unroll": True}]


@pytest.mark.parametrize("options", also_slow(HIGHER_ORDER[3], slowly=OTHERS), ids=str)
def test_forward_mode_equals_the_textbook_loop(options):
    flat, flat_loss = flat_losses(options)
    tangent = jax.random.normal(jax.random.key(1), flat.shape)
    derivative = lambda f: jax.jit(lambda x: jax.jvp(f, (x,), (tangent,)))(flat)
    expected = derivative(flat_loss(textbook_loss))
    for extra in EXTRA:
        assert_close(derivative(flat_loss(residuum_loss, **extra)), expected, what=extra)


@pytest.mark.parametrize("options", also_slow(HIGHER_ORDER[3], slowly=OTHERS), ids=str)
def test_hessians_equal_the_textbook_loop(options):
    flat, flat_loss = flat_losses(options)
    expected = jax.jit(jax.hessian(flat_loss(textbook_loss)))(flat)
    for extra, outer in zip(
        [{}, *EXTRA[:2]], [jax.jacfwd, jax.jacrev, jax.jacrev], strict=True
    ):
        actual = jax.jit(outer(jax.jacrev(flat_loss(residuum_loss, **extra))))(flat)
        assert_close(actual, expected, what=(outer, extra))


TRANSFORMATIONS = {
    "grad": jax.grad,
    "jit of grad": lambda f: jax.jit(jax.grad(f)),
    "grad of jit": lambda f: jax.grad(jax.jit(f)),
    "grad of checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
    "vmap of grad": lambda f: lambda x: jax.vmap(jax.grad(f))(x[None] + jnp.eye(2, 1)),
    "grad of vmap": lambda f: jax.grad(
        lambda x: jnp.sum(jax.vmap(f)(x[None] * jnp.arange(3.0)[:, None]))
    ),
    "grad of scan": lambda f: jax.grad(
        lambda x: jax.lax.scan(lambda c, s: (c + f(s * x), None), 0.0, jnp.arange(3.0))[0]
    ),
    "grad of cond": lambda f: jax.grad(lambda x: jax.lax.cond(x[0] > 9, jnp.sum, f, x)),
}


@pytest.mark.parametrize("bptt", also_slow("2", slowly=["mask"]))
@pytest.mark.parametrize(
    "name",
    also_slow(
        *("jit of grad", "grad of jit", "vmap of grad", "grad of scan"),
        slowly=["grad", "grad of vmap", "grad of cond", "grad of checkpoint"],
    ),
)
def test_composes_with(name, bptt):
    options = dict(num_rollout_steps=3, cuts=cuts_of(3, bptt))
    flat, flat_loss = flat_losses(options)
    transform = TRANSFORMATIONS[name]
    expected = jax.jit(transform(flat_loss(textbook_loss)))(flat)
    assert_close(transform(flat_loss(residuum_loss))(flat), expected)


@pytest.mark.parametrize("bptt", also_slow("2", slowly=["none", "mask"]))
@pytest.mark.parametrize(
    "transform", also_slow("grad of jit", slowly=["jit of grad", "grad of checkpoint"])
)
def test_closures_over_traced_ints_and_keys(transform, bptt):
    options = dict(num_rollout_steps=5, cuts=cuts_of(5, bptt))
    data = jax.random.normal(jax.random.key(0), (2, 1, 3))

    def loss(loss_fn, x, shift, key):
        noise = jax.random.normal(key, (3,))

        def stepper(u):
            drawn = jax.random.normal(jax.random.fold_in(key, shift), (3,))
            return jnp.sin(x * jnp.roll(u, shift) + noise + drawn)

        return loss_fn(stepper, data, lambda n, p: n - x * jnp.roll(p, 2 * shift), **options)

    def of_x(loss_fn):
        def with_ints(x, shift, seed):
            # `shift` and the key are traced wherever the transformation traces
            f = lambda x: loss(loss_fn, x, shift, jax.random.key(seed))
            return TRANSFORMATIONS[transform](f)(x)

        return jax.jit(with_ints)(jnp.arange(3.0), 1, 7)

    assert_close(of_x(residuum_loss), of_x(textbook_loss))


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))

STEPPERS = {
    "jit": lambda x, u: jax.jit(lambda u: jnp.sin(x * u))(u),
    "custom_vjp": lambda x, u: sine(x * u),
    "checkpoint": lambda x, u: jax.checkpoint(lambda u: jnp.sin(x * u))(u),
    "cond": lambda x, u: jax.lax.cond(u[0] > 0, jnp.sin, jnp.cos, x * u),
    "fori_loop": lambda x, u: jax.lax.fori_loop(0, 2, lambda _, u: jnp.sin(x * u), u),
    "debug": lambda x, u: (jax.debug.callback(lambda _: None, u), jnp.sin(x * u))[1],
}


@slow
@pytest.mark.parametrize("bptt", ["2", "none"])
@pytest.mark.parametrize("name", STEPPERS)
def test_steppers_that_use_transformations(name, bptt):
    def loss(loss_fn, x):
        options = dict(num_rollout_steps=3, cuts=cuts_of(3, bptt))
        data = jnp.linspace(-1, 1, 6).reshape(2, 1, 3)
        stepper = functools.partial(STEPPERS[name], x)
        return loss_fn(stepper, data, lambda n, p: n - x * p, **options)

    x = jnp.arange(1.0, 4.0)
    expected = jax.grad(functools.partial(loss, textbook_loss))(x)
    for f in (jax.grad(loss, 1), jax.grad(jax.jit(loss, static_argnums=0), 1)):
        assert_close(f(residuum_loss, x), expected)


#
# Any state, any batch, any cut
#


@st.composite
def rollouts(draw):
    """A state of any tree and shapes, and valid options."""
    shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)
    tree = draw(
        st.recursive(
            shapes.map(lambda shape: {"leaf": shape}),
            lambda inner: (
                st.lists(inner, min_size=1, max_size=2)
                | st.dictionaries(st.sampled_from("ab"), inner, min_size=1)
            ),
            max_leaves=4,
        )
    )
    batch, num_snapshots, steps = (draw(st.integers(1, 4)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    data = jax.tree.map(
        lambda shape: rng.normal(size=(batch, num_snapshots, *shape)),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    mask = st.lists(st.booleans(), min_size=steps, max_size=steps).map(np.array)
    flag = st.booleans() | st.booleans().map(np.array) | mask
    cuts = Cuts(draw(st.booleans() | st.integers(1, 5) | mask), draw(flag), draw(flag))
    weights = draw(st.none() | st.just(rng.normal(size=steps)))
    return data, dict(num_rollout_steps=steps, cuts=cuts, weights=weights)


@slow
@settings(max_examples=30, deadline=None)
@given(rollouts(), st.booleans(), st.integers(1, 3) | st.booleans())
def test_any_rollout_equals_the_textbook_loop(rollout, checkpoint, unroll):
    data, options = rollout

    def loss(loss_fn, scale, data, **more):
        def stepper(u):
            total = sum(jnp.mean(leaf) for leaf in jax.tree.leaves(u))
            return jax.tree.map(lambda leaf: jnp.sin(scale * leaf + total), u)

        def residuum_fn(u_next, u_prev):
            return jax.tree.map(lambda n, p: n * p - jnp.cos(scale * p), u_next, u_prev)

        return loss_fn(stepper, data, residuum_fn, **options, **more)

    def judge(loss_fn, **more):
        f = functools.partial(loss, loss_fn, **more)
        return jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(jnp.float64(1.3), data)

    actual = judge(residuum_loss, checkpoint=checkpoint, unroll=unroll)
    assert_close(actual, judge(textbook_loss))


#
# chex variants: with and without jit, on one device and on many
#


class VariantsTest(chex.TestCase):
    @chex.variants(
        with_jit=True,
        without_jit=True,
        with_device=True,
        without_device=True,
        with_pmap=True,
    )
    @parameterized.parameters("2", "mask")
    def test_value_and_gradient(self, bptt):
        inputs = problem(5)
        cuts = cuts_of(5, bptt, prev=True)
        f = functools.partial(value_and_grad, residuum_loss, num_rollout_steps=5, cuts=cuts)
        expected = value_and_grad(textbook_loss, inputs, num_rollout_steps=5, cuts=cuts)
        actual = jax.tree.map(jnp.asarray, self.variant(f)(inputs))
        assert_close(actual, expected)


def test_pmap_runs_on_several_devices():
    assert jax.device_count() > 1 or jax.default_backend() != "cpu"


@pytest.mark.parametrize("platform", sorted({d.platform for d in jax.devices()} | {"cpu"}))
def test_every_platform_agrees_with_the_textbook_loop_on_the_cpu(platform):
    inputs = problem(5)
    options = dict(num_rollout_steps=5, cuts=Cuts(bptt=2))
    with jax.default_device(jax.devices("cpu")[0]):
        expected = jax.device_get(value_and_grad(textbook_loss, inputs, **options))
    with jax.default_device(jax.devices(platform)[0]):
        inputs = jax.tree.map(jnp.asarray, jax.device_get(inputs))
        actual = jax.jit(lambda x: value_and_grad(residuum_loss, x, **options))(inputs)
    assert {d.platform for d in actual[0].devices()} == {platform}
    assert_close(jax.device_get(actual), expected)


def test_new_parameters_weights_and_masks_do_not_retrace():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(inputs, bptt, prev):
        cuts = Cuts(bptt, prev, False)
        return value_and_grad(residuum_loss, inputs, num_rollout_steps=5, cuts=cuts)

    for seed in range(3):
        bptt = np.random.default_rng(seed).integers(2, size=5).astype(bool)
        inputs = problem(5, seed=seed)
        expected = value_and_grad(
            textbook_loss, inputs, num_rollout_steps=5, cuts=Cuts(bptt, bptt[0])
        )
        assert_close(step(inputs, bptt, bptt[0]), expected)


#
# Meshes: the same loss and gradient on many devices as on one
#

# With one accelerator, the CPU's virtual devices make up the mesh.
MESH_DEVICES = jax.devices() if jax.device_count() > 1 else jax.devices("cpu")

# They exist before, but do not go through `vmap` of a loop.
needs_explicit_axes = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="needs a newer JAX"
)
needs_shard_map = pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="needs a newer JAX")


def make_mesh(axes=("batch",), *, explicit=False):
    shape = (-1, *[2] * (len(axes) - 1))
    devices = np.array(MESH_DEVICES).reshape(shape)
    if explicit:
        return Mesh(devices, axes, axis_types=(jax.sharding.AxisType.Explicit,) * len(axes))
    return Mesh(devices, axes)


def shard(mesh, spec, tree):
    return jax.device_put(tree, NamedSharding(mesh, spec))


# k = 3 does not divide the number of steps
MESH_ROLLOUTS = [
    dict(num_rollout_steps=4, cuts=Cuts(bptt), **extra)
    for bptt, extra in [*itertools.product([False, 1, 2, 3], EXTRA[:2]), (3, EXTRA[2])]
]


def mesh_problem():
    """Losses `(params, data) -> scalar`, by rollout; their inputs; and what to expect."""
    params, data, weights, coefficient = problem(4, batch=2 * len(MESH_DEVICES))

    def loss(loss_fn, options, params, data):
        return evaluate(loss_fn, params, data, weights, coefficient, **options)

    def value_and_grad(options):
        options = dict(num_rollout_steps=4, cuts=options["cuts"])
        f = functools.partial(loss, textbook_loss, options)
        return jax.value_and_grad(f, argnums=(0, 1))(params, data)

    expected = jax.jit(lambda: [value_and_grad(options) for options in MESH_ROLLOUTS])()
    losses = [functools.partial(loss, residuum_loss, options) for options in MESH_ROLLOUTS]
    return losses, params, data, expected


def assert_all_close(actual, expected):
    for options, *pair in zip(MESH_ROLLOUTS, actual, expected, strict=True):
        assert_close(*jax.device_get(pair), what=options)


@pytest.mark.parametrize(
    "explicit", [False, pytest.param(True, marks=needs_explicit_axes)], ids=str
)
@pytest.mark.parametrize("groups", also_slow(True, slowly=[False]))
def test_sharded_data_under_jit(groups, explicit):
    """Automatic and explicit axes. `groups`: one term of the loss for each device."""
    losses, params, data, expected = mesh_problem()
    num_devices = len(MESH_DEVICES)
    mesh = make_mesh(explicit=explicit)
    split = lambda x: x.reshape(num_devices, -1, *x.shape[1:])
    data = shard(mesh, P("batch"), jax.tree.map(split, data) if groups else data)
    params = shard(mesh, P(), params)

    def value_and_grad(loss, *args):
        grouped = lambda params, data: jnp.mean(jax.vmap(loss, (None, 0))(params, data))
        return jax.value_and_grad(grouped if groups else loss, argnums=(0, 1))(*args)

    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        actual = jax.jit(lambda *x: [value_and_grad(loss, *x) for loss in losses])(params, data)
    merge = lambda x: x.reshape(-1, *x.shape[2:])
    if groups:
        actual = [
            (loss, (grad, jax.tree.map(merge, jax.device_get(data_grad))))
            for loss, (grad, data_grad) in actual
        ]
    assert_all_close(actual, expected)


@needs_shard_map
@pytest.mark.parametrize("check_vma", also_slow(True, slowly=[False]))
@pytest.mark.parametrize("where", ["outside", "inside", "inside, varying parameters"])
def test_shard_map(where, check_vma):
    losses, params, data, expected = mesh_problem()

    def mean_loss(loss, params, data):
        return jax.lax.pmean(loss(params, data), "batch")

    def value_and_grad(loss, params, data):
        if where == "inside" and check_vma:  # JAX sums over what params do not vary over
            return jax.value_and_grad(functools.partial(mean_loss, loss))(params, data)
        if check_vma:
            params = residuum._vary(params, frozenset({"batch"}))
        value, grad = jax.value_and_grad(loss)(params, data)
        return jax.lax.pmean((value, grad), "batch")

    def mapped(f, loss):
        return jax.shard_map(
            functools.partial(f, loss),
            mesh=make_mesh(),
            in_specs=(P(), P("batch")),
            out_specs=P(),
            check_vma=check_vma,
        )

    def all_values_and_grads(*args):
        if where == "outside":
            return [jax.value_and_grad(mapped(mean_loss, loss))(*args) for loss in losses]
        return [mapped(value_and_grad, loss)(*args) for loss in losses]

    actual = jax.jit(all_values_and_grads)(params, data)
    assert_all_close(actual, [(loss, grad) for loss, (grad, _) in expected])


def test_pmap():
    losses, params, data, expected = mesh_problem()
    num_devices = len(MESH_DEVICES)
    data = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), data)

    def value_and_grad(loss, params, data):
        return jax.lax.pmean(jax.value_and_grad(loss)(params, data), "batch")

    @functools.partial(jax.pmap, axis_name="batch", in_axes=(None, 0), devices=MESH_DEVICES)
    def all_values_and_grads(params, data):
        return [value_and_grad(loss, params, data) for loss in losses]

    actual = jax.tree.map(lambda x: x[0], jax.device_get(all_values_and_grads(params, data)))
    assert_all_close(actual, [(loss, grad) for loss, (grad, _) in expected])


@pytest.mark.parametrize("sharded", also_slow("parameters", slowly=["space"]))
def test_sharded_parameters_and_sharded_space(sharded):
    mesh = make_mesh(("batch", "model"))
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(8, 8))
    data = rng.normal(size=(2 * len(MESH_DEVICES), 1, 8))

    def value_and_grad(loss_fn, options, kernel, data):
        def loss(kernel, data):
            def stepper(u):  # mixes all points, and neighbours
                return jnp.tanh(kernel @ u) + jnp.roll(u, 1) / 2

            return loss_fn(stepper, data, lambda n, p: n - jnp.roll(p, -1), **options)

        return jax.value_and_grad(loss, argnums=(0, 1))(kernel, data)

    def all_values_and_grads(loss_fn, kernel, data):
        for options in MESH_ROLLOUTS:
            if loss_fn is textbook_loss:
                options = dict(num_rollout_steps=4, cuts=options["cuts"])
            yield value_and_grad(loss_fn, options, kernel, data)

    expected = jax.jit(lambda *x: list(all_values_and_grads(textbook_loss, *x)))(kernel, data)
    specs = {
        "parameters": (P("model"), P("batch")),
        "space": (P(), P("batch", None, "model")),
    }[sharded]
    args = (shard(mesh, spec, x) for spec, x in zip(specs, (kernel, data), strict=True))
    actual = jax.jit(lambda *x: list(all_values_and_grads(residuum_loss, *x)))(*args)
    assert_all_close(actual, expected)


def compiled_on_a_mesh(way, num_rollout_steps, cuts):
    """The value and gradient of an MLP's loss, data parallel."""
    params, _, stepper = network_problem("mlp")
    num_devices = len(MESH_DEVICES)
    explicit, groups = "explicit" in way, "groups" in way
    mesh = make_mesh(explicit=explicit)
    shape = (num_devices, 4, 1, 64) if groups else (4 * num_devices, 1, 64)
    data = shard(mesh, P("batch"), jnp.ones(shape, jnp.float32))
    params = shard(mesh, P(), params)

    def loss(params, data):
        return residuum_loss(
            functools.partial(stepper, params),
            data,
            lambda n, p: n - p,
            num_rollout_steps=num_rollout_steps,
            cuts=cuts,
        )

    def grouped(params, data):
        return jnp.mean(jax.vmap(loss, (None, 0))(params, data))

    def mapped(params, data):
        if way == "shard_map":
            params = residuum._vary(params, frozenset({"batch"}))
        return jax.lax.pmean(loss(params, data), "batch")

    if "shard_map" in way:
        specs = dict(in_specs=(P(), P("batch")), out_specs=P())
        specs["check_vma"] = "check_vma=False" not in way
        f = jax.shard_map(mapped, mesh=mesh, **specs)
    else:
        f = grouped if groups else loss
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        return jax.jit(jax.value_and_grad(f)).lower(params, data).compile()


MESH_WAYS = [
    "automatic",
    "automatic, groups",
    pytest.param("explicit", marks=needs_explicit_axes),
    pytest.param("explicit, groups", marks=needs_explicit_axes),
    pytest.param("shard_map", marks=needs_shard_map),
    pytest.param("shard_map, check_vma=False", marks=needs_shard_map),
]


@pytest.mark.parametrize("bptt", also_slow(1, slowly=[5]))
@pytest.mark.parametrize("way", MESH_WAYS)
def test_memory_per_device_does_not_grow_with_the_rollout(way, bptt):
    short, long = (
        compiled_on_a_mesh(way, n, Cuts(bptt)).memory_analysis().temp_size_in_bytes
        for n in (20, 1000)
    )
    # Explicit axes keep the weights themselves in memory; a state is 1024 times larger.
    assert long - short <= (980 * 4 if "explicit" in way else 0)


def collectives(compiled):
    """Numbers of collective operations in a program: once, and in loops."""
    operation = (
        r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)[a-z-]*\("
    )
    once, in_loops = 0, 0
    for computation in re.split(r"\n(?=\S)", compiled.as_text()):
        count = len(re.findall(operation, computation))
        if computation.startswith("ENTRY"):
            once += count
        else:
            in_loops += count
    return once, in_loops


@pytest.mark.parametrize("bptt", also_slow(1, slowly=[5]))
@pytest.mark.parametrize("way", MESH_WAYS)
def test_one_collective_at_the_end_instead_of_one_per_segment(way, bptt):
    once, in_loops = collectives(compiled_on_a_mesh(way, 100, Cuts(bptt)))
    if "groups" in way or "shard_map" in way:
        # At most the gradients of two layers and the loss; a newer XLA makes one of them.
        assert 1 <= once <= 3
        assert in_loops == 0
    else:
        # The compiler reduces each segment's gradient over the devices, as it does each
        # step's in the backward pass of an ordinary scan. README says how to avoid that.
        assert in_loops > 0
        assert collectives(compiled_on_a_mesh(way, 100, Cuts()))[1] > 0


@needs_shard_map
def test_without_pcast_a_shard_map_stores_and_sums_every_step():
    """The exception, of which README warns."""
    short, long = (
        compiled_on_a_mesh("shard_map, without pcast", n, Cuts(bptt=1)) for n in (20, 1000)
    )
    sizes = [c.memory_analysis().temp_size_in_bytes for c in (short, long)]
    assert sizes[1] > 10 * sizes[0]
    assert collectives(long)[1] > 0


#
# Strict modes, and what else a program may be put through
#

STRICT_MODES = [
    ("jax_numpy_dtype_promotion", "strict"),
    ("jax_numpy_rank_promotion", "raise"),
    ("jax_debug_nans", True),
    ("jax_debug_infs", True),
    ("jax_check_tracer_leaks", True),
    ("jax_disable_jit", True),
    ("jax_enable_x64", False),
    ("jax_transfer_guard", "disallow"),
]


@contextlib.contextmanager
def config(name, value):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


@pytest.mark.parametrize("mode, value", STRICT_MODES, ids=str)
@pytest.mark.parametrize("bptt", also_slow("3", slowly=["mask"]))
def test_strict_modes(bptt, mode, value):
    dtype = np.float32 if mode == "jax_enable_x64" else np.float64
    rng = np.random.default_rng(0)
    data = {
        "u": jnp.asarray(rng.normal(size=(2, 1, 3)), dtype),
        "key": jax.random.split(jax.random.key(0), (2, 1)),
    }
    kernel = jnp.asarray(rng.normal(size=3), dtype)
    weights = jnp.arange(1, 6, dtype=dtype)

    def loss(loss_fn, kernel, weights, data, **options):
        def stepper(state):
            key, _ = jax.random.split(state["key"])
            return {"u": jnp.tanh(kernel * state["u"]), "key": key}

        residuum_fn = lambda u_next, u_prev: u_next["u"] - jnp.sin(u_prev["u"])
        options = dict(num_rollout_steps=5, cuts=cuts_of(5, bptt, prev=True), **options)
        return loss_fn(stepper, data, residuum_fn, weights=weights, **options)

    def core(loss_fn, *args, **options):
        f = functools.partial(loss, loss_fn, **options)
        grad = lambda kernel: jax.grad(f)(kernel, *args[1:])
        second_order = jax.jvp(grad, args[:1], args[:1])[1]
        return jax.value_and_grad(f, argnums=(0, 1))(*args), second_order

    args = (kernel, weights, data)
    expected = jax.jit(functools.partial(core, textbook_loss))(*args)
    value_and_grad, second_order = jax.device_get(expected)
    tolerance = TOLERANCE if dtype == np.float64 else SINGLE_TOLERANCE
    with config(mode, value):
        f = lambda *args: [core(residuum_loss, *args, **extra) for extra in EXTRA[:2]]
        for actual in jax.jit(f)(*args):
            assert_close(jax.device_get(actual), (value_and_grad, second_order), tolerance)
        actual = jax.jit(functools.partial(loss, residuum_loss, has_aux=True))(*args)
        assert_close(jax.device_get(actual[0]), value_and_grad[0], tolerance)
        if mode != "jax_transfer_guard":  # it forbids constants outside of `jit`
            actual = loss(residuum_loss, *args)
            assert_close(jax.device_get(actual), value_and_grad[0], tolerance)


@pytest.mark.parametrize("bptt", also_slow("2", slowly=["none", "mask"]))
def test_export_round_trips_a_gradient(bptt):
    inputs = problem(5)
    options = dict(num_rollout_steps=5, cuts=cuts_of(5, bptt))
    f = jax.jit(lambda inputs: value_and_grad(residuum_loss, inputs, **options)[1])
    serialized = export.export(f)(inputs).serialize()
    actual = export.deserialize(serialized).call(inputs)
    assert_close(actual, value_and_grad(textbook_loss, inputs, **options)[1])


@pytest.mark.parametrize("bptt", also_slow("2", slowly=["none", "mask"]))
def test_a_training_step_may_donate_its_buffers(bptt):
    params, *rest = problem(5)
    options = dict(num_rollout_steps=5, cuts=cuts_of(5, bptt))

    def training_step(loss_fn, params):
        loss = lambda params: evaluate(loss_fn, params, *rest, **options)
        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    step = jax.jit(functools.partial(training_step, residuum_loss), donate_argnums=0)
    donated, expected = jax.tree.map(jnp.copy, params), params
    for _ in range(3):
        consumed = donated
        value, donated = step(donated)
        expected_value, expected = training_step(textbook_loss, expected)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(consumed))
        # Of copies, since a view that numpy holds may keep a buffer from being donated.
        copies = jax.tree.map(jnp.copy, (value, donated))
        assert_close(copies, (expected_value, expected))


#
# has_aux
#


@pytest.mark.parametrize("bptt", BPTT)
@pytest.mark.parametrize("num_rollout_steps", [1, 5])
def test_rollout_holds_unweighted_losses_and_the_final_state(num_rollout_steps, bptt):
    params, data, weights, coefficient = problem(num_rollout_steps)
    evaluate_at = functools.partial(evaluate, residuum_loss, params, data, weights, coefficient)
    options = dict(num_rollout_steps=num_rollout_steps, cuts=cuts_of(num_rollout_steps, bptt))
    loss, rollout = evaluate_at(**options, has_aux=True)
    assert isinstance(rollout, Rollout)
    assert_close(loss, evaluate_at(**options))
    assert_close(loss, jnp.sum(weights * rollout.time_level_losses))

    u, losses = jax.tree.map(lambda leaf: leaf[:, 0], data), []
    for _ in range(num_rollout_steps):
        args = (params, jax.tree.map(lambda leaf: leaf[:, None], u), None, coefficient)
        level_loss, one_step = evaluate(residuum_loss, *args, has_aux=True)
        u = one_step.final_state
        losses.append(level_loss)
    assert_close(rollout, Rollout(jnp.stack(losses), u))


@pytest.mark.parametrize("bptt", also_slow("2", slowly=["none", "every", "3", "9", "mask"]))
def test_rollout_has_no_gradient(bptt):
    def everything_in_it(inputs):
        cuts = cuts_of(5, bptt)
        _, rollout = evaluate(
            residuum_loss, *inputs, num_rollout_steps=5, cuts=cuts, has_aux=True
        )
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(rollout))

    grads = jax.grad(everything_in_it)(problem(5))
    assert_close(grads, jax.tree.map(jnp.zeros_like, grads))


def test_value_and_grad_with_aux():
    def loss(params, data, weights, coefficient):
        args = (params, data, weights, coefficient)
        return evaluate(residuum_loss, *args, num_rollout_steps=5, has_aux=True)

    inputs = problem(5)
    (value, _), grads = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*inputs)
    expected = value_and_grad(textbook_loss, inputs, num_rollout_steps=5)
    assert_close((value, grads), expected)


def test_a_long_rollout_in_pieces_equals_the_rollout_in_one():
    params, data, _, coefficient = problem(6)
    evaluate_at = functools.partial(evaluate, residuum_loss, params)
    whole = evaluate_at(data, None, coefficient, num_rollout_steps=6)
    total = 0.0
    for _ in range(3):
        loss, rollout = evaluate_at(data, None, coefficient, num_rollout_steps=2, has_aux=True)
        data = jax.tree.map(lambda leaf: leaf[:, None], rollout.final_state)
        total += loss
    assert_close(total, whole)


#
# Kinds of states: precisions, complex numbers, integers, keys
#


def test_mse_is_the_mean_over_all_entries_of_all_leaves():
    residuum = {"a": jnp.array([3.0, 1.0]), "b": jnp.array([[2.0 + 1.0j]])}
    assert_close(mse(residuum), jnp.float64((9 + 1 + 5) / 3))
    assert_close(mse([[jnp.int32(2)], jnp.bfloat16(3)]), jnp.float32(6.5))


def test_mse_is_differentiable_at_zero():
    assert jax.grad(mse)(0.0) == 0.0
    assert jax.grad(mse)(0.0 + 0.0j) == 0.0


def rotation_problem(dtype, batch=4):
    rng = np.random.default_rng(0)
    entries = rng.normal(size=(batch, 1, 8)) + 1j * rng.normal(size=(batch, 1, 8))
    factor = rng.normal(size=8) + 1j * rng.normal(size=8)
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        entries, factor = entries.real, factor.real
    return jnp.asarray(factor, dtype), jnp.asarray(entries, dtype)


def rotation_loss(loss_fn, factor, data, **options):
    def stepper(u):
        return u * factor / (1 + (u * u.conj()).real)

    return loss_fn(stepper, data, lambda n, p: n - jnp.roll(p, 1), **options)


@pytest.mark.parametrize("bptt", also_slow("3", slowly=["none", "every", "2", "9", "mask"]))
@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.complex128])
def test_complex_states_equal_the_textbook_loop(dtype, bptt):
    inputs = rotation_problem(dtype)
    options = dict(num_rollout_steps=5, cuts=cuts_of(5, bptt))
    actual, expected = (
        jax.jit(jax.value_and_grad(functools.partial(rotation_loss, f, **options), (0, 1)))(
            *inputs
        )
        for f in (residuum_loss, textbook_loss)
    )
    chex.assert_type(jax.tree.leaves(actual), [dtype(0).real.dtype, dtype, dtype])
    chex.assert_trees_all_close(
        actual, expected, rtol=TOLERANCE if dtype == jnp.complex128 else SINGLE_TOLERANCE
    )


@pytest.mark.parametrize("bptt", also_slow("2", slowly=["none", "mask"]))
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_accumulates_in_float32(dtype, bptt):
    factor, data = rotation_problem(dtype, batch=512)
    options = dict(num_rollout_steps=5, cuts=cuts_of(5, bptt), has_aux=True)
    (loss, rollout), grad = jax.value_and_grad(
        functools.partial(rotation_loss, residuum_loss), has_aux=True
    )(factor, data, **options)
    chex.assert_type([loss, rollout.time_level_losses], jnp.float32)
    chex.assert_type([grad, rollout.final_state], dtype)

    # The mean over 512 samples of the same half precision residua, in float64
    u, losses = data[:, 0], []
    for _ in range(5):
        u_next = u * factor / (1 + (u * u.conj()).real)
        entries = (u_next - jnp.roll(u, 1, axis=-1)).astype(jnp.float64)
        losses.append(jnp.mean(entries**2))
        u = u_next
    # XLA may keep more precision between two operations than the format has, never less.
    tolerance = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(loss, sum(losses), rtol=tolerance)


def test_a_half_precision_time_level_loss_is_averaged_in_float32():
    data = jnp.ones((4096, 1, 1), jnp.bfloat16)
    loss = residuum_loss(
        lambda u: 2 * u, data, lambda n, p: n - p, time_level_loss=lambda r: r[0]
    )
    assert_close(loss, jnp.float32(1.0))


def half_precision_problem(dtype, num_rollout_steps):
    """A rollout that neither dies out nor diverges; a loss `(loss_fn, params, data)`."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(0.7 / 4 * rng.normal(size=(16, 16)), dtype)
    data = jnp.asarray(rng.normal(size=(4, 1, 16)), dtype)

    def loss(loss_fn, kernel, data, **options):
        half = jnp.asarray(0.5, kernel.dtype)
        stepper = lambda u: jnp.tanh(kernel @ u) + half * u + half
        options = dict(num_rollout_steps=num_rollout_steps, **options)
        return loss_fn(stepper, data, lambda n, p: n - half * p, **options)

    return loss, kernel, data


def errors_in_half_precision(dtype, loss_fn, num_rollout_steps, **options):
    """Relative errors of the loss and of its gradient, in units of the format's."""
    loss, kernel, data = half_precision_problem(dtype, num_rollout_steps)
    f = jax.value_and_grad(functools.partial(loss, loss_fn, **options))
    actual = jax.jit(f)(kernel, data)
    chex.assert_type(actual[1], dtype)
    wide = (x.astype(jnp.float64) for x in (kernel, data))
    f = functools.partial(loss, residuum_loss, cuts=options.get("cuts", Cuts(bptt=True)))
    expected = jax.jit(jax.value_and_grad(f))(*wide)
    return [
        jnp.linalg.norm(x.astype(jnp.float64) - y) / jnp.linalg.norm(y) / jnp.finfo(dtype).eps
        for x, y in zip(actual, expected, strict=True)
    ]


@pytest.mark.parametrize("bptt", also_slow("every", slowly=["none", "9", "mask"]))
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_on_a_long_rollout(dtype, bptt):
    cuts = Cuts(np.ones(200, bool) if bptt == "mask" else BPTT[bptt])
    errors = errors_in_half_precision(dtype, residuum_loss, 200, cuts=cuts)
    assert max(errors) < 8


def scan_loss(stepper, data, residuum_fn, *, num_rollout_steps):
    """Cut after every step, written by hand."""

    def step(u_prev, _):
        u_prev = jax.lax.stop_gradient(u_prev)
        u_next = jax.vmap(stepper)(u_prev)
        return u_next, mse(jax.vmap(residuum_fn)(u_next, u_prev))

    return jnp.sum(jax.lax.scan(step, data[:, 0], length=num_rollout_steps)[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_thousand_segments_lose_no_small_contributions(dtype):
    for bptt in (True, np.ones(1000, bool)):
        _, error = errors_in_half_precision(dtype, residuum_loss, 1000, cuts=Cuts(bptt))
        assert error < 4
    _, ordinary_error = errors_in_half_precision(dtype, scan_loss, 1000)
    assert ordinary_error > 10 * error


@pytest.mark.parametrize("bptt", also_slow("3", slowly=["none", "every", "2", "9", "mask"]))
def test_wider_parameters_promote_the_initial_condition(bptt):
    factor, data = rotation_problem(jnp.float64)
    narrow = data.astype(jnp.float32)
    options = dict(num_rollout_steps=5, cuts=cuts_of(5, bptt))
    f = jax.value_and_grad(functools.partial(rotation_loss, residuum_loss, **options), (0, 1))
    loss, (grad, data_grad) = jax.jit(f)(factor, narrow)
    expected = jax.jit(f)(factor, narrow.astype(jnp.float64))
    assert_close((loss, grad), (expected[0], expected[1][0]))
    assert_close(data_grad, expected[1][1].astype(jnp.float32), 1e-6)


def test_promotion_goes_on_until_the_dtypes_settle():
    data = {"a": jnp.ones((2, 1, 3), jnp.float32), "b": jnp.ones((2, 1), jnp.float16)}

    def stepper(u):  # b makes a wider in the first step, a makes b wider in the second
        return {"a": u["a"] * jnp.float64(2), "b": u["b"] + u["a"][0]}

    _, rollout = residuum_loss(
        stepper, data, lambda n, p: n["b"] - p["b"], num_rollout_steps=3, has_aux=True
    )
    chex.assert_type(jax.tree.leaves(rollout), jnp.float64)


def test_single_precision_without_x64():
    with config("jax_enable_x64", False):
        inputs = jax.tree.map(np.float32, jax.device_get(problem(5)))
        actual, expected = (
            jax.jit(functools.partial(value_and_grad, f, num_rollout_steps=5))(inputs)
            for f in (residuum_loss, textbook_loss)
        )
        chex.assert_type(jax.tree.leaves(actual), jnp.float32)
        assert_close(actual, expected, SINGLE_TOLERANCE)


@pytest.mark.parametrize("bptt", also_slow("3", slowly=["none", "every", "2", "9", "mask"]))
def test_step_counters_and_keys_in_the_state(bptt):
    batch = 2
    data = {
        "u": jax.random.normal(jax.random.key(0), (batch, 1, 3)),
        "count": jnp.zeros((batch, 1), jnp.int32),
        "key": jax.random.split(jax.random.key(1), (batch, 1)),
    }

    def loss(loss_fn, x, **options):
        def stepper(state):
            key, noise_key = jax.random.split(state["key"])
            noise = jax.random.normal(noise_key, (3,))
            u = jnp.sin(x * state["u"] + state["count"]) + noise
            return {"u": u, "count": state["count"] + 1, "key": key}

        def residuum_fn(u_next, u_prev):
            return u_next["count"] * u_next["u"] - u_prev["u"] ** 2

        cuts = cuts_of(5, bptt, np.array(True), True)
        return loss_fn(stepper, data, residuum_fn, num_rollout_steps=5, cuts=cuts, **options)

    def derivatives(loss_fn, **options):
        f = functools.partial(loss, loss_fn, **options)
        return lambda x: (jax.value_and_grad(f)(x), jax.hessian(f)(x))

    x = jnp.arange(3.0)
    expected = jax.jit(derivatives(textbook_loss))(x)
    for options in EXTRA[:2]:
        actual = jax.jit(derivatives(residuum_loss, **options))(x)
        assert_close(actual, expected, what=options)
    _, rollout = loss(residuum_loss, x, has_aux=True)
    assert_close(rollout.final_state["count"], jnp.full((batch,), 5, jnp.int32))


@pytest.mark.parametrize("bptt", BPTT)
def test_scalar_states_and_a_batch_of_one(bptt):
    def loss(loss_fn, x):
        options = dict(num_rollout_steps=5, cuts=cuts_of(5, bptt))
        data = np.full((1, 1), 0.3)
        return loss_fn(lambda u: jnp.sin(x * u), data, lambda n, p: n - p, **options)

    actual = jax.value_and_grad(functools.partial(loss, residuum_loss))(1.5)
    assert_close(actual, jax.value_and_grad(functools.partial(loss, textbook_loss))(1.5))


def test_weights_are_any_array_like_and_leave_the_dtype_of_the_loss_alone():
    factor, data = rotation_problem(jnp.float32)
    weights = [1, 0.5, jnp.float64(0.25)]
    loss, half = (
        rotation_loss(residuum_loss, factor, data, num_rollout_steps=3, weights=w)
        for w in (weights, np.asarray(weights, np.float16))
    )
    assert_close(loss, half)
    chex.assert_type(loss, jnp.float32)


#
# Not a number
#


@slow
@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"unroll": True}], ids=str)
@pytest.mark.parametrize("field", ["bptt", "prev", "next"])
@pytest.mark.parametrize("kind", ["mask", "static"])
def test_cuts_keep_infinite_derivatives_out(field, kind, options):
    # √ has an infinite derivative at 0, which is where the state to be cut is.
    def residuum_fn(u_next, u_prev):
        if field == "prev":
            return u_next + jnp.sqrt(u_prev - jax.lax.stop_gradient(u_prev))
        if field == "next":
            return u_prev + jnp.sqrt(u_next - jax.lax.stop_gradient(u_next))
        return u_next

    def loss(loss_fn, x, cut, **options):
        def stepper(u):
            if field == "bptt":
                return jnp.cos(x) + jnp.sqrt(u - jax.lax.stop_gradient(u))
            return x * u

        return loss_fn(
            stepper,
            jnp.ones((2, 1, 3)),
            residuum_fn,
            num_rollout_steps=4,
            cuts=Cuts(**{field: cut}),
            **options,
        )

    cut = True if kind == "static" else np.ones(4, bool)
    f = functools.partial(loss, residuum_loss, **options)
    actual = jax.value_and_grad(f)(1.5, cut)
    chex.assert_tree_all_finite(actual)
    expected = jax.value_and_grad(functools.partial(loss, textbook_loss))(1.5, cut)
    assert_close(actual, expected)
    # Without the cut, there would be something to keep out.
    assert not np.isfinite(jax.grad(f)(1.5, False))


@st.composite
def poisoned_rollouts(draw):
    """Cuts, and coefficients that are 0 only on the far side of one, where √ is infinitely
    steep."""
    steps = draw(st.integers(1, 5))
    masks = st.lists(st.booleans(), min_size=steps, max_size=steps).map(np.array)
    cuts = Cuts(
        draw(st.booleans() | st.integers(1, 5) | masks),
        draw(st.booleans() | masks),
        draw(st.booleans() | masks),
    )
    every = cuts.bptt if isinstance(cuts.bptt, int) else 0  # True is 1, False is 0
    after = np.array([every and (t + 1) % every == 0 for t in range(steps)], bool)
    after = cuts.bptt if isinstance(cuts.bptt, np.ndarray) else after
    before = np.concatenate([[False], after[:-1]])
    poison = {
        "stepper": draw(masks) & before,
        "prev": draw(masks) & (before | cuts.prev),
        "next": draw(masks) & cuts.next,
    }
    weights = draw(st.none() | st.lists(st.integers(-1, 1), min_size=steps, max_size=steps))
    coefficients = {name: np.where(mask, 0.0, 1.0) for name, mask in poison.items()}
    return coefficients, dict(num_rollout_steps=steps, cuts=cuts, weights=weights)


@slow
@settings(max_examples=20, deadline=None)
@given(poisoned_rollouts(), st.booleans(), st.sampled_from([1, 2, True]))
def test_what_a_cut_separates_stays_clean(rollout, checkpoint, unroll):
    coefficients, options = rollout
    data = {"u": np.linspace(0.5, 1, 6).reshape(2, 1, 3), "t": np.zeros((2, 1), int)}
    coefficients = jax.tree.map(jnp.asarray, coefficients)

    def loss(loss_fn, x, **more):
        def steep(name, state):  # 0, with an infinite derivative where the coefficient is 0
            coefficient = coefficients[name][state["t"]]
            u = coefficient + state["u"] - jax.lax.stop_gradient(state["u"])
            return jnp.sqrt(u) - jnp.sqrt(coefficient)

        def stepper(state):
            return {"u": jnp.sin(x * state["u"]) + steep("stepper", state), "t": state["t"] + 1}

        def residuum_fn(u_next, u_prev):
            steep_next = steep("next", {"u": u_next["u"], "t": u_prev["t"]})
            return u_next["u"] + steep_next - u_prev["u"] * x - steep("prev", u_prev)

        return loss_fn(stepper, data, residuum_fn, **options, **more)

    f = functools.partial(loss, residuum_loss, checkpoint=checkpoint, unroll=unroll)
    actual = jax.jit(jax.value_and_grad(f))(1.3)
    chex.assert_tree_all_finite(actual)
    f = functools.partial(loss, textbook_loss)
    assert_close(actual, jax.jit(jax.value_and_grad(f))(1.3))


@pytest.mark.parametrize("bptt", BPTT)
def test_a_diverging_rollout_is_not_an_exception(bptt):
    def loss(x):
        options = dict(num_rollout_steps=50, cuts=Cuts(BPTT[bptt]))
        if bptt == "mask":
            options["cuts"] = Cuts(np.arange(50) % 3 == 0)
        data = jnp.full((2, 1, 3), 10.0)
        return residuum_loss(lambda u: x * u**3, data, lambda n, p: n - p, **options)

    assert not np.isfinite(jax.jit(loss)(2.0))
    assert not np.isfinite(jax.jit(jax.grad(loss))(2.0))


#
# The program: loops where they save compile time, none where they cost run time
#


def primitives(jaxpr):
    """Names of all primitives in a jaxpr, those of inner jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def program(num_rollout_steps, transform=jax.value_and_grad, **options):
    """Primitives of the loss and its gradient."""
    params, data, _, coefficient = problem(num_rollout_steps)

    def loss(params):
        args = (params, data, None, coefficient)
        options_ = dict(num_rollout_steps=num_rollout_steps, **options)
        return evaluate(residuum_loss, *args, **options_)

    return list(primitives(jax.make_jaxpr(transform(loss))(params).jaxpr))


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"has_aux": True}], ids=str)
def test_one_step_is_not_a_loop(options):
    transform = functools.partial(jax.grad, has_aux=options.get("has_aux", False))
    names = program(1, transform, **options)
    assert "dot_general" in names
    assert not {"scan", "while"} & set(names)


@pytest.mark.parametrize("bptt", [False, True, 2, 3, 9])
def test_unroll_true_leaves_no_loop(bptt):
    names = program(7, cuts=Cuts(bptt), unroll=True)
    assert not {"scan", "while"} & set(names)
    assert "scan" in program(7, cuts=Cuts(bptt), unroll=1)


@pytest.mark.parametrize("cut", FLAGS)
@pytest.mark.parametrize("bptt", [False, True, 2])
def test_static_cuts_leave_no_selection(bptt, cut):
    assert "select_n" not in program(6, cuts=Cuts(bptt, cut, cut))
    assert "select_n" in program(6, cuts=Cuts(bptt, np.array(cut), cut))


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"unroll": 3}], ids=str)
@pytest.mark.parametrize("bptt", [False, True, 5])
def test_program_size_does_not_grow_with_the_rollout(bptt, options):
    short, long = (
        len(program(num_steps, cuts=Cuts(bptt), **options)) for num_steps in (30, 300)
    )
    assert short == long


def test_unroll_is_steps_per_iteration():
    def count(unroll, bptt):
        names = program(12, lambda f: f, cuts=Cuts(bptt), unroll=unroll)
        return names.count("tanh")

    assert [count(u, False) for u in (1, 12, True)] == [1, 12, 12]
    assert [count(u, 3) for u in (1, 3, 6, True)] == [1, 3, 3, 12]


#
# The cost, as far as it is deterministic: what the compiler allocates, what JAX traces
#


def network_problem(name):
    """Params, data and a stepper `(params, u) -> u_next` in float32."""
    keys = jax.random.split(jax.random.key(0), 4)
    if name == "mlp":
        shapes, num_points = [(64, 64), (64, 64)], 64
        layer = lambda u, w: w @ u
    else:
        shapes, num_points = [(8, 1, 5), (8, 8, 5), (1, 8, 5)], 64
        layer = lambda u, w: jax.lax.conv_general_dilated(u[None], w, (1,), "SAME")[0]
    params = [jax.random.normal(k, s, jnp.float32) / 8 for k, s in zip(keys, shapes)]  # noqa: B905
    state_shape = (num_points,) if name == "mlp" else (1, num_points)
    data = jax.random.normal(keys[-1], (8, 1, *state_shape), jnp.float32)

    def stepper(params, u):
        hidden = u
        for w in params:
            hidden = jnp.tanh(layer(hidden, w))
        return u + hidden

    return params, data, stepper


def temporaries(name, num_rollout_steps, *, loss_fn=residuum_loss, wrt=0, **options):
    """Bytes of temporary memory of the compiled value and gradient."""
    params, data, stepper = network_problem(name)

    def loss(params, data):
        return loss_fn(
            functools.partial(stepper, params),
            data,
            lambda n, p: n - p,
            num_rollout_steps=num_rollout_steps,
            **options,
        )

    compiled = jax.jit(jax.value_and_grad(loss, wrt)).lower(params, data).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def num_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "options",
    [{}, {"checkpoint": True}, {"unroll": 5}, {"wrt": 1}, {"wrt": (0, 1)}],
    ids=str,
)
@pytest.mark.parametrize("bptt", also_slow(1, slowly=[5]))
@pytest.mark.parametrize("name", also_slow("mlp", slowly=["conv"]))
def test_memory_of_a_truncated_rollout_does_not_grow_with_its_length(name, bptt, options):
    options = dict(cuts=Cuts(bptt, next=True), **options)
    assert temporaries(name, 1000, **options) == temporaries(name, 20, **options)


@pytest.mark.parametrize("bptt", also_slow(1, slowly=[5]))
@pytest.mark.parametrize("name", also_slow("mlp", slowly=["conv"]))
def test_memory_of_a_truncated_rollout_is_that_of_one_segment(name, bptt):
    one_segment = temporaries(name, bptt)
    params, _, _ = network_problem(name)
    streamed = temporaries(name, 1000, cuts=Cuts(bptt))
    assert streamed <= 1.5 * (one_segment + num_bytes(params))
    # An ordinary scan needs this much for the states alone.
    assert temporaries(name, 1000, cuts=Cuts(np.ones(1000, bool))) > 20 * streamed / bptt


@pytest.mark.parametrize("name", also_slow("mlp", slowly=["conv"]))
def test_checkpoint_stores_one_state_per_step_and_nothing_else(name):
    _, data, _ = network_problem(name)
    short, long = (temporaries(name, n, checkpoint=True) for n in (100, 1000))
    assert long - short <= 1.01 * 900 * num_bytes(data)
    stored = temporaries(name, 1000) - temporaries(name, 100)
    assert stored > 1.9 * (long - short)


@pytest.mark.parametrize("name", also_slow("mlp", slowly=["conv"]))
def test_checkpoint_within_segments_stores_one_state_per_step_of_a_segment(name):
    _, data, _ = network_problem(name)
    short, long = (temporaries(name, 1000, cuts=Cuts(k), checkpoint=True) for k in (50, 100))
    assert long - short <= 1.01 * 50 * num_bytes(data)


@pytest.mark.parametrize("bptt", also_slow(2, slowly=[False, 1]))
def test_unrolled_it_needs_no_more_memory_than_trainax(bptt):
    def trainax_loss(stepper, data, residuum_fn, *, num_rollout_steps):
        configuration = trainax.configuration.Residuum(
            num_rollout_steps, cut_bptt=bptt is not False, cut_bptt_every=int(bptt) or 1
        )
        return configuration(stepper, data, residuum_fn=residuum_fn)

    ours = temporaries("conv", 10, cuts=Cuts(bptt), unroll=True)
    assert ours <= 1.05 * temporaries("conv", 10, loss_fn=trainax_loss)


@pytest.mark.parametrize("bptt", [1, 3])
def test_streaming_does_the_arithmetic_of_one_segment_per_segment(bptt):
    names = program(30, cuts=Cuts(bptt))
    one_segment = program(bptt)
    for primitive in ("dot_general", "tanh"):
        assert names.count(primitive) == one_segment.count(primitive)


def test_nothing_of_the_gradient_is_computed_for_the_value():
    forward = program(30, lambda f: f)
    streamed = program(30, lambda f: f, cuts=Cuts(1))
    for primitive in ("dot_general", "tanh"):
        assert streamed.count(primitive) == forward.count(primitive) == 1


def test_nothing_is_accumulated_for_constants():
    big = jnp.ones((512, 512), jnp.float32)
    data = jnp.ones((1, 1, 512), jnp.float32)

    def loss(scale, big):
        stepper = lambda u: jnp.tanh(scale * u)
        residuum_fn = lambda n, p: big @ n - p
        options = dict(num_rollout_steps=10, cuts=Cuts(1))
        return residuum_loss(stepper, data, residuum_fn, **options)

    compiled = jax.jit(jax.grad(loss)).lower(jnp.float32(1), big).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < big.nbytes / 2


#
# The second witness: trainax
#


def trainax_network(name):
    key = jax.random.key(0)
    if name == "mlp":
        network = eqx.nn.MLP(8, 8, 16, 2, jnp.tanh, key=key)
        return eqx.nn.Lambda(lambda u: u + network(u[0])[None])
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv1d(1, 4, 3, padding="SAME", padding_mode="CIRCULAR", key=key),
            eqx.nn.Lambda(jnp.tanh),
            eqx.nn.Conv1d(4, 1, 3, padding="SAME", padding_mode="CIRCULAR", key=key),
        ]
    )


def heat_residuum(u_next, u_prev):
    """Implicit Euler for the heat equation; does not mention the batch axis."""
    neighbours = jnp.roll(u_next, 1, axis=-1) + jnp.roll(u_next, -1, axis=-1)
    return u_next - u_prev - 0.1 * (neighbours - 2 * u_next)


@pytest.mark.parametrize("every", also_slow(2, slowly=[None, 1, 3]))
@pytest.mark.parametrize(
    "network_name, loss_name",
    [
        ("mlp", "MSELoss"),
        pytest.param("mlp", "MAELoss", marks=slow),
        pytest.param("conv", "MSELoss", marks=slow),
    ],
)
def test_trainax_agrees(network_name, loss_name, every):
    network = trainax_network(network_name)
    data = jax.random.normal(jax.random.key(1), (3, 2, 1, 8))
    trainax_loss = getattr(trainax.loss, loss_name)()
    ours = {} if loss_name == "MSELoss" else {"time_level_loss": trainax_loss.single_batch}

    params, static = eqx.partition(network, eqx.is_array)

    def both(params):
        def value_and_grad(loss_fn, *args, **options):
            def loss(params):
                return loss_fn(eqx.combine(params, static), data, *args, **options)

            return jax.value_and_grad(loss)(params)

        for prev, next, weights in itertools.product(
            FLAGS, FLAGS, [None, jnp.array([1.0, -0.5, 0.0, 2.0])]
        ):
            actual = value_and_grad(
                residuum_loss,
                heat_residuum,
                num_rollout_steps=4,
                cuts=Cuts(every or False, prev, next),
                weights=weights,
                **ours,
            )
            reference = trainax.configuration.Residuum(
                4,
                cut_bptt=every is not None,
                cut_bptt_every=every or 1,
                cut_prev=prev,
                cut_next=next,
                time_level_weights=weights,
                time_level_loss=trainax_loss,
            )
            yield actual, value_and_grad(reference, residuum_fn=heat_residuum)

    for actual, expected in jax.jit(lambda params: list(both(params)))(params):
        assert_close(actual, expected)


class ResiduumLossConfiguration(trainax.configuration.BaseConfiguration):
    """`residuum_loss` plugged into the trainers of trainax."""

    options: dict

    def __call__(self, stepper, data, *, ref_stepper=None, residuum_fn):
        return residuum_loss(stepper, data, residuum_fn, **self.options)


@slow
def test_trainax_trains_with_it():
    data = jax.random.normal(jax.random.key(1), (12, 6, 1, 8))
    training = dict(residuum_fn=heat_residuum, optimizer=optax.adam(1e-2), batch_size=4)
    ours = trainax.GeneralTrainer(
        trainax.TrajectorySubStacker(data, sub_trajectory_len=5),
        ResiduumLossConfiguration(dict(num_rollout_steps=4, cuts=Cuts(bptt=2))),
        num_minibatches=12,
        **training,
    )
    reference = trainax.trainer.ResiduumTrainer(
        data,
        num_rollout_steps=4,
        cut_bptt=True,
        cut_bptt_every=2,
        num_training_steps=12,
        **training,
    )
    network = trainax_network("conv")
    (_, history), (_, expected) = (
        trainer(network, jax.random.key(0), spawn_tqdm=False) for trainer in (ours, reference)
    )
    assert_close(history, expected)
    assert history[-1] < 0.8 * history[0]


#
# The mathematics that README promises: the residuum and the diverted chain
#


def linear_step(condition_number, size=5, seed=0):
    """A of the given condition, B, emulator and initial conditions, all random."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(2))
    matrix = left @ np.diag(np.geomspace(1, condition_number, size)) @ right
    others = (rng.normal(size=(size, size)) / np.sqrt(size) for _ in range(2))
    return matrix, *others, rng.normal(size=(4, 1, size))


def diverted_chain_loss(matrix, b, emulator, data, num_rollout_steps):
    """The loss of `trainax.configuration.DivertedChainBranchOne`, as a loop."""
    u_prev, loss = data[:, 0], 0.0
    for _ in range(num_rollout_steps):
        u_next = u_prev @ emulator.T
        loss += jnp.mean((u_next - jnp.linalg.solve(matrix, b @ u_prev.T).T) ** 2)
        u_prev = u_next
    return loss


@pytest.mark.parametrize("seed", also_slow(0, slowly=[1, 2, 3, 4]))
@pytest.mark.parametrize("condition_number", [2, 1e2, 1e4])
def test_residuum_and_diverted_chain(condition_number, seed):
    matrix, b, emulator, data = linear_step(condition_number, seed=seed)
    loss = functools.partial(
        residuum_loss,
        lambda u: emulator @ u,
        data,
        lambda n, p: matrix @ n - b @ p,
        num_rollout_steps=4,
    )
    diverted = diverted_chain_loss(matrix, b, emulator, data, 4)
    preconditioned = loss(time_level_loss=lambda r: mse(jnp.linalg.solve(matrix, r)))
    np.testing.assert_allclose(preconditioned, diverted, rtol=1e-9)
    largest, *_, smallest = np.linalg.svd(matrix, compute_uv=False)
    assert smallest**2 * diverted <= loss() * (1 + 1e-9)
    assert loss() <= largest**2 * diverted * (1 + 1e-9)


def test_residuum_and_diverted_chain_agree_with_trainax():
    matrix, b, emulator, data = linear_step(1e2)
    reference = trainax.configuration.DivertedChainBranchOne(3)(
        lambda u: emulator @ u, data, ref_stepper=lambda u: jnp.linalg.solve(matrix, b @ u)
    )
    np.testing.assert_allclose(
        diverted_chain_loss(matrix, b, emulator, data, 3), reference, rtol=1e-9
    )


@pytest.mark.parametrize("condition_number", [2, 1e2, 1e4])
def test_hessian_has_the_squared_condition_number(condition_number):
    matrix, b, _, data = linear_step(condition_number)

    def loss(u_next, time_level_loss):
        residuum_fn = lambda n, p: matrix @ n - b @ p
        options = dict(time_level_loss=time_level_loss)
        return residuum_loss(lambda _: u_next, data[:1], residuum_fn, **options)

    for time_level_loss, expected in (
        (mse, condition_number**2),
        (lambda r: mse(jnp.linalg.solve(matrix, r)), 1),
    ):
        hessian = jax.hessian(loss)(data[0, 0], time_level_loss)
        np.testing.assert_allclose(np.linalg.cond(hessian), expected, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1e-5])
def test_near_the_solution_a_nonlinear_step_is_as_its_linearisation(size):
    matrix, b, _, data = linear_step(1e2)
    residuum_fn = lambda n, p: matrix @ n + 0.1 * n**3 - b @ p
    u_prev, solution = data[0, 0], np.zeros(5)
    for _ in range(30):  # Newton's method
        jacobian = jax.jacobian(residuum_fn)(solution, u_prev)
        solution -= jnp.linalg.solve(jacobian, residuum_fn(solution, u_prev))
    error = size * np.random.default_rng(1).normal(size=5)
    stepper = lambda u_prev: solution + error
    loss = residuum_loss(stepper, data[:1], residuum_fn)
    largest, *_, smallest = np.linalg.svd(jacobian, compute_uv=False)
    assert (1 - 10 * size) * smallest**2 * mse(error) <= loss
    assert loss <= (1 + 10 * size) * largest**2 * mse(error)
    precondition = lambda r: mse(jnp.linalg.solve(jacobian, r))
    loss = residuum_loss(stepper, data[:1], residuum_fn, time_level_loss=precondition)
    np.testing.assert_allclose(loss, mse(error), rtol=10 * size)


#
# Bad input: an error at trace time that names the culprit
#


def valid_call(loss_fn=residuum_loss, **changes):
    call = dict(
        stepper=lambda u: {"u": jnp.sin(u["u"])},
        data={"u": np.ones((2, 1, 3), np.float32)},
        residuum_fn=lambda u_next, u_prev: u_next["u"] - u_prev["u"],
        num_rollout_steps=4,
    )
    call.update(changes)
    stepper, data, residuum_fn = (call.pop(name) for name in ("stepper", "data", "residuum_fn"))
    return loss_fn(stepper, data, residuum_fn, **call)


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


BAD_CALLS = [
    # what is wrong, the error, and what its text must name
    (dict(num_rollout_steps=2.0), TypeError, "num_rollout_steps.* int.*2.0"),
    (dict(num_rollout_steps=True), TypeError, "num_rollout_steps.* int.*True"),
    (dict(num_rollout_steps="3"), TypeError, "num_rollout_steps.* int.*'3'"),
    (dict(num_rollout_steps=None), TypeError, "num_rollout_steps.* int.*None"),
    (dict(num_rollout_steps=jnp.array(3)), TypeError, r"num_rollout_steps.* int.*int\d+"),
    (dict(num_rollout_steps=0), ValueError, "num_rollout_steps.*at least 1.*0"),
    (dict(num_rollout_steps=-3), ValueError, "num_rollout_steps.*at least 1.*-3"),
    (dict(data=None), ValueError, "data.*at least one array.*None"),
    (dict(data={}), ValueError, "data.*at least one array"),
    (dict(data="u"), TypeError, "data.*array.*'u'"),
    (dict(data={"u": [1.0]}), TypeError, r"data\['u'\]\[0\].*array.*1.0"),
    (dict(data={"u": ones(3)}), ValueError, r"data\['u'\].*\[batch, num_snap.*\[3\]"),
    (dict(data={"u": ones(0, 1, 3)}), ValueError, r"data\['u'\].*at least 1.*0, 1, 3"),
    (dict(data={"u": ones(2, 0, 3)}), ValueError, r"data\['u'\].*at least 1.*2, 0, 3"),
    (
        dict(data={"u": ones(2, 1, 3), "v": ones(3, 1, 3)}),
        ValueError,
        r"data\['v'\].*\[2, 1\].*\[3, 1, 3\]",
    ),
    (
        dict(data={"u": ones(2, 1, 3), "v": ones(2, 2, 3)}),
        ValueError,
        r"data\['v'\].*\[2, 1\].*\[2, 2, 3\]",
    ),
    (dict(stepper=3), TypeError, "stepper.*callable.*3"),
    (dict(stepper=lambda u: u["u"]), TypeError, "stepper.*structure"),
    (dict(stepper=lambda u: None), TypeError, "stepper.*structure"),
    (
        dict(stepper=lambda u: {"u": u["u"][1:]}),
        TypeError,
        r"stepper.*\['u'\] is float32\[3\].*float32\[2\]",
    ),
    (
        dict(stepper=lambda u: {"u": u["u"].astype(jnp.float16)}),
        TypeError,
        r"stepper.*\['u'\] is float32\[3\].*float16\[3\]",
    ),
    (
        dict(stepper=lambda u: {"u": u["u"].astype(jnp.int32)}),
        TypeError,
        r"stepper.*\['u'\] is float32\[3\].*int32\[3\]",
    ),
    (
        dict(stepper=lambda u: {"u": u["u"] * 1j}),
        TypeError,
        r"stepper.*\['u'\] is float32\[3\].*complex64\[3\]",
    ),
    (dict(residuum_fn=None), TypeError, "residuum_fn.*callable.*None"),
    (dict(residuum_fn=lambda n, p: None), TypeError, "residuum_fn.*array.*None"),
    (dict(time_level_loss=3), TypeError, "time_level_loss.*callable.*3"),
    (
        dict(time_level_loss=lambda r: r),
        TypeError,
        r"time_level_loss.*real scalar.*float32\[3\]",
    ),
    (
        dict(time_level_loss=lambda r: r[0] * 1j),
        TypeError,
        r"time_level_loss.*real scalar.*complex64\[\]",
    ),
    (
        dict(time_level_loss=lambda r: (r[0], r[1])),
        TypeError,
        "time_level_loss.*real scalar",
    ),
    (dict(time_level_loss=lambda r: r[0] > 0), TypeError, "time_level_loss.*real.*bool"),
    (dict(weights=ones(3)), ValueError, r"weights.*\[4\].*\[3\]"),
    (dict(weights=ones(4, 1)), ValueError, r"weights.*\[4\].*\[4, 1\]"),
    (dict(weights=1.0), ValueError, r"weights.*\[4\].*\[\]"),
    (dict(weights=ones(4) * 1j), TypeError, "weights.*real.*complex64"),
    (dict(weights="ones"), TypeError, "weights.*array.*'ones'"),
    (dict(weights=[[1.0], [1.0, 2.0]]), TypeError, "weights.*array"),
    (dict(cuts=True), TypeError, "cuts must be a Cuts.*True"),
    (dict(cuts=None), TypeError, "cuts must be a Cuts.*None"),
    (dict(cuts=(True, False, False)), TypeError, r"cuts must be a Cuts.*\(True"),
    (dict(cuts=Cuts(bptt=0)), ValueError, "cuts.bptt.*at least 1.*0"),
    (dict(cuts=Cuts(bptt=-2)), ValueError, "cuts.bptt.*at least 1.*-2"),
    (dict(cuts=Cuts(bptt=1.0)), TypeError, "cuts.bptt.*static int.*1.0"),
    (dict(cuts=Cuts(bptt=None)), TypeError, "cuts.bptt.*static int.*None"),
    (dict(cuts=Cuts(bptt=[True] * 4)), TypeError, "cuts.bptt.*bool array.*True"),
    (dict(cuts=Cuts(bptt=jnp.array(2))), TypeError, "cuts.bptt.*bool array.*int"),
    (dict(cuts=Cuts(bptt=ones(4))), TypeError, "cuts.bptt.*bool array.*float32"),
    (dict(cuts=Cuts(bptt=np.array(True))), ValueError, r"cuts.bptt.*\[4\].*bool\[\]"),
    (dict(cuts=Cuts(bptt=ones(3, dtype=bool))), ValueError, r"cuts.bptt.*\[4\].*\[3\]"),
    (dict(cuts=Cuts(prev=1)), TypeError, "cuts.prev.*bool array.*1"),
    (dict(cuts=Cuts(prev=ones(4))), TypeError, "cuts.prev.*bool array.*float32"),
    (dict(cuts=Cuts(prev=ones(1, dtype=bool))), ValueError, r"cuts.prev.*\[4\].*\[1\]"),
    (dict(cuts=Cuts(next="yes")), TypeError, "cuts.next.*bool array.*'yes'"),
    (dict(cuts=Cuts(next=ones(4, 1, dtype=bool))), ValueError, r"cuts.next.*\[4, 1\]"),
    (dict(unroll=0), ValueError, "unroll.*at least 1.*0"),
    (dict(unroll=-1), ValueError, "unroll.*at least 1.*-1"),
    (dict(unroll=1.0), TypeError, "unroll.* int.*1.0"),
    (dict(checkpoint=1), TypeError, "checkpoint.*static bool.*1"),
    (dict(has_aux=None), TypeError, "has_aux.*static bool.*None"),
]


def test_the_valid_call_is_valid():
    assert np.isfinite(valid_call())


@pytest.mark.parametrize(
    "changes, error, pattern",
    BAD_CALLS,
    ids=[f"{i}: {next(iter(call[0]))}" for i, call in enumerate(BAD_CALLS)],
)
def test_bad_input_is_named(changes, error, pattern):
    if RUNTIME_TYPECHECKING:
        # The annotations may object first; they name the argument, too.
        error, pattern = (error, jaxtyping.TypeCheckError), next(iter(changes))
    with pytest.raises(error, match=f"(?s){pattern}"):
        jax.eval_shape(lambda: valid_call(**changes))  # no computation, only tracing


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_rollout_steps", 3),
        ("unroll", 2),
        ("checkpoint", True),
        ("has_aux", True),
        ("cuts", Cuts(bptt=2)),
        ("cuts", Cuts(bptt=True)),
    ],
)
def test_tracing_what_must_be_static_is_named(name, value):
    pattern = "cuts.bptt" if name == "cuts" else name
    with pytest.raises((TypeError, ValueError), match=pattern):
        jax.jit(lambda x: valid_call(**{name: x}))(value)


ODD_VALUES = [
    *(None, True, False, 0, 1, -1, 3, 2**31, -(10**30), 10**30, 0.5, 1j, float("nan")),
    *(
        "3",
        b"3",
        (),
        [],
        {},
        [1, 2],
        [[1.0], [2.0, 3.0]],
        {"u": 1.0},
        {"u": None},
        int,
        object(),
    ),
    *(ones(), ones(4), ones(4, 1), ones(0), ones(2, 1, 3), ones(2, 1, 5), ones(2, 0, 3)),
    *(ones(4, dtype=bool), ones(4, dtype=int), ones(4, dtype=complex), ones(4) * np.nan),
    *(ones(dtype=bool), ones(5, dtype=bool), jnp.ones(4), jnp.ones(4, jnp.bfloat16)),
    *(np.array(["a"] * 4), np.array([None] * 4), np.array([1e30] * 4), jax.random.key(0)),
    *({"u": ones(2, 1, 5)}, {"v": ones(2, 1, 3)}, {"u": ones(2, 1)}, {"u": ones(2, 1, 0)}),
    *({"u": ones(2, 1, 3), "v": ones(2, 1)}, {"u": ones(2, 1, 3, dtype=int)}),
    *({"u": ones(2, 1, 3, dtype=complex)}, {"u": np.array([[["x"]]])}, [ones(2, 1, 3)]),
    *(Cuts(), Cuts(True, True, True), Cuts(2), (True, False, False), jax.ShapeDtypeStruct),
    *(lambda: 0, lambda x: x, lambda x: None, lambda x: "x", lambda x: x["u"], lambda x: x[0]),
    *(lambda x: x["w"], lambda x: x.w, lambda x: 1 / 0, lambda x: x["u"][:, 9], jnp.sum),
    *(lambda x: {"u": x["u"][:2]}, lambda x: {"u": x["u"] * 1j}, lambda x: {"u": 1}),
    *(lambda x: {"u": x["u"].astype(int)}, lambda x: [x["u"]], lambda x: {"u": object()}),
    *(lambda x, y: x, lambda x, y: None, lambda x, y: x["u"], lambda x, y: [x, y, "r"]),
    *(lambda x, y: x["u"] @ y["u"][:2], lambda x, y: x["u"] > 0, lambda x, y: 1, max),
    *(lambda x, y: bool(x["u"][0] > 0), lambda x, y: np.asarray(x["u"]), jnp.add),
]
ARGUMENTS = {
    # each argument, and what else may be named if it is wrong
    "data": ["stepper", "residuum_fn"],
    "stepper": ["residuum_fn"],
    "residuum_fn": ["time_level_loss"],
    "time_level_loss": [],
    "num_rollout_steps": ["weights", "cuts"],
    "weights": [],
    "cuts": [],
    "cuts.bptt": [],
    "cuts.prev": [],
    "cuts.next": [],
    "checkpoint": [],
    "unroll": [],
    "has_aux": [],
}


def can_be_traced(value):
    try:
        jax.eval_shape(lambda value: value, value)
    except (TypeError, OverflowError):
        return False
    return True


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(ARGUMENTS)), st.sampled_from(ODD_VALUES), st.booleans())
def test_one_thing_wrong_is_an_error_that_names_it_or_a_correct_result(name, value, traced):
    argument, _, field = name.partition(".")

    def call(value, **changes):
        changes[argument] = Cuts(**{field: value}) if field else value
        return valid_call(**changes)

    try:
        actual = jax.jit(call)(value) if traced and can_be_traced(value) else call(value)
    except Exception as error:
        text = "".join(traceback.format_exception_only(error))
        assert any(named in text for named in (name, *ARGUMENTS[name])), text
    else:
        actual = actual[0] if isinstance(actual, tuple) else actual
        options = {} if argument in ("checkpoint", "unroll", "has_aux") else {argument: value}
        if field:
            options = {"cuts": Cuts(**{field: value})}
        expected = valid_call(loss_fn=textbook_loss, **options)
        np.testing.assert_allclose(actual, expected, rtol=SINGLE_TOLERANCE)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:], ids=str)
def test_arguments_in_the_wrong_order_are_named(order):
    call = (lambda u: u, ones(2, 1, 3), lambda u_next, u_prev: u_next - u_prev)
    names = ("stepper", "data", "residuum_fn")
    with pytest.raises(TypeError) as info:
        residuum_loss(*(call[i] for i in order))
    text = "".join(traceback.format_exception_only(info.value))
    assert any(names[slot] in text for slot, i in enumerate(order) if slot != i)


#
# The module as a file
#


def test_annotations_hold_at_run_time():
    original = sys.modules.pop("residuum")
    try:
        with jaxtyping.install_import_hook("residuum", "beartype.beartype"):
            checked = importlib.import_module("residuum")
    finally:
        sys.modules["residuum"] = original

    inputs = problem(5)
    for bptt in (False, True, 2, MASK[:5]):
        options = dict(num_rollout_steps=5, cuts=checked.Cuts(bptt, MASK[:5], True))
        f = functools.partial(value_and_grad, checked.residuum_loss, **options)
        assert_close(jax.jit(f)(inputs), value_and_grad(textbook_loss, inputs, **options))
    with pytest.raises(jaxtyping.TypeCheckError, match="weights"):
        evaluate(checked.residuum_loss, *inputs, num_rollout_steps=4)


def test_it_imports_jax_and_jaxtyping_only():
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "residuum.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"jax", "jaxtyping"}


def test_importing_it_touches_no_network_no_file_and_no_environment():
    program = """if True:
        import collections, os, sys
        import jax, jaxtyping
        from jaxtyping import PyTree  # loaded lazily

        touched = []

        class Environment(collections.UserDict):
            def __getitem__(self, name, default=None):
                touched.append(("environment", name))
                raise KeyError(name)

            __contains__ = get = __getitem__

        def audit(event, args):
            is_module = event == "open" and "residuum" in os.path.basename(str(args[0]))
            watched = ("open", "socket.", "subprocess.", "os.putenv", "os.system", "urllib.")
            if event.startswith(watched) and not is_module:
                touched.append((event, args))

        sys.addaudithook(audit)
        os.environ = Environment()
        import residuum
        assert touched == [], touched
        os.getenv("HOME") if len(sys.argv) == 1 else open(sys.argv[1])
    """
    run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    # That the program would notice is what the last line is for.
    for last, arguments in (("KeyError", []), ("FileNotFoundError", ["/no/such/file"])):
        result = run([sys.executable, "-B", "-c", program, *arguments])
        assert result.stderr.strip().splitlines()[-1].startswith(last), result.stderr


def test_public_names():
    assert sorted(residuum.__all__) == ["Cuts", "Rollout", "mse", "residuum_loss"]
    assert all(getattr(residuum, name).__doc__ for name in residuum.__all__)
    assert f"## {residuum.__version__}" in (ROOT / "CHANGELOG.md").read_text()


#
# README and the examples: every block and every program runs
#

README = (ROOT / "README.md").read_text()


def python_blocks():
    """Title of the section, first block of the section, block, for each block of README."""
    for section in re.split(r"^## ", README, flags=re.MULTILINE):
        blocks = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        for i, block in enumerate(blocks):
            yield section.splitlines()[0], blocks[0] if i else "", block


def run_block(section, setup, block):
    namespace = {"__name__": "__main__"}
    with config("jax_enable_x64", False):
        for part in (setup, block):
            exec(compile(part, f"README.md, {section}", "exec"), namespace)
    return namespace


PYTHON_BLOCKS = list(python_blocks())
API = PYTHON_BLOCKS[:2]


@pytest.mark.parametrize(
    "section, setup, block",
    [pytest.param(*block, marks=() if block in API else slow) for block in PYTHON_BLOCKS],
    ids=[f"{i}: {b[0]}" for i, b in enumerate(PYTHON_BLOCKS)],
)
def test_readme_block_runs(section, setup, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "jax.shard_map" in block and not hasattr(jax, "shard_map"):
        pytest.skip("needs a newer JAX")
    namespace = run_block(section, setup, block)
    for value in list(namespace.values()):
        if isinstance(value, type) and issubclass(value, chex.TestCase):
            tests = unittest.defaultTestLoader.loadTestsFromTestCase(value)
            result = unittest.TextTestRunner(stream=io.StringIO()).run(tests)
            assert result.wasSuccessful() and result.testsRun > 0


def test_readme_example_trains():
    example = run_block(*PYTHON_BLOCKS[0])
    assert example["loss"](example["kernel"], example["data"]) < 1e-5


@slow
def test_readme_learns_the_physical_parameter():
    (block,) = (b for b in PYTHON_BLOCKS if 'params["diffusion"]' in b[2])
    assert abs(run_block(*block)["params"]["diffusion"] - 0.5) < 1e-3


def test_readme_names_every_parameter():
    code = residuum_loss.__kwdefaults__ or residuum_loss.__wrapped__.__kwdefaults__
    for name in ("stepper", "data", "residuum_fn", *code):
        assert f"`{name}`" in README


def test_readme_links_to_files_and_sections_that_exist():
    links = re.findall(r"""(?:\]\(|href=")([^)"]+)""", README)
    files = [link for link in links if not link.startswith(("http", "#"))]
    assert files and all((ROOT / file).exists() for file in files)
    titles = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", t.lower()).replace(" ", "-") for t in titles}
    assert {link[1:] for link in links if link.startswith("#")} <= anchors


def run_example(name, *arguments, **options):
    """In a process of its own, since examples set what JAX knows before it starts."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    environment.pop("XLA_FLAGS", None)  # with this process' number of virtual devices
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


FIGURES = {
    # which .ci/run starts by README's command
    "burgers.py": "burgers.png",
    "conditioning.py": "conditioning.png",
    "cuts.py": "cuts_bptt.svg",
    "kuramoto_sivashinsky_2d.py": "kuramoto_sivashinsky_2d.png",
    "lorenz.py": "lorenz.png",
    "supervised.py": "supervised.png",
}


@slow
@pytest.mark.parametrize("name", [name for name in FIGURES if name != "burgers.py"])
def test_example_runs(name, tmp_path):
    output = tmp_path if name == "cuts.py" else tmp_path / FIGURES[name]
    quick = {"cuts.py": (), "supervised.py": ("--quick", "--rollout-steps", "2")}
    run_example(name, *quick.get(name, ("--quick",)), "--output", str(output), cwd=tmp_path)
    assert (tmp_path / FIGURES[name]).stat().st_size > 1000
    assert (ROOT / "assets" / FIGURES[name]).exists()


def test_every_example_is_tested():
    names = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert names == {*FIGURES, "data_parallel.py"}


@slow
@pytest.mark.skipif(not hasattr(jax.config, "jax_num_cpu_devices"), reason="needs a newer JAX")
def test_two_processes_train_like_one(tmp_path):
    histories = []
    for num_processes in ("1", "2"):
        path = tmp_path / f"{num_processes}.csv"
        output = run_example(
            "data_parallel.py",
            *("--quick", "--rollout-steps", "2"),
            *("--num-processes", num_processes, "--cpu-devices", "2"),
            *("--output", str(path)),
        )
        assert f"{num_processes} processes, {2 * int(num_processes)} devices" in output
        histories.append(np.loadtxt(path))
    np.testing.assert_allclose(*histories, rtol=1e-4)
    assert histories[0].shape == (20,) and histories[0][-1] < 0.1 * histories[0][0]


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@slow
@pytest.mark.parametrize(
    "figure, missing",
    [
        ("none", []),
        ("bptt", ["chain 1", "chain 2", "prev 1", "prev 2"]),
        ("bptt_every_2", ["chain 2", "prev 2"]),
        ("prev", ["prev 0", "prev 1", "prev 2"]),
        ("next", ["next 0", "next 1", "next 2", "chain 2", "made 2"]),
    ],
)
def test_cuts_are_drawn_as_the_library_makes_them(figure, missing):
    cuts = load_example("cuts")
    arrows = cuts.gradient_arrows(cuts.FIGURES[figure])
    actual = [f"{edge} {t}" for edge, flows in arrows.items() for t in range(3) if not flows[t]]
    assert sorted(actual) == sorted(missing)
    drawn = (ROOT / "assets" / f"cuts_{figure}.svg").read_text()
    assert drawn == cuts.picture(cuts.FIGURES[figure])
