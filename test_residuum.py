"""These tests verify that `residuum_loss` has the value and the derivatives of a textbook
Python loop.

The textbook loop below is the oracle, and the two agree in float64 to 1e-9. To run this file,
put residuum.py in the same folder and `pip install jax jaxtyping chex pytest`. The folder
tests/ of the project has more tests with the same oracle, one topic per file.
"""

import functools
import itertools
import os

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from absl.testing import parameterized
from jax.flatten_util import ravel_pytree

from residuum import Cuts, mse, residuum_loss, Rollout


# `pmap` is tested on four virtual CPU devices. JAX reads this setting when it first computes
# anything. If it already has, it keeps its devices, and `pmap` runs on as many as there are.
chex.set_n_cpu_devices(4)

# XLA's optimisations cost more time here than they save, because nearly every program runs only
# once. To test with the optimisations that users have: RESIDUUM_TEST_OPTIMIZED=1 python -m
# pytest
OPTIMIZED = os.environ.get("RESIDUUM_TEST_OPTIMIZED", "0") != "0"

SETTINGS = {
    "jax_enable_x64": True,  # in float32, round-off could hide a small mistake
    # By default, an accelerator multiplies float32 matrices with a mantissa of 10 bits.
    "jax_default_matmul_precision": "highest",
    "jax_disable_most_optimizations": not OPTIMIZED,
}


@pytest.fixture(scope="module", autouse=True)
def settings():
    """Sets JAX up for the tests of this file alone, since other files of the same run have
    settings of their own."""
    before = {name: jax.config.values[name] for name in SETTINGS}
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


TOLERANCE, SINGLE_TOLERANCE = 1e-9, 2e-5  # for float64 and for float32
FLAGS = (False, True)

# True if this module was imported through jaxtyping's import hook.
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
    inputs=None,
    time_level_loss=None,
    axis_name=None,
):
    """Computes the loss that `residuum_loss` must equal in value and in every derivative."""
    if weights is None:
        weights = np.ones(num_rollout_steps)
    if time_level_loss is None:
        time_level_loss = textbook_mse
    over_batch = functools.partial(jax.vmap, axis_name=axis_name)
    loss = 0.0
    u_prev = jax.tree.map(lambda leaf: leaf[:, 0], data)
    for t in range(num_rollout_steps):
        inputs_t = () if inputs is None else (of_level(inputs, t),)
        u_next = over_batch(stepper)(u_prev, *inputs_t)
        seen_next = jax.lax.stop_gradient(u_next) if at(cuts.next, t) else u_next
        seen_prev = jax.lax.stop_gradient(u_prev) if at(cuts.prev, t) else u_prev
        residuum = over_batch(residuum_fn)(seen_next, seen_prev, *inputs_t)
        loss = loss + weights[t] * jnp.mean(over_batch(time_level_loss)(residuum))
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


def of_level(inputs, t):
    return jax.tree.map(lambda leaf: leaf[:, t], inputs)


def at(cut, t):
    return cut[t] if np.ndim(cut) == 1 else bool(cut)


def textbook_mse(residuum):
    entries = [jnp.ravel(leaf) for leaf in jax.tree.leaves(residuum)]
    entries = jnp.concatenate(entries)
    return jnp.mean(entries.real**2 + entries.imag**2)


def assert_as_textbook(f, *args, extra=({},), tolerance=TOLERANCE):
    """Asserts that `f(loss_fn, *args)` is the same for the oracle and for the library, whatever
    the `extra` options. A single program computes everything, because most of the time of a
    test is compilation."""

    @jax.jit
    def all_of_them(*args):
        actual = [f(functools.partial(residuum_loss, **options), *args) for options in extra]
        return f(textbook_loss, *args), actual

    expected, all_actual = all_of_them(*args)
    for options, actual in zip(extra, all_actual, strict=True):
        assert_close(actual, expected, tolerance, what=options)


