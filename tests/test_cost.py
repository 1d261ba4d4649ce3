"""These tests verify the deterministic part of the cost: there are loops where they save
compile time and none where they cost run time, JAX traces each function once, and the compiler
allocates as much memory as the documentation says."""

import collections
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from residuum import Cuts, mse, residuum_loss
from test_residuum import evaluate, FLAGS, problem
from tests.common import also_slow, network_problem, primitives


def program(num_rollout_steps, transform=jax.value_and_grad, **options):
    """Returns the names of all primitives in the program of the loss and its gradient."""
    params, data, _, coefficient = problem(num_rollout_steps)

    def loss(params):
        args = (params, data, None, coefficient)
        options_ = dict(num_rollout_steps=num_rollout_steps, **options)
        return evaluate(residuum_loss, *args, **options_)

    return list(primitives(jax.make_jaxpr(transform(loss))(params).jaxpr))


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"has_aux": True}], ids=str)
def test_one_step_is_not_a_loop(options):
    transform = functools.partial(jax.grad, has_aux=options.get("has_aux", False))
    names = program(1, transform, **options)
    assert "dot_general" in names
    assert not {"scan", "while"} & set(names)


@pytest.mark.parametrize("bptt", [False, True, 2, 3, 9])
def test_unroll_true_leaves_no_loop(bptt):
    names = program(7, cuts=Cuts(bptt), unroll=True)
    assert not {"scan", "while"} & set(names)
    assert "scan" in program(7, cuts=Cuts(bptt), unroll=1)


@pytest.mark.parametrize("cut", FLAGS)
@pytest.mark.parametrize("bptt", [False, True, 2])
def test_static_cuts_leave_no_selection(bptt, cut):
    assert "select_n" not in program(6, cuts=Cuts(bptt, cut, cut))
    assert "select_n" in program(6, cuts=Cuts(bptt, np.array(cut), cut))


@pytest.mark.parametrize(
    "options", [{}, {"checkpoint": True}, {"checkpoint": 5}, {"unroll": 3}], ids=str
)
@pytest.mark.parametrize("bptt", [False, True, 5])
def test_program_size_does_not_grow_with_the_rollout(bptt, options):
    short, long = (
        len(program(num_steps, cuts=Cuts(bptt), **options)) for num_steps in (30, 300)
    )
    assert short == long


def test_every_kth_state_computes_three_times_what_would_be_stored():
    count = lambda **options: program(8, checkpoint=2, **options).count("tanh")
    # A step is computed in the forward pass, again when its block is recomputed, and a third
    # time when the step itself is rematerialised there.
    assert count() == 3 * program(8).count("tanh")
    assert program(4, checkpoint=2).count("tanh") == count()  # the same with two blocks only
    assert count(cuts=Cuts(1)) == program(8, cuts=Cuts(1)).count("tanh")
    # A rollout of a single block is computed like any rollout with `checkpoint=True`.
    assert program(9, checkpoint=2).count("tanh") == 5 * program(8).count("tanh")
    assert program(8, checkpoint=3).count("tanh") == 5 * program(8).count("tanh")
    assert program(8, checkpoint=8) == program(8, checkpoint=50) == program(8, checkpoint=True)


@pytest.mark.parametrize("unroll", [1, True])
def test_checkpoint_computes_twice_only_what_would_be_stored(unroll):
    def count(bptt, checkpoint):
        options = dict(cuts=Cuts(bptt), checkpoint=checkpoint, unroll=unroll)
        return program(6, **options).count("tanh")

    for bptt in (False, 2):
        assert count(bptt, True) == 2 * count(bptt, False)
    # With segments of one step, the backward pass follows immediately.
    for bptt in (1, True):
        assert count(bptt, True) == count(bptt, False)


def test_a_rollout_of_one_step_is_rematerialised_too():
    """A one-step rollout is rematerialised as well, since it may be one of many in a loop of
    the user's."""
    assert program(1, checkpoint=True).count("tanh") == 2 * program(1).count("tanh")


