"""`inputs` give each sample something besides the state at each time level: a forcing, boundary
values, a key. Every derivative equals that of the textbook loop, including those with respect
to the inputs."""

import functools
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

from residuum import Cuts, residuum_loss
from test_residuum import (
    assert_as_textbook,
    assert_close,
    cuts_of,
    EXTRA,
    MASK,
    problem,
    textbook_loss,
)
from tests.common import (
    also_slow,
    make_mesh,
    MESH_DEVICES,
    needs_shard_map,
    primitives,
    shard,
    slow,
    vary,
)


#
# The problem of test_residuum.py, with inputs of every kind
#


def forced_problem(num_rollout_steps, *, batch=2, seed=0):
    """Returns the differentiable arguments and the labels. The arguments are params, data,
    weights and forcing. The labels are inputs without a derivative: integers, bools and
    keys."""
    params, data, weights, _ = problem(num_rollout_steps, batch=batch, seed=seed)
    rng, shape = np.random.default_rng(seed + 1), (batch, num_rollout_steps)
    normal = lambda *more: jnp.asarray(rng.normal(size=(*shape, *more)))
    labels = {
        "order": jnp.asarray(rng.integers(3, size=(*shape, 3))),
        "is_day": jnp.asarray(rng.integers(2, size=shape) == 0),
        "key": jax.random.split(jax.random.key(seed), shape),
    }
    # The tree is nested, and the complex leaf has no axes besides batch and time.
    return params, data, weights, {"f": normal(3), "walls": [normal() + 1j * normal()]}, labels


def forced_loss(loss_fn, params, data, weights, forcing, labels, **options):
    """Evaluates `loss_fn`, either the oracle or the library, as a function of all of these
    arguments."""

    def stepper(state, inputs_t):
        noise = jax.random.key_data(inputs_t["key"])[-1] / 2**32  # a draw compiles slowly
        f = inputs_t["f"][inputs_t["order"]] + noise
        u = jnp.tanh(params["w"] @ state["u"] + state["v"][0] * f)
        (wall,) = inputs_t["walls"]
        return {"u": u, "v": params["b"] * state["v"] + u[:2] * wall.real - wall.imag}

    def residuum_fn(u_next, u_prev, inputs_t):
        (wall,) = inputs_t["walls"]
        light = jnp.where(inputs_t["is_day"], inputs_t["f"] ** 2, u_prev["u"])
        return u_next["u"] - light * u_prev["u"], wall * u_next["v"] * u_prev["v"]

    options = {"num_rollout_steps": forcing["f"].shape[1], **options}
    inputs = {**forcing, **labels}
    return loss_fn(stepper, data, residuum_fn, weights=weights, inputs=inputs, **options)


def value_and_grad(loss_fn, args, **options):
    f = functools.partial(forced_loss, loss_fn, **options)
    return jax.value_and_grad(f, argnums=(0, 1, 2, 3))(*args)


#
# Values and derivatives
#

ROWS = [  # prev, next, and options that do not change the result
    (False, False, {}),
    (MASK[:4], np.array(True), {"checkpoint": True, "unroll": 2}),
    (True, False, {"checkpoint": 2}),
    (False, True, {"unroll": True}),
    (True, True, {"checkpoint": 3, "unroll": True}),
]


@pytest.mark.parametrize("rows", [ROWS[:2], pytest.param(ROWS[2:], marks=slow)])
@pytest.mark.parametrize("bptt", also_slow("3", slowly=["none", "every", "2", "mask"]))
def test_gradient_with_respect_to_inputs_equals_the_textbook_loop(bptt, rows):
    """With inputs, the gradients with respect to the inputs, params, data and weights all equal
    those of the textbook loop."""

    def all_values_and_grads(loss_fn, args):
        for prev, next, program in rows:
            options = {} if loss_fn is textbook_loss else program
            cuts = cuts_of(4, bptt, prev, next)
            yield value_and_grad(loss_fn, args, cuts=cuts, **options)

    functions = (residuum_loss, textbook_loss)
    both = jax.jit(lambda args: [list(all_values_and_grads(f, args)) for f in functions])
    for row, *pair in zip(rows, *both(forced_problem(4)), strict=True):
        assert_close(*pair, what=row)


