"""A leaf of the state that the stepper returns unchanged is a constant of the loop: it is not
stored for every step, and its gradients are those of the textbook loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from residuum import Cuts, residuum_loss
from test_residuum import assert_as_textbook, assert_close, cuts_of, EXTRA, MASK, textbook_loss
from tests.common import also_slow, slow


#
# A state with constants of every kind: floats, complex numbers, integers, bools and keys
#


def constant_problem(num_rollout_steps, batch=2):
    """Returns the differentiable arguments and the labels. The arguments are the scale, the
    data and the weights, and some leaves of the data move while others stay constant. The
    labels are further constant leaves, which have no derivative."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    data = {
        "u": normal(batch, 2, 3),
        "coefficient": normal(batch, 2, 3),
        "phase": normal(batch, 2) + 1j * normal(batch, 2),
        "unused": normal(batch, 2, 2),
    }
    labels = {
        "order": jnp.asarray(rng.integers(3, size=(batch, 2, 3))),
        "is_wet": jnp.asarray(rng.integers(2, size=(batch, 2, 3)) == 0),
        "key": jax.random.split(jax.random.key(0), (batch, 2)),
    }
    return normal(), data, normal(num_rollout_steps), labels


def constant_loss(loss_fn, scale, data, weights, labels, **options):
    def stepper(state):
        noise = jax.random.key_data(state["key"])[-1] / 2**32
        u = jnp.sin(state["coefficient"] * state["u"][state["order"]] + scale * noise)
        return {**state, "u": jnp.where(state["is_wet"], u, state["phase"].real * state["u"])}

    def residuum_fn(u_next, u_prev):
        # `prev` cuts one of the two reads of a constant leaf, and `next` cuts the other.
        field = u_next["coefficient"] ** 2 + scale * u_prev["coefficient"]
        return u_next["u"] - field * u_prev["u"] ** 2, u_next["phase"] * u_prev["u"]

    options = dict(num_rollout_steps=len(weights), weights=weights, **options)
    return loss_fn(stepper, {**data, **labels}, residuum_fn, **options)


def value_and_grad(loss_fn, args, **options):
    f = functools.partial(constant_loss, loss_fn, **options)
    return jax.value_and_grad(f, argnums=(0, 1, 2))(*args)


ROWS = [  # prev, next, and options that do not change the result
    (False, False, {}),
    (MASK[:4], np.array(True), {"checkpoint": True}),
    (False, True, {"checkpoint": 2}),
    (True, False, {"checkpoint": 3, "unroll": 2}),
    (True, True, {"checkpoint": True, "unroll": True}),
]


@pytest.mark.parametrize("rows", [ROWS[:3], pytest.param(ROWS[3:], marks=slow)], ids=len)
@pytest.mark.parametrize("bptt", also_slow("3", slowly=["none", "every", "2", "mask"]))
def test_gradients_of_constants_equal_the_textbook_loop(bptt, rows):
    def all_values_and_grads(loss_fn, args):
        for prev, next, program in rows:
            options = {} if loss_fn is textbook_loss else program
            yield value_and_grad(loss_fn, args, cuts=cuts_of(4, bptt, prev, next), **options)

    functions = (residuum_loss, textbook_loss)
    both = jax.jit(lambda args: [list(all_values_and_grads(f, args)) for f in functions])
    for row, *pair in zip(rows, *both(constant_problem(4)), strict=True):
        assert_close(*pair, what=row)


@pytest.mark.parametrize("bptt", also_slow("every", slowly=["none", "mask"]))
def test_constants_in_one_step_equal_the_textbook_loop(bptt):
    f = functools.partial(value_and_grad, cuts=cuts_of(1, bptt, False, np.array(True)))
    assert_as_textbook(f, constant_problem(1, batch=1), extra=[{}, {"checkpoint": True}])


def test_a_traced_mask_of_cuts_may_select_constants_too():
    args = constant_problem(4)

    def all_of_them(loss_fn, args, masks):
        return [value_and_grad(loss_fn, args, cuts=Cuts(mask)) for mask in masks]

    masks = np.array([MASK[:4], [True] * 4])
    actual = jax.jit(lambda args, masks: all_of_them(residuum_loss, args, masks))(args, masks)
    assert_close(actual, jax.jit(lambda args: all_of_them(textbook_loss, args, masks))(args))


@pytest.mark.parametrize("extra", [EXTRA[:1], pytest.param(EXTRA[1:], marks=slow)], ids=str)
@pytest.mark.parametrize("bptt", also_slow("2", slowly=["none", "every", "mask"]))
def test_second_derivatives_of_constants_equal_the_textbook_loop(bptt, extra):
    *variables, labels = constant_problem(3)
    tangents = jax.tree.map(lambda x: jnp.cos(x.real).astype(x.dtype), variables)

    def derivatives(loss_fn, variables):
        def value_and_grad(*variables):
            f = functools.partial(constant_loss, loss_fn, cuts=cuts_of(3, bptt))
            return jax.value_and_grad(f, (0, 1, 2))(*variables, labels)

        def along_the_tangents(variables):
            _, grads = value_and_grad(*variables)
            products = jax.tree.map(lambda g, dot: g * dot, list(grads), tangents)
            return sum(jnp.sum(x).real for x in jax.tree.leaves(products))

        forward_over_reverse = jax.jvp(value_and_grad, variables, tangents)
        return forward_over_reverse, jax.grad(along_the_tangents)(variables)

    assert_as_textbook(derivatives, variables, extra=extra)


