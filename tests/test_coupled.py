"""Members of a `vmap` or of a mesh may exchange data, as in a halo exchange between devices or
a mean over an ensemble. The loss of one member then depends on the arrays of the others, and
all of its derivatives are still those of the textbook loop.

The exchanging axis is bound outside of the call. test_named_axis.py tests the axis of the
batch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec as P

from residuum import Cuts, residuum_loss
from test_residuum import assert_close, textbook_loss
from tests.common import also_slow, MESH_DEVICES, needs_shard_map, slow, vary


AXIS, NUM_MEMBERS = "members", len(MESH_DEVICES)
TO_THE_RIGHT = [(i, (i + 1) % NUM_MEMBERS) for i in range(NUM_MEMBERS)]

COLLECTIVES = {  # each takes a vector with one entry per member
    "psum": lambda x: jax.lax.psum(x, AXIS),
    "pmean": lambda x: jax.lax.pmean(x, AXIS),
    "all_gather": lambda x: jax.lax.all_gather(x, AXIS)[jax.lax.axis_index(AXIS) - 1],
    "ppermute": lambda x: jax.lax.ppermute(x, AXIS, TO_THE_RIGHT),
    "all_to_all": lambda x: jax.lax.all_to_all(x, AXIS, 0, 0),
    "psum_scatter": lambda x: jax.lax.psum_scatter(x, AXIS) * x,
    "nested": lambda x: jax.lax.cond(
        jnp.sum(x) > -99, jax.jit(lambda x: jax.lax.pmean(x, AXIS)), jnp.cos, x
    ),
}


def coupled_loss(loss_fn, collective, where, kernel, data, weights, **options):
    """Returns the loss of one member, which has all kinds of derivatives."""
    exchanged = {place: lambda x: x for place in ("stepper", "residuum", "loss")}
    exchanged[where] = COLLECTIVES[collective]

    def stepper(u):
        return jnp.sin(kernel * u + exchanged["stepper"](u) / 3)

    def residuum_fn(u_next, u_prev):
        return u_next - kernel * exchanged["residuum"](u_next) * u_prev

    def time_level_loss(residuum):
        return jnp.mean(exchanged["loss"](residuum**2) * residuum)

    options = dict(num_rollout_steps=3, weights=weights, **options)
    return loss_fn(stepper, data, residuum_fn, time_level_loss=time_level_loss, **options)


def members():
    """Returns the arguments of all members, stacked along the first axis."""
    normal = np.random.default_rng(0).normal
    shapes = (NUM_MEMBERS,), (2, 1, NUM_MEMBERS), (3,)
    return [jnp.asarray(normal(size=(NUM_MEMBERS, *shape))) for shape in shapes]


def losses_by_vmap(loss_fn, collective, where, **options):
    loss = functools.partial(coupled_loss, loss_fn, collective, where, **options)
    return jax.vmap(loss, axis_name=AXIS)


def reverse_mode(losses, *args):
    """Returns the gradients under cotangents that differ between members, and the derivative of
    each loss with respect to all kernels."""
    cotangents = jnp.arange(1.0, NUM_MEMBERS + 1)
    of_kernels = lambda kernels: losses(kernels, *args[1:])
    return jax.vjp(losses, *args)[1](cotangents), jax.jacrev(of_kernels)(args[0])


def both_modes(losses, *args):
    return jax.jvp(losses, args, jax.tree.map(jnp.cos, args)), reverse_mode(losses, *args)


def second_derivatives(losses, *args):
    total = lambda kernel: jnp.arange(1.0, NUM_MEMBERS + 1) @ losses(kernel, *args[1:])
    return jax.hessian(total)(args[0]), jax.jacrev(jax.grad(total))(args[0])


def assert_as_by_vmap(losses, derivatives, collective, where, cuts):
    """Asserts that all derivatives are those of the textbook loop under `vmap`."""
    oracle = losses_by_vmap(textbook_loss, collective, where, cuts=cuts)
    both = jax.jit(lambda *args: [derivatives(f, *args) for f in (losses, oracle)])
    assert_close(*jax.device_get(both(*members())))


FEW = [("ppermute", "stepper"), ("pmean", "residuum"), ("psum", "loss")]
FEW += [("nested", "stepper")]
CASES = [(name, where) for name in COLLECTIVES for where in ("stepper", "residuum", "loss")]
CASES = also_slow(*FEW, slowly=[case for case in CASES if case not in FEW])


@pytest.mark.parametrize("bptt", also_slow(1, slowly=[False, 2, [True, False, True]]))
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_first_derivatives_under_vmap(case, bptt):
    cuts = Cuts(bptt, prev=np.array([False, True, False]))
    losses = losses_by_vmap(residuum_loss, *case, cuts=cuts)
    assert_as_by_vmap(losses, both_modes, *case, cuts)


@pytest.mark.parametrize("options", [dict(checkpoint=True), dict(unroll=True)])
def test_options_of_the_program_under_vmap(options):
    losses = losses_by_vmap(residuum_loss, "ppermute", "stepper", cuts=Cuts(2), **options)
    assert_as_by_vmap(losses, both_modes, "ppermute", "stepper", Cuts(2))


@pytest.mark.parametrize("bptt", also_slow(1, slowly=[False, 2, [True, False, True]]))
@pytest.mark.parametrize("case", also_slow(FEW[1], slowly=[FEW[0]]), ids="-".join)
def test_second_derivatives_under_vmap(case, bptt):
    losses = losses_by_vmap(residuum_loss, *case, cuts=Cuts(bptt))
    assert_as_by_vmap(losses, second_derivatives, *case, Cuts(bptt))


def on_a_mesh(collective, where, cuts, *, check_vma):
    """Returns the losses of all members, each of which runs on its own device."""

    def one_member(*args):
        args = [x[0] for x in args]
        return coupled_loss(residuum_loss, collective, where, *args, cuts=cuts)[None]

    mesh = Mesh(np.array(MESH_DEVICES), (AXIS,))
    specs = dict(in_specs=P(AXIS), out_specs=P(AXIS), check_vma=check_vma)
    return jax.shard_map(one_member, mesh=mesh, **specs)


@needs_shard_map
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("bptt", also_slow(1, slowly=[False, 2]))
@pytest.mark.parametrize("case", also_slow(FEW[0], slowly=FEW[1:3]), ids="-".join)
def test_first_derivatives_of_a_shard_map(case, bptt, check_vma):
    losses = on_a_mesh(*case, Cuts(bptt), check_vma=check_vma)
    assert_as_by_vmap(losses, both_modes, *case, Cuts(bptt))


@needs_shard_map
@slow
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("case", FEW[:2], ids="-".join)
def test_second_derivatives_of_a_shard_map(case, check_vma):
    losses = on_a_mesh(*case, Cuts(1), check_vma=check_vma)
    assert_as_by_vmap(losses, second_derivatives, *case, Cuts(1))


@needs_shard_map
@pytest.mark.parametrize("check_vma", also_slow(True, slowly=[False]))
@pytest.mark.parametrize("with_pcast", also_slow(True, slowly=[False]))
@pytest.mark.parametrize("bptt", also_slow(1, slowly=[False, 2]))
def test_derivatives_taken_inside_of_a_shard_map(bptt, with_pcast, check_vma):
    """Derivatives taken inside a `shard_map` are exact. This includes parameters that are the
    same on all devices, for which JAX sums the derivatives over the mesh."""

    def derivatives(loss_fn, kernel, data, weights):
        data, weights = data[0], weights[0]
        kernel = vary(kernel, AXIS) if with_pcast and check_vma else kernel
        cuts = Cuts(bptt)
        loss = lambda kernel, weights: coupled_loss(
            loss_fn, "ppermute", "stepper", kernel, data, weights, cuts=cuts
        )
        value, grads = jax.value_and_grad(loss, (0, 1))(kernel, weights)
        if with_pcast or not check_vma:
            value = value, jax.jvp(loss, (kernel, weights), (jnp.cos(kernel), weights))
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (1, *x.shape)), (value, grads))

    def both(*args):
        return [derivatives(f, *args) for f in (residuum_loss, textbook_loss)]

    mesh = Mesh(np.array(MESH_DEVICES), (AXIS,))
    specs = dict(in_specs=(P(), P(AXIS), P(AXIS)), out_specs=P(AXIS), check_vma=check_vma)
    kernels, *rest = members()
    f = jax.jit(jax.shard_map(both, mesh=mesh, **specs))
    assert_close(*jax.device_get(f(kernels[0], *rest)))


@pytest.mark.parametrize("bptt", also_slow(1, slowly=[False, 2]))
def test_first_derivatives_of_a_pmap(bptt):
    loss = functools.partial(
        coupled_loss, residuum_loss, "ppermute", "stepper", cuts=Cuts(bptt)
    )
    losses = jax.pmap(loss, axis_name=AXIS, devices=MESH_DEVICES)
    oracle = losses_by_vmap(textbook_loss, "ppermute", "stepper", cuts=Cuts(bptt))

    assert_close(*jax.device_get([both_modes(f, *members()) for f in (losses, oracle)]))


@jax.custom_vjp
def sum_of_cotangents(x):
    """Returns its argument. Its only collective is in the backward pass."""
    return x


sum_of_cotangents.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.psum(g, AXIS),))


def gradients_of_summed_cotangents(loss_fn, over_members, cuts):
    kernels, data, _ = members()

    def loss(kernel, data):
        stepper = lambda u: jnp.sin(sum_of_cotangents(kernel * u))
        return loss_fn(stepper, data, lambda n, p: n - p, num_rollout_steps=3, cuts=cuts)

    cotangents = jnp.arange(1.0, NUM_MEMBERS + 1)
    gradients = lambda *args: jax.vjp(over_members(loss), *args)[1](cotangents)
    return jax.jit(gradients)(kernels, data)


def under_vmap(loss):
    return jax.vmap(loss, axis_name=AXIS)


def under_shard_map(loss):
    one_member = lambda *args: loss(*[x[0] for x in args])[None]
    mesh = Mesh(np.array(MESH_DEVICES), (AXIS,))
    specs = dict(in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)
    return jax.shard_map(one_member, mesh=mesh, **specs)


@pytest.mark.parametrize("bptt", [1, 2])
def test_collectives_in_a_backward_pass(bptt):
    """The library also finds collectives that occur only in a backward pass. Under a `vmap`,
    JAX cannot differentiate their custom rule in the way that they need. This raises an error
    with a note, and never gives a wrong number."""
    mask = Cuts([(t + 1) % bptt == 0 for t in range(3)])
    expected = gradients_of_summed_cotangents(textbook_loss, under_vmap, mask)
    assert_close(gradients_of_summed_cotangents(residuum_loss, under_vmap, mask), expected)
    if hasattr(jax, "shard_map"):
        of_mesh = gradients_of_summed_cotangents(residuum_loss, under_shard_map, Cuts(bptt))
        assert_close(jax.device_get(of_mesh), jax.device_get(expected))
    with pytest.raises(TypeError, match="custom_vjp") as info:
        gradients_of_summed_cotangents(residuum_loss, under_vmap, Cuts(bptt))
    assert any("With an array" in note for note in info.value.__notes__)


def test_both_names_at_once():
    """A statistic over the batch and a statistic over the members work in one rollout."""

    def losses(loss_fn, kernels):
        def loss(kernel):
            stepper = lambda u: jnp.sin(kernel * u - jax.lax.pmean(u, "batch"))
            residuum_fn = lambda n, p: n - p * jax.lax.pmean(n, AXIS) / 2
            options = dict(num_rollout_steps=3, cuts=Cuts(1), axis_name="batch")
            return loss_fn(stepper, members()[1][0], residuum_fn, **options)

        return jax.vmap(loss, axis_name=AXIS)(kernels)

    jacobians = [
        jax.jit(jax.jacrev(functools.partial(losses, f)))
        for f in (residuum_loss, textbook_loss)
    ]
    assert_close(*[f(members()[0]) for f in jacobians])


#
# Rollouts without an exchange between members keep their memory
#


def memory_of_member(num_steps, stepper):
    """Returns the memory, in bytes, of the value and gradient of a truncated rollout."""
    state = jnp.ones((4, 1, 256), jnp.float32)

    def loss(scale):
        options = dict(num_rollout_steps=num_steps, cuts=Cuts(1))
        step = functools.partial(stepper, scale)
        return residuum_loss(step, state, lambda n, p: n - p / 2, **options)

    return jax.value_and_grad(loss)


def bytes_of(f, *args):
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


# A member may know its index, or several devices may work together on the step of a member.
STEPPERS = {
    "axis_index": lambda scale, u: jnp.tanh(scale * u + jax.lax.axis_index(AXIS)),
    "psum": lambda scale, u: jnp.tanh(scale * jax.lax.pmean(u, AXIS)),
}


@pytest.mark.parametrize("name", STEPPERS)
def test_only_an_exchange_stores_a_state_for_each_segment(name):
    def size(num_steps):
        f = memory_of_member(num_steps, STEPPERS[name])
        f = jax.vmap(f, axis_name=AXIS)
        return bytes_of(f, jnp.ones(NUM_MEMBERS, jnp.float32))

    growth = size(220) - size(20)
    one_state_per_segment = 200 * NUM_MEMBERS * 4 * 256 * 4
    if name == "axis_index":
        assert growth == 0
    else:  # plus some numbers per segment
        assert 1 <= growth / one_state_per_segment < 1.1


@needs_shard_map
def test_an_exchange_within_the_stepper_is_none_between_members():
    """An exchange inside the stepper, over an axis bound by a `shard_map` inside the call, does
    not couple members."""
    mesh = Mesh(np.array(MESH_DEVICES), (AXIS,))

    def smooth(u):
        halves = jax.lax.ppermute(u, AXIS, TO_THE_RIGHT)
        return (u + halves) / 2

    def stepper(scale, u):
        specs = dict(in_specs=P(AXIS), out_specs=P(AXIS))
        return jnp.tanh(scale * jax.shard_map(smooth, mesh=mesh, **specs)(u))

    short, long = (bytes_of(memory_of_member(n, stepper), jnp.float32(1)) for n in (20, 220))
    assert long == short