PROTECTED = [
    # The columns are checkpoint, unroll, and whether anything is rematerialised in unrolled
    # code.
    (True, 1, False),
    (True, True, True),
    (3, 1, False),
    (3, 3, True),  # the blocks are a loop, and the steps of a block are unrolled
    (3, True, True),
    (4, 1, True),  # a block of four and a block of two: two loops in unrolled code
]


@pytest.mark.parametrize("checkpoint, unroll, expected", PROTECTED)
def test_rematerialisation_is_protected_from_xla_only_where_there_is_no_loop(
    checkpoint, unroll, expected
):
    params, data, _, coefficient = problem(6)

    def loss(params):
        options = dict(num_rollout_steps=6, checkpoint=checkpoint, unroll=unroll)
        return evaluate(residuum_loss, params, data, None, coefficient, **options)

    program = jax.jit(jax.grad(loss)).lower(params).as_text()
    assert ("optimization_barrier" in program) == expected


OPTIONS = [{}, {"checkpoint": True}, {"checkpoint": 2}, {"has_aux": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bptt", [False, True, 3])
def test_the_users_functions_are_traced_once(bptt, options):
    calls = collections.Counter()

    def counted(name, f):
        def g(*args):
            calls[name] += 1
            return f(*args)

        return g

    def loss(scale):
        return residuum_loss(
            counted("stepper", lambda u: jnp.tanh(scale * u)),
            jnp.ones((2, 1, 3)),
            counted("residuum_fn", lambda n, p: n - p),
            num_rollout_steps=7,
            cuts=Cuts(bptt),
            time_level_loss=counted("time_level_loss", lambda r: jnp.mean(r**2)),
            **options,
        )

    has_aux = options.get("has_aux", False)
    jax.jit(jax.value_and_grad(loss, has_aux=has_aux)).lower(2.0)
    assert calls == {"stepper": 1, "residuum_fn": 1, "time_level_loss": 1}


def num_traced(loss):
    """Counts how often JAX looks at a matrix product while it traces the value and the
    gradient."""
    calls, original = 0, jax.lax.dot_general_p.abstract_eval

    def abstract_eval(*args, **params):
        nonlocal calls
        calls += 1
        return original(*args, **params)

    params, data, stepper = network_problem("mlp")
    f = lambda params: loss(functools.partial(stepper, params), data, lambda n, p: n - p)
    jax.clear_caches()
    with mock.patch.object(jax.lax.dot_general_p, "abstract_eval", abstract_eval):
        jax.jit(jax.value_and_grad(f)).trace(params)
    return calls


def test_tracing_costs_little_more_than_that_of_a_plain_scan():
    def scan_loss(stepper, data, residuum_fn):
        def step(u_prev, _):
            u_next = jax.vmap(stepper)(u_prev)
            return u_next, mse(residuum_fn(u_next, u_prev))

        return jnp.sum(jax.lax.scan(step, data[:, 0], length=20)[1])

    plain = num_traced(scan_loss)
    for bptt in (False, 1, 5):
        options = dict(num_rollout_steps=20, cuts=Cuts(bptt))
        assert num_traced(functools.partial(residuum_loss, **options)) <= 1.6 * plain, bptt


def test_unroll_is_steps_per_iteration():
    def count(unroll, bptt, **options):
        names = program(12, lambda f: f, cuts=Cuts(bptt), unroll=unroll, **options)
        return names.count("tanh")

    assert [count(u, False) for u in (1, 12, True)] == [1, 12, 12]
    # `unroll` counts the steps of a segment or block. Only `True` also unrolls the loop over
    # segments or blocks.
    assert [count(u, 3) for u in (1, 3, 6, True)] == [1, 3, 3, 12]
    assert [count(u, False, checkpoint=3) for u in (1, 3, 6, True)] == [1, 3, 3, 12]


def test_unroll_false_is_one_step_per_iteration():
    def text(unroll):
        options = dict(num_rollout_steps=6, unroll=unroll)
        loss = functools.partial(evaluate, residuum_loss, **options)
        return jax.jit(loss).lower(*problem(6)).as_text()

    assert text(False) == text(1) != text(2)


def temporaries(
    name, num_rollout_steps, *, loss_fn=residuum_loss, wrt=0, compiler_options=None, **options
):
    """Returns the temporary memory, in bytes, of the compiled value and gradient."""
    params, data, stepper = network_problem(name)

    def loss(params, data):
        return loss_fn(
            functools.partial(stepper, params),
            data,
            lambda n, p: n - p,
            num_rollout_steps=num_rollout_steps,
            **options,
        )

    lowered = jax.jit(jax.value_and_grad(loss, wrt)).lower(params, data)
    compiled = lowered.compile(compiler_options)
    return compiled.memory_analysis().temp_size_in_bytes


def num_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "options",
    [{}, {"checkpoint": True}, {"unroll": 5}, {"wrt": 1}, {"wrt": (0, 1)}],
    ids=str,
)
@pytest.mark.parametrize("bptt", also_slow(1, slowly=[5]))
@pytest.mark.parametrize("name", also_slow("mlp", slowly=["conv"]))
def test_memory_of_a_truncated_rollout_does_not_grow_with_its_length(name, bptt, options):
    options = dict(cuts=Cuts(bptt, next=True), **options)
    assert temporaries(name, 1000, **options) == temporaries(name, 20, **options)


@pytest.mark.parametrize("bptt", also_slow(1, slowly=[5]))
@pytest.mark.parametrize("name", also_slow("mlp", slowly=["conv"]))
def test_memory_of_a_truncated_rollout_is_that_of_one_segment(name, bptt):
    one_segment = temporaries(name, bptt)
    params, _, _ = network_problem(name)
    streamed = temporaries(name, 1000, cuts=Cuts(bptt))
    assert streamed <= 1.5 * (one_segment + num_bytes(params))
    # An ordinary scan needs this much memory for the states alone.
    assert temporaries(name, 1000, cuts=Cuts(np.ones(1000, bool))) > 20 * streamed / bptt


@pytest.mark.parametrize("name", also_slow("mlp", slowly=["conv"]))
def test_checkpoint_stores_one_state_per_step_and_nothing_else(name):
    _, data, _ = network_problem(name)
    short, long = (temporaries(name, n, checkpoint=True) for n in (100, 1000))
    assert long - short <= 1.01 * 900 * num_bytes(data)
    stored = temporaries(name, 1000) - temporaries(name, 100)
    assert stored > 1.9 * (long - short)


@pytest.mark.parametrize("name", also_slow("mlp", slowly=["conv"]))
def test_checkpoint_within_segments_stores_one_state_per_step_of_a_segment(name):
    _, data, _ = network_problem(name)
    short, long = (temporaries(name, 1000, cuts=Cuts(k), checkpoint=True) for k in (50, 100))
    assert long - short <= 1.01 * 50 * num_bytes(data)


@pytest.mark.parametrize("every", also_slow(25, slowly=[10, 31, 40, 300]))
@pytest.mark.parametrize("name", also_slow("mlp", slowly=["conv"]))
def test_every_kth_state_is_stored_and_those_of_one_block(name, every):
    num_steps = 1000
    params, data, _ = network_problem(name)
    activations = temporaries(name, 2, checkpoint=True)
    actual = temporaries(name, num_steps, checkpoint=every)
    levels = 4 * 4 * num_steps  # losses, weights, and their cotangents
    num_states = num_steps / every + every + 2
    rest = num_steps % every  # the rest is a loop of its own, with its own sum of the gradient
    num_states += rest
    sums = num_bytes(params) * (2 if rest else 1)
    assert actual <= activations + num_states * num_bytes(data) + sums + levels


def test_every_kth_state_within_segments():
    _, data, _ = network_problem("mlp")
    size = lambda **options: temporaries("mlp", 1000, cuts=Cuts(100), **options)
    assert size(checkpoint=True) - size(checkpoint=10) >= 60 * num_bytes(data)
    assert size(checkpoint=100) == size(checkpoint=200) == size(checkpoint=True)


@pytest.mark.skipif(jax.__version_info__ < (0, 5), reason="needs a newer JAX")
@pytest.mark.parametrize("checkpoint", also_slow(True, slowly=[5]))
def test_checkpoint_in_straight_code_stores_states_only(checkpoint):
    """In unrolled code, `checkpoint` stores states only. Before JAX 0.11.1, XLA removed the
    barriers on a CPU before it looked for common subexpressions. These versions have to be told
    to keep the barriers, as the documentation says."""
    straight = functools.partial(temporaries, "conv", 20, unroll=True)
    barriers_stay = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    stored, again = straight(), straight(checkpoint=checkpoint)
    if jax.default_backend() != "cpu" or jax.__version_info__ >= (0, 11, 1):
        assert again < 0.2 * stored
    else:
        assert again > 0.9 * stored
        assert straight(checkpoint=checkpoint, compiler_options=barriers_stay) < 0.2 * stored


@pytest.mark.parametrize("bptt", also_slow(2, slowly=[False, 1]))
def test_unrolled_it_needs_no_more_memory_than_trainax(bptt):
    import trainax  # imported here, since the other tests of this file do not need it

    def trainax_loss(stepper, data, residuum_fn, *, num_rollout_steps):
        configuration = trainax.configuration.Residuum(
            num_rollout_steps, cut_bptt=bptt is not False, cut_bptt_every=int(bptt) or 1
        )
        return configuration(stepper, data, residuum_fn=residuum_fn)

    ours = temporaries("conv", 10, cuts=Cuts(bptt), unroll=True)
    assert ours <= 1.05 * temporaries("conv", 10, loss_fn=trainax_loss)


@pytest.mark.parametrize("bptt", [1, 3])
def test_streaming_does_the_arithmetic_of_one_segment_per_segment(bptt):
    names = program(30, cuts=Cuts(bptt))
    one_segment = program(bptt)
    for primitive in ("dot_general", "tanh"):
        assert names.count(primitive) == one_segment.count(primitive)


def test_the_first_segment_alone_computes_the_gradient_of_the_initial_state():
    def count(num_rollout_steps, transform, **options):
        params, data, _, coefficient = problem(num_rollout_steps)
        options["num_rollout_steps"] = num_rollout_steps
        loss = lambda data: evaluate(residuum_loss, params, data, None, coefficient, **options)
        names = primitives(jax.make_jaxpr(transform(loss))(data).jaxpr)
        return collections.Counter(names)["dot_general"]

    first, rest = count(1, jax.grad), count(29, lambda loss: loss)
    assert count(30, jax.grad, cuts=Cuts(1)) == first + rest < 2 * first


def test_nothing_of_the_gradient_is_computed_for_the_value():
    forward = program(30, lambda f: f)
    streamed = program(30, lambda f: f, cuts=Cuts(1))
    for primitive in ("dot_general", "tanh"):
        assert streamed.count(primitive) == forward.count(primitive) == 1


@pytest.mark.parametrize("options", [{}, {"checkpoint": True, "unroll": True}], ids=str)
def test_a_cut_beyond_the_last_step_changes_nothing(options):
    """A cut after the last step, or later, changes nothing. In particular, it does not let XLA
    undo the rematerialisation in unrolled code."""

    def text(bptt):
        params, data, stepper = network_problem("mlp")

        def loss(params):
            u_next = functools.partial(stepper, params)
            options_ = dict(num_rollout_steps=4, cuts=Cuts(bptt), **options)
            return residuum_loss(u_next, data, lambda n, p: n - p, **options_)

        return jax.jit(jax.grad(loss)).lower(params).as_text()

    assert text(9) == text(False)


def outer_loop(name, f, chunks):
    """Sums `f` over chunks, in a JAX loop."""
    if name == "map":
        return jnp.sum(jax.lax.map(f, chunks))
    if name == "scan":
        return jax.lax.scan(lambda total, x: (total + f(x), None), jnp.float32(0), chunks)[0]
    return jax.lax.fori_loop(
        0, len(chunks), lambda i, total: total + f(chunks[i]), jnp.float32(0)
    )


@pytest.mark.parametrize("prev", also_slow("mask", slowly=[False]))
@pytest.mark.parametrize("bptt", also_slow(1, slowly=[5]))
@pytest.mark.parametrize("name", also_slow("map", slowly=["scan", "fori_loop"]))
def test_memory_inside_a_loop_that_is_differentiated_from_outside(name, bptt, prev):
    """Inside a loop that is differentiated from outside, memory grows only by weights and
    masks. JAX moves whatever depends only on a loop's constants out of the loop. Here these are
    the weights of the time levels, but not the cotangents that begin with the weights."""
    params, data, stepper = network_problem("mlp")
    chunks = jnp.broadcast_to(data, (3, *data.shape))

    def size(num_rollout_steps):
        mask = np.arange(num_rollout_steps) % 2 == 0
        options = dict(cuts=Cuts(bptt, prev=mask if prev else False))

        def loss(params, data):
            u_next = functools.partial(stepper, params)
            options_ = dict(num_rollout_steps=num_rollout_steps, **options)
            return residuum_loss(u_next, data, lambda n, p: n - p, **options_)

        f = lambda params: outer_loop(name, functools.partial(loss, params), chunks)
        compiled = jax.jit(jax.grad(f)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # This is the size of the weights and masks themselves. A cotangent is 512 times as large.
    assert size(220) - size(20) <= 2 * 200 * 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, bool])
