"""On many devices, the loss and the gradient equal those of a single device. Neither the memory
of each device nor the number of its communications grows with the rollout."""

import contextlib
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import residuum
from residuum import Cuts, residuum_loss
from test_residuum import assert_close, evaluate, EXTRA, problem, textbook_loss
from tests.common import (
    also_slow,
    make_mesh,
    MESH_DEVICES,
    needs_explicit_axes,
    needs_shard_map,
    network_problem,
    shard,
    slow,
    vary,
)


# k = 3 does not divide the number of steps.
BPTT = (False, 1, 2, 3)
ROLLOUTS = [
    dict(num_rollout_steps=4, cuts=Cuts(bptt), **extra)
    for bptt, extra in [*itertools.product(BPTT, EXTRA[:2]), (3, EXTRA[2])]
]
FEW = [ROLLOUTS[i] for i in (1, 2, 7)]
OTHERS = [options for options in ROLLOUTS if options not in FEW]
several_rollouts = pytest.mark.parametrize(
    "rollouts",
    [pytest.param(FEW, id="few"), pytest.param(OTHERS, id="others", marks=slow)],
)


@functools.cache
def mesh_problem():
    """Returns a loss `(loss_fn, options, params, data) -> scalar`, its inputs, and the expected
    results."""
    params, data, weights, coefficient = problem(4, batch=2 * len(MESH_DEVICES))

    def loss(loss_fn, options, params, data):
        return evaluate(loss_fn, params, data, weights, coefficient, **options)

    return loss, params, data, expectation(loss, params, data)


def expectation(loss, *args):
    """Returns the value and gradient on one device, for each choice of cuts."""

    def value_and_grad(cuts):
        f = functools.partial(loss, textbook_loss, dict(num_rollout_steps=4, cuts=cuts))
        return jax.value_and_grad(f, argnums=(0, 1))(*args)

    return jax.jit(lambda: {bptt: value_and_grad(Cuts(bptt)) for bptt in BPTT})()


def assert_as_on_one_device(actual, rollouts, expected):
    for options, value_and_grad in zip(rollouts, actual, strict=True):
        pair = jax.device_get((value_and_grad, expected[options["cuts"].bptt]))
        assert_close(*pair, what=options)


@pytest.mark.parametrize(
    "groups, explicit",
    [
        (False, False),
        pytest.param(True, False, marks=slow),
        pytest.param(False, True, marks=[slow, needs_explicit_axes]),
        pytest.param(True, True, marks=[slow, needs_explicit_axes]),
    ],
)
@several_rollouts
def test_sharded_data_under_jit(rollouts, groups, explicit):
    """`jax.jit` accepts data that are sharded over automatic or explicit axes. With `groups`,
    the loss has one term per device."""
    loss, params, data, expected = mesh_problem()
    losses = [functools.partial(loss, residuum_loss, options) for options in rollouts]
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
    assert_as_on_one_device(actual, rollouts, expected)


RESHARDING = {  # the sharding of u_next, on a mesh with the axes "batch" and "model"
    "replicated": lambda u: jax.sharding.reshard(u, P(None)),
    "split": lambda u: jax.sharding.reshard(u, P("model")),
    # The state alternates between a split array and one that is not split.
    "alternating": lambda u: jax.sharding.reshard(
        u, P(None) if jax.typeof(u).sharding.spec[-1] else P("model")
    ),
}


SPLIT_TWICE = P("batch", None, "model")


