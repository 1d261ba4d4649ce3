"""What is said to somebody who slipped: the end of the message names the culprit.

That each bad argument is named is in test_residuum.py; here is what comes with an error that
is raised inside of the user's functions, and the slips that are common.
"""

import dataclasses
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from residuum import Cuts, mse, residuum_loss
from test_residuum import assert_close, RUNTIME_TYPECHECKING


def difference(u_next, u_prev):
    return u_next - u_prev


def message(stepper, data, residuum_fn=difference, **options):
    """All that is shown below the traceback."""
    with pytest.raises((TypeError, ValueError, AssertionError, NameError)) as info:
        jax.eval_shape(lambda: residuum_loss(stepper, data, residuum_fn, **options))
    return "".join(traceback.format_exception_only(info.value)).split("-----")[0].strip()


@pytest.mark.parametrize("bptt", [False, 1])
@pytest.mark.parametrize(
    "data, sample",
    [
        # A forgotten snapshot axis, and a forgotten batch axis.
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
    assert "must return the next state only" in message(lambda u: (u, u.sum()), data)
    # If the state is one, something else is wrong with it.
    assert "next state only" not in message(lambda u: list(u), (data, data))


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
    assert text.endswith("Only snapshot 0 is read: what changes in time belongs in inputs.")


@pytest.mark.parametrize(
    "num_snapshots, num_rollout_steps, is_series",
    [((1, 5), 5, True), ((5, 5), 5, True), ((1, 2), 5, True), ((2, 2), 5, False)],
)
def test_a_series_in_data_is_referred_to_inputs(num_snapshots, num_rollout_steps, is_series):
    one, other = num_snapshots
    data = {"u": np.ones((4, one, 3)), "v": np.ones((3, other, 3))}  # batches disagree as well
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

        return str(jax.make_jaxpr(jax.grad(loss, has_aux=bool(options.get("has_aux"))))(2.0))

    for value in BOOLS:
        assert program(value) == program(bool(value))


def test_a_list_of_samples():
    states = [np.ones(32)] * 16
    assert "jnp.stack" in message(lambda u: u, states)
    assert "jnp.stack" in message(lambda u: np.ones((32, 32)) @ u, [np.ones((1, 32))] * 16)
    # Of fields it may be made, and if something else is wrong nothing is said of it.
    fields = [np.ones((4, 1, 8)), np.ones((4, 1, 3))]
    assert "jnp.stack" not in message(lambda u: 3, fields)


class TraceContextError(Exception):
    """As Flax NNX has one."""


def test_what_a_vmap_forbids_names_the_way():
    def unbound(u):
        return u - jax.lax.pmean(u, "batch")

    def changes_itself(u):
        raise TraceContextError("Cannot mutate BatchStat from a different trace level")

    assert "Batch statistics" in message(unbound, np.ones((4, 1, 3)))
    with pytest.raises(TraceContextError) as info:
        residuum_loss(changes_itself, np.ones((4, 1, 3)), difference)
    assert any("Batch statistics" in note for note in info.value.__notes__)


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="needs a newer JAX")
@pytest.mark.parametrize("num_rollout_steps", [1, 3])
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_ref_cannot_be_closed_over(where, num_rollout_steps):
    outside = jax.new_ref(jnp.arange(3.0))

    def loss(x):
        ref = jax.new_ref(jnp.arange(3.0)) if where == "inside" else outside
        options = dict(num_rollout_steps=num_rollout_steps, cuts=Cuts(bptt=1))
        return residuum_loss(
            lambda u: x * u * ref[...], jnp.ones((2, 1, 3)), difference, **options
        )

    for f in (loss, jax.grad(loss), jax.jit(jax.grad(loss))):
        with pytest.raises(TypeError, match=r"jax.Ref cannot be closed over.*ref\[\.\.\.\]"):
            f(2.0)


def test_shapes_and_refs_are_not_arrays():
    """They have a shape and a dtype, but nothing can be read from them."""
    data, mask = (jax.ShapeDtypeStruct(s, d) for s, d in (((4, 1, 3), float), ((3,), bool)))
    assert "data must be an array" in message(lambda u: u, data)
    for field in Cuts._fields:
        options = dict(num_rollout_steps=3, cuts=Cuts(**{field: mask}))
        assert f"cuts.{field} must be a" in message(lambda u: u, jnp.ones((4, 1, 3)), **options)
    if hasattr(jax, "new_ref"):
        assert "data must be an array" in message(lambda u: u, jax.new_ref(jnp.ones((4, 1, 3))))


@jax.tree_util.register_pytree_node_class
class Checked:
    """A state that checks what it is made of."""

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
    """Only arrays are ever put into the user's nodes."""

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


def test_functions_are_traced_from_python_twice_at_most():
    calls = []

    def stepper(u):
        calls.append("stepper")
        return u

    def residuum_fn(u_next, u_prev):
        calls.append("residuum_fn")
        return u_next - u_prev

    data = jnp.ones((2, 1, 3))
    options = dict(num_rollout_steps=50, cuts=Cuts(bptt=5), checkpoint=True)
    jax.jit(jax.grad(lambda d: residuum_loss(stepper, d, residuum_fn, **options)))(data)
    assert (calls.count("stepper"), calls.count("residuum_fn")) == (2, 1)