def test_what_depends_on_inputs_alone_stays_in_a_loop_that_is_differentiated(dtype):
    """A loop that is differentiated takes one more copy of the inputs, but none of what the
    stepper computes from the inputs, which is much larger."""
    params, data, stepper = network_problem("mlp")
    chunks = jnp.broadcast_to(data, (3, *data.shape))
    pattern = jnp.linspace(1, 2, 64, dtype=jnp.float32)

    def size(num_rollout_steps):
        inputs = jnp.ones((8, num_rollout_steps), dtype)

        def loss(params, data):
            forced = lambda u, x: stepper(params, u) + jnp.sin(x * pattern)
            options = dict(num_rollout_steps=num_rollout_steps, cuts=Cuts(4), inputs=inputs)
            return residuum_loss(forced, data, lambda n, p, x: n - p, **options)

        f = lambda params: outer_loop("scan", functools.partial(loss, params), chunks)
        compiled = jax.jit(jax.grad(f)).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert size(220) - size(20) <= 4 * 200 * 8 * 4  # 64 times as much for fields


def test_forward_mode_without_a_cut_stores_no_step():
    """In forward mode, a rollout without a cut stores no step. The derivative rule of cut
    rollouts takes a gradient, and would store all steps."""

    def size(num_rollout_steps):
        params, data, stepper = network_problem("mlp")

        def loss(params):
            u_next = functools.partial(stepper, params)
            options = dict(num_rollout_steps=num_rollout_steps)
            return residuum_loss(u_next, data, lambda n, p: n - p, **options)

        derivative = jax.jit(lambda v: jax.jvp(loss, (params,), (v,))[1])
        return derivative.lower(params).compile().memory_analysis().temp_size_in_bytes

    # Each step adds its loss, its weight and their tangents. A state is 512 times as large.
    assert size(220) - size(20) <= 4 * 200 * 4