@needs_explicit_axes
@pytest.mark.parametrize(
    "sharding, data_spec",
    [
        ("replicated", SPLIT_TWICE),
        ("alternating", P("batch")),
        pytest.param("replicated", P("batch"), marks=slow),
        pytest.param("split", P("batch"), marks=slow),
        pytest.param("split", SPLIT_TWICE, marks=slow),
        pytest.param("alternating", SPLIT_TWICE, marks=slow),
    ],
    ids=str,
)
def test_a_stepper_may_change_an_explicit_sharding(sharding, data_spec):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=8)
    data = rng.normal(size=(2 * len(MESH_DEVICES), 1, 8))

    def loss(loss_fn, options, on_mesh, kernel, data):
        whole = (lambda u: jax.sharding.reshard(u, P(None))) if on_mesh else lambda u: u
        change = RESHARDING[sharding] if on_mesh else lambda u: u
        stepper = lambda u: change(jnp.tanh(whole(u) * kernel))
        residuum_fn = lambda n, p: whole(n) - jnp.roll(whole(p), 1)
        return loss_fn(stepper, data, residuum_fn, **options)

    def value_and_grad(loss_fn, options, on_mesh, *args):
        f = functools.partial(loss, loss_fn, options, on_mesh)
        return jax.value_and_grad(f, (0, 1))(*args)

    rollouts = [
        dict(num_rollout_steps=4, cuts=Cuts(k), checkpoint=k == 2) for k in (False, 1, 2)
    ]
    mesh = make_mesh(("batch", "model"), explicit=True)
    with jax.set_mesh(mesh):
        args = [shard(mesh, spec, x) for spec, x in ((P(), kernel), (data_spec, data))]
        on_mesh = jax.jit(
            lambda *x: [value_and_grad(residuum_loss, o, True, *x) for o in rollouts]
        )
        actual = on_mesh(*args)
    for options, result in zip(rollouts, actual, strict=True):
        textbook = dict(num_rollout_steps=4, cuts=options["cuts"])
        f = jax.jit(functools.partial(value_and_grad, textbook_loss, textbook, False))
        assert_close(jax.device_get(result), jax.device_get(f(kernel, data)), what=options)


@needs_shard_map
@pytest.mark.parametrize("check_vma", also_slow(True, slowly=[False]))
@pytest.mark.parametrize(
    "where", also_slow("outside", "inside, varying parameters", slowly=["inside"])
)
@several_rollouts
def test_shard_map(rollouts, where, check_vma):
    loss, params, data, expected = mesh_problem()
    losses = [functools.partial(loss, residuum_loss, options) for options in rollouts]

    def mean_loss(loss, params, data):
        return jax.lax.pmean(loss(params, data), "batch")

    def value_and_grad(loss, params, data):
        if where == "inside" and check_vma:  # JAX sums over axes that params lack
            return jax.value_and_grad(functools.partial(mean_loss, loss))(params, data)
        if check_vma:
            params = vary(params)
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
    expected = {bptt: (loss, grad) for bptt, (loss, (grad, _)) in expected.items()}
    assert_as_on_one_device(actual, rollouts, expected)


@needs_shard_map
@pytest.mark.parametrize("check_vma", also_slow(True, slowly=[False]))
@pytest.mark.parametrize("resets", [False, pytest.param(True, marks=slow)])
def test_shard_map_over_parameters_that_differ(resets, check_vma):
    """Parameters may differ between devices while the data are the same. The state then becomes
    varying within the rollout, whatever its dtype, unless the stepper resets it."""
    data = {"u": jnp.ones((2, 1, 3)), "n": jnp.zeros((2, 1), int), "b": jnp.zeros((2, 1), bool)}
    scales = jnp.linspace(0.5, 1.5, len(MESH_DEVICES))

    def value_and_grad(loss_fn, options, scale):
        def loss(scale):
            def stepper(state):
                u = jnp.tanh(scale * state["u"] + state["b"])
                n = state["n"] + (u[0] > 0.7)
                v = jnp.zeros(())  # varies at first only
                return {"u": jnp.ones(3) if resets else u, "n": n, "b": u[0] > 0.5, "v": v}

            residuum_fn = lambda n, p: n["u"] * n["n"] - scale * p["u"] + p["v"]
            v = jnp.broadcast_to(scale, (2, 1))
            return loss_fn(stepper, {**data, "v": v}, residuum_fn, **options)

        return jax.value_and_grad(loss)(scale[0])

    def mapped(loss_fn, options, scales):
        f = functools.partial(value_and_grad, loss_fn, options)
        f = lambda scale, f=f: jax.tree.map(lambda x: x[None], f(scale))
        specs = dict(in_specs=P("batch"), out_specs=P("batch"), check_vma=check_vma)
        return jax.shard_map(f, mesh=make_mesh(), **specs)(scales)

    for options in FEW:
        textbook = {key: options[key] for key in ("num_rollout_steps", "cuts")}
        f = functools.partial(value_and_grad, textbook_loss, textbook)
        expected = jax.jit(lambda x, f=f: jax.lax.map(f, x[:, None]))(scales)
        actual = jax.jit(functools.partial(mapped, residuum_loss, options))(scales)
        assert_close(*jax.device_get((actual, expected)), what=options)


