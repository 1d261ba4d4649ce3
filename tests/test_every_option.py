"""Runs the tests of test_residuum.py with all the parameters that it leaves out to save
time."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

import test_residuum as short
from test_residuum import (
    assert_as_textbook,
    assert_values_and_gradients,
    AT_LEVELS,
    BPTT,
    EXTRA,
    flat_problem,
    HIGHER_ORDER,
    PROGRAMS,
)
from tests.common import slow


pytestmark = slow


@pytest.mark.parametrize("bptt", BPTT)
@pytest.mark.parametrize("num_rollout_steps", [1, 2, 5])
def test_all_options_together_equal_the_textbook_loop(num_rollout_steps, bptt):
    rows = itertools.product(AT_LEVELS, PROGRAMS)
    assert_values_and_gradients(num_rollout_steps, bptt, list(rows))


@pytest.mark.parametrize("options", [HIGHER_ORDER[0], HIGHER_ORDER[-1]], ids=str)
def test_hessians_equal_the_textbook_loop(options):
    flat, loss = flat_problem(**options)

    def hessians(loss_fn, x):
        grad = jax.grad(functools.partial(loss, loss_fn))
        return jax.jacfwd(grad)(x), jax.jacrev(grad)(x)

    assert_as_textbook(hessians, flat, extra=EXTRA[:3])


LEFT_OUT = [
    (short.test_value_and_gradient_equal_the_textbook_loop, ["mask"]),
    (short.test_traced_masks_equal_the_textbook_loop, ["none"]),
    (short.test_traced_masks_equal_the_textbook_loop, ["mask"]),
    *(
        (short.test_forward_mode_and_second_derivatives_equal_the_textbook_loop, [options])
        for options in HIGHER_ORDER[1:]
    ),
    *(
        (short.test_complex_states_equal_the_textbook_loop, [dtype, bptt])
        for dtype, bptt in itertools.product((jnp.complex128, jnp.complex64), BPTT)
    ),
    *(
        (short.test_step_counters_and_keys_in_the_state, [bptt])
        for bptt in ("none", "every", "mask")
    ),
    *((short.test_scalar_states_and_a_batch_of_one, [bptt]) for bptt in ("every", "3", "9")),
]


@pytest.mark.parametrize(
    "test, arguments", LEFT_OUT, ids=lambda x: x.__name__ if callable(x) else str(x)
)
def test_what_was_left_out(test, arguments):
    test(*arguments)
