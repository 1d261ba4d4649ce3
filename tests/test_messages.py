"""After a slip, the end of the error message names the culprit.

test_residuum.py tests that each bad argument is named. This file tests the notes on errors that
are raised inside the user's functions, and the messages about common slips.
"""

import dataclasses
import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.experimental.sparse import BCOO

from residuum import Cuts, mse, residuum_loss
from test_residuum import assert_close, RUNTIME_TYPECHECKING


def difference(u_next, u_prev):
    return u_next - u_prev


def message(stepper, data, residuum_fn=difference, **options):
    """Returns everything that is shown below the traceback."""
    with pytest.raises((TypeError, ValueError, AssertionError, NameError)) as info:
        jax.eval_shape(lambda: residuum_loss(stepper, data, residuum_fn, **options))
    return "".join(traceback.format_exception_only(info.value)).split("-----")[0].strip()


@pytest.mark.parametrize("bptt", [False, 1])
@pytest.mark.parametrize(
    "data, sample",
    [
        # The first case forgets the snapshot axis, and the second one the batch axis.
        (np.ones((16, 32), np.float32), "batch 16, num_snapshots 32, one sample float32[]"),
        (np.ones((1, 16, 32)), "batch 1, num_snapshots 16, one sample float64[32]"),
    ],
)
def test_an_error_in_a_function_ends_with_how_the_data_was_read(data, sample, bptt):
    network = lambda u: np.ones((16, 16)) @ u
    options = dict(num_rollout_steps=3, cuts=Cuts(bptt))
    assert message(network, data, **options).endswith(f"data: {sample}.")


def test_an_error_in_a_function_says_what_it_was_called_with():
    def residuum_fn(u_next, u_prev):
        return u_next["u"] @ u_prev["v"]

    data = {"u": np.ones((4, 1, 3)), "v": np.ones((4, 1, 2), np.float32)}
    called = (
        "residuum_fn(u_next['u'] float64[3], u_next['v'] float32[2], "
        "u_prev['u'] float64[3], u_prev['v'] float32[2])"
    )
    assert f"called on one sample: {called}." in message(lambda u: u, data, residuum_fn)


def test_many_leaves_are_not_all_listed():
    def stepper(u):
        raise ValueError("no")

    assert ", [7] float64[], ..." in message(stepper, [np.ones((2, 1))] * 99)


def test_a_tuple_from_the_stepper():
    data = np.ones((4, 1, 3))
    assert "must return only the next state" in message(lambda u: (u, u.sum()), data)
    # If the state itself is a tuple, something else is wrong with it.
    assert "only the next state" not in message(lambda u: list(u), (data, data))


@pytest.mark.parametrize("cuts", [Cuts(bptt=2), Cuts(bptt=True)])
def test_cuts_as_an_argument_of_jit(cuts):
    def loss(cuts):
        data = jnp.ones((4, 1, 3))
        return residuum_loss(lambda u: u, data, difference, num_rollout_steps=4, cuts=cuts)

    with pytest.raises(
        (TypeError, ValueError), match=r"cuts.bptt.*static.*close over it, or ma"
    ):
        jax.jit(loss)(cuts)
    assert jax.jit(loss, static_argnums=0)(cuts) == 0.0


@pytest.mark.parametrize("mask", [np.array([True, False]), [True, False]], ids=type)
@pytest.mark.parametrize("field", Cuts._fields)
def test_an_array_that_is_closed_over_is_not_traced(field, mask):
    def loss(x):
        options = dict(num_rollout_steps=4, cuts=Cuts(**{field: mask}))
        return residuum_loss(lambda u: x * u, jnp.ones((4, 1, 3)), difference, **options)

    with pytest.raises(
        ValueError, match=rf"cuts.{field} must.*= \[4\], got bool\[2\]\."
    ) as info:
        jax.jit(loss)(2.0)
    assert "traced" not in str(info.value)


def test_leaves_that_disagree_are_all_shown_and_none_is_blamed():
    forcing, field = np.ones((4, 8)), np.ones((4, 1, 8))
    text = message(lambda u: u, {"f": forcing, "u": field, "w": field})
    shapes = "['f'] float64[4, 8], ['u'] float64[4, 1, 8], ['w'] float64[4, 1, 8]"
    assert f"data must be arrays that agree on [batch, num_snapshots], got {shapes}." in text
    assert "Only snapshot 0 is read" in text and "inputs" in text