@pytest.mark.parametrize("bptt", also_slow("every", slowly=["none"]))
def test_one_step_of_one_sample_with_inputs_equals_the_textbook_loop(bptt):
    f = functools.partial(value_and_grad, cuts=cuts_of(1, bptt))
    assert_as_textbook(f, forced_problem(1, batch=1), extra=[{}, {"checkpoint": True}])


def random_like(tree, seed=2):
    rng = np.random.default_rng(seed)
    normal = lambda x: rng.normal(size=x.shape)
    complex_or_real = lambda x: normal(x) + (1j * normal(x) if jnp.iscomplexobj(x) else 0)
    return jax.tree.map(lambda x: jnp.asarray(complex_or_real(x), x.dtype), tree)


@pytest.mark.parametrize(
    "extra, twice", [(EXTRA[:1], False), pytest.param(EXTRA[1:3], True, marks=slow)], ids=str
)
@pytest.mark.parametrize("bptt", also_slow("2", slowly=["none", "every", "mask"]))
def test_derivatives_of_higher_order_with_respect_to_inputs(bptt, extra, twice):
    """Second derivatives with respect to inputs equal those of the textbook loop. With `twice`,
    this includes reverse over reverse mode."""
    *variables, labels = forced_problem(3)
    tangents = random_like(variables)

    def derivatives(loss_fn, variables):
        def loss(*variables):
            return forced_loss(loss_fn, *variables, labels, cuts=cuts_of(3, bptt))

        def along_the_tangents(*variables):
            products = jax.tree.map(lambda g, dot: g * dot, list(grad(*variables)), tangents)
            return sum(jnp.sum(x).real for x in jax.tree.leaves(products))

        grad = jax.grad(loss, argnums=(0, 1, 2, 3))
        first = jax.jvp(loss, variables, tangents)
        forward_over_reverse = jax.jvp(grad, variables, tangents)
        twice_reverse = jax.grad(along_the_tangents, (0, 1, 2, 3))
        reverse_over_reverse = twice_reverse(*variables) if twice else None
        return first, forward_over_reverse, reverse_over_reverse

    assert_as_textbook(derivatives, variables, extra=extra)


@slow
@pytest.mark.parametrize("bptt", ["2", "mask"])
def test_hessians_with_respect_to_inputs_equal_the_textbook_loop(bptt):
    *variables, labels = forced_problem(3, batch=1)
    is_complex = jnp.iscomplexobj
    parts = jax.tree.map(lambda x: (x.real, x.imag) if is_complex(x) else (x,), variables)
    flat, unravel = ravel_pytree(parts)

    def hessians(loss_fn, flat):
        def loss(flat):
            join = lambda part: part[0] + 1j * part[1] if len(part) == 2 else part[0]
            args = [join(x) for x in jax.tree.structure(variables).flatten_up_to(unravel(flat))]
            args = jax.tree.unflatten(jax.tree.structure(variables), args)
            return forced_loss(loss_fn, *args, labels, cuts=cuts_of(3, bptt))

        return jax.jacfwd(jax.grad(loss))(flat), jax.jacrev(jax.grad(loss))(flat)

    assert_as_textbook(hessians, flat, extra=EXTRA[:3])


def first(tree):
    return jax.tree.map(lambda x: x[0], tree)


TRANSFORMATIONS = {
    "grad of jit": lambda f: lambda params, x, y: jax.grad(jax.jit(f))(params, *first((x, y))),
    "jit of grad": lambda f: lambda params, x, y: jax.jit(jax.grad(f))(params, *first((x, y))),
    # Several series share the same parameters.
    "vmap of grad": lambda f: jax.jit(jax.vmap(jax.grad(f, (0, 1)), (None, 0, 0))),
}


@pytest.mark.parametrize("bptt", also_slow("2", slowly=["none", "mask"]))
@pytest.mark.parametrize(
    "name", also_slow("grad of jit", "vmap of grad", slowly=["jit of grad"])
)
def test_gradients_with_respect_to_inputs_compose_with(name, bptt):
    (params, data, weights, _, _) = forced_problem(3)
    series = [forced_problem(3, seed=seed)[3:] for seed in (1, 2)]
    forcings, labels = jax.tree.map(lambda *x: jnp.stack(x), *series)

    def gradient(loss_fn):
        def loss(params, forcing, labels):
            cuts = cuts_of(3, bptt)
            return forced_loss(loss_fn, params, data, weights, forcing, labels, cuts=cuts)

        return TRANSFORMATIONS[name](loss)(params, forcings, labels)

    assert_close(gradient(residuum_loss), gradient(textbook_loss))


