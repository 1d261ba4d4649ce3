"""For each argument and each odd value, either a certain error is expected or the value is
valid.

An error names the argument and says what was expected and what was received. If the value is
valid, the result equals that of the oracle.
"""

import functools
import itertools
import re
import reprlib
import traceback

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from residuum import Cuts, residuum_loss
from test_residuum import ones, SINGLE_TOLERANCE, textbook_loss, valid_call
from tests.common import also_slow


def split(text):
    return [source.strip() for source in re.split("[;\n]", text) if source.strip()]


ODD_SOURCES = split("""
    None; True; False; 0; 1; -1; 3; 2**31; -(10**30); 10**30; 0.5; 1j; float("nan")
    "3"; b"3"; (); []; {}; [1, 2]; [True] * 4; [True, False]; [[1.0], [2.0, 3.0]]
    {"u": 1.0}; {"u": None}; int; object()
    ones(); ones(4); ones(4, 1); ones(0); ones(2, 1, 3); ones(2, 1, 5); ones(2, 0, 3)
    ones(2, 4); ones(4, dtype=bool); ones(4, dtype=int); ones(4, dtype=complex)
    ones(4) * np.nan; ones(dtype=bool); ones(5, dtype=bool); jnp.ones(4)
    jnp.ones(4, jnp.bfloat16); np.array(["a"] * 4); np.array([None] * 4)
    np.array([1e30] * 4); jax.random.key(0)
    {"u": ones(2, 1, 5)}; {"v": ones(2, 1, 3)}; {"u": ones(2, 1)}; {"u": ones(2, 1, 0)}
    {"u": ones(2, 1, 3), "v": ones(2, 1)}; {"u": ones(2, 1, 3), "v": ones(3, 1)}
    {"u": ones(2, 1, 3, dtype=int)}; {"u": ones(2, 1, 3, dtype=complex)}
    {"u": np.array([[["x"]]])}; [ones(2, 1, 3)]
    Cuts(); Cuts(True, True, True); Cuts(2); (True, False, False); jax.ShapeDtypeStruct
    lambda: 0; lambda x: x; lambda x: None; lambda x: "x"; lambda x: x["u"]; lambda x: x[0]
    lambda x: x["w"]; lambda x: x.w; lambda x: 1 / 0; lambda x: x["u"][:, 9]; jnp.sum
    lambda x: {"u": x["u"][:2]}; lambda x: {"u": x["u"] * 1j}; lambda x: {"u": 1}
    lambda x: {"u": x["u"].astype(int)}; lambda x: [x["u"]]; lambda x: {"u": object()}
    lambda x, y: x; lambda x, y: None; lambda x, y: x["u"]; lambda x, y: [x, y, "r"]
    lambda x, y: x["u"] @ y["u"][:2]; lambda x, y: x["u"] > 0; lambda x, y: 1; max
    lambda x, y: bool(x["u"][0] > 0); lambda x, y: np.asarray(x["u"]); jnp.add
""")
ODD_VALUES = {source: eval(source) for source in ODD_SOURCES}


def can_be_traced(value):
    try:
        jax.eval_shape(lambda value: value, value)
    except (TypeError, OverflowError):
        return False
    return True


def is_hashable(value):
    try:
        hash(value)
    except TypeError:
        return False
    return True


#
# The expected outcome for each argument
#

VALID = "valid"
REST = ODD_SOURCES + [f"traced {source}" for source in ODD_SOURCES]
NOT_CALLABLE = [source for source in REST if not callable(ODD_VALUES.get(source))]
HASHABLE = [source for source, value in ODD_VALUES.items() if is_hashable(value)]
TUPLES = [source for source, value in ODD_VALUES.items() if isinstance(value, tuple)]


def odd(text):
    """Splits a text into the odd values that it names."""
    sources = split(text)
    assert not set(sources) - set(ODD_SOURCES), sources
    return sources


def traced(text):
    """Returns the odd values of the text as arguments of `jax.jit`."""
    return [f"traced {source}" for source in odd(text)]