STEPPERS = {  # the state has three leaves of the same shape
    "one stays": lambda w, u, a, b: (jnp.sin(w * u + a * b), a, jnp.cos(b + u)),
    # The outputs of these steppers are inputs, but in another position.
    "two swap places": lambda w, u, a, b: (jnp.sin(w * u + a * b), b, a),
    "three swap places": lambda w, u, a, b: (a, b, u),
    "one twice": lambda w, u, a, b: (jnp.sin(w * u + a * b), a, a),
    "one follows another": lambda w, u, a, b: (jnp.sin(w * u + b), u, b),
    "all stay": lambda w, u, a, b: (u, a, b),
    # This leaf is no constant, although its value does not change.
    "one is copied": lambda w, u, a, b: (jnp.sin(w * u + a * b), a * 1, b + 0),
}
FEW = ["two swap places", "one twice"]


@pytest.mark.parametrize("name", also_slow(*FEW, slowly=[n for n in STEPPERS if n not in FEW]))
def test_only_a_leaf_that_stays_in_its_place_is_a_constant(name):
    rng = np.random.default_rng(0)
    w, *data = (jnp.asarray(rng.normal(size=shape)) for shape in [(), *[(2, 1, 2)] * 3])

    def values_and_grads(loss_fn, w, data):
        def loss(w, data, cuts):
            stepper = lambda state: STEPPERS[name](w, *state)
            residuum_fn = lambda n, p: [n[0] - w * p[0], n[1] * p[1] * n[0], p[2] ** 2 * n[0]]
            return loss_fn(stepper, tuple(data), residuum_fn, num_rollout_steps=3, cuts=cuts)

        all_cuts = [Cuts(), Cuts(1), Cuts(2, next=True), Cuts(MASK[:3], MASK[:3])]
        return [jax.value_and_grad(loss, (0, 1))(w, data, cuts) for cuts in all_cuts]

    assert_as_textbook(values_and_grads, w, data, extra=[{"checkpoint": 2}])


@pytest.mark.parametrize("bptt", also_slow("2", slowly=["none", "mask"]))
def test_constants_of_any_dtype_come_back_in_the_final_state(bptt):
    scale, data, weights, labels = constant_problem(3)

    @jax.jit
    def final_state(data, labels):
        options = dict(cuts=cuts_of(3, bptt), has_aux=True)
        _, rollout = constant_loss(residuum_loss, scale, data, weights, labels, **options)
        return rollout.final_state

    final = final_state(data, labels)
    assert any(final["u"].ravel() != data["u"][:, 0].ravel())
    for name, leaf in {**data, **labels}.items():
        assert name == "u" or jnp.all(final[name] == leaf[:, 0]), name


#
# Memory
#

STATE, FIELD, NUM_STEPS = 32, 2048, 100


def temporaries(options, *, wrt, field_stays=True):
    """Returns the temporary memory, in bytes, of the compiled value and gradient."""

    def stepper(scale, state):
        # This stepper reads the whole field, so that no part of the field can be left out.
        field = state["field"]
        u = jnp.tanh(scale * state["u"] + jnp.mean(field.reshape(-1, STATE), 0))
        return {"u": u, "field": field if field_stays else field * 0.999}

    def loss(scale, u, field):
        return residuum_loss(
            functools.partial(stepper, scale),
            {"u": u, "field": field},
            lambda n, p: n["u"] - p["u"],
            num_rollout_steps=NUM_STEPS,
            **options,
        )

    args = jnp.float32(1), *(jnp.ones((1, 1, size), jnp.float32) for size in (STATE, FIELD))
    compiled = jax.jit(jax.value_and_grad(loss, wrt)).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("wrt", also_slow((0, 1, 2), slowly=[0]), ids=str)
@pytest.mark.parametrize(
    "options, num_states",
    [
        ({"checkpoint": True}, NUM_STEPS),
        ({"checkpoint": 10}, NUM_STEPS / 10 + 10),
        ({"checkpoint": True, "cuts": Cuts(20)}, 20),
    ],
    ids=str,
)
def test_a_constant_is_not_stored_for_any_step(options, num_states, wrt):
    """Memory holds one copy of a constant field for reading, and one copy for its gradient."""
    levels = 4 * NUM_STEPS  # losses, weights, and their cotangents
    bound = 4 * (num_states * STATE + 2 * FIELD + levels)
    assert temporaries(options, wrt=wrt) <= bound
    # The field would take this much memory if it were stored like the rest of the state.
    assert temporaries(options, wrt=wrt, field_stays=False) > 4 * num_states * FIELD