@pytest.mark.parametrize("num_rollout_steps", also_slow(2, slowly=[5]))
def test_a_forcing_may_be_read_by_one_function_only(num_rollout_steps):
    """A forcing may be read by one function only. At a level where nobody reads the forcing,
    such as the last one, its gradient is zero."""
    rng, shape = np.random.default_rng(0), (2, num_rollout_steps)
    names = ("stepper", "residuum", "nobody")
    inputs = {name: jnp.asarray(rng.normal(size=shape)) for name in names}
    data = jnp.asarray(rng.normal(size=(2, 1)))
    all_cuts = [Cuts(), Cuts(1), Cuts(2, prev=True), Cuts(3, next=True), Cuts(1, True, True)]

    def gradients(loss_fn, inputs):
        def loss(inputs, cuts):
            stepper = lambda u, inputs_t: jnp.sin(u + inputs_t["stepper"])
            residuum_fn = lambda n, p, inputs_t: n - p * inputs_t["residuum"]
            options = dict(num_rollout_steps=num_rollout_steps, inputs=inputs, cuts=cuts)
            return loss_fn(stepper, data, residuum_fn, **options)

        return [jax.grad(loss)(inputs, cuts) for cuts in all_cuts]

    assert_as_textbook(gradients, inputs)
    for grads in gradients(residuum_loss, inputs):
        assert_close(grads["nobody"], jnp.zeros(shape))
        assert jnp.any(grads["residuum"] != 0)
    assert_close(grads["stepper"], jnp.zeros(shape))  # `prev` and `next` cut it off


def test_a_long_rollout_in_pieces_of_the_series_equals_the_rollout_in_one():
    """A long rollout in pieces of the series has the loss of the whole rollout, and the
    gradient of a rollout that is cut between the pieces."""
    params, data, weights, forcing, labels = forced_problem(4)

    def in_pieces(params, weights, forcing):
        total, rest = 0.0, data
        for piece in (slice(0, 2), slice(2, 4)):
            series = jax.tree.map(lambda x, piece=piece: x[:, piece], (forcing, labels))
            args = (params, rest, weights[piece], *series)
            loss, rollout = forced_loss(residuum_loss, *args, has_aux=True)
            rest = jax.tree.map(lambda x: x[:, None], rollout.final_state)
            total += loss
        return total

    def in_one(params, weights, forcing):
        args = (params, data, weights, forcing, labels)
        return forced_loss(textbook_loss, *args, cuts=Cuts(bptt=2))

    both = [jax.jit(jax.value_and_grad(f, (0, 1, 2))) for f in (in_pieces, in_one)]
    assert_close(*[f(params, weights, forcing) for f in both])


@pytest.mark.parametrize("bptt", also_slow("2", slowly=["none"]))
def test_inputs_in_bf16_have_gradients_in_bf16(bptt):
    *args, forcing, labels = forced_problem(3)
    forcing["f"] = forcing["f"].astype(jnp.bfloat16)

    def value_and_grad_of(loss_fn, f):
        loss = lambda f: forced_loss(
            loss_fn, *args, {**forcing, "f": f}, labels, cuts=cuts_of(3, bptt)
        )
        value, grad = jax.value_and_grad(loss)(f)
        return value, grad.astype(jnp.float32)

    value, grad = jax.jit(functools.partial(value_and_grad_of, residuum_loss))(forcing["f"])
    expected = jax.jit(functools.partial(value_and_grad_of, textbook_loss))(forcing["f"])
    assert_close(value, expected[0])
    assert_close(grad, expected[1], 2**-7)


WAYS_IN = {  # how a number enters (stepper's scale, data, weights, inputs)
    "parameters": lambda s: (s, 0.3, [1.0, 2.0, 1.0], 0.7),
    "data": lambda s: (0.5, s, [1.0, 2.0, 1.0], 0.7),
    "weights": lambda s: (0.5, 0.3, [s, 2.0, s], 0.7),
    "inputs": lambda s: (0.5, 0.3, [1.0, 2.0, 1.0], s),
    "all": lambda s: (s, s, [s, s, s], s),
}