def both(text):
    return odd(text) + traced(text)


BELOW_1_OR_TOO_LARGE = odd("0; -1; 2**31; -(10**30); 10**30")
NO_ARRAYS = both('None; (); []; {}; {"u": None}')
A_BOOL_PER_STEP = both("[True] * 4; ones(4, dtype=bool)")
VALID_DATA = both(
    '{"u": ones(2, 1, 5)}; {"u": ones(2, 1)}; {"u": ones(2, 1, 3, dtype=complex)}'
)

STRUCTURE = "stepper must return a state with the structure of its input, ['u'] float32[3]"
SHAPES = "stepper must return a state like its input: u_prev['u'] is"
STEPPER_RAISES = "Raised when stepper was called on one sample: stepper(u_prev"
BPTT = "a static bool, a static int or a bool array of shape [num_rollout_steps] = [4]"
MASK = "a bool or a bool array of shape [] or [num_rollout_steps] = [4]"

# For each argument, this table gives the expected message for its odd values. The first line
# that contains a value counts. `…` stands for the path to a leaf, such as `['u']`. The message
# must go on with what was received. Where a function's result was received, the table spells it
# out. If a function raises an error, the error passes through with a note that names the
# function and its arguments.
EXPECTED = {
    "stepper": {
        VALID: odd("lambda x: x"),
        "stepper must be callable": NOT_CALLABLE,
        f"{STRUCTURE}, got None of type NoneType": odd("lambda x: None"),
        f"{STRUCTURE}, got 'x' of type str": odd('lambda x: "x"'),
        f"{STRUCTURE}, got float32[3]": odd('lambda x: x["u"]'),
        f"{STRUCTURE}, got [0] float32[3]": odd('lambda x: [x["u"]]'),
        f"{STRUCTURE}, got 'u' of type str": odd("max"),  # `max` takes the largest key
        f"{SHAPES} float32[3], got float32[2]": odd('lambda x: {"u": x["u"][:2]}'),
        f"{SHAPES} float32[3], got complex64[3]": odd('lambda x: {"u": x["u"] * 1j}'),
        f"{SHAPES} float32[3], got int64[3]": odd('lambda x: {"u": x["u"].astype(int)}'),
        f"{SHAPES} float32[3], got int64[]": odd('lambda x: {"u": 1}'),
        "stepper(...)['u'] must be an array, got <object": odd('lambda x: {"u": object()}'),
        f"{STEPPER_RAISES}['u'] float32[3]).": REST,
    },
    "data": {
        VALID: VALID_DATA,
        "data must hold at least one array with entries": [
            *NO_ARRAYS,
            *both('{"u": ones(2, 1, 0)}'),
        ],
        "data must be arrays that agree on [batch, num_snapshots], "
        "got ['u'] float32[2, 1, 3], ['v'] float32[3, 1]": both(
            '{"u": ones(2, 1, 3), "v": ones(3, 1)}'
        ),
        # These data are valid by themselves, but not for this stepper.
        "stepper must return a state with the structure of its input, "
        "['u'] float32[3], ['v'] float32[], got ['u'] float32[3]": both(
            '{"u": ones(2, 1, 3), "v": ones(2, 1)}'
        ),
        "data['u'] must be floating point, as stepper returns float64[3], got int64[3]": both(
            '{"u": ones(2, 1, 3, dtype=int)}'
        ),
        f"{STEPPER_RAISES} float32[]).": both("ones(4, 1); ones(2, 4)"),
        f"{STEPPER_RAISES} float32[3]).": both("ones(2, 1, 3)"),
        f"{STEPPER_RAISES} float32[5]).": both("ones(2, 1, 5)"),
        f"{STEPPER_RAISES}[0] float32[3]).": both("[ones(2, 1, 3)]"),
        f"{STEPPER_RAISES}['v'] float32[3]).": both('{"v": ones(2, 1, 3)}'),
        "data… must be an array of shape [batch, num_snapshots, ...], both at least 1": REST,
    },
    "residuum_fn": {
        VALID: odd(
            'lambda x, y: x; lambda x, y: x["u"]; lambda x, y: x["u"] > 0; lambda x, y: 1'
        ),
        "residuum_fn must be callable": NOT_CALLABLE,
        "residuum_fn(...) must hold at least one array with entries, got None of": odd(
            "lambda x, y: None"
        ),
        "residuum_fn(...)[2] must be a real or complex array, got 'r' of type str": odd(
            'lambda x, y: [x, y, "r"]'
        ),
        "Raised when residuum_fn was called on one sample: "
        "residuum_fn(u_next['u'] float32[3], u_prev['u'] float32[3]).": REST,
    },
    "num_rollout_steps": {
        VALID: odd("1; 3"),
        "num_rollout_steps must be at least 1 and below 2**31": BELOW_1_OR_TOO_LARGE,
        "num_rollout_steps must be a static int": REST,
    },
    "cuts": {
        VALID: odd("Cuts(); Cuts(True, True, True); Cuts(2)"),
        f"cuts.bptt must be {BPTT}, got bool[]. It is traced": traced(
            "Cuts(); Cuts(True, True, True)"
        ),
        f"cuts.bptt must be {BPTT}, got int64[]. It is traced": traced("Cuts(2)"),
        "cuts must be a Cuts(bptt, prev, next)": REST,
    },
    "cuts.bptt": {
        VALID: [*odd("True; False; 1; 3"), *A_BOOL_PER_STEP],
        "cuts.bptt must be at least 1 and below 2**31": BELOW_1_OR_TOO_LARGE,
        f"cuts.bptt must be {BPTT}": REST,
    },
    "cuts.prev": {
        VALID: [*both("True; False; ones(dtype=bool)"), *A_BOOL_PER_STEP],
        f"cuts.prev must be {MASK}": REST,
    },
    "cuts.next": {
        VALID: [*both("True; False; ones(dtype=bool)"), *A_BOOL_PER_STEP],
        f"cuts.next must be {MASK}": REST,
    },
    "weights": {
        VALID: both("""
            None; [True] * 4; ones(4); ones(4, dtype=bool); ones(4, dtype=int)
            ones(4) * np.nan; jnp.ones(4); jnp.ones(4, jnp.bfloat16); np.array([1e30] * 4)
        """),
        "weights must be a real array of shape [num_rollout_steps] = [4]": REST,
    },
    "inputs": {
        VALID: both("None"),
        "inputs must hold at least one array with entries": NO_ARRAYS,
        # The stepper of `valid_call` takes the state only.
        f"{STEPPER_RAISES}['u'] float32[3], inputs_t float32[]).": both("ones(2, 4)"),
        "inputs… must be an array [batch, num_rollout_steps, ...] = [2, 4, ...]": REST,
    },
    "time_level_loss": {
        VALID: odd("lambda x: x[0]; jnp.sum"),
        "time_level_loss must be callable": NOT_CALLABLE,
        "time_level_loss must return a real scalar, got float32[3]": odd("lambda x: x"),
        "time_level_loss must return a real scalar, got None of": odd("lambda x: None"),
        "time_level_loss must return a real scalar, got 'x' of type str": odd('lambda x: "x"'),
        "time_level_loss must return a real scalar, got {'u': ": odd(
            'lambda x: {"u": 1}; lambda x: {"u": object()}'
        ),
        "Raised when time_level_loss was called on one sample: "
        "time_level_loss(residuum float32[3]).": REST,
    },
    "axis_name": {
        VALID: [*(name for name in HASHABLE if name not in TUPLES), *traced("None")],
        "axis_name must be one name, not a tuple of names": [
            *TUPLES,
            *(f"traced {name}" for name in TUPLES),
        ],
        "axis_name must be hashable": REST,
    },
    "checkpoint": {
        VALID: odd("True; False; 1; 3"),
        "checkpoint must be at least 1 and below 2**31": BELOW_1_OR_TOO_LARGE,
        "checkpoint must be a static bool or a static int": REST,
    },
    "unroll": {
        VALID: odd("True; False; 1; 3"),
        "unroll must be at least 1 and below 2**31": BELOW_1_OR_TOO_LARGE,
        "unroll must be a static bool or a static int": REST,
    },
    "has_aux": {
        VALID: odd("True; False"),
        "has_aux must be a static bool": REST,
    },
}


