"""`axis_name` names the batch axis. Collectives over that axis are then statistics of the
batch, in the streaming gradient as in the textbook loop, and batch norms work as their
documentation says."""

import functools
import inspect
import traceback

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from residuum import Cuts, residuum_loss
from test_residuum import (
    assert_as_textbook,
    assert_close,
    cuts_of,
    EXTRA,
    SINGLE_TOLERANCE,
    textbook_loss,
)
from tests.common import also_slow, make_mesh, MESH_DEVICES, needs_shard_map, shard, slow


#
# A batch norm in the stepper, and statistics of the batch in the residual and in its norm
#


def normed_problem(num_rollout_steps, batch=4):
    """Returns the differentiable arguments: params, data, weights, inputs."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    params = {"w": normal(3, 3), "scale": normal()}
    data, inputs = normal(batch, 1, 3), normal(batch, num_rollout_steps)
    return params, data, normal(num_rollout_steps), inputs


def normed_loss(loss_fn, params, data, weights, inputs, *, names="batch", **options):
    def stepper(u, f):
        hidden = params["w"] @ u + f - jax.lax.pmean(f, names)
        mean = jax.lax.pmean(hidden, names)
        variance = jax.lax.pmean((hidden - mean) ** 2, names)
        return u / 2 + jnp.tanh((hidden - mean) / jnp.sqrt(variance + 0.1))

    def residuum_fn(u_next, u_prev, f):
        residuum = params["scale"] * u_next - u_prev**2 + jax.lax.psum(u_prev, names) * f
        if names == "batch":  # not on a mesh, where only a part of the batch is in this order
            everyone = jax.lax.all_gather(u_next, names)
            residuum -= everyone[jax.lax.axis_index(names) - 1]
        return residuum

    def time_level_loss(residuum):
        return jnp.mean(residuum**2 / (1 + jax.lax.psum(residuum**2, names)))

    return loss_fn(
        stepper,
        data,
        residuum_fn,
        num_rollout_steps=inputs.shape[1],
        weights=weights,
        inputs=inputs,
        time_level_loss=time_level_loss,
        axis_name="batch",
        **options,
    )


def value_and_grad(loss_fn, args, **options):
    f = functools.partial(normed_loss, loss_fn, **options)
    return jax.value_and_grad(f, argnums=(0, 1, 2, 3))(*args)


@pytest.mark.parametrize("extra", [EXTRA[:2], pytest.param(EXTRA[2:], marks=slow)], ids=str)
@pytest.mark.parametrize("bptt", also_slow("2", slowly=["none", "every", "mask"]))
def test_collectives_over_the_batch_equal_the_textbook_loop(bptt, extra):
    prev = np.array([False, True, False])  # becomes a `where` in the program
    f = functools.partial(value_and_grad, cuts=cuts_of(3, bptt, prev))
    assert_as_textbook(f, normed_problem(3), extra=extra)


@pytest.mark.parametrize("twice", also_slow(False, slowly=[True]))
@pytest.mark.parametrize("bptt", also_slow("2", slowly=["none", "every", "mask"]))
def test_derivatives_of_collectives_equal_the_textbook_loop(bptt, twice):
    """The derivatives of collectives over the batch equal those of the textbook loop. With
    `twice`, this includes reverse over reverse mode."""
    args = normed_problem(3)
    tangents = jax.tree.map(jnp.cos, args)

    def derivatives(loss_fn, args):
        def value_and_grad(*args):
            f = functools.partial(normed_loss, loss_fn, cuts=cuts_of(3, bptt))
            return jax.value_and_grad(f, argnums=(0, 1, 2, 3))(*args)

        def along_the_tangents(args):
            products = jax.tree.map(lambda g, dot: g * dot, value_and_grad(*args)[1], tangents)
            return sum(jnp.sum(x) for x in jax.tree.leaves(products))

        reverse_over_reverse = jax.grad(along_the_tangents)(args) if twice else None
        return jax.jvp(value_and_grad, args, tangents), reverse_over_reverse

    assert_as_textbook(derivatives, args)


#
# Several devices
#


@functools.cache
def on_one_device():
    args = normed_problem(3, batch=2 * len(MESH_DEVICES))
    f = lambda bptt: value_and_grad(textbook_loss, args, cuts=Cuts(bptt))
    return args, jax.jit(lambda: {bptt: f(bptt) for bptt in (False, 1, 2)})()


SHARDED = [dict(cuts=Cuts(1)), dict(cuts=Cuts(2), checkpoint=True), dict(checkpoint=2)]
SPECS = (P(), P("devices"), P(), P("devices"))


def assert_as_on_one_device(actual):
    for options, value_and_grads in zip(SHARDED, actual, strict=True):
        expected = on_one_device()[1][options.get("cuts", Cuts()).bptt]
        assert_close(*jax.device_get((value_and_grads, expected)), what=options)


def test_under_jit_a_statistic_is_that_of_the_whole_sharded_batch():
    args, _ = on_one_device()
    mesh = make_mesh(("devices",))
    args = [shard(mesh, spec, x) for spec, x in zip(SPECS, args, strict=True)]
    f = lambda *args: [value_and_grad(residuum_loss, args, **options) for options in SHARDED]
    assert_as_on_one_device(jax.jit(f)(*args))


BOTH_NAMES = ("batch", "devices")


@needs_shard_map
@pytest.mark.parametrize("where", also_slow("inside", slowly=["outside"]))
def test_in_a_shard_map_a_collective_over_both_names_is_exact(where):
    """In a `shard_map`, a collective over both axis names covers the whole batch, so the value
    and the gradient equal those of the whole batch on one device."""
    args, _ = on_one_device()
    mapped = functools.partial(
        jax.shard_map, mesh=make_mesh(("devices",)), in_specs=SPECS, check_vma=False
    )

    def outside(options):
        loss = functools.partial(normed_loss, residuum_loss, names=BOTH_NAMES, **options)
        mean_loss = mapped(lambda *args: jax.lax.pmean(loss(*args), "devices"), out_specs=P())
        return jax.value_and_grad(mean_loss, (0, 1, 2, 3))(*args)

    def inside(options):
        def mean_value_and_grad(*args):
            value, grads = value_and_grad(residuum_loss, args, names=BOTH_NAMES, **options)
            params, data, weights, inputs = grads
            value, params, weights = jax.lax.pmean((value, params, weights), "devices")
            data, inputs = data / len(MESH_DEVICES), inputs / len(MESH_DEVICES)
            return value, (params, data, weights, inputs)

        return mapped(mean_value_and_grad, out_specs=(P(), SPECS))(*args)

    def on_one(options):
        # `normed_loss` with both names is another function, as the `if` in it shows.
        f = functools.partial(value_and_grad, textbook_loss, names=("batch",))
        return f(args, cuts=options.get("cuts", Cuts()))

    f = {"outside": outside, "inside": inside}[where]
    both = [jax.jit(lambda f=f: [f(options) for options in SHARDED])() for f in (f, on_one)]
    assert_close(*jax.device_get(both))


# JAX 0.7 accepts the collective and then fails with a KeyError after the `vmap`, whether the
# `vmap` is that of residuum or not.
both_are_refused = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="needs a newer JAX"
)


@needs_shard_map
@pytest.mark.parametrize("bptt", [False, 1])
@pytest.mark.parametrize("names", ["batch", pytest.param(BOTH_NAMES, marks=both_are_refused)])
def test_where_a_mesh_checks_types_the_error_says_what_to_do(names, bptt):
    args, _ = on_one_device()

    def mean_loss(*args):
        loss = normed_loss(residuum_loss, *args, names=names, cuts=Cuts(bptt))
        return jax.lax.pmean(loss, "devices")

    mesh = make_mesh(("devices",))
    f = jax.shard_map(mean_loss, mesh=mesh, in_specs=SPECS, out_specs=P())
    with pytest.raises(Exception) as info:  # the type differs between versions of JAX
        jax.eval_shape(f, *args)
    text = "".join(traceback.format_exception_only(info.value))
    assert "axis_name" in text
    assert "check_vma=False" in text


#
# The batch norm of Equinox
#


def assert_as_with_the_whole_batch_in_one_sample(apply, variables, statistics):
    """Asserts that `axis_name` gives the loss of the whole batch taken as a single sample.

    `apply(variables, (u, statistics))` must return the next state, inside an axis named
    "batch". In the comparison, there is no `axis_name`, and the stepper itself maps over the
    batch.
    """
    batch, size = 6, 4
    data = jnp.asarray(np.random.default_rng(0).normal(size=(batch, 1, size)), jnp.float32)
    residuum_fn = lambda u_next, u_prev: u_next[0] - u_prev[0] ** 2
    all_cuts = [Cuts(), Cuts(1), Cuts(2, prev=True)]

    def named(variables, cuts):
        copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, 1, *x.shape)), statistics)
        stepper = functools.partial(apply, variables)
        options = dict(num_rollout_steps=3, cuts=cuts, has_aux=True, axis_name="batch")
        loss, rollout = residuum_loss(stepper, (data, copies), residuum_fn, **options)
        return loss, rollout.final_state

    def in_one_sample(variables, cuts):
        stepper = jax.vmap(functools.partial(apply, variables), axis_name="batch")
        copies = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (1, 1, batch, *x.shape)), statistics
        )
        whole_batch = (data[:, 0][None, None], copies)
        options = dict(num_rollout_steps=3, cuts=cuts, has_aux=True)
        loss, rollout = residuum_loss(stepper, whole_batch, residuum_fn, **options)
        return loss, jax.tree.map(lambda x: x[0], rollout.final_state)

    def value_and_grads(f, variables):
        f = jax.value_and_grad(f, has_aux=True)
        return [f(variables, cuts) for cuts in all_cuts]

    both = jax.jit(lambda x: [value_and_grads(f, x) for f in (named, in_one_sample)])
    actual, expected = both(variables)
    assert_close(actual, expected, SINGLE_TOLERANCE)
    (_, (_, final_statistics)), grads = actual[0]
    assert all(jnp.any(grad != 0) for grad in jax.tree.leaves(grads))
    for x in jax.tree.leaves(final_statistics):
        assert_close(x, jnp.broadcast_to(x[0], x.shape))  # all samples have equal copies
    before, after = jax.tree.leaves(statistics), jax.tree.leaves(final_statistics)
    assert any(jnp.any(x != y[0]) for x, y in zip(before, after, strict=True))


def test_batch_norm_of_equinox():
    # Older versions of Equinox have no modes.
    has_modes = "mode" in inspect.signature(eqx.nn.BatchNorm.__init__).parameters
    options = dict(axis_name="batch", **({"mode": "batch"} if has_modes else {}))

    def make(key):
        norm = eqx.nn.BatchNorm(4, dtype=jnp.float32, **options)
        return eqx.nn.Linear(4, 4, dtype=jnp.float32, key=key), norm

    layers, statistics = eqx.nn.make_with_state(make)(jax.random.key(0))
    variables, rest = eqx.partition(layers, eqx.is_inexact_array)

    def apply(variables, state):
        linear, norm = eqx.combine(variables, rest)
        hidden, statistics = norm(linear(state[0]), state[1])
        return state[0] / 2 + jnp.tanh(hidden), statistics

    assert_as_with_the_whole_batch_in_one_sample(apply, variables, statistics)


#
# Bad input
#


def message(error, **changes):
    normed = lambda u: u - jax.lax.pmean(u, "batch")
    call = dict(stepper=normed, residuum_fn=lambda n, p: n - p, data=np.ones((4, 1, 3)))
    call |= changes
    positional = [call.pop(name) for name in ("stepper", "data", "residuum_fn")]
    with pytest.raises(error) as info:
        jax.eval_shape(lambda: residuum_loss(*positional, **call))
    return "".join(traceback.format_exception_only(info.value))


@pytest.mark.parametrize("name", [["batch"], {"batch": 0}, np.ones(2)], ids=str)
def test_a_name_that_is_not_hashable_is_named(name):
    assert "axis_name must be hashable, got " in message(TypeError, axis_name=name)


@pytest.mark.parametrize("name", [("batch", "space"), ("batch",), ("batch", ["space"])])
def test_a_tuple_of_names_is_refused(name):
    assert "axis_name must be one name, not a tuple" in message(TypeError, axis_name=name)


@pytest.mark.parametrize("axis_name", [None, "samples"])
def test_an_unbound_name_leads_to_axis_name(axis_name):
    of_batch = lambda x: jax.lax.pmean(x, "batch")
    assert 'pass axis_name="batch" to residuum_loss' in message(NameError, axis_name=axis_name)
    call = dict(axis_name=axis_name, stepper=lambda u: u)
    assert 'pass axis_name="batch"' in message(
        NameError, residuum_fn=lambda n, p: of_batch(n), **call
    )
    time_level_loss = lambda r: of_batch(jnp.sum(r))
    assert 'pass axis_name="batch"' in message(
        NameError, time_level_loss=time_level_loss, **call
    )