@pytest.mark.parametrize(
    "way", also_slow("parameters", "all", slowly=["data", "weights", "inputs"])
)
def test_tangents_may_be_python_numbers(way):
    def loss(loss_fn, s, bptt=1):
        scale, initial, weights, forcing = WAYS_IN[way](s)
        return loss_fn(
            lambda u, inputs_t: jnp.sin(scale * u + inputs_t),
            jnp.full((1, 1), initial),
            lambda n, p, inputs_t: n - p * inputs_t,
            weights=weights,
            inputs=jnp.full((1, 3), forcing),
            num_rollout_steps=3,
            cuts=Cuts(bptt),
        )

    def tangents(loss_fn, s):
        of = [functools.partial(loss, loss_fn, bptt=bptt) for bptt in (1, 2)]
        return [jax.jvp(f, (s,), (1.0,)) for f in of]

    functions = (residuum_loss, textbook_loss)
    both = jax.jit(lambda s: [jax.tree.map(jnp.float64, tangents(f, s)) for f in functions])
    assert_close(*both(0.5))


@pytest.mark.skipif(not hasattr(jax, "debug_key_reuse"), reason="needs a newer JAX")
@pytest.mark.parametrize("bptt", also_slow(3, slowly=[False, 1, [True, False, True, False]]))
def test_each_key_is_used_once(bptt):
    """Each key is used once by JAX's count, for which even a transposition is a use."""
    data = jnp.ones((2, 1, 3))

    def loss(x, stepper, keys):
        options = dict(num_rollout_steps=4, cuts=Cuts(bptt), inputs={"key": keys})
        return residuum_loss(
            functools.partial(stepper, x), data, lambda n, p, k: n - p, **options
        )

    def noisy(x, u, inputs_t):
        return x * u + jax.random.normal(inputs_t["key"], u.shape)

    def noisy_twice(x, u, inputs_t):
        return noisy(x, noisy(x, u, inputs_t), inputs_t)

    keys = lambda: jax.random.split(jax.random.key(0), (2, 4))
    expected = [f(2.0, noisy, keys()) for f in (loss, jax.grad(loss))]
    with jax.debug_key_reuse(True):
        for wrap in (lambda f, **_: f, jax.jit):
            functions = [wrap(f, static_argnums=1) for f in (loss, jax.grad(loss))]
            assert_close([f(2.0, noisy, keys()) for f in functions], expected, 1e-6)
        with pytest.raises(jax.errors.KeyReuseError):
            jax.jit(loss, static_argnums=1)(2.0, noisy_twice, keys())


@pytest.mark.skipif(not hasattr(jax, "debug_key_reuse"), reason="needs a newer JAX")
@pytest.mark.parametrize("bptt", also_slow(1, slowly=[False, [True, False, True, False]]))
def test_each_key_in_the_state_is_used_once(bptt):
    def loss(x, keys):
        def stepper(state):
            key, noise_key = jax.random.split(state["key"])
            return {"u": x * state["u"] + jax.random.normal(noise_key, (3,)), "key": key}

        data = {"u": jnp.ones((2, 1, 3)), "key": keys}
        options = dict(num_rollout_steps=4, cuts=Cuts(bptt))
        return residuum_loss(stepper, data, lambda n, p: n["u"] - p["u"], **options)

    keys = lambda: jax.random.split(jax.random.key(0), (2, 1))
    expected = jax.value_and_grad(loss)(2.0, keys())
    with jax.debug_key_reuse(True):
        assert_close(jax.jit(jax.value_and_grad(loss))(2.0, keys()), expected, 1e-6)


#
# Several devices
#


@functools.cache
def on_one_device():
    args = forced_problem(4, batch=2 * len(MESH_DEVICES))
    f = lambda bptt: value_and_grad(textbook_loss, args, cuts=Cuts(bptt))
    return args, jax.jit(lambda: {bptt: f(bptt) for bptt in (False, 1, 3)})()


SHARDED = [dict(cuts=Cuts(1)), dict(cuts=Cuts(3), checkpoint=True), dict(checkpoint=2)]


def assert_as_on_one_device(actual):
    for options, value_and_grads in zip(SHARDED, actual, strict=True):
        expected = on_one_device()[1][options.get("cuts", Cuts()).bptt]
        assert_close(*jax.device_get((value_and_grads, expected)), what=options)