def expected_of(name, source):
    return next(text for text, sources in EXPECTED[name].items() if source in sources)


def descriptions(value):
    """Yields all descriptions that a message may give of a received value, or of a leaf of
    it."""
    for part in (value, *jax.tree.leaves(value)):
        yield f"{reprlib.repr(part)} of type {type(part).__name__}"
        try:
            array = part if hasattr(part, "dtype") else jnp.asarray(part)
            yield f"{array.dtype}{list(array.shape)}"
        except (TypeError, ValueError, OverflowError, AttributeError):
            pass


def is_said(expectation, value, error):
    """Returns whether the error says what was expected and what was received instead."""
    if expectation.startswith("Raised"):
        return any(note.startswith(expectation) for note in error.__notes__)
    if type(error) not in (TypeError, ValueError):
        return False
    path = r"[\w\[\]'.]*"
    said = re.match(re.escape(expectation).replace("…", path), str(error))
    if ", got " in expectation or not said:
        return bool(said)
    hint = r"( \(data is a list of fields; .*\))?"
    received = "|".join(map(re.escape, descriptions(value)))
    return bool(re.match(rf"{hint}, got ({path} )?({received})[.,]", str(error)[said.end() :]))


@functools.cache
def result_of_the_valid_call():
    return valid_call(loss_fn=textbook_loss)