@pytest.mark.parametrize(
    "num_snapshots, num_rollout_steps, is_series",
    [((1, 5), 5, True), ((5, 5), 5, True), ((1, 2), 5, True), ((2, 2), 5, False)],
)
def test_a_series_in_data_is_referred_to_inputs(num_snapshots, num_rollout_steps, is_series):
    one, other = num_snapshots
    data = {"u": np.ones((4, one, 3)), "v": np.ones((3, other, 3))}  # the batches disagree too
    text = message(lambda u: u, data, num_rollout_steps=num_rollout_steps)
    assert ("Only snapshot 0 is read" in text) == is_series


@pytest.mark.parametrize("empty", [np.ones((0, 3)), [], {"a": np.ones(0)}], ids=str)
def test_a_mean_over_nothing_is_an_error(empty):
    with pytest.raises(TypeError, match="residuum must hold at least one array with entries"):
        mse(empty)
    data, options = np.ones((4, 1, 3)), dict(time_level_loss=lambda r: jnp.float32(0))
    with pytest.raises(TypeError, match=r"residuum_fn\(\.\.\.\) must hold.*entries"):
        residuum_loss(lambda u: u, data, lambda n, p: empty, **options)


NOT_OF_JAX = [
    np.ones((4, 1, 3), np.longdouble),
    np.ones((4, 1, 3), np.clongdouble),
    np.full((4, 1, 3), "x"),
    np.full((4, 1, 3), None),
    np.zeros((4, 1, 3), "datetime64[D]"),
]


@pytest.mark.parametrize("x", NOT_OF_JAX, ids=lambda x: str(x.dtype))
def test_arrays_that_jax_does_not_have(x):
    text = message(lambda u: u, {"u": np.ones((4, 1, 3)), "v": x})
    assert text.startswith("TypeError: data['v'] must be an array of shape [batch, num_sn")
    assert f"got {x.dtype}[4, 1, 3]. JAX has no {x.dtype}." in text or "of type ndarray" in text
    text = message(lambda u, x: u, np.ones((4, 1, 3)), inputs=[x[:, 0, 0]])
    assert text.startswith("TypeError: inputs[0] must be an array [batch, num_roll")
    text = message(lambda u: u, np.ones((4, 1, 3)), weights=x[:1, 0, 0])
    assert text.startswith("TypeError: weights must be a real array of shape [num_roll")


def test_weights_beyond_all_floats():
    text = message(lambda u: u, np.ones((4, 1, 3)), num_rollout_steps=2, weights=[1, 10**400])
    assert "weights must be a real array" in text and "too large to convert" in text


def test_what_the_message_says_is_not_said_again():
    text = message(lambda u: u[1:], np.ones((4, 1, 3)))
    assert "u_prev is float64[3], got float64[2]" in text
    assert "Raised when" not in text


def test_objects_with_a_shape_are_no_arrays():
    class Odd:
        shape, dtype = [4, 1, 3], float

    assert "data[0] must be an array" in message(lambda u: u, [Odd(), Odd()])


BOOLS = [np.bool_(True), np.bool_(False)]
STATIC = ("cuts.bptt", "cuts.prev", "cuts.next", "checkpoint", "unroll", "has_aux")


@pytest.mark.skipif(RUNTIME_TYPECHECKING, reason="annotations that are checked say no")
@pytest.mark.parametrize("name", STATIC)
def test_scalars_of_numpy_are_scalars(name):
    def program(value):
        argument, _, field = name.partition(".")
        options = {argument: Cuts(**{field: value}) if field else value}

        def loss(x):
            data = jnp.ones((4, 1, 3))
            options_ = dict(num_rollout_steps=4, **options)
            return residuum_loss(lambda u: jnp.sin(x * u), data, difference, **options_)

        text = str(jax.make_jaxpr(jax.grad(loss, has_aux=bool(options.get("has_aux"))))(2.0))
        return re.sub("0x[0-9a-f]+", "", text)  # without the addresses of functions

    for value in BOOLS:
        assert program(value) == program(bool(value))


def test_a_list_of_samples():
    states = [np.ones(32)] * 16
    assert "jnp.stack" in message(lambda u: u, states)
    assert "jnp.stack" in message(lambda u: np.ones((32, 32)) @ u, [np.ones((1, 32))] * 16)
    # A list of fields is valid, so no message about another mistake suggests stacking it.
    fields = [np.ones((4, 1, 8)), np.ones((4, 1, 3))]
    assert "jnp.stack" not in message(lambda u: 3, fields)