SPREAD = {  # which argument varies over which axis of the mesh
    "data": dict(data="batch"),
    "inputs": dict(inputs="model"),
    "both": dict(data="batch", inputs="model"),
    "mask": dict(mask="model"),
    "mask and data": dict(mask="model", data="batch"),
}


def loop_with_traced_masks(stepper, data, residuum_fn, *, num_rollout_steps, cuts, inputs):
    """Runs the oracle with traced masks, which the oracle itself does not take."""
    loss, u = 0.0, data[:, 0]
    for t in range(num_rollout_steps):
        u_next = jax.vmap(stepper)(u, inputs[:, t])
        seen = jnp.where(cuts.prev[t], jax.lax.stop_gradient(u), u)
        residuum = jax.vmap(residuum_fn)(u_next, seen, inputs[:, t])
        loss += jnp.mean(residuum**2)
        is_static = isinstance(cuts.bptt, int)
        cut = cuts.bptt and (t + 1) % cuts.bptt == 0 if is_static else cuts.bptt[t]
        u = jnp.where(cut, jax.lax.stop_gradient(u_next), u_next)
    return loss


@needs_shard_map
@pytest.mark.parametrize("spread", also_slow("data", "inputs", slowly=[*SPREAD][2:]))
@pytest.mark.parametrize("bptt", also_slow(1, slowly=[False, 2, "mask"]))
def test_shard_map_over_part_of_the_arguments(bptt, spread):
    """The state and the time levels need not vary over the same axes of the mesh."""
    mesh, rng = make_mesh(("batch", "model")), np.random.default_rng(0)
    axes, num_steps = SPREAD[spread], 3
    of = lambda name: P(axes[name]) if name in axes else P()
    names = ("data", "inputs", "mask")
    data, inputs = (jnp.asarray(rng.normal(size=(4, n, 3))) for n in (1, num_steps))
    mask = jnp.asarray(rng.integers(2, size=(4, num_steps)).astype(bool))

    def value_and_grad(loss_fn, *args):
        data, inputs, mask = args
        size = min(len(data), len(inputs))
        cuts = Cuts(mask[0] if bptt == "mask" else bptt, prev=mask[0])

        def loss(scale, data, inputs):
            stepper = lambda u, x: jnp.tanh(scale * u + x)
            residuum_fn = lambda n, p, x: n - jnp.sin(p) * x
            options = dict(num_rollout_steps=num_steps, cuts=cuts, inputs=inputs[:size])
            return loss_fn(stepper, data[:size], residuum_fn, **options)

        return jax.value_and_grad(loss, (0, 1, 2))(1.5, data, inputs)

    def on_mesh(loss_fn):
        def f(*args):
            results = value_and_grad(loss_fn, *args)
            missing = lambda x: tuple({"batch", "model"} - residuum._varying_axes(x))
            varying = lambda x: vary(x, missing(x)) if missing(x) else x
            return jax.tree.map(lambda x: varying(x)[None, None], results)

        specs = dict(in_specs=tuple(map(of, names)), out_specs=P("batch", "model"))
        return jax.jit(jax.shard_map(f, mesh=mesh, **specs))(data, inputs, mask)

    assert_close(*jax.device_get([on_mesh(f) for f in (residuum_loss, loop_with_traced_masks)]))