def expected_result(argument, value):
    if argument in ("axis_name", "checkpoint", "unroll", "has_aux"):
        return result_of_the_valid_call()
    return valid_call(loss_fn=textbook_loss, **{argument: value})


@pytest.mark.parametrize("is_traced", also_slow(False, slowly=[True]))
@pytest.mark.parametrize("name", EXPECTED)
def test_an_odd_value_is_valid_or_an_error_says_what_is_expected(name, is_traced):
    argument, _, field = name.partition(".")
    wrap = (lambda value: Cuts(**{field: value})) if field else (lambda value: value)
    call = lambda value: valid_call(**{argument: wrap(value)})
    failures = []
    for source, value in ODD_VALUES.items():
        if is_traced:
            if not can_be_traced(value):
                continue
            source = f"traced {source}"
        expectation = expected_of(name, source)
        try:
            actual = jax.jit(call)(value) if is_traced else call(value)
        except Exception as error:
            is_expected = expectation != VALID and is_said(expectation, value, error)
            outcome = "".join(traceback.format_exception_only(error))
        else:
            outcome = actual[0] if isinstance(actual, tuple) else actual
            is_expected = expectation == VALID and np.allclose(
                outcome,
                expected_result(argument, wrap(value)),
                SINGLE_TOLERANCE,
                equal_nan=True,
            )
        if not is_expected:
            failures.append(f"{name} = {source}\n  expected: {expectation}\n  but: {outcome}")
    assert not failures, "\n".join(failures)


def test_every_line_of_the_table_is_of_use():
    for name, expectations in EXPECTED.items():
        used = {expected_of(name, source) for source in REST}
        assert used == set(expectations), name


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:], ids=str)
def test_arguments_in_the_wrong_order_are_named(order):
    arguments = (lambda u: u, ones(2, 1, 3), lambda u_next, u_prev: u_next - u_prev)
    stepper, data, residuum_fn = (arguments[i] for i in order)
    with pytest.raises(TypeError) as info:
        residuum_loss(stepper, data, residuum_fn)
    if data is arguments[1]:  # the two functions are swapped
        expectation = f"{STEPPER_RAISES} float32[3])."
    else:
        expectation = (
            "data must be an array of shape [batch, num_snapshots, ...], both at least 1"
        )
    assert is_said(expectation, data, info.value)


class Counter(eqx.Module):
    """Counts its calls in a State of Equinox, which can be read only once."""

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