def test_sharded_inputs_under_jit():
    args, _ = on_one_device()
    specs = (P(), P("batch"), P(), P("batch"), P("batch"))
    args = [shard(make_mesh(), spec, x) for spec, x in zip(specs, args, strict=True)]
    f = lambda *args: [value_and_grad(residuum_loss, args, **options) for options in SHARDED]
    assert_as_on_one_device(jax.jit(f)(*args))


@needs_shard_map
@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=slow)])
@pytest.mark.parametrize("where", also_slow("outside", slowly=["inside"]))
def test_sharded_inputs_under_shard_map(where, check_vma):
    """Inputs may be sharded under a `shard_map`. The gradient with respect to arguments that
    are not sharded is a sum over devices. JAX takes this sum if the gradient is taken outside.
    Inside, where the parameters vary, the test takes the sum itself."""
    args, _ = on_one_device()
    num_devices, specs = len(MESH_DEVICES), (P(), P("batch"), P(), P("batch"), P("batch"))
    mapped = functools.partial(
        jax.shard_map, mesh=make_mesh(), in_specs=specs, check_vma=check_vma
    )

    def outside(options):
        loss = lambda *args: forced_loss(residuum_loss, *args, **options)
        mean_loss = mapped(lambda *args: jax.lax.pmean(loss(*args), "batch"), out_specs=P())
        return jax.value_and_grad(mean_loss, (0, 1, 2, 3))(*args)

    def inside(options):
        def value_and_grad_of_mean(params, data, weights, forcing, labels):
            if check_vma:
                params, weights = vary((params, weights))
            args = params, data, weights, forcing, labels
            loss, (params, data, weights, forcing) = value_and_grad(
                residuum_loss, args, **options
            )
            loss, params, weights = jax.lax.pmean((loss, params, weights), "batch")
            data, forcing = jax.tree.map(lambda x: x / num_devices, (data, forcing))
            return loss, (params, data, weights, forcing)

        return mapped(value_and_grad_of_mean, out_specs=(P(), specs[:4]))(*args)

    f = {"outside": outside, "inside": inside}[where]
    assert_as_on_one_device(jax.jit(lambda: [f(options) for options in SHARDED])())


#
# Cost
#


def compile_forced(num_rollout_steps, bptt, *, wrt=0, **options):
    """Compiles the value and gradient of a loss whose forcing is as large as the state at each
    level."""
    batch, size = 8, 64
    params = {"w": jnp.ones((size, size), jnp.float32), "b": jnp.ones(size, jnp.float32)}
    data = jnp.ones((batch, 1, size), jnp.float32)
    inputs = jax.ShapeDtypeStruct((batch, num_rollout_steps, size), jnp.float32)

    def loss(params, data, inputs):
        stepper = lambda u, f: u + jnp.tanh(params["w"] @ u + params["b"] * f)
        options_ = dict(num_rollout_steps=num_rollout_steps, inputs=inputs, cuts=Cuts(bptt))
        return residuum_loss(stepper, data, lambda n, p, f: n - p - f, **options_, **options)

    traced = jax.jit(jax.value_and_grad(loss, wrt)).trace(params, data, inputs)
    return traced, batch * size * 4


# The XLA of JAX 0.10.2 makes one more copy if a segment has an axis of length one. The XLA of
# JAX 0.4.34, 0.7.2 and 0.12 does not.
COPIES_OF_ONE_STEP = 2 if (0, 8) <= jax.__version_info__ < (0, 11) else 1


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"checkpoint": 3}], ids=str)
@pytest.mark.parametrize("bptt", also_slow(1, 7, slowly=[5]))
@pytest.mark.parametrize("wrt", also_slow(0, slowly=[1, 2, (0, 1, 2)]))
def test_memory_grows_with_the_rollout_by_one_copy_of_the_inputs(wrt, bptt, options):
    """Memory grows with the rollout by one copy of the inputs. The gradient with respect to the
    inputs is a result, so it does not count as temporary memory. With segments of 7 steps, both
    20 and 1000 steps leave a last segment of 6 steps."""

    def temporaries(num_rollout_steps):
        traced, level = compile_forced(num_rollout_steps, bptt, wrt=wrt, **options)
        memory = traced.lower().compile().memory_analysis()
        return memory.temp_size_in_bytes, level * num_rollout_steps

    (short, inputs_of_short), (long, inputs_of_long) = temporaries(20), temporaries(1000)
    copies = COPIES_OF_ONE_STEP if bptt == 1 else 1
    few_bytes_a_level = 32 * (1000 - 20)  # a level of the inputs has 2048
    assert long - short <= copies * (inputs_of_long - inputs_of_short) + few_bytes_a_level