@several_rollouts
def test_pmap(rollouts):
    loss, params, data, expected = mesh_problem()
    losses = [functools.partial(loss, residuum_loss, options) for options in rollouts]
    num_devices = len(MESH_DEVICES)
    data = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), data)

    def value_and_grad(loss, params, data):
        return jax.lax.pmean(jax.value_and_grad(loss)(params, data), "batch")

    @functools.partial(jax.pmap, axis_name="batch", in_axes=(None, 0), devices=MESH_DEVICES)
    def all_values_and_grads(params, data):
        return [value_and_grad(loss, params, data) for loss in losses]

    actual = jax.tree.map(lambda x: x[0], jax.device_get(all_values_and_grads(params, data)))
    expected = {bptt: (loss, grad) for bptt, (loss, (grad, _)) in expected.items()}
    assert_as_on_one_device(actual, rollouts, expected)


@pytest.mark.parametrize("sharded", also_slow("parameters", slowly=["space"]))
@several_rollouts
def test_sharded_parameters_and_sharded_space(rollouts, sharded):
    mesh = make_mesh(("batch", "model"))
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(8, 8))
    data = rng.normal(size=(2 * len(MESH_DEVICES), 1, 8))

    def loss(loss_fn, options, kernel, data):
        def stepper(u):  # mixes all points, and neighbours
            return jnp.tanh(kernel @ u) + jnp.roll(u, 1) / 2

        return loss_fn(stepper, data, lambda n, p: n - jnp.roll(p, -1), **options)

    def value_and_grad(options, *args):
        f = functools.partial(loss, residuum_loss, options)
        return jax.value_and_grad(f, argnums=(0, 1))(*args)

    specs = {
        "parameters": (P("model"), P("batch")),
        "space": (P(), P("batch", None, "model")),
    }[sharded]
    args = [shard(mesh, spec, x) for spec, x in zip(specs, (kernel, data), strict=True)]
    actual = jax.jit(lambda *x: [value_and_grad(options, *x) for options in rollouts])(*args)
    assert_as_on_one_device(actual, rollouts, expectation(loss, kernel, data))


@functools.cache
def compiled_on_a_mesh(way, num_rollout_steps, cuts):
    """Compiles the value and gradient of an MLP's loss, with data parallelism."""
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
            params = vary(params)
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
    # With explicit axes, the weights themselves stay in memory. A state is 1024 times as large.
    assert long - short <= (980 * 4 if "explicit" in way else 0)


def collectives(compiled):
    """Counts the collective operations of a program: those that run once, and those in
    loops."""
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
    once, in_loops = collectives(compiled_on_a_mesh(way, 1000, Cuts(bptt)))
    if "groups" in way or "shard_map" in way:
        # There is at most one collective for each layer's gradient and one for the loss. A
        # newer XLA combines them into one.
        assert 1 <= once <= 3
        assert in_loops == 0
    else:
        # XLA reduces each segment's gradient over the devices, just as it reduces each step's
        # gradient in the backward pass of an ordinary scan. The documentation says how to avoid
        # this.
        assert in_loops > 0
        assert collectives(compiled_on_a_mesh(way, 20, Cuts()))[1] > 0


@needs_shard_map
def test_without_pcast_a_shard_map_stores_and_sums_every_step():
    """Without `pcast`, a `shard_map` stores and sums every step. This is the exception of which
    the documentation warns."""
    short, long = (
        compiled_on_a_mesh("shard_map, without pcast", n, Cuts(bptt=1)) for n in (20, 1000)
    )
    sizes = [c.memory_analysis().temp_size_in_bytes for c in (short, long)]
    assert sizes[1] > 10 * sizes[0]
    assert collectives(long)[1] > 0