#
# A small problem that has everything: a state with several leaves, a nonlinear stepper with
# parameters, a nonlinear residual that closes over a coefficient, and weights
#


def problem(num_rollout_steps, *, batch=2, seed=0):
    """Returns the differentiable inputs: params, data, weights, coefficient."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    params = {"w": normal(3, 3), "b": 0.5 * normal(2)}
    data = {"u": normal(batch, 2, 3), "v": normal(batch, 2, 2)}
    return params, data, normal(num_rollout_steps), normal()


def evaluate(loss_fn, params, data, weights, coefficient, **options):
    """Evaluates `loss_fn`, either the oracle or the library, as a function of everything with
    respect to which it can be differentiated."""

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

# The columns are prev, next and weighted. Missing weights are replaced by ones before anything
# else happens, so one row without weights is enough.
AT_LEVELS = [*itertools.product(FLAGS, FLAGS, [True]), (False, False, False)]
PROGRAMS = [dict(checkpoint=c, unroll=u) for c, u in itertools.product(FLAGS, (1, True))]


def assert_values_and_gradients(num_rollout_steps, bptt, rows):
    def values_and_grads(loss_fn, inputs):
        for (prev, next, weighted), program in rows:
            options = {} if loss_fn is textbook_loss else program
            cuts = cuts_of(num_rollout_steps, bptt, prev, next)
            options = dict(num_rollout_steps=num_rollout_steps, cuts=cuts, **options)
            yield value_and_grad(loss_fn, inputs, weighted=weighted, **options)

    functions = (residuum_loss, textbook_loss)
    both = jax.jit(lambda inputs: [list(values_and_grads(f, inputs)) for f in functions])
    for row, *pair in zip(rows, *both(problem(num_rollout_steps)), strict=True):
        assert_close(*pair, what=row)


@pytest.mark.parametrize("bptt", ["none", "2"])
def test_value_and_gradient_equal_the_textbook_loop(bptt):
    rows = zip(AT_LEVELS, [*PROGRAMS, dict(unroll=3)], strict=True)
    assert_values_and_gradients(7, bptt, list(rows))


@pytest.mark.parametrize("bptt", ["2"])
def test_traced_masks_equal_the_textbook_loop(bptt):
    inputs, rng = problem(5), np.random.default_rng(0)

    def values_and_grads(loss_fn, per_level, scalar):
        for prev, next in ((per_level, scalar), (scalar, per_level)):
            cuts = cuts_of(5, bptt, prev, next)
            yield value_and_grad(loss_fn, inputs, num_rollout_steps=5, cuts=cuts)

    traced = jax.jit(lambda *masks: list(values_and_grads(residuum_loss, *masks)))
    masks = [(rng.integers(2, size=5).astype(bool), np.array(flag)) for flag in FLAGS]
    expected = jax.jit(lambda: [list(values_and_grads(textbook_loss, *m)) for m in masks])()
    assert_close([traced(*m) for m in masks], expected)


def test_nothing_is_cut_by_default():
    assert Cuts() == (False, False, False)  # otherwise the oracle would cut as well


HIGHER_ORDER = [
    dict(num_rollout_steps=5, cuts=Cuts(bptt=2)),
    dict(num_rollout_steps=1),
    dict(num_rollout_steps=3),
    dict(num_rollout_steps=3, cuts=Cuts(bptt=True)),
    dict(num_rollout_steps=4, cuts=Cuts(bptt=2, prev=True)),
    dict(num_rollout_steps=4, cuts=Cuts(bptt=3, next=True)),
    dict(num_rollout_steps=5, cuts=Cuts(bptt=MASK[:5], next=MASK[:5])),
]
EXTRA = [{}, {"checkpoint": True, "unroll": 2}, {"checkpoint": 2}, {"unroll": True}]


def flat_problem(num_rollout_steps, **options):
    """Returns all inputs as one flat vector, and the loss as a function of that vector."""
    flat, unravel = ravel_pytree(problem(num_rollout_steps, batch=1))
    options["num_rollout_steps"] = num_rollout_steps
    return flat, lambda loss_fn, flat: evaluate(loss_fn, *unravel(flat), **options)


@pytest.mark.parametrize("options", HIGHER_ORDER[:1], ids=str)
def test_forward_mode_and_second_derivatives_equal_the_textbook_loop(options):
    flat, loss = flat_problem(**options)
    tangent = jnp.asarray(np.random.default_rng(1).normal(size=flat.shape))

    def first_order(loss_fn, x):
        return jax.jvp(functools.partial(loss, loss_fn), (x,), (tangent,))

    def forward_over_reverse(loss_fn, x):
        value_and_grad = jax.value_and_grad(functools.partial(loss, loss_fn))
        return jax.jvp(value_and_grad, (x,), (tangent,))

    def reverse_over_reverse(loss_fn, x):
        value_and_grad = jax.value_and_grad(functools.partial(loss, loss_fn))
        penalised = lambda value, grad: value + grad @ tangent
        return jax.grad(lambda x: penalised(*value_and_grad(x)))(x)

    assert_as_textbook(first_order, flat, extra=EXTRA)
    assert_as_textbook(forward_over_reverse, flat)
    assert_as_textbook(reverse_over_reverse, flat, extra=EXTRA[1:3])


#
# chex variants: with and without jit, on one device and on several
#


@functools.cache
def expected_value_and_grad(bptt):
    options = dict(num_rollout_steps=5, cuts=cuts_of(5, bptt, prev=True))
    return jax.jit(lambda inputs: value_and_grad(textbook_loss, inputs, **options))(problem(5))


class VariantsTest(chex.TestCase):
    @chex.variants(
        with_jit=True,
        without_jit=True,
        with_device=True,
        without_device=True,
        with_pmap=True,
    )
    @parameterized.parameters("every", "mask")
    def test_value_and_gradient(self, bptt):
        options = dict(num_rollout_steps=5, cuts=cuts_of(5, bptt, prev=True))
        f = functools.partial(value_and_grad, residuum_loss, **options)
        actual = jax.tree.map(jnp.asarray, self.variant(f)(problem(5)))
        assert_close(actual, expected_value_and_grad(bptt))


def test_pmap_runs_on_several_devices():
    assert jax.device_count() > 1 or jax.default_backend() != "cpu"


@pytest.mark.parametrize("platform", sorted({d.platform for d in jax.devices()} | {"cpu"}))
def test_every_platform_agrees_with_the_textbook_loop_on_the_cpu(platform):
    options = dict(num_rollout_steps=5, cuts=cuts_of(5, "every", prev=True))
    with jax.default_device(jax.devices("cpu")[0]):
        expected = jax.device_get(expected_value_and_grad("every"))
        inputs = jax.device_get(problem(5))
    with jax.default_device(jax.devices(platform)[0]):
        inputs = jax.tree.map(jnp.asarray, inputs)
        actual = jax.jit(lambda x: value_and_grad(residuum_loss, x, **options))(inputs)
    assert {d.platform for d in actual[0].devices()} == {platform}
    assert_close(jax.device_get(actual), expected)


def test_new_parameters_weights_and_masks_do_not_retrace():
    def value_and_grad_of(loss_fn, inputs, bptt, prev):
        cuts = Cuts(bptt, prev)
        return value_and_grad(loss_fn, inputs, num_rollout_steps=5, cuts=cuts)

    cases = []
    for seed in range(3):
        mask = np.random.default_rng(seed).integers(2, size=5).astype(bool)
        cases.append((problem(5, seed=seed), mask, mask[0]))
    expected = jax.jit(lambda: [value_and_grad_of(textbook_loss, *case) for case in cases])()
    step = chex.assert_max_traces(n=1)(lambda *case: value_and_grad_of(residuum_loss, *case))
    step = jax.jit(step)
    assert_close([step(*case) for case in cases], expected)


#
# has_aux
#


@pytest.mark.parametrize("num_rollout_steps", [1, 5])
def test_rollout_holds_unweighted_losses_and_the_final_state(num_rollout_steps):
    params, data, weights, coefficient = problem(num_rollout_steps)

    @jax.jit
    def one_step(u):
        data = jax.tree.map(lambda leaf: leaf[:, None], u)
        return evaluate(residuum_loss, params, data, None, coefficient, has_aux=True)

    u, losses = jax.tree.map(lambda leaf: leaf[:, 0], data), []
    for _ in range(num_rollout_steps):
        level_loss, (_, u) = one_step(u)
        losses.append(level_loss)
    expected = Rollout(jnp.stack(losses), u)

    def with_and_without(bptt):
        options = dict(num_rollout_steps=num_rollout_steps)
        options["cuts"] = cuts_of(num_rollout_steps, bptt)
        loss_of = functools.partial(evaluate, residuum_loss, params, data, weights, coefficient)
        return loss_of(**options), loss_of(has_aux=True, **options)

    results = jax.jit(lambda: [with_and_without(bptt) for bptt in BPTT])()
    for bptt, (alone, (loss, rollout)) in zip(BPTT, results, strict=True):
        assert isinstance(rollout, Rollout)
        assert_close(rollout, expected, what=bptt)
        assert_close([loss, alone], [jnp.sum(weights * expected.time_level_losses)] * 2)


def test_rollout_has_no_gradient():
    def everything_in_it(inputs, bptt, checkpoint):
        options = dict(num_rollout_steps=5, cuts=cuts_of(5, bptt), checkpoint=checkpoint)
        _, rollout = evaluate(residuum_loss, *inputs, has_aux=True, **options)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(rollout))

    cases = [*itertools.product(("none", "2", "mask"), FLAGS)]
    grads = jax.jit(lambda x: [jax.grad(everything_in_it)(x, *case) for case in cases])
    assert_close(grads(problem(5)), jax.tree.map(jnp.zeros_like, [problem(5)] * len(cases)))


@pytest.mark.parametrize("bptt", ["none", "2"])
def test_value_and_grad_with_aux(bptt):
    options = dict(num_rollout_steps=5, cuts=cuts_of(5, bptt, prev=True))

    def loss(*inputs):
        return evaluate(residuum_loss, *inputs, has_aux=True, **options)

    f = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    (value, _), grads = f(*problem(5))
    expected = jax.jit(lambda inputs: value_and_grad(textbook_loss, inputs, **options))
    assert_close((value, grads), expected(problem(5)))


def test_a_long_rollout_in_pieces_equals_the_rollout_in_one():
    params, data, _, coefficient = problem(6)

    def loss(data, num_rollout_steps):
        options = dict(num_rollout_steps=num_rollout_steps, has_aux=True)
        return evaluate(residuum_loss, params, data, None, coefficient, **options)

    total, rest = 0.0, data
    for _ in range(3):
        piece, rollout = loss(rest, 2)
        rest = jax.tree.map(lambda leaf: leaf[:, None], rollout.final_state)
        total += piece
    assert_close(total, loss(data, 6)[0])


#
# Kinds of states: complex numbers, integers, keys, scalars
#


def test_mse_is_the_mean_over_all_entries_of_all_leaves():
    residuum = {"a": jnp.array([3.0, 1.0]), "b": jnp.array([[2.0 + 1.0j]])}
    assert_close(mse(residuum), jnp.float64((9 + 1 + 5) / 3))
    assert_close(mse([[jnp.int32(2)], jnp.bfloat16(3)]), jnp.float32(6.5))
    assert_close(mse(jnp.float16(300)), jnp.float32(90000))  # too large for float16


def test_mse_adds_up_in_the_widest_dtype_of_all_leaves():
    leaves = [jnp.float16(1), jnp.float32(1), jnp.float64(1e-5)]
    for residuum in itertools.permutations(leaves):
        with jax.numpy_dtype_promotion("strict"):
            actual = mse(residuum)
        assert_close(actual, jnp.float64((2 + 1e-10) / 3), 1e-15)


def test_mse_has_all_derivatives_at_zero():
    assert jax.grad(mse)(0.0) == 0.0
    assert jax.grad(mse)(0.0 + 0.0j) == 0.0
    hessian = jax.hessian(lambda x: mse({"real": x[0], "complex": x[1] + 1j * x[2]}))
    assert_close(jax.jit(hessian)(jnp.zeros(3)), jnp.eye(3))


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


@pytest.mark.parametrize("bptt", ["3"])
@pytest.mark.parametrize("dtype", [jnp.complex128])
def test_complex_states_equal_the_textbook_loop(dtype, bptt):
    options = dict(num_rollout_steps=5, cuts=cuts_of(5, bptt))

    def f(loss_fn, *inputs):
        loss = functools.partial(rotation_loss, loss_fn, **options)
        value, grads = jax.value_and_grad(loss, (0, 1))(*inputs)
        if loss_fn is textbook_loss:
            value = value.astype(dtype(0).real.dtype)  # the oracle's weights are float64
        chex.assert_type([value, *grads], [dtype(0).real.dtype, dtype, dtype])
        return value, grads

    tolerance = TOLERANCE if dtype == jnp.complex128 else SINGLE_TOLERANCE
    assert_as_textbook(f, *rotation_problem(dtype), tolerance=tolerance)


@pytest.mark.parametrize("bptt", ["3"])
def test_step_counters_and_keys_in_the_state(bptt):
    batch = 2
    data = {
        "u": jnp.asarray(np.random.default_rng(0).normal(size=(batch, 1, 3))),
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

    x = jnp.arange(3.0)

    def derivatives(loss_fn, x):
        f = functools.partial(loss, loss_fn)
        return jax.value_and_grad(f)(x), jax.jvp(jax.grad(f), (x,), (x + 1,))[1]

    assert_as_textbook(derivatives, x, extra=EXTRA[:3])
    _, rollout = jax.jit(lambda x: loss(residuum_loss, x, has_aux=True))(x)
    assert_close(rollout.final_state["count"], jnp.full((batch,), 5, jnp.int32))


@pytest.mark.parametrize("bptt", ["none", "2", "mask"])
def test_scalar_states_and_a_batch_of_one(bptt):
    def value_and_grad(loss_fn, x):
        def loss(x):
            options = dict(num_rollout_steps=5, cuts=cuts_of(5, bptt))
            data = np.full((1, 1), 0.3)
            return loss_fn(lambda u: jnp.sin(x * u), data, lambda n, p: n - p, **options)

        return jax.value_and_grad(loss)(x)

    # `x` is a Python number here, and nothing is jitted.
    expected = jax.jit(functools.partial(value_and_grad, textbook_loss))(1.5)
    assert_close(value_and_grad(residuum_loss, 1.5), expected)


@pytest.mark.parametrize("bptt", ["none", "2"])
def test_functions_may_return_python_numbers(bptt):
    options = dict(num_rollout_steps=3, cuts=cuts_of(3, bptt))
    data, weights = {"u": np.ones((2, 1)), "t": np.zeros((2, 1), int)}, jnp.arange(3.0)

    def loss(weights, stepper=lambda u: u, residuum_fn=lambda n, p: n, **more):
        return residuum_loss(stepper, data, residuum_fn, weights=weights, **options, **more)

    assert_close(loss(weights, lambda u: {"u": 3.0, "t": 1}), 3.0 * jnp.float64(5))
    for residuum in (2, 2.0, 2j):
        actual = loss(weights, residuum_fn=lambda n, p, residuum=residuum: residuum)
        np.testing.assert_allclose(actual, 12)


def test_numpy_integers_are_ints():
    # Annotations that are checked at run time reject NumPy integers, except in the fields of
    # `Cuts`.
    integer = int if RUNTIME_TYPECHECKING else np.uint8

    def f(loss_fn, inputs):
        cuts = Cuts(bptt=2 if loss_fn is textbook_loss else np.int64(2))
        steps = 5 if loss_fn is textbook_loss else integer(5)
        return value_and_grad(loss_fn, inputs, num_rollout_steps=steps, cuts=cuts)

    assert_as_textbook(f, problem(5), extra=[dict(unroll=integer(2))])


def test_lists_of_bools_are_masks():
    cuts = Cuts([True, False, True, True, False], [False, True, True, False, False], MASK[:5])
    f = functools.partial(value_and_grad, num_rollout_steps=5, cuts=cuts)
    assert_as_textbook(f, problem(5))


#
# Bad input raises an error at trace time that names the culprit
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
    # the changes to a valid call, the error, and a pattern for its message
    (dict(num_rollout_steps=2.0), TypeError, "num_rollout_steps.* int.*2.0"),
    (dict(num_rollout_steps=True), TypeError, "num_rollout_steps.* int.*True"),
    (dict(num_rollout_steps="3"), TypeError, "num_rollout_steps.* int.*'3'"),
    (dict(num_rollout_steps=None), TypeError, "num_rollout_steps.* int.*None"),
    (dict(num_rollout_steps=jnp.array(3)), TypeError, r"num_rollout_steps.* int.*int\d+"),
    (dict(num_rollout_steps=0), ValueError, "num_rollout_steps.*at least 1.*0"),
    (dict(num_rollout_steps=-3), ValueError, "num_rollout_steps.*at least 1.*-3"),
    (dict(num_rollout_steps=2**31), ValueError, r"num_rollout_steps.*2\*\*31.*2147483648"),
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
        r"data.*agree.*\['u'\] float32\[2, 1, 3\], \['v'\] float32\[3, 1, 3\]\.",
    ),
    (
        dict(data={"u": ones(2, 1, 3), "v": ones(2, 2, 3)}),
        ValueError,
        r"data.*agree.*\[2, 1, 3\].*\[2, 2, 3\]\. Only snapshot 0 is read.*inputs",
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
    (dict(residuum_fn=lambda n, p: n["u"][:0]), TypeError, r"residuum_fn.*entries.*\[0\]"),
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
    (dict(weights=[1, 10**400, 1, 1]), TypeError, r"weights.*\[4\].*1000.*too large"),
    (dict(inputs={}), ValueError, "inputs.*at least one array"),
    (dict(inputs={"f": 1.0}), TypeError, r"inputs\['f'\].*array.*\[2, 4, \.\.\.\].*1.0"),
    (dict(inputs={"f": ones(2)}), ValueError, r"inputs\['f'\].*\[2, 4, \.\.\.\].*\[2\]"),
    (
        dict(inputs=[ones(2, 4), ones(3, 4)]),
        ValueError,
        r"inputs\[1\].*\[batch, num_rollout_steps, \.\.\.\] = \[2, 4, .*\[3, 4\]",
    ),
    (dict(inputs=ones(2, 5, 3)), ValueError, r"inputs.*\[2, 4, \.\.\.\].*\[2, 5, 3\]"),
    (dict(axis_name=["batch"]), TypeError, r"axis_name.*hashable.*\['batch'\]"),
    (dict(axis_name=jnp.ones(3)), TypeError, r"axis_name.*hashable.*\[3\]"),
    (dict(cuts=True), TypeError, "cuts must be a Cuts.*True"),
    (dict(cuts=None), TypeError, "cuts must be a Cuts.*None"),
    (dict(cuts=(True, False, False)), TypeError, r"cuts must be a Cuts.*\(True"),
    (dict(cuts=Cuts(bptt=0)), ValueError, "cuts.bptt.*at least 1.*0"),
    (dict(cuts=Cuts(bptt=-2)), ValueError, "cuts.bptt.*at least 1.*-2"),
    (dict(cuts=Cuts(bptt=1.0)), TypeError, "cuts.bptt.*static int.*1.0"),
    (dict(cuts=Cuts(bptt=None)), TypeError, "cuts.bptt.*static int.*None"),
    (dict(cuts=Cuts(bptt=2**31)), ValueError, r"cuts.bptt.*2\*\*31.*2147483648"),
    (dict(cuts=Cuts(bptt=[1, 0, 1, 0])), TypeError, "cuts.bptt.*1"),
    (dict(cuts=Cuts(bptt=[])), TypeError, "cuts.bptt"),
    (dict(cuts=Cuts(bptt=[True] * 3)), ValueError, r"cuts.bptt.*\[4\].*\[3\]"),
    (dict(cuts=Cuts(bptt=jnp.array(2))), TypeError, "cuts.bptt.*bool array.*int"),
    (dict(cuts=Cuts(bptt=ones(4))), TypeError, "cuts.bptt.*bool array.*float32"),
    (dict(cuts=Cuts(bptt=np.array(True))), ValueError, r"cuts.bptt.*\[4\].*bool\[\]"),
    (dict(cuts=Cuts(bptt=ones(3, dtype=bool))), ValueError, r"cuts.bptt.*\[4\].*\[3\]"),
    (dict(cuts=Cuts(prev=1)), TypeError, "cuts.prev.*bool array.*1"),
    (dict(cuts=Cuts(prev=[True, 0, 1, 0])), TypeError, "cuts.prev"),
    (dict(cuts=Cuts(prev=ones(4))), TypeError, "cuts.prev.*bool array.*float32"),
    (dict(cuts=Cuts(prev=ones(1, dtype=bool))), ValueError, r"cuts.prev.*\[4\].*\[1\]"),
    (dict(cuts=Cuts(next="yes")), TypeError, "cuts.next.*bool array.*'yes'"),
    (dict(cuts=Cuts(next=[[True]] * 4)), ValueError, r"cuts.next.*\[4, 1\]"),
    (dict(cuts=Cuts(next=ones(4, 1, dtype=bool))), ValueError, r"cuts.next.*\[4, 1\]"),
    (dict(unroll=0), ValueError, "unroll.*at least 1.*0"),
    (dict(unroll=-1), ValueError, "unroll.*at least 1.*-1"),
    (dict(unroll=1.0), TypeError, "unroll.* int.*1.0"),
    (dict(checkpoint=0), ValueError, "checkpoint.*at least 1.*0"),
    (dict(checkpoint=-2), ValueError, "checkpoint.*at least 1.*-2"),
    (dict(checkpoint=2.0), TypeError, "checkpoint.*static bool or.* int.*2.0"),
    (dict(checkpoint=None), TypeError, "checkpoint.*static bool or.* int.*None"),
    (dict(checkpoint=jnp.array(2)), TypeError, r"checkpoint.*static bool or.* int.*int\d+"),
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
        # The annotations may object first, and they name the argument as well.
        error, pattern = (error, jaxtyping.TypeCheckError), next(iter(changes))
    with pytest.raises(error, match=f"(?s){pattern}"):
        jax.eval_shape(lambda: valid_call(**changes))  # traces and computes nothing


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_rollout_steps", 3),
        ("unroll", 2),
        ("checkpoint", True),
        ("checkpoint", 2),
        ("has_aux", True),
        ("cuts", Cuts(bptt=2)),
        ("cuts", Cuts(bptt=True)),
    ],
)
def test_tracing_what_must_be_static_is_named(name, value):
    pattern = "cuts.bptt" if name == "cuts" else name
    with pytest.raises((TypeError, ValueError), match=pattern):
        jax.jit(lambda x: valid_call(**{name: x}))(value)