def test_memory_of_hessian_vector_products():
    def size(num_rollout_steps, outer):
        params, data, stepper = network_problem("mlp")

        def loss(params):
            options = dict(num_rollout_steps=num_rollout_steps, cuts=Cuts(bptt=1))
            u_next = functools.partial(stepper, params)
            return residuum_loss(u_next, data, lambda n, p: n - p, **options)

        grad = jax.grad(loss)
        product = {
            "forward": lambda v: jax.jvp(grad, (params,), (v,))[1],
            "reverse": lambda v: jax.vjp(grad, params)[1](v)[0],
        }[outer]
        compiled = jax.jit(product).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert size(200, "forward") == size(20, "forward")
    # Each segment adds the state at its start, and the numbers of its time levels.
    assert size(200, "reverse") - size(20, "reverse") <= 180 * (8 * 64 * 4 + 64)


def test_every_kth_state_and_its_tangent_are_stored_for_hessian_vector_products():
    def size(num_rollout_steps, **options):
        params, data, stepper = network_problem("mlp")

        def loss(params):
            u_next = functools.partial(stepper, params)
            options_ = dict(num_rollout_steps=num_rollout_steps, **options)
            return residuum_loss(u_next, data, lambda n, p: n - p, **options_)

        product = lambda v: jax.jvp(jax.grad(loss), (params,), (v,))[1]
        return jax.jit(product).lower(params).compile().memory_analysis().temp_size_in_bytes

    _, data, _ = network_problem("mlp")
    levels = 4 * 8 * 500  # losses, weights, and their tangents
    growth = size(1000, checkpoint=25) - size(500, checkpoint=25)
    assert growth <= 2 * (500 / 25) * num_bytes(data) + levels
    assert size(1000, checkpoint=25) < 0.2 * size(1000, checkpoint=True)


