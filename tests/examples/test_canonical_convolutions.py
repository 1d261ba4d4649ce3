"""`canonical_convolutions` changes layouts and nothing else. It finds all convolutions of a
program, and the program then computes the same results in little more memory."""

import functools
import re
from collections import Counter

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from canonical_convolutions import _canonical, canonical_convolutions
from jax import export
from jax.sharding import Mesh, PartitionSpec as P

from benchmarks.convolutions_on_cpu.run import ConvNet, heat_residuum, UNet
from residuum import Cuts, residuum_loss
from tests.common import also_slow, config, equations, primitives, slow


TOLERANCE, HALF_TOLERANCE = 1e-5, 2e-2


def normal(*shape, dtype=np.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def convolve(u, kernel, **options):
    options = dict(window_strides=(1,) * (u.ndim - 2), padding="SAME") | options
    return jax.lax.conv_general_dilated(u, kernel, **options)


def assert_close(actual, expected, tolerance=TOLERANCE):
    """Compares leaves relative to their norms."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(*map(jax.tree.leaves, jax.device_get((actual, expected))), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        x, y = np.asarray(x, np.complex128), np.asarray(y, np.complex128)
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


#
# The structure of a program
#


def convolutions(jaxpr):
    """Yields for each convolution whether it is canonical, whether it is grouped, and its
    dtype."""
    for eqn in equations(jaxpr):
        if eqn.primitive.name == "conv_general_dilated":
            # For example (0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2) in 2D.
            batch, *space, features = range(eqn.invars[0].aval.ndim)
            data = (batch, features, *space)
            kernel = (features, space[-1], batch, *space[:-1])
            is_canonical = tuple(eqn.params["dimension_numbers"]) == (data, kernel, data)
            groups = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
            yield is_canonical, groups > 1, eqn.invars[0].aval.dtype.name


def assert_only_layouts_change(f, *args):
    """Asserts that every convolution that should become canonical is canonical, that at least
    one of them was not so before, and that nothing else has changed."""
    before, after = (jax.make_jaxpr(g)(*args).jaxpr for g in (f, canonical_convolutions(f)))
    pairs = list(zip(convolutions(before), convolutions(after), strict=True))
    to_be = [not grouped and dtype != "float64" for (_, grouped, dtype), _ in pairs]
    assert any(new and not x[0] for new, (x, _) in zip(to_be, pairs, strict=True))
    for new, (x, y) in zip(to_be, pairs, strict=True):
        assert y == ((True, *x[1:]) if new else x)
    before, after = (Counter(primitives(jaxpr)) for jaxpr in (before, after))
    assert set(after - before) <= {"transpose"} and not before - after


#
# Values and derivatives of layers
#

DERIVATIVES = {
    "value and gradient": lambda f: jax.value_and_grad(f, (0, 1)),
    "forward": lambda f: lambda *x: jax.jvp(f, x, x),
    "forward over reverse": lambda f: lambda *x: jax.jvp(jax.grad(f, (0, 1)), x, x)[1],
    "reverse over reverse": lambda f: lambda *x: jax.vjp(jax.grad(f, (0, 1)), *x)[1](x),
}


def all_derivatives(f):
    return lambda *args: {name: d(f)(*args) for name, d in DERIVATIVES.items()}


def loss_of(layer):
    return lambda kernel, u: jnp.mean(jnp.tanh(layer(u, kernel)) ** 2)


def conv_transpose(u, kernel):
    u, kernel = jnp.moveaxis(u, 1, -1), jnp.moveaxis(kernel, (0, 1), (-1, -2))
    return jax.lax.conv_transpose(u, kernel, (2,) * (u.ndim - 2), "SAME")


# Each layer comes with the shapes of its input and of its kernel.
LAYERS = {
    "1D": (convolve, (2, 3, 8), (4, 3, 3)),
    "2D": (convolve, (2, 3, 6, 5), (4, 3, 3, 2)),
    "3D": (convolve, (2, 3, 4, 5, 4), (2, 3, 3, 2, 1)),
    "strided": (
        functools.partial(convolve, window_strides=(2, 1)),
        *((2, 3, 6, 5), (4, 3, 3, 3)),
    ),
    "dilated": (
        functools.partial(
            convolve, rhs_dilation=(2, 1), lhs_dilation=(1, 2), padding=[(2, 1), (0, 2)]
        ),
        *((2, 3, 6, 5), (4, 3, 3, 3)),
    ),
    "transposed": (conv_transpose, (2, 3, 4, 4), (4, 3, 2, 2)),
    "other layout": (
        functools.partial(convolve, dimension_numbers=("HNCW", "IWOH", "CWHN")),
        *((6, 2, 3, 5), (3, 2, 4, 3)),
    ),
    "grouped": (
        functools.partial(convolve, feature_group_count=2),
        *((2, 4, 6, 5), (4, 2, 3, 3)),
    ),
    "depthwise": (
        functools.partial(convolve, feature_group_count=3),
        *((2, 3, 8), (3, 1, 3)),
    ),
    "vmapped over kernels": (
        lambda u, kernels: jax.vmap(functools.partial(convolve, u))(kernels),
        *((2, 3, 6), (3, 4, 3, 3)),
    ),
}


@pytest.mark.parametrize("dtype", also_slow("float32", slowly=["float16", "bfloat16"]))
@pytest.mark.parametrize(
    "name",
    also_slow(
        *("1D", "2D", "other layout"),
        slowly=[name for name in LAYERS if name not in ("1D", "2D", "other layout")],
    ),
)
def test_value_and_derivatives(name, dtype):
    layer, *shapes = LAYERS[name]
    u, kernel = (normal(*shape, dtype=dtype) for shape in shapes)
    f = all_derivatives(loss_of(layer))
    actual, expected = jax.jit(lambda *x: (canonical_convolutions(f)(*x), f(*x)))(kernel, u)
    assert_close(actual, expected, TOLERANCE if dtype == "float32" else HALF_TOLERANCE)


@pytest.mark.parametrize("name", list(LAYERS)[:-3])  # without the grouped ones
def test_all_convolutions_are_found(name):
    layer, *shapes = LAYERS[name]
    u, kernel = (normal(*shape) for shape in shapes)
    assert_only_layouts_change(all_derivatives(loss_of(layer)), kernel, u)


@pytest.mark.parametrize("name", ["grouped", "depthwise", "float64", "complex64", "int32"])
def test_untouched(name):
    layer, *shapes = LAYERS.get(name, LAYERS["2D"])
    u, kernel = (normal(*s, dtype="float32" if name in LAYERS else name) for s in shapes)
    f = functools.partial(layer, u)
    texts = [str(jax.make_jaxpr(g)(kernel)) for g in (f, canonical_convolutions(f))]
    assert texts[0] == texts[1] and "conv_general_dilated" in texts[0]


def test_wider_results_of_narrow_input():
    f = functools.partial(convolve, preferred_element_type=jnp.float32)
    u, kernel = normal(2, 3, 6, 5, dtype="bfloat16"), normal(4, 3, 3, 3, dtype="bfloat16")
    assert_only_layouts_change(f, u, kernel)
    actual = jax.jit(canonical_convolutions(f))(u, kernel)
    assert_close(actual, jax.jit(f)(u, kernel), HALF_TOLERANCE)


#
# Convolutions inside other primitives
#


def with_custom_jvp(u, kernel):
    f = jax.custom_jvp(convolve)

    @f.defjvp
    def _(primals, tangents):
        (u, kernel), (u_dot, kernel_dot) = primals, tangents
        return convolve(u, kernel), convolve(u_dot, kernel) + convolve(u, kernel_dot)

    return f(u, kernel)


def with_custom_vjp(u, kernel):
    f = jax.custom_vjp(convolve)
    f.defvjp(lambda *x: (convolve(*x), x), lambda x, g: jax.vjp(convolve, *x)[1](g))
    return f(u, kernel)


def in_scan(u, kernel, wrap=lambda f: f):
    step = wrap(lambda u, _: (jnp.tanh(convolve(u, kernel)), None))
    return jax.lax.scan(step, u, None, 3)[0]


def in_while_loop(u, kernel):
    go_on = lambda state: (state[0] < 3) & (jnp.sum(convolve(state[1], kernel)) > -1e6)
    advance = lambda state: (state[0] + 1, jnp.tanh(convolve(state[1], kernel)))
    return jax.lax.while_loop(go_on, advance, (0, u))[1]


def in_solver(u, kernel):
    """Solves a linear system by `custom_linear_solve`, which keeps its jaxprs in a named
    tuple."""
    matvec = lambda v: (
        4 * v + jax.vjp(lambda u: convolve(u, kernel), v)[1](convolve(v, kernel))[0]
    )
    return jax.scipy.sparse.linalg.cg(matvec, u, maxiter=4)[0]


PLACES = {
    "scan": in_scan,
    "remat in scan": functools.partial(in_scan, wrap=jax.checkpoint),
    "while_loop": in_while_loop,
    "fori_loop": lambda u, k: jax.lax.fori_loop(0, 3, lambda _, u: jnp.tanh(convolve(u, k)), u),
    "cond": lambda u, k: jax.lax.cond(u[0, 0, 0] > 9, lambda u: u, lambda u: convolve(u, k), u),
    "switch": lambda u, k: jax.lax.switch(
        jnp.int32(u[0, 0, 0] > 9), [lambda u: convolve(u, k), lambda u: convolve(2 * u, k)], u
    ),
    "jit in jit": lambda u, k: jax.jit(lambda u, k: jax.jit(convolve)(u, k))(u, k),
    "checkpoint": jax.checkpoint(lambda u, k: convolve(jnp.tanh(convolve(u, k)), k)),
    "custom_jvp": with_custom_jvp,
    "custom_vjp": with_custom_vjp,
    "vmap": lambda u, k: jax.vmap(lambda u: convolve(u[None], k)[0])(u),
    "solver": in_solver,
}
FEW_PLACES = ["remat in scan", "cond", "custom_vjp", "solver"]


def place(name):
    """Returns a function that computes the value at that place and the derivatives that exist
    there."""
    if name == "while_loop":
        return lambda kernel, u: jax.jvp(PLACES[name], (u, kernel), (u, kernel))
    value_and_grad = jax.value_and_grad(loss_of(PLACES[name]), (0, 1))
    return lambda kernel, u: (PLACES[name](u, kernel), value_and_grad(kernel, u))


@pytest.mark.parametrize("name", PLACES)
def test_all_convolutions_are_found_inside(name):
    assert_only_layouts_change(place(name), 0.3 * normal(3, 3, 3), normal(2, 3, 6))


@pytest.mark.parametrize(
    "name", also_slow(*FEW_PLACES, slowly=[name for name in PLACES if name not in FEW_PLACES])
)
def test_value_and_gradient_inside(name):
    f, args = place(name), (0.3 * normal(3, 3, 3), normal(2, 3, 6))
    actual, expected = jax.jit(lambda *x: (canonical_convolutions(f)(*x), f(*x)))(*args)
    assert_close(actual, expected)


#
# Primitives of JAX 0.12 that lower a jaxpr of their own, which none of the tests above would
# find
#

NEW_PRIMITIVES = {
    "jax_remat3": ["checkpoint", "remat in scan"],
    "jax_custom_jvp3": ["custom_jvp"],
    "jax_custom_vjp3": ["custom_vjp"],
}
new_primitives = pytest.mark.parametrize("flag", NEW_PRIMITIVES)
needs_flags = pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="needs a newer JAX")


def layouts(f, *args):
    """Returns the layouts of all convolutions in the program that XLA compiles."""
    program = jax.jit(lambda *x: f(*x)).lower(*args).as_text()
    return re.findall(r"dim_numbers = (\[.*?\]x\[.*?\]->\[.*?\])", program)


@needs_flags
@new_primitives
def test_no_convolution_is_out_of_reach(flag):
    args = 0.3 * normal(3, 3, 3), normal(2, 3, 6)
    for name in NEW_PRIMITIVES[flag]:
        for f in (lambda k, u, name=name: PLACES[name](u, k), place(name)):
            with config(flag, True):
                before, after = layouts(f, *args), layouts(canonical_convolutions(f), *args)
                actual, expected = (jax.jit(canonical_convolutions(f))(*args), f(*args))
            assert len(before) == len(after) and set(after) == {
                "[b, 0, f]x[0, i, o]->[b, 0, f]"
            }
            assert set(before) - set(after)
            assert_close(actual, expected)


def test_a_primitive_that_is_built_otherwise_stays_as_it_is():
    class Primitive:
        __slots__ = ("params",)

    Primitive.__module__ = "jax._src.hijax"
    primitive = Primitive()
    primitive.params = {"jaxpr": jax.make_jaxpr(convolve)(normal(2, 3, 6), normal(3, 3, 3))}
    assert _canonical(primitive) is primitive


@needs_flags
@new_primitives
def test_a_rollout_with_new_primitives(flag):
    f, params = gradient_of("U-Net", 4, cuts=Cuts(bptt=2), checkpoint=True)
    with config(flag, True):
        assert set(layouts(canonical_convolutions(f), params)) == {
            "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
        }
        assert_close(*(jax.jit(g)(params) for g in (canonical_convolutions(f), f)))


def with_tripled_derivative(rule):
    """Returns a convolution whose custom rule gives three times the derivative, so that a lost
    rule is noticed."""
    if rule == "custom_jvp":
        f = jax.custom_jvp(convolve)
        f.defjvp(lambda x, x_dot: (convolve(*x), 3 * jax.jvp(convolve, x, x_dot)[1]))
    else:
        f = jax.custom_vjp(convolve)
        f.defvjp(lambda *x: (convolve(*x), x), lambda x, g: jax.vjp(convolve, *x)[1](3 * g))
    return f


@pytest.mark.parametrize("rule", ["custom_jvp", "custom_vjp"])
@pytest.mark.parametrize("flag", ["jax_enable_x64", *also_slow(slowly=NEW_PRIMITIVES)])
def test_custom_rules_hold_outside_of_the_transform(rule, flag):
    if flag in NEW_PRIMITIVES and jax.__version_info__ < (0, 12):
        pytest.skip("needs a newer JAX")
    f = lambda u, kernel: with_tripled_derivative(rule)(u, kernel)
    args = normal(2, 3, 6), normal(3, 3, 3)
    with config(flag, True):
        gradient, expected = (
            jax.grad(lambda *x, g=g: jnp.sum(jnp.sin(g(*x))), (0, 1))(*args)
            for g in (canonical_convolutions(f), f)
        )
        assert_close(gradient, expected)
        vmapped, expected = (
            jax.vmap(g)(*(x[None] for x in args)) for g in (canonical_convolutions(f), f)
        )
        assert_close(vmapped, expected)


#
# Arguments and results
#


class Network(eqx.Module):
    layers: list[eqx.nn.Conv1d]
    activation: object
    name: str = "a network"

    def __call__(self, u):
        return self.layers[1](self.activation(self.layers[0](u)))


def make_network():
    keys = jax.random.split(jax.random.key(0), 2)
    layer = functools.partial(eqx.nn.Conv1d, 3, 3, 3, padding="SAME", dtype=jnp.float32)
    return Network([layer(key=key) for key in keys], jnp.tanh)


def test_an_update_in_equinox():
    network, data = make_network(), normal(2, 3, 6)

    def update(network, data, *, rate, options=None):
        loss = lambda network: jnp.mean(jax.vmap(network)(data) ** 2)
        value, grads = eqx.filter_value_and_grad(loss)(network)
        new = eqx.apply_updates(network, jax.tree.map(lambda g: -rate * g, grads))
        return {"new": new, "loss": [value, None], "options": options, "grads": grads}

    compiled = eqx.filter_jit(canonical_convolutions(update))
    actual, expected = (
        f(network, data, rate=0.1, options=("adam", len))
        for f in (compiled, eqx.filter_jit(update))
    )
    assert actual["new"].activation is jnp.tanh and actual["options"] == ("adam", len)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert_close(*(eqx.filter(x, eqx.is_array) for x in (actual, expected)))


def test_what_is_not_traced_goes_through():
    """Values that are not traced pass through unchanged: NumPy arrays, including those whose
    dtype means that there is no gradient (float0), and Python scalars."""
    loss = lambda i, kernel: jnp.sum(convolve(i * normal(1, 3, 6), kernel))
    f = jax.grad(loss, (0, 1), allow_int=True)
    kernel, constant = normal(3, 3, 3), np.arange(3)

    def with_constants(i, kernel):
        return f(i, kernel), constant, 3, "name"

    grads, *others = canonical_convolutions(with_constants)(2, kernel)
    assert grads[0].dtype == jax.dtypes.float0
    assert_close(grads[1], jax.jit(f)(2, kernel)[1])
    assert others[0] is constant and others[1:] == [3, "name"]


def test_static_and_donated_arguments_and_closures():
    def make(transform, shift, key):
        def f(kernel, u, *, mode):
            u = u + jax.random.normal(jax.random.fold_in(key, shift), u.shape, u.dtype)
            return jax.grad(loss_of(convolve))(kernel, jnp.roll(u, shift)), mode == "on"

        return jax.jit(transform(f), static_argnames="mode", donate_argnums=0)

    # `shift` and the key are traced as well.
    of = lambda transform: jax.jit(
        lambda shift, seed, *x: make(transform, shift, jax.random.key(seed))(*x, mode="on")
    )(1, 7, normal(3, 3, 3), normal(2, 3, 6))
    assert_close(of(canonical_convolutions), of(lambda f: f))
    kernel = jnp.copy(normal(3, 3, 3))
    make(canonical_convolutions, 1, jax.random.key(7))(kernel, normal(2, 3, 6), mode="off")
    assert kernel.is_deleted()


def test_effects_happen_once_and_in_order():
    log = []

    def f(kernel, u):
        def step(u, i):
            jax.debug.callback(lambda i: log.append(int(i)), i, ordered=True)
            return jnp.tanh(convolve(u, kernel)), None

        return jax.lax.scan(step, u, jnp.arange(3))[0]

    jax.jit(canonical_convolutions(f))(normal(3, 3, 3), normal(2, 3, 6))
    jax.effects_barrier()
    assert log == [0, 1, 2]


#
# Transformations around the function
#

AROUND = {
    "jit": lambda f: f,
    "vmap": lambda f: jax.vmap(f, (0, None)),
    "vmap over both": jax.vmap,
    "scan": lambda f: (
        lambda ks, us: jax.lax.scan(
            lambda k, x: (k - 0.1 * f(k, x[1])[1][0], f(x[0], x[1])[0]), ks[0], (ks, us)
        )
    ),
    "cond": lambda f: lambda ks, us: jax.lax.cond(us[0, 0, 0, 0] < 9, f, f, ks[0], us[0]),
    "itself": lambda f: canonical_convolutions(canonical_convolutions(f)),
    "grad": lambda f: jax.grad(lambda *x: jnp.sum(f(*x)[1][0] ** 2), (0, 1)),
    "jvp": lambda f: lambda *x: jax.jvp(f, x, x),
}
FEW_AROUND = ["vmap", "grad"]


@pytest.mark.parametrize(
    "name", also_slow(*FEW_AROUND, slowly=[name for name in AROUND if name not in FEW_AROUND])
)
def test_inside(name):
    f = jax.value_and_grad(loss_of(in_scan), (0, 1))
    kernels, us = 0.3 * normal(4, 3, 3, 3), normal(4, 2, 3, 6)
    if name in ("jit", "itself", "grad", "jvp"):
        kernels, us = kernels[0], us[0]
    if name == "vmap":
        us = us[0]
    around = AROUND[name]
    actual, expected = jax.jit(
        lambda *x: (around(canonical_convolutions(f))(*x), around(f)(*x))
    )(kernels, us)
    assert_close(actual, expected)


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="needs a newer JAX")
@pytest.mark.parametrize("check", also_slow(True, slowly=[False]))
@pytest.mark.parametrize("name", also_slow("outside", slowly=["inside"]))
def test_shard_map(name, check):
    mesh = Mesh(np.array(jax.devices("cpu")), ("batch",))
    transform = {"outside": lambda f: f, "inside": canonical_convolutions}[name]
    kernel, u = 0.3 * normal(3, 3, 3), normal(8, 3, 6)

    def layer(u, kernel):
        local = transform(lambda kernel, u: convolve(in_scan(u, kernel), kernel))
        specs = dict(in_specs=(P(), P("batch")), out_specs=P("batch"))
        return jax.shard_map(local, mesh=mesh, check_vma=check, **specs)(kernel, u)

    f = jax.value_and_grad(loss_of(layer), (0, 1))
    actual = jax.jit(f if name == "inside" else canonical_convolutions(f))(kernel, u)
    expected = jax.jit(
        jax.value_and_grad(loss_of(lambda u, k: convolve(in_scan(u, k), k)), (0, 1))
    )
    assert_close(actual, expected(kernel, u))
    if name == "outside":
        # The types are right, including the axes over which they vary
        with config("jax_enable_checks", True):
            jax.make_jaxpr(canonical_convolutions(f))(kernel, u)
        assert_only_layouts_change(f, kernel, u)


@slow
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="needs a newer JAX")
def test_explicit_axes():
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = Mesh(np.array(jax.devices("cpu")), ("batch",), axis_types=explicit)
    f = jax.value_and_grad(loss_of(in_scan), (0, 1))
    with jax.set_mesh(mesh):
        kernel = jax.device_put(0.3 * normal(3, 3, 3), P())
        u = jax.device_put(normal(8, 3, 6), P("batch"))
        actual, expected = (jax.jit(g)(kernel, u) for g in (canonical_convolutions(f), f))
        assert_close(actual, expected)
        shardings = [jax.tree.map(lambda x: x.sharding, x) for x in (actual, expected)]
        assert shardings[0] == shardings[1]


@slow
def test_export_with_symbolic_shapes():
    f = jax.value_and_grad(loss_of(in_scan), (0, 1))
    kernel, u = 0.3 * normal(3, 3, 3), normal(2, 3, 6)
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("batch, 3, space"), u.dtype)
    exported = export.export(jax.jit(canonical_convolutions(f)))(kernel, shape)
    actual = export.deserialize(exported.serialize()).call(kernel, u)
    assert_close(actual, jax.jit(f)(kernel, u))


MODES = {
    "jax_enable_checks": True,
    "jax_check_tracer_leaks": True,
    "jax_disable_jit": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_debug_nans": True,
    "jax_enable_x64": False,
}


@pytest.mark.parametrize(
    "mode",
    also_slow(
        "jax_disable_jit",
        slowly=[mode for mode in MODES if mode != "jax_disable_jit"],
    ),
)
def test_strict_modes(mode):
    f = jax.value_and_grad(loss_of(PLACES["checkpoint"]), (0, 1))
    args = 0.3 * normal(3, 3, 3), normal(2, 3, 6)
    with config(mode, MODES[mode]):
        actual, expected = (jax.jit(g)(*args) for g in (canonical_convolutions(f), f))
        assert_close(actual, expected)


#
# Rollouts
#


def as_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, tree)


class Depthwise(eqx.Module):
    layers: list[eqx.nn.Conv2d]

    def __init__(self, *, key):
        keys = jax.random.split(key, 3)
        wide = functools.partial(eqx.nn.Conv2d, kernel_size=3, padding=1)
        self.layers = [
            wide(1, 4, key=keys[0]),
            wide(4, 4, groups=4, key=keys[1]),
            wide(4, 1, key=keys[2]),
        ]

    def __call__(self, u):
        hidden = u
        for layer in self.layers:
            hidden = jnp.tanh(layer(hidden))
        return u + hidden


@functools.cache
def rollout_problem(name):
    key = jax.random.key(0)
    network, space = {
        "U-Net": (UNet, (8, 8)),
        "3D": (functools.partial(ConvNet, 3), (4, 4, 4)),
        "depthwise": (Depthwise, (8, 8)),
    }[name]
    return as_float32(network(key=key)), normal(2, 1, 1, *space)


def gradient_of(name, num_rollout_steps, **options):
    """Returns the gradient of a rollout with respect to the parameters, and the parameters."""
    network, data = rollout_problem(name)
    params, static = eqx.partition(network, eqx.is_array)

    def loss(params):
        stepper = eqx.combine(params, static)
        options_ = dict(num_rollout_steps=num_rollout_steps, **options)
        return residuum_loss(stepper, data, heat_residuum, **options_)

    return jax.grad(loss), params


ROLLOUTS = {
    "no cut": {},
    "bptt=1": dict(cuts=Cuts(bptt=1)),
    "checkpoint": dict(checkpoint=True),
}


@pytest.mark.parametrize("options", also_slow("bptt=1", slowly=["no cut", "checkpoint"]))
@pytest.mark.parametrize("name", ["U-Net", "3D", "depthwise"])
def test_all_convolutions_of_a_rollout_are_found(name, options):
    assert_only_layouts_change(*gradient_of(name, 4, **ROLLOUTS[options]))


@pytest.mark.parametrize("options", also_slow("bptt=1", slowly=["no cut", "checkpoint"]))
@pytest.mark.parametrize("name", also_slow("U-Net", slowly=["3D", "depthwise"]))
def test_gradient_of_a_rollout(name, options):
    f, params = gradient_of(name, 4, **ROLLOUTS[options])
    actual, expected = jax.jit(lambda x: (canonical_convolutions(f)(x), f(x)))(params)
    assert_close(actual, expected)


@functools.cache
def temporaries(name, num_rollout_steps, transform=canonical_convolutions):
    f, params = gradient_of(name, num_rollout_steps, cuts=Cuts(bptt=1))
    compiled = jax.jit(transform(f)).lower(params).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", also_slow("3D", slowly=["U-Net", "depthwise"]))
def test_memory_of_a_truncated_rollout_does_not_grow_with_its_length(name):
    assert temporaries(name, 1000) == temporaries(name, 20)


# Canonical convolutions store a transposed copy of an activation or two. With grouped
# convolutions in between there are more copies, and the loop itself needs less memory.
MEMORY = {"U-Net": 1.25, "3D": 1.25, "depthwise": 2.4}


@pytest.mark.parametrize("name", also_slow("3D", slowly=["U-Net", "depthwise"]))
def test_memory_is_about_that_of_the_loop_as_it_was(name):
    assert temporaries(name, 20) <= MEMORY[name] * temporaries(name, 20, lambda f: f)