class TraceContextError(Exception):
    """Has the name of an error of Flax NNX."""


def test_what_a_vmap_forbids_names_the_way():
    def unbound(u):
        return u - jax.lax.pmean(u, "batch")

    def changes_itself(u):
        raise TraceContextError("Cannot mutate BatchStat from a different trace level")

    assert "Batch statistics" in message(unbound, np.ones((4, 1, 3)))
    with pytest.raises(TraceContextError) as info:
        residuum_loss(changes_itself, np.ones((4, 1, 3)), difference)
    assert any("Batch statistics" in note for note in info.value.__notes__)


def test_shapes_and_refs_are_not_arrays():
    """Shapes and Refs have a shape and a dtype but are no arrays, because nothing can be read
    from them."""
    data, mask = (jax.ShapeDtypeStruct(s, d) for s, d in (((4, 1, 3), float), ((3,), bool)))
    assert "data must be an array" in message(lambda u: u, data)
    for field in Cuts._fields:
        options = dict(num_rollout_steps=3, cuts=Cuts(**{field: mask}))
        assert f"cuts.{field} must be a" in message(lambda u: u, jnp.ones((4, 1, 3)), **options)
    if hasattr(jax, "new_ref"):
        assert "data must be an array" in message(lambda u: u, jax.new_ref(jnp.ones((4, 1, 3))))