@pytest.mark.skipif(jax.__version_info__ < (0, 5), reason="needs a newer JAX")
@pytest.mark.parametrize("transform", [lambda f: f, jax.value_and_grad], ids=["value", "grad"])
@pytest.mark.parametrize("bptt", also_slow(1, slowly=[2, 8]))
def test_an_ensemble_shares_its_inputs(bptt, transform):
    """The members of an ensemble share one copy of the inputs, in which time comes before the
    batch."""
    num_steps, batch, size = 64, 4, 4096
    inputs = jax.ShapeDtypeStruct((batch, num_steps, size), jnp.float32)

    def loss(scale, inputs):  # the inputs are large, and the state is small
        stepper = lambda u, f: jnp.tanh(scale * u + jnp.mean(f.reshape(-1, 16), 0))
        options = dict(num_rollout_steps=num_steps, inputs=inputs, cuts=Cuts(bptt))
        data = jnp.ones((batch, 1, 16), jnp.float32)
        return residuum_loss(stepper, data, lambda n, p, f: n - p, **options)

    def copies(num_members):
        scales = jax.ShapeDtypeStruct((num_members,), jnp.float32)
        ensemble = jax.jit(jax.vmap(transform(loss), (0, None)))
        memory = ensemble.lower(scales, inputs).compile().memory_analysis()
        return memory.temp_size_in_bytes / (num_steps * batch * size * 4)

    assert max(map(copies, (1, 4, 16))) <= 2.2


def test_nothing_is_accumulated_for_constants():
    big = jnp.ones((512, 512), jnp.float32)
    data = jnp.ones((1, 1, 512), jnp.float32)

    def loss(scale, big):
        stepper = lambda u: jnp.tanh(scale * u)
        residuum_fn = lambda n, p: big @ n - p
        options = dict(num_rollout_steps=10, cuts=Cuts(1))
        return residuum_loss(stepper, data, residuum_fn, **options)

    compiled = jax.jit(jax.grad(loss)).lower(jnp.float32(1), big).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < big.nbytes / 2