@pytest.mark.parametrize("bptt", also_slow(1, slowly=[False, 7]))
def test_program_size_with_inputs_does_not_grow_with_the_rollout(bptt):
    def size(num_rollout_steps):
        traced, _ = compile_forced(num_rollout_steps, bptt, wrt=(0, 1, 2))
        return len(list(primitives(traced.jaxpr.jaxpr)))

    assert size(30) == size(303)


#
# Bad input
#


def message(**changes):
    """Returns everything that is shown below the traceback of a bad call."""
    call = dict(
        stepper=lambda u, inputs_t: u + inputs_t["f"],
        data=np.ones((4, 1, 3)),
        residuum_fn=lambda n, p, inputs_t: n - p,
        num_rollout_steps=5,
        inputs={"f": np.ones((4, 5, 3)), "g": np.ones((4, 5))},
    )
    call |= changes
    positional = [call.pop(name) for name in ("stepper", "data", "residuum_fn")]
    with pytest.raises((TypeError, ValueError)) as info:
        jax.eval_shape(lambda: residuum_loss(*positional, **call))
    return "".join(traceback.format_exception_only(info.value))


WRONG_INPUTS = {
    "batch": ({"f": np.ones((3, 5, 2))}, ["ValueError", "inputs['f']", "[4, 5", "[3, 5, 2]"]),
    "length": ({"f": np.ones((4, 6))}, ["ValueError", "inputs['f']", "[4, 5", "[4, 6]"]),
    "batch and time swapped": ({"f": np.ones((5, 4))}, ["inputs['f']", "[4, 5", "[5, 4]"]),
    "no time axis": ({"f": np.ones(4)}, ["ValueError", "inputs['f']", "[4, 5", "[4]"]),
    "a scalar": ({"f": np.float32(1)}, ["ValueError", "inputs['f']", "[4, 5", "float32[]"]),
    "a Python number": ({"f": 1.0}, ["TypeError", "inputs['f']", "[4, 5", "1.0"]),
    "a list of floats": ({"f": [1.0, 2.0]}, ["TypeError", "inputs['f'][0]", "[4, 5", "1.0"]),
    "text": ({"f": "wind"}, ["TypeError", "inputs['f']", "[4, 5", "'wind'"]),
    "no leaf": ({}, ["ValueError", "inputs must hold at least one array", "{}"]),
    "None as the only leaf": ({"f": None}, ["ValueError", "inputs", "at least one array"]),
    "the second leaf": ([np.ones((4, 5)), np.ones((4, 4))], ["inputs[1]", "[4, 5", "[4, 4]"]),
    "an array": (np.ones((4, 1)), ["ValueError", "inputs must", "[4, 5", "[4, 1]"]),
    "keys": (
        {"f": jax.random.split(jax.random.key(0), 4)},
        ["ValueError", "inputs['f']", "[4, 5", "key<fry>[4]"],
    ),
}


@pytest.mark.parametrize("wrong", WRONG_INPUTS)
def test_wrong_inputs_are_named_with_both_sizes(wrong):
    inputs, expected = WRONG_INPUTS[wrong]
    text = message(inputs=inputs)
    assert [part for part in expected if part not in text] == [], text


def test_a_wrong_number_of_arguments_shows_what_the_function_was_called_with():
    u_prev, inputs_t = "u_prev float64[3]", "inputs_t['f'] float64[3], inputs_t['g'] float64[]"
    one, two, three = lambda u: u, lambda u, v: u, lambda u, v, w: u
    assert f"stepper({u_prev}, {inputs_t})" in message(stepper=one)
    assert f"stepper({u_prev})" in message(stepper=two, inputs=None)
    called = f"residuum_fn(u_next float64[3], {u_prev}, {inputs_t})"
    assert called in message(residuum_fn=two)
    called = f"residuum_fn(u_next float64[3], {u_prev})"
    assert called in message(stepper=one, residuum_fn=three, inputs=None)
