"""One thing wrong, whatever it is, is an error that names it, or the result is correct."""

import itertools
import traceback

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from residuum import Cuts, residuum_loss
from test_residuum import FLAGS, ones, SINGLE_TOLERANCE, slow, textbook_loss, valid_call


ODD_VALUES = [
    *(None, True, False, 0, 1, -1, 3, 2**31, -(10**30), 10**30, 0.5, 1j, float("nan")),
    *(
        "3",
        b"3",
        (),
        [],
        {},
        [1, 2],
        [True] * 4,
        [True, False],
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
    "inputs": ["stepper"],
    "axis_name": [],
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


def check(name, value, traced):
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


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(ARGUMENTS)), st.sampled_from(ODD_VALUES), st.booleans())
def test_one_thing_wrong_is_an_error_that_names_it_or_a_correct_result(name, value, traced):
    check(name, value, traced)


@slow
@pytest.mark.parametrize("name", ARGUMENTS)
def test_each_odd_value_is_an_error_that_names_it_or_a_correct_result(name):
    for value, traced in itertools.product(ODD_VALUES, FLAGS):
        check(name, value, traced)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:], ids=str)
def test_arguments_in_the_wrong_order_are_named(order):
    call = (lambda u: u, ones(2, 1, 3), lambda u_next, u_prev: u_next - u_prev)
    names = ("stepper", "data", "residuum_fn")
    with pytest.raises(TypeError) as info:
        residuum_loss(*(call[i] for i in order))
    text = "".join(traceback.format_exception_only(info.value))
    assert any(names[slot] in text for slot, i in enumerate(order) if slot != i)


class Counter(eqx.Module):
    """Counts its calls in a State of Equinox, which can be read once only."""

    index: eqx.nn.StateIndex

    def __init__(self):
        self.index = eqx.nn.StateIndex(jnp.array(0))

    def __call__(self, state):
        count = state["count"].get(self.index)
        return {"u": state["u"] / 2, "count": state["count"].set(self.index, count + 1)}


def test_a_state_that_can_be_read_once_only():
    counter, state = eqx.nn.make_with_state(Counter)()
    data = {
        "u": ones(2, 1, 3),
        "count": jax.tree.map(lambda x: jnp.stack([x, x])[:, None], state),
    }
    difference = lambda u_next, u_prev: u_next["u"] - u_prev["u"]
    options = dict(num_rollout_steps=3, has_aux=True)
    loss, rollout = jax.jit(lambda: residuum_loss(counter, data, difference, **options))()
    np.testing.assert_allclose(loss, 1 / 4 + 1 / 16 + 1 / 64, rtol=SINGLE_TOLERANCE)
    assert rollout.final_state["count"].get(counter.index).tolist() == [3, 3]