@jax.tree_util.register_pytree_node_class
class Checked:
    """Holds a state and checks what it is made of."""

    def __init__(self, u):
        assert hasattr(u, "shape") and hasattr(u, "dtype")
        self.u = u

    def tree_flatten(self):
        return (self.u,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@dataclasses.dataclass
class CheckedDataclass:
    u: jax.Array

    def __post_init__(self):
        assert jnp.issubdtype(self.u.dtype, jnp.floating) and self.u.ndim >= 1


jax.tree_util.register_pytree_with_keys(
    CheckedDataclass,
    lambda x: (((jax.tree_util.GetAttrKey("u"), x.u),), None),
    lambda _, children: CheckedDataclass(*children),
)


@pytest.mark.parametrize("node", [Checked, CheckedDataclass])
@pytest.mark.parametrize("bptt", [False, 1, np.array([False, True, False])])
def test_a_state_may_check_what_it_is_made_of(node, bptt):
    """The library puts nothing but arrays into the user's PyTree nodes, so a state may check
    what it is made of."""

    def loss(x, wrap):
        data = wrap(np.linspace(0, 1, 8, dtype=np.float32).reshape(2, 1, 4))
        unwrap = lambda state: state if wrap is jnp.asarray else state.u
        stepper = lambda u: wrap(jnp.tanh(x * unwrap(u)))  # float64, so that u_0 is promoted
        residuum_fn = lambda n, p: wrap(unwrap(n) - unwrap(p))
        options = dict(num_rollout_steps=3, cuts=Cuts(bptt, prev=np.array(True)), has_aux=True)
        loss, rollout = residuum_loss(stepper, data, residuum_fn, **options)
        return loss, unwrap(rollout.final_state)

    x = jnp.arange(1.0, 5.0)
    derivatives = lambda wrap: jax.value_and_grad(loss, has_aux=True)(x, wrap)
    assert_close(derivatives(node), derivatives(jnp.asarray))


#
# Slips that used to be blamed on something else
#


def test_a_masked_array_has_to_be_filled():
    masked = np.ma.masked_invalid(np.ones((4, 1, 3)))
    for options in (dict(data=masked), dict(weights=masked[0, 0])):
        call = dict(data=np.ones((4, 1, 3)), num_rollout_steps=3) | options
        text = message(lambda u: u, **call)
        assert "x.filled(value)" in text and "JAX has no" not in text


INPUTS_THAT_DO_NOT_FIT = {  # what the message says about them, for a batch of 4
    "num_rollout_steps is 1": dict(inputs=np.ones((4, 5, 3))),
    "jnp.stack(..., axis=1)": dict(inputs=[np.ones((4, 3))] * 5, num_rollout_steps=5),
    "jnp.swapaxes(x, 0, 1)": dict(inputs={"f": np.ones((5, 4, 3))}, num_rollout_steps=5),
}


@pytest.mark.parametrize("hint", INPUTS_THAT_DO_NOT_FIT)
def test_inputs_in_another_order(hint):
    text = message(lambda u, f: u, np.ones((4, 1, 3)), **INPUTS_THAT_DO_NOT_FIT[hint])
    assert text.startswith("ValueError: inputs") and "[batch, num_rollout_steps" in text
    assert [other for other in INPUTS_THAT_DO_NOT_FIT if other in text] == [hint]
    # The message suggests nothing that would not help.
    text = message(lambda u, f: u, np.ones((4, 1, 3)), inputs=np.ones((3, 7)))
    assert not any(other in text for other in INPUTS_THAT_DO_NOT_FIT)


@pytest.mark.parametrize("dtype", [int, bool, np.uint8])
def test_integer_data_for_a_stepper_of_floats(dtype):
    text = message(lambda u: {"u": 0.9 * u["u"]}, {"u": np.ones((4, 1, 3), dtype)})
    name = np.dtype(dtype).name
    assert (
        f"data['u'] must be floating point, as stepper returns float64[3], got {name}" in text
    )


def test_a_sparse_matrix_is_passed_by_its_values():
    matrix = scipy.sparse.eye(3).tocsr()
    bcoo = BCOO.from_scipy_sparse(matrix)
    hint = "values of a sparse matrix"
    u = np.ones((4, 1, 3))
    for sparse in (matrix, bcoo):
        text = message(lambda state: state, {"u": u, "A": sparse})
        assert text.startswith("TypeError: data['A'] must be an array") and hint in text
        text = message(lambda u, x: u, u, inputs=[sparse])
        assert text.startswith("TypeError: inputs[0] must be an array") and hint in text
        # The indices of a sparse matrix are no residual.
        assert hint in message(lambda u: u, u, lambda n, p, sparse=sparse: (n - p, sparse))


def test_a_key_is_no_residual():
    key = jax.random.key(0)
    text = message(lambda u: u, np.ones((4, 1, 3)), lambda n, p: {"noise": key})
    assert "residuum_fn(...)['noise'] must be a real or complex array, got key<fry>[]" in text
    with pytest.raises(TypeError, match="residuum must be a real or complex array, got key"):
        mse(key)


def test_random_numbers_of_nnx_lead_to_dropout():
    def changes_itself(u):
        raise TraceContextError("Cannot mutate RngCount from a different trace level")

    with pytest.raises(TraceContextError) as info:
        residuum_loss(changes_itself, np.ones((4, 1, 3)), difference)
    assert any("Dropout" in note for note in info.value.__notes__)


def whiles(u):
    """Computes the same in a loop that has a forward mode but no reverse mode."""
    return jax.lax.while_loop(lambda x: x[0] < 3, lambda x: (x[0] + 1, x[1] / 2), (0, u))[1]


def guarded(u):
    """Guards against the root of 0 in forward mode alone."""
    return jnp.where(u > 0, jnp.sqrt(u), 0.0)


def test_forward_mode_through_a_cut_needs_reverse_mode():
    def tangent(f, bptt):
        def loss(x):
            options = dict(num_rollout_steps=3, cuts=Cuts(bptt))
            stepper = lambda u: f(x * u)
            return residuum_loss(stepper, jnp.ones((2, 1, 3)), difference, **options)

        return jax.jvp(loss, (1.5,), (1.0,))[1]

    with pytest.raises(ValueError, match="Reverse-mode differentiation") as info:
        tangent(whiles, 1)
    assert any("cuts=Cuts(bptt=np.ones" in note for note in info.value.__notes__)
    assert_close(tangent(whiles, np.ones(3, bool)), tangent(lambda u: u / 8, 1))
    no_loop = tangent(whiles, False)
    assert jnp.isfinite(no_loop) and no_loop != 0


def test_forward_mode_through_a_cut_is_finite_where_reverse_mode_is():
    def gradient_and_tangent(bptt):
        def loss(x):
            options = dict(num_rollout_steps=2, cuts=Cuts(bptt))
            stepper = lambda u: guarded(x * u)
            return residuum_loss(stepper, jnp.zeros((1, 1, 1)), difference, **options)

        return jax.grad(loss)(1.5), jax.jvp(loss, (1.5,), (1.0,))[1]

    assert jnp.all(jnp.isnan(jnp.array(gradient_and_tangent(1))))
    gradient, tangent = gradient_and_tangent([True, True])
    assert jnp.isnan(gradient) and tangent == 0
