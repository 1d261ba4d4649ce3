"""Every block of README and of the pages in docs/ runs, and every link leads somewhere."""

import io
import os
import re
import unittest
from functools import partial
from itertools import pairwise

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse import BCOO, BCSR
from jax.experimental.sparse.linalg import spsolve
from jax.scipy.sparse.linalg import bicgstab, cg

from residuum import Cuts, mse, residuum_loss
from test_residuum import OPTIMIZED, textbook_loss
from tests.common import config, ROOT


README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
# On these pages, each block continues from all blocks before it. On other pages, a block
# continues from the first block of its page, and can be copied together with it. In README, a
# block continues from the first block of its section.
WALKS = (
    "boundary_conditions.md",
    "first_steps.md",
    "forcing.md",
    "how_good_is_it.md",
    "meshes.md",
    "scaling_out.md",
    "your_own_problem.md",
)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


PART = re.compile(r"^(#+) ([^\n]*)$|^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def slug(title):
    """Returns the anchor of a title. Forges and mkdocs agree on the anchors of the titles used
    here."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def python_blocks(page):
    """Yields for each block of a page its section, the blocks that come before, and the
    block."""
    section, first = "", []
    for level, title, block in PART.findall(page.read_text()):
        if title:
            section = slug(title)
            first = [] if page == README and level == "##" else first
        else:
            yield f"{page.name}#{section}", first, block
            first = first or [block]


def programs():
    """Yields the section or page, and the blocks of everything that a reader would run in one
    go."""
    for page in PAGES:
        if page.name in WALKS:
            yield page.name, BLOCK.findall(page.read_text())
        else:
            for name, before, block in python_blocks(page):
                yield name, [*before, block]


PROGRAMS = list(programs())


# This page trains for so long that XLA's optimisations pay off.
TRAINS_LONG = "your_own_problem.md"


def run(name, program):
    """Runs the blocks of a program one after the other, in float32, as a reader would."""
    text = "".join(program)
    if "jax.shard_map" in text and not hasattr(jax, "shard_map"):
        pytest.skip("needs a newer JAX")
    namespace = {"__name__": "__main__"}
    optimized = OPTIMIZED or name == TRAINS_LONG
    with (
        config("jax_enable_x64", False),
        config("jax_disable_most_optimizations", not optimized),
    ):
        for block in program:
            exec(compile(block, name, "exec"), namespace)
    return namespace


#
# What the text says about the blocks of a section is true, or of a page on which blocks build
# on each other
#

CLAIMS = {}


def claim(section):
    def register(function):
        CLAIMS[section] = function
        return function

    return register


@claim("README.md#residuum")
def example_trains(*, value, loss, data, **_):
    assert value < 1e-5
    assert 0.9 < loss(jnp.zeros(9), data) < 1.1


@claim("first_steps.md")
def first_steps_find_mistakes_and_train(
    *, check, data, solver_step, heat_residuum, swapped, wrong_sign, **names
):
    assert check(solver_step, data, heat_residuum) < 1e-13
    assert check(solver_step, data, swapped) > 1
    assert check(solver_step, data, wrong_sign) > 0.5
    loss_of_fine_steps = names["loss_of_fine_steps"]
    for implicit, sign, ratio in ((1, 1, 16), (0.5, 1, 64), (0.3, 1, 16), (0.5, -1, 4)):
        losses = [loss_of_fine_steps(dt, implicit, sign) for dt in (0.1, 0.05)]
        assert abs(losses[0] / losses[1] - ratio) < 0.1 * ratio
    assert names["history"][-1] < 0.1 * names["history"][0]
    assert names["errors"].shape == (10,)


@claim("your_own_problem.md")
def your_own_problem_beats_persistence_at_every_step(
    *, check, solver, persistence, untrained, data, imex_euler, scaled, condition, **names
):
    assert check(solver, data, imex_euler) < 1e-13
    assert check(persistence, data, imex_euler) > 1e-6
    assert abs(check(persistence, data, scaled) - 1) < 1e-5
    assert abs(untrained - 1) < 1e-5
    assert abs(condition - 2.28) < 1e-5
    emulator, baseline = names["emulator"], names["baseline"]
    assert emulator.shape == (51, 2)
    assert jnp.all(emulator[1:] < baseline[1:])
    assert jnp.all(emulator[50] < 0.5 * baseline[50])


@claim("boundary_conditions.md")
def boundary_conditions_need_the_padding_of_the_equation(
    *, exact_step, implicit_euler, dirichlet, neumann, unseen, **names
):
    for name, bound in (
        ("periodic", 0.01),
        ("dirichlet", 0.01),
        ("neumann", 0.02),
        ("robin", 0.02),
    ):
        right, zeros = names[f"{name}_errors"]
        assert right < bound and zeros > 10 * right
    for name, bound in (("wave", 0.04), ("heated", 0.05), ("flow", 1e-3)):
        right, wrong = names[f"{name}_errors"]
        assert right < bound and wrong > 8 * right
    right, wrong = names["basin_errors"]
    assert right < 0.02 and wrong > 20 * right
    soft, hard = names["at_the_wall"]
    assert hard == 0 and soft > 0.1
    # The exact steps follow from series: sines vanish at the walls, and cosines have no slope
    # there.
    phase = jnp.pi * (jnp.arange(32) + 0.5) / 32
    for mode in (1, 2, 5):
        decay = 1 / (3 - 2 * jnp.cos(mode * jnp.pi / 32))
        for pad, shape in ((dirichlet, jnp.sin), (neumann, jnp.cos)):
            u = shape(mode * phase)
            u_next = exact_step(partial(implicit_euler, pad=pad), u)
            assert_close_to(u_next, decay * u)


@claim("how_good_is_it.md")
def an_emulator_is_judged_without_reference_trajectories(
    *, floors, baselines, estimated, true, corrected, after_correction, **names
):
    coarse, half_step, half_width = floors.values()
    assert abs(coarse - 0.0127) < 3e-4 and coarse - half_step < 5e-4
    assert abs(half_width - 0.0026) < 3e-4
    persistence, explicit, once, twice, three_times = baselines.values()
    assert persistence > 1 and once < 0.08
    assert max(explicit, twice) < coarse / 4 and three_times < 3e-4
    assert abs(estimated / true - 1) < 0.05 and true == pytest.approx(0.066, rel=0.03)
    assert corrected < true / 6
    assert after_correction < 2e-5
    counts = [names["counts"][name] for name in ("Runge–Kutta", "P twice", "network")]
    assert counts == pytest.approx([197, 177, 2990], rel=0.05)
    nrmse_over_time = names["nrmse_over_time"]
    assert nrmse_over_time.shape == (8, 50)
    assert jnp.median(nrmse_over_time[:, -1]) == pytest.approx(0.048, rel=0.05)
    assert jnp.max(nrmse_over_time) == pytest.approx(0.22, rel=0.05)
    steppers, initial, exact = (names[name] for name in ("steppers", "initial", "exact"))
    largest_ratio, norm = names["largest_ratio"], names["norm"]
    assert largest_ratio(steppers["P once"], initial(64)) == pytest.approx(0.38, rel=0.1)
    assert largest_ratio(steppers["P twice"], initial(64)) == pytest.approx(0.037, rel=0.1)
    states, errors = names["estimate_error"](
        steppers["P twice"], names["residuum_fn"], initial(64), num_rollout_steps=50
    )
    chex.assert_trees_all_close(norm(errors), norm(states - exact), rtol=0.04)
    assert {"persistence", "P three times"} <= set(names["front"])


@claim("meshes.md")
@config("jax_enable_x64", False)
def finite_elements_work_as_the_page_says(
    *, mesh, heat, one_step, solve, check, u_0, inputs, A, products, stiffness, **names
):
    import equinox as eqx
    import optax
    import scipy.sparse
    import skfem
    from skfem.helpers import ddot, div, dot, grad, sym_grad

    assert heat["A"].dtype == np.float64 and A.dtype == jnp.float32 and A.shape == (900, 900)
    exact, late, not_fixed = names["checks"]
    assert exact < 1e-11 and late == pytest.approx(0.007, rel=0.1)
    assert not_fixed == pytest.approx(0.4, rel=0.1)
    assert names["too_large"] == pytest.approx(6, rel=0.1)
    assert names["preconditioned_error"] < 0.015
    trained, untrained, trained_more, untrained_more = names["errors"]
    assert trained < 0.01 and untrained == pytest.approx(0.3, rel=0.1)
    assert trained_more < 7e-4 and untrained_more == pytest.approx(0.1, rel=0.2)

    def without_gcr(params, u_prev, inputs_t):
        u = names["set_wall"](u_prev, inputs_t)
        for _ in range(4):
            r = names["heat_residuum"](u, u_prev, inputs_t) * heat["lumped_mass"]
            u -= names["free"] * names["graph_network"](params, r / names["diagonal"])
        return u

    def update(carry, key):
        params, opt_state = carry
        u_0, inputs = names["random_states"](mesh, key, 4), names["random_inputs"](key, 4, 1)
        options = dict(inputs=inputs, time_level_loss=lambda r: mse(names["precondition"](r)))
        loss = lambda params: residuum_loss(
            partial(without_gcr, params), u_0[:, None], names["heat_residuum"], **options
        )
        updates, opt_state = names["adam"].update(jax.grad(loss)(params), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    start = names["untrained"], names["adam"].init(names["untrained"])
    (params, _), _ = jax.jit(partial(jax.lax.scan, update))(start, names["keys"])
    assert names["nrmse"](partial(without_gcr, params)) == pytest.approx(0.05, rel=0.15)

    def preconditioned_steps(num_steps, u_prev, inputs_t):
        u = names["set_wall"](u_prev, inputs_t)
        for _ in range(num_steps):
            u -= names["precondition"](names["heat_residuum"](u, u_prev, inputs_t))
        return u

    for num_steps, error in ((1, 0.004), (2, 2e-5)):
        actual = names["nrmse"](partial(preconditioned_steps, num_steps))
        assert actual == pytest.approx(error, rel=0.2)
    for product in products(heat["A"]).values():
        chex.assert_trees_all_close(product(u_0[0]), A @ u_0[0], atol=1e-6)
    assert_close_to(names["both"], sum(names["alone"]) / 2)

    # A conductivity on the triangles, or one that depends on the solution, as scikit-fem has it
    basis = skfem.Basis(mesh, skfem.ElementTriP1())
    varying = skfem.BilinearForm(lambda u, v, w: (1 + w.u / 2) * dot(grad(u), grad(v)))
    u = np.asarray(u_0[0], float)
    expected = varying.assemble(basis, u=basis.interpolate(u)) @ u
    actual = stiffness(1 + u_0[0][mesh.t].mean(axis=0) / 2) @ u_0[0]
    chex.assert_trees_all_close(actual, expected, atol=1e-5)

    # The other equations
    bilinear = lambda form: skfem.BilinearForm(lambda u, v, w: form(u, v))
    test = lambda v: v + 0.015 * grad(v)[0]
    transport = lambda u, v: grad(u)[0] * test(v) + 1e-3 * dot(grad(u), grad(v))
    B = bilinear(lambda u, v: u * test(v)).assemble(basis)
    supg = heat | {"A": B + 0.01 * bilinear(transport).assemble(basis), "B": B}
    assert check(one_step(**supg), u_0, inputs, solve(u_0, inputs, **supg)) < 1e-10

    wind = jnp.array([0.8, -0.5])
    areas = basis.dx.sum(axis=1)
    tau = np.sqrt(2 * areas) / (2 * np.linalg.norm(wind))
    along = lambda u: wind[0] * grad(u)[0] + wind[1] * grad(u)[1]
    shifted = lambda v, w: v + w.tau * along(v)
    forms = (
        skfem.BilinearForm(lambda u, v, w: u * shifted(v, w)),
        skfem.BilinearForm(
            lambda u, v, w: along(u) * shifted(v, w) + 1e-3 * dot(grad(u), grad(v))
        ),
    )
    at_points = dict(tau=tau[:, None] * np.ones(basis.dx.shape))
    B, C = (form.assemble(basis, **at_points) for form in forms)
    expected = one_step(**heat | {"A": B + 0.01 * C, "B": B, "loads": np.zeros((1, 900))})(
        u_0[0], u_0[1], {"load": jnp.zeros(1), "wall": 0.0}
    )
    actual = names["supg_residuum"](u_0[0], u_0[1], wind)
    chex.assert_trees_all_close(actual, expected, atol=1e-4)

    vectors = skfem.Basis(mesh, skfem.ElementVector(skfem.ElementTriP1()))
    lame = lambda u, v: 2 * ddot(sym_grad(u), sym_grad(v)) + div(u) * div(v)
    K, M = (bilinear(form).assemble(vectors) for form in (lame, dot))
    ones, eye, half = np.ones(vectors.N), scipy.sparse.eye(vectors.N), 0.01 / 2
    weight = skfem.LinearForm(lambda v, w: -v[1]).assemble(vectors)
    clamped = np.isin(np.arange(vectors.N), vectors.get_dofs(lambda x: x[0] < 1e-9).all())
    elastic = {
        "A": scipy.sparse.bmat([[eye, -half * eye], [half * K, M]], format="csr"),
        "B": scipy.sparse.bmat([[eye, half * eye], [-half * K, M]], format="csr"),
        "loads": 0.01 * np.concatenate([0 * weight, weight])[None],
        "is_fixed": np.tile(clamped, 2),
        "lumped_mass": np.concatenate([ones, M @ ones]),
    }
    at_rest = jnp.zeros((1, 2 * vectors.N))
    gravity = {"load": jnp.ones((1, 20, 1)), "wall": jnp.zeros((1, 20))}
    falling = solve(at_rest, gravity, **elastic)
    assert check(one_step(**elastic), at_rest, gravity, falling) < 1e-9
    (u, v), (u_next, v_next) = (np.split(np.asarray(x, float), 2) for x in falling[0, -2:])
    S = M + half**2 * K
    right_hand_side = (M - half**2 * K) @ v - 0.01 * (K @ u - weight)
    assert np.allclose(u_next, u + half * (v + v_next), atol=1e-6)
    assert np.allclose((S @ v_next)[~clamped], right_hand_side[~clamped], atol=1e-6)

    # A stiffer material: bicgstab fails on the block matrix, and cg does not after elimination
    def free_rows(matrix, is_free):
        keep = scipy.sparse.diags(1.0 * is_free)
        return keep @ matrix @ keep + scipy.sparse.diags(1.0 * ~is_free)

    def error(solver, matrix, b):
        A, diagonal = BCOO.from_scipy_sparse(matrix), matrix.diagonal()
        x, _ = solver(lambda x: A @ x, jnp.asarray(b), tol=1e-2, M=lambda x: x / diagonal)
        expected = scipy.sparse.linalg.spsolve(matrix.tocsc(), b)
        return np.linalg.norm(x - expected) / np.linalg.norm(expected)

    K, free_dofs = 100 * K, ~clamped
    block = scipy.sparse.bmat([[eye, -half * eye], [half * K, M]])
    u = free_dofs * np.sin(vectors.doflocs[0])
    b = np.concatenate([u, free_dofs * weight])
    assert error(bicgstab, free_rows(block, np.tile(free_dofs, 2)), b) > 1
    S = free_rows(M + half**2 * K, free_dofs)
    assert error(cg, S, free_dofs * (weight - half * K @ u)) < 0.02

    # What does not work
    csr = BCSR.from_scipy_sparse(heat["A"])
    solve_sparse = lambda b: spsolve(csr.data, csr.indices, csr.indptr, b)
    difference = lambda u_next, u_prev: u_next - u_prev
    with pytest.raises(TypeError):
        jnp.linalg.solve(A, u_0[0])
    with pytest.raises(NotImplementedError, match="Batching rule for 'spsolve'"):
        residuum_loss(solve_sparse, u_0[:1, None], difference)
    with pytest.raises(jax.errors.TracerArrayConversionError):
        residuum_loss(lambda u: heat["A"] @ u, u_0[:, None], difference)
    with pytest.raises(TypeError, match="Pass the values of a sparse matrix"):
        residuum_loss(lambda u: u, A, difference)

    class Emulator(eqx.Module):
        matrix: BCOO

    grads = eqx.filter_grad(lambda emulator: jnp.sum(emulator.matrix @ u_0[0]))(Emulator(A))
    assert jnp.max(jnp.abs(grads.matrix.data)) > 0.1


@claim("recipes_training.md#pushforward-and-burn-in")
def recipe_of_the_pushforward_is_the_gradient_of_the_last_step(
    *, update, kernel, data, emulate, heat_residuum, **_
):
    last_only = dict(weights=jnp.arange(10) == 9, cuts=Cuts(bptt=True), num_rollout_steps=10)
    loss = lambda kernel: textbook_loss(
        partial(emulate, kernel), data, heat_residuum, **last_only
    )
    kernel = 0.9 * kernel
    expected = jax.jit(jax.grad(loss))(kernel)
    assert_close_to((kernel - update(kernel, data)) / 0.02, expected, 1e-3)


@claim("recipes_training.md#overlapping-tbptt-windows")
def recipe_of_overlapping_windows_differentiates_through_each_of_them(
    *, update, kernel, data, emulate, heat_residuum, **_
):
    weights = jnp.array([0, 0, 0, 0, 1, 1])
    loss = lambda kernel: textbook_loss(
        partial(emulate, kernel), data, heat_residuum, num_rollout_steps=6, weights=weights
    )
    new_kernel, state = update(kernel, data)
    assert_close_to((kernel - new_kernel) / 0.002, jax.jit(jax.grad(loss))(kernel), 1e-2)
    two_steps = jax.vmap(lambda u: emulate(kernel, emulate(kernel, u)))(data[:, 0])
    assert_close_to(state[:, 0], two_steps)


@claim("recipes_training.md#a-supervised-term")
def recipe_with_data_is_the_supervised_loss(*, supervised_loss, kernel, data, emulate, **_):
    reference = jax.random.normal(jax.random.key(1), (64, 3, 32))
    u, expected = data[:, 0], 0.0
    for t in range(3):
        u = jax.vmap(partial(emulate, kernel))(u)
        expected += jnp.mean((u - reference[:, t]) ** 2)
    assert_close_to(supervised_loss(kernel, reference), expected)


@claim("recipes_problems.md#conservation-laws")
def recipes_conserve_the_mean(*, flux_form, projection, kernel, data, **_):
    for stepper in (flux_form, projection):
        u_next = jax.vmap(partial(stepper, 0.1 * kernel))(data[:, 0])
        assert jnp.max(jnp.abs(jnp.mean(u_next - data[:, 0], axis=1))) < 1e-6


@claim("recipes_problems.md#hybrid-models")
def recipe_of_the_hybrid_model_improves_its_solver(*, loss, correction, **_):
    assert abs(loss(jnp.zeros(9)) - 0.4) < 0.05
    assert loss(correction) < 1e-5


@claim("recipes_problems.md#temporal-bundling")
def recipe_of_temporal_bundling_has_the_residuals_of_a_rollout(
    *, loss, data, kernel, emulate, heat_residuum, **_
):
    u, u_next = data[:, 0], jax.vmap(partial(emulate, kernel))(data[:, 0])
    residuals = [jax.vmap(heat_residuum)(*pair) for pair in ((u_next, u), *2 * [(u_next,) * 2])]
    assert_close_to(loss, jnp.mean(jnp.stack(residuals) ** 2))


@claim("recipes_training.md#a-very-long-trajectory-piece-by-piece")
def recipe_of_a_long_trajectory_goes_on_where_it_stopped(
    *, update, kernel, data, emulate, heat_residuum, **_
):
    u = data[:, 0]
    for _ in range(5):
        u = jax.vmap(partial(emulate, kernel))(u)
    new_kernel, next_data = update(kernel, data)
    assert_close_to(next_data[:, 0], u)
    loss = lambda kernel: textbook_loss(
        partial(emulate, kernel), data, heat_residuum, num_rollout_steps=5
    )
    assert_close_to((kernel - new_kernel) / 0.002, jax.jit(jax.grad(loss))(kernel), 1e-2)


@claim("recipes_problems.md#a-fourth-order-hermite-step")
@config("jax_enable_x64", True)
def residual_of_the_exact_solution_falls_by_32_for_half_a_hermite_step(
    *, hermite_residuum, **_
):
    u_prev = jnp.cos(2 * jnp.pi * 3 * jnp.arange(32) / 32)
    rate = 2 * jnp.cos(2 * jnp.pi * 3 / 32) - 2
    residuals = [
        jnp.linalg.norm(hermite_residuum(jnp.exp(rate * dt) * u_prev, u_prev, dt))
        for dt in (0.2, 0.1)
    ]
    assert abs(residuals[0] / residuals[1] - 32) < 2


@claim("recipes_problems.md#past-states-as-input-of-the-network")
def recipe_with_past_states_extrapolates(*, loss, data, heat_residuum, **_):
    before, u, expected = 1.1 * data[:, 0], data[:, 0], 0.0
    for _ in range(3):
        u_next = 1.5 * u - 0.5 * before
        expected += jnp.mean(jax.vmap(heat_residuum)(u_next, u) ** 2)
        before, u = u, u_next
    assert_close_to(loss, expected)


@claim("recipes_problems.md#deeponets")
def recipe_of_the_deeponet_trains(*, untrained, loss, params, data, heat_residuum, **_):
    persistence = jnp.mean(jax.vmap(heat_residuum)(data[:, 0], data[:, 0]) ** 2)
    assert_close_to(untrained, persistence)
    assert abs(untrained - 1.6) < 0.05
    assert 1e-4 < loss(params) < 1e-3


@claim("recipes_problems.md#graph-networks-and-unstructured-meshes")
def recipe_of_the_graph_network_trains_on_the_same_residual(
    *, untrained, loss, params, data, heat_residuum, graph_residuum, graph_network, **names
):
    u_next, u_prev = data[:32, 0], data[32:, 0]
    assert_close_to(
        jax.vmap(graph_residuum)(u_next, u_prev), jax.vmap(heat_residuum)(u_next, u_prev)
    )
    assert abs(untrained - 1.6) < 0.05
    assert 0.01 < loss(params) < 0.02

    # The edges are a part of the state, as for meshes that differ between samples.
    def stepper(state):
        u, edges = state["u"], (state["senders"], state["receivers"])
        for layer in params:
            difference = u[edges[0]] - u[edges[1]]
            messages = jnp.tanh(difference[:, None] * layer["message"])
            u = u + jax.ops.segment_sum(messages, edges[1], num_segments=32) @ layer["update"]
        return {**state, "u": u}

    edges = {
        name: jnp.broadcast_to(names[name], (64, 1, 64)) for name in ("senders", "receivers")
    }
    residuum_fn = lambda next, prev: heat_residuum(next["u"], prev["u"])
    actual = residuum_loss(stepper, {"u": data, **edges}, residuum_fn, num_rollout_steps=3)
    expected = residuum_loss(
        partial(graph_network, params), data, graph_residuum, num_rollout_steps=3
    )
    assert_close_to(actual, expected)


@claim("recipes_networks.md#log-each-time-level")
def recipe_logs_the_terms_of_the_loss(*, update, value, time_level_losses, **_):
    assert_close_to(jnp.sum(time_level_losses), value)
    kernel = jnp.zeros(9, jnp.float32).at[4].set(1.0)
    _, first, _ = update(kernel)
    assert value < 0.01 * first


@claim("recipes_networks.md#save-or-offload-some-activations")
def recipe_that_saves_named_activations_has_the_same_gradient(*, grad, loss, kernel, save, **_):
    everything = jax.checkpoint_policies.everything_saveable
    assert_close_to(grad, jax.grad(loss)(kernel, everything))
    nothing = jax.checkpoint_policies.nothing_saveable
    sizes = [
        memory(lambda kernel, policy=policy: jax.grad(loss)(kernel, policy), kernel)
        for policy in (everything, save, nothing)
    ]
    assert sizes[0] > sizes[1] > sizes[2]


@claim("scaling_out.md")
def a_state_that_is_split_over_devices_has_the_gradient_of_one_that_is_not(
    *, split, whole, value, grads, **_
):
    chex.assert_trees_all_close(*jax.device_get((split, whole)), rtol=1e-5)
    chex.assert_trees_all_close(*jax.device_get(((value, grads), whole)), rtol=1e-5)
    assert jax.device_count() > 1


@claim("cuts.md#how-large-is-the-bias-of-a-cut")
def the_bias_of_a_cut_falls_with_the_length_of_its_segments(*, loss, kernel, data, full, **_):
    cuts = [jax.grad(loss)(kernel, data, Cuts(bptt=k)) for k in (1, 4, 16)]
    distances = [jnp.linalg.norm(cut - full) for cut in cuts]
    assert distances[0] > distances[1] > distances[2] == 0
    size = jnp.linalg.norm(cuts[0])
    assert 0.9999 < cuts[0] @ full / size / jnp.linalg.norm(full) < 1
    assert abs(size / jnp.linalg.norm(full) - 1.034) < 1e-3


@claim("recipes_problems.md#learn-a-physical-parameter")
def recipe_learns_the_physical_parameter(*, params, **_):
    assert abs(params["diffusion"] - 0.5) < 1e-3


@claim("recipes_networks.md#batch-statistics")
def recipe_with_a_named_axis_has_the_gradient_of_the_whole_batch(
    *, loss, grads, params, data, normed_emulate, heat_residuum, **_
):
    def loss_of_whole_batch(params, cuts):
        stepper = jax.vmap(partial(normed_emulate, params), axis_name="batch")
        residuum_fn = jax.vmap(heat_residuum)
        one_sample = data[:, 0][None, None]
        options = dict(num_rollout_steps=3, cuts=cuts)
        return textbook_loss(stepper, one_sample, residuum_fn, **options)

    def vmap_outside(params):
        stepper = partial(normed_emulate, params)
        options = dict(num_rollout_steps=3, cuts=Cuts(bptt=True))
        of_one = lambda u: residuum_loss(stepper, u[None], heat_residuum, **options)
        return jnp.mean(jax.vmap(of_one, axis_name="batch")(data))

    for cuts in (Cuts(), Cuts(bptt=True), Cuts(bptt=2), Cuts(prev=True)):
        actual = jax.jit(jax.value_and_grad(partial(loss, cuts=cuts)))(params)
        expected = jax.jit(jax.value_and_grad(partial(loss_of_whole_batch, cuts=cuts)))(params)
        assert_close_to(actual, expected)
        if cuts == Cuts():
            assert_close_to(grads, expected[1])
    named = partial(loss, cuts=Cuts(bptt=True))
    assert_close_to(jax.jit(jax.grad(vmap_outside))(params), jax.jit(jax.grad(named))(params))
    assert memory(jax.grad(vmap_outside), params) > 1.3 * memory(jax.grad(named), params)


@claim("forcing.md")
@config("jax_enable_x64", False)
def recipe_follows_a_forcing_that_it_has_not_seen(
    *, error, kernels, u_0, draw, convolve, nrmse, source, true_source, **names
):
    assert error < 0.01
    not_forced = {**kernels, "f": jnp.zeros(9)}
    f = draw(jax.random.key(3), 20)
    assert nrmse(not_forced, u_0, f) > 0.9
    assert jnp.linalg.norm(source - true_source) < 0.2 * jnp.linalg.norm(true_source)
    # The expected steps are written by hand, with the forcing at both ends of each step.
    laplacian = jnp.roll(jnp.eye(32), 1, axis=0) + jnp.roll(jnp.eye(32), -1, axis=0)
    laplacian = laplacian - 2 * jnp.eye(32)
    exact = emulated = u_0[:, 0]
    assert jnp.all(f["prev"][:, 1:] == f["next"][:, :-1])
    for t in range(20):
        f_mean = (f["prev"][:, t] + f["next"][:, t]) / 2
        right_hand_side = exact + 0.25 * exact @ laplacian + f_mean
        exact = jnp.linalg.solve(jnp.eye(32) - 0.25 * laplacian, right_hand_side.T).T
        forced = jax.vmap(partial(convolve, kernels["f"]))(2 * f_mean)
        emulated = jax.vmap(partial(convolve, kernels["u"]))(emulated) + forced
    by_hand = jnp.linalg.norm(emulated - exact) / jnp.linalg.norm(exact)
    assert abs(error / by_hand - 1) < 1e-2


@claim("recipes_networks.md#dropout")
@config("jax_enable_x64", False)
def recipes_with_dropout_draw_a_mask_for_each_sample_and_step(
    *, step, loss, params, keys, data, heat_residuum, **_
):
    u, expected = data[:, 0], 0.0
    for t in range(3):
        u_next = jax.vmap(partial(step, params))(u, keys[:, t])
        expected += jnp.mean(jax.vmap(heat_residuum)(u_next, u) ** 2)
        u = u_next
    assert_close_to(loss(params, keys), expected)
    assert loss(params, keys) != loss(params, keys[::-1])
    same_state = jax.vmap(partial(step, params, data[0, 0]))(keys[:, 0])
    assert jnp.all(jnp.ptp(same_state, axis=0) > 0)


@claim("recipes_problems.md#external-solvers")
@config("jax_enable_x64", False)
def recipe_with_an_external_solver_has_its_derivatives(*, loss, kernel, grad, curvature, **_):
    slope = lambda kernel: jnp.vdot(jax.grad(loss)(kernel), grad)
    assert_close_to(curvature, jax.grad(slope)(kernel), 1e-3)
    difference = (loss(kernel + 1e-3 * grad) - loss(kernel - 1e-3 * grad)) / 2e-3
    assert_close_to(difference, jnp.vdot(grad, grad), 1e-2)
    for k in (1, 2):
        cut = partial(loss, cuts=Cuts(bptt=k))
        assert jnp.all(jnp.isfinite(jax.jvp(jax.grad(cut), (kernel,), (grad,))[1]))


@claim("recipes_training.md#curriculum")
def recipe_of_the_curriculum_compiles_each_length(*, update, **_):
    assert update._cache_size() == 3


@claim("recipes_training.md#a-schedule-of-cuts")
def recipe_schedules_the_cuts(*, update, emulate, heat_residuum, data, **names):
    kernel = jnp.zeros(9, jnp.float32).at[3].set(1.0)
    assert update._cache_size() == 5
    assert jnp.all(jnp.isfinite(names["kernel"]))
    for k in (1, 2, 4, 8, 16):
        loss = lambda kernel: textbook_loss(
            partial(emulate, kernel),
            data,
            heat_residuum,
            num_rollout_steps=16,
            cuts=Cuts(bptt=k),  # noqa: B023
        )
        grad = jax.jit(jax.grad(loss))(kernel)
        assert_close_to((kernel - update(kernel, k)) / 0.001, grad, 1e-3)
    sizes = [memory(partial(update, k=k), kernel) for k in (1, 2, 4, 8, 16)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] / 4


@claim("recipes_training.md#adaptive-weights")
def recipe_adapts_the_weights_to_the_losses(*, history, update, weights, kernel, **names):
    assert update._cache_size() == 1
    for before, after in pairwise(history[1:]):
        assert abs(jnp.sum(after) - 5) < 1e-4
        assert jnp.any(before != after)
    # Time levels with larger losses have smaller weights.
    losses = names["time_level_losses"]
    assert (jnp.argsort(losses) == jnp.argsort(-weights)).all()
    assert jnp.ptp(weights) > 0.1
    # The update uses the weights.
    other, *_ = update(kernel, weights[::-1])
    assert jnp.any(other != update(kernel, weights)[0])


@claim("recipes_training.md#causal-weights")
def recipe_opens_one_level_after_the_other(*, history, update, emulate, data, **names):
    assert update._cache_size() == 1
    for weights in history:
        assert weights[0] == 1 and jnp.all(jnp.diff(weights) <= 0)
    assert history[0][-1] < 0.003 and history[19][-1] > 0.999
    assert history[20][-1] < history[19][-1]  # a larger eps demands smaller losses
    # The weights follow from the losses, as computed by hand.
    kernel, eps, losses = jnp.zeros(9, jnp.float32).at[4].set(1.0), 0.5, []
    u_prev = data[:, 0]
    for _ in range(5):
        u_next = jax.vmap(partial(emulate, kernel))(u_prev)
        losses.append(jnp.mean(jax.vmap(names["heat_residuum"])(u_next, u_prev) ** 2))
        u_prev = u_next
    expected = jnp.stack([jnp.exp(-eps * sum(losses[:t])) for t in range(5)])
    new_kernel, weights = update(kernel, jnp.ones(5), eps)
    assert_close_to(weights, expected)
    # The update uses the weights.
    assert jnp.any(new_kernel != update(kernel, weights, eps)[0])


@claim("recipes_training.md#a-buffer-with-a-forcing")
@config("jax_enable_x64", False)
def recipe_of_a_buffer_with_a_forcing_keeps_states_and_times_together(
    *, kernel, buffer, update, forcing_series, emulate, **_
):
    ages = buffer["time"] / 0.5
    assert_close_to(ages, jnp.round(ages), 1e-4)
    assert jnp.max(ages) > 5 and jnp.mean(ages == 0) > 0.01
    _, after = update(kernel, buffer, jax.random.key(3))
    visited = after["time"] > buffer["time"]
    assert 40 < jnp.sum(visited) <= 64
    # A visited state has advanced by five steps, under the forcing of its time and phase.
    u, series = buffer["u"], forcing_series(buffer)
    for n in range(5):
        u = jax.vmap(partial(emulate, kernel))(u) + 0.1 * series[:, n]
    assert_close_to(after["u"][visited], u[visited], 1e-4)
    assert_close_to(series[:, -1, 0], jnp.sin(buffer["time"] + 0.5 + buffer["phase"]), 1e-4)
    # Any other state is as it was, or fresh.
    is_fresh = (after["time"] == 0) & ~visited
    same = jnp.all(after["u"] == buffer["u"], axis=1) & (after["phase"] == buffer["phase"])
    assert jnp.all(same | visited | is_fresh)


@claim("recipes_training.md#a-replay-buffer")
@config("jax_enable_x64", False)
def recipe_keeps_a_replay_buffer(*, kernel, buffer, update, draw, **_):
    fresh = draw(jax.random.key(1), 256)
    was_visited = jnp.any(buffer != fresh, axis=1)
    assert jnp.mean(was_visited) > 0.9
    energy = jnp.mean(buffer**2, axis=1)
    assert jnp.any(energy[was_visited] > 0.5)  # started afresh: the others have decayed
    assert jnp.mean(energy < 0.2) > 0.5
    # In one update, a batch advances, and the rest of the buffer stays as it is.
    key = jax.random.key(3)
    new_kernel, after = update(kernel, buffer, key)
    assert jnp.sum(jnp.any(after != buffer, axis=1)) == 64
    assert jnp.any(new_kernel != kernel)
    # States that are not finite are replaced, and do not reach the parameters.
    new_kernel, after = update(kernel, jnp.full_like(buffer, jnp.nan), key)
    assert jnp.sum(jnp.isfinite(after).all(axis=1)) == 64
    assert (new_kernel == kernel).all()


@claim("recipes_networks.md#whitened-neighbours")
def whitened_neighbours_are_uncorrelated(*, covariance, whitening, neighbours, **_):
    assert np.linalg.cond(covariance) == pytest.approx(55_000, rel=0.1)
    chex.assert_trees_all_close(whitening @ covariance @ whitening.T, np.eye(9), atol=1e-9)
    assert neighbours(jnp.ones(32)).shape == (9, 32)


@claim("recipes_problems.md#a-differential-algebraic-equation")
def projection_is_the_exact_step(
    *, projection_step, flows, navier_stokes_residuum, divergence, **_
):
    assert residuum_loss(projection_step, flows, navier_stokes_residuum) < 1e-11
    persistence = lambda state: state
    assert residuum_loss(persistence, flows, navier_stokes_residuum) > 1e-5
    flow = jax.tree.map(lambda x: x[0, 0], flows)
    compressible = flow | {"velocity": flow["velocity"] ** 2}
    assert jnp.max(jnp.abs(divergence(flow["velocity"]))) < 1e-4
    assert jnp.max(jnp.abs(divergence(compressible["velocity"]))) > 0.1


@claim("recipes_problems.md#stiff-systems")
def radau_solves_robertsons_problem(*, data, state, solver, newton_correction, **_):
    assert residuum_loss(solver, data, newton_correction, num_rollout_steps=4) < 1e-11
    assert residuum_loss(lambda state: state, data, newton_correction) > 0.1
    published = jnp.array([0.7158, 9.185e-6, 0.2842])
    chex.assert_trees_all_close(state["y"] / published, jnp.ones(3), rtol=0.004)
    assert abs(jnp.sum(state["y"]) - 1 - 3e-5) < 1e-5


@claim("recipes_problems.md#a-loss-relative-to-the-change-of-the-state")
def each_sample_starts_at_a_loss_of_one(*, relative_residuum, data, **_):
    for scale in (1.0, 1e-3):
        loss = residuum_loss(lambda u: u, scale * data, relative_residuum)
        assert loss == pytest.approx(1, rel=1e-4)


@claim("recipes_training.md#young-and-old-states-in-one-buffer")
def mean_ages_follow_from_the_probabilities(*, restarts, mean_ages, **_):
    keys = jax.random.split(jax.random.key(0), 4000)
    shares = jnp.mean(jax.vmap(restarts, (0, None))(keys, jnp.array([0, 100, 255])), axis=0)
    expected = 5 / mean_ages[jnp.array([0, 100, 255])]
    chex.assert_trees_all_close(shares, expected, rtol=0.3, atol=1e-3)


@claim("recipes_training.md#noise-on-the-input")
def recipe_with_noise_has_the_gradient_of_a_loop_by_hand(
    *, loss, emulate, heat_residuum, data, **_
):
    def loss_by_hand(kernel, key):
        loss, u, keys = 0.0, data[:, 0], jax.random.split(key, (64, 3))
        for t in range(3):
            noise = jax.vmap(partial(jax.random.normal, shape=(32,)))(keys[:, t])
            u = u + 0.01 * noise.astype(u.dtype)
            u_next = jax.vmap(partial(emulate, kernel))(u)
            loss = loss + jnp.mean(jax.vmap(heat_residuum)(u_next, u) ** 2)
            u = u_next
        return loss

    kernel = jnp.linspace(-0.2, 0.5, 9, dtype=jnp.float32)
    value_and_grad = jax.jit(jax.value_and_grad(loss))
    one, other = [value_and_grad(kernel, jax.random.key(i)) for i in range(2)]
    assert 1e-5 < abs(one[0] / other[0] - 1) < 0.1
    expected = jax.jit(jax.value_and_grad(loss_by_hand))(kernel, jax.random.key(0))
    assert_close_to(one, expected)


def assert_close_to(actual, expected, tolerance=1e-4):
    """Compares leaves relative to the largest entry of each leaf, in any precision."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for x, y in pairs:
        assert jnp.shape(x) == jnp.shape(y)
        assert jnp.max(jnp.abs(x - y)) <= tolerance * jnp.max(jnp.abs(y))


def memory(function, *args):
    """Returns the temporary memory, in bytes, of the program that a user would compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        with config("jax_enable_x64", False):
            compiled = jax.jit(function).lower(*args).compile()
    finally:
        jax.config.update("jax_disable_most_optimizations", not OPTIMIZED)
    return compiled.memory_analysis().temp_size_in_bytes


@claim("recipes_networks.md#saving-and-resuming")
def recipe_brings_back_what_was_saved(*, keys, states, data, **_):
    assert (states["key"] == keys).all()
    assert (states["u"] == data).all()


@pytest.mark.parametrize(
    "name, program",
    [
        pytest.param(name, program, marks=() if name.startswith("README") else pytest.mark.slow)
        for name, program in PROGRAMS
    ],
    ids=[f"{i}: {name}" for i, (name, _) in enumerate(PROGRAMS)],
)
def test_block_runs_and_does_what_is_said(name, program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = run(name, program)
    CLAIMS.get(name, lambda **_: None)(**namespace)
    for value in list(namespace.values()):
        if isinstance(value, type) and issubclass(value, chex.TestCase):
            tests = unittest.defaultTestLoader.loadTestsFromTestCase(value)
            result = unittest.TextTestRunner(stream=io.StringIO()).run(tests)
            assert result.wasSuccessful() and result.testsRun > 0


def test_every_claim_is_about_a_section_that_has_a_block():
    assert CLAIMS.keys() <= {name for name, _ in PROGRAMS}


#
# The messages in the FAQ are those that a user sees
#

ONES = jnp.ones((16, 1, 32))


def difference(u_next, u_prev):
    return u_next - u_prev


def loss(stepper=lambda u: u, data=ONES, **options):
    return residuum_loss(stepper, data, options.pop("residuum_fn", difference), **options)


def close_over_a_ref():
    if not hasattr(jax, "new_ref"):
        pytest.skip("needs a newer JAX")
    ref = jax.new_ref(jnp.array(1.0))
    loss(lambda u: ref[...] * u)


def close_over_a_batch_norm_of_equinox():
    import equinox as eqx

    norm, statistics = eqx.nn.make_with_state(eqx.nn.BatchNorm)(32, "batch")
    loss(lambda u: norm(u, statistics)[0])


def close_over_a_batch_norm_of_flax():
    from flax import nnx

    norm = nnx.BatchNorm(32, rngs=nnx.Rngs(0))
    loss(lambda u: norm(u))


def close_over_a_dropout_of_flax():
    from flax import nnx

    dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(0))
    loss(lambda u: dropout(u))


def differentiate_a_while_loop_forward():
    stepper = lambda scale, u: jax.lax.while_loop(
        lambda u: jnp.max(u) > 10.0, lambda u: scale * u, scale * u
    )
    of_scale = lambda scale: loss(
        partial(stepper, scale), num_rollout_steps=3, cuts=Cuts(bptt=True)
    )
    jax.jvp(of_scale, (0.5,), (1.0,))


def forget_has_aux_in_a_gradient():
    jax.grad(lambda scale: loss(lambda u: scale * u, has_aux=True))(1.0)


def rematerialise_a_module():
    import equinox as eqx

    network = eqx.nn.Linear(32, 32, key=jax.random.key(0))
    loss(lambda u: jax.checkpoint(network)(u))


MESSAGES = {
    "data: batch 16, num_snapshots 32, one sample float32[]": lambda: loss(
        lambda u: jnp.ones((32, 32)) @ u, jnp.ones((16, 32), jnp.float32)
    ),
    "stepper must return only the next state": lambda: loss(lambda u: (u, u)),
    "stepper must return a state": lambda: loss(lambda u: u[1:]),
    "data must be floating point": lambda: loss(
        lambda u: 0.5 * u, jnp.ones((16, 1, 32), jnp.int32)
    ),
    "data must be an array of shape [batch, num_snapshots, ...]": lambda: loss(
        data=jnp.ones(32)
    ),
    "data must be arrays that agree on [batch, num_snapshots]": lambda: loss(
        data={"u": ONES, "viscosity": jnp.ones((1, 1))}
    ),
    "inputs must be an array": lambda: loss(
        lambda u, f: u + f, num_rollout_steps=3, inputs=jnp.ones((16, 4, 32))
    ),
    "positional argument but 2 were given": lambda: loss(inputs=ONES),
    "A list is read as separate fields": lambda: loss(data=[jnp.ones(32)] * 3),
    "cuts must be a Cuts(bptt, prev, next)": lambda: loss(cuts=True),
    "make it static in jax.jit": lambda: jax.jit(
        lambda cuts: loss(num_rollout_steps=10, cuts=cuts)
    )(Cuts(bptt=5)),
    "Pass the values of a sparse matrix": lambda: loss(data=BCOO.fromdense(jnp.eye(32))),
    "It is a masked array": lambda: loss(data=np.ma.masked_equal(np.ones((16, 1, 32)), 0)),
    "num_rollout_steps must be a static int": lambda: jax.jit(
        lambda n: loss(num_rollout_steps=n)
    )(3),
    "weights must be a real array of shape [num_rollout_steps]": lambda: loss(
        weights=[1.0, 2.0]
    ),
    "axis_name must be one name": lambda: loss(axis_name=("batch", "devices")),
    "must hold at least one array": lambda: loss(residuum_fn=lambda u_next, u_prev: None),
    "time_level_loss must return a real scalar": lambda: loss(time_level_loss=jnp.square),
    "Gradient only defined for scalar-output functions": forget_has_aux_in_a_gradient,
    "Found an unbound axis name": close_over_a_batch_norm_of_equinox,
    "Cannot mutate BatchStat from a different trace level": close_over_a_batch_norm_of_flax,
    "Cannot mutate RngCount from a different trace level": close_over_a_dropout_of_flax,
    "forward mode needs reverse mode as well": differentiate_a_while_loop_forward,
    "A jax.Ref cannot be closed over": close_over_a_ref,
    "unhashable type, from jax.checkpoint": rematerialise_a_module,
}


@pytest.mark.parametrize(
    "message",
    [
        # The messages of other packages may differ from version to version.
        pytest.param(m, marks=pytest.mark.slow if "_a_" in provoke.__name__ else ())
        for m, provoke in MESSAGES.items()
    ],
)
def test_message_is_as_in_the_faq(message):
    with pytest.raises(Exception) as raised:
        MESSAGES[message]()
    text = "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert message.split(", from")[0] in text


def test_faq_has_these_messages():
    text = (ROOT / "docs" / "faq.md").read_text()
    messages = text.split("## Messages\n")[1].split("\n## Training\n")[0]
    assert re.findall(r"^### (.*)$", messages, re.MULTILINE) == list(MESSAGES)


#
# README is complete
#


def test_readme_names_every_parameter():
    code = residuum_loss.__kwdefaults__ or residuum_loss.__wrapped__.__kwdefaults__
    for name in ("stepper", "data", "residuum_fn", *code):
        assert f"`{name}`" in README.read_text()


#
# Form
#


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_fits_the_page(page):
    for block in BLOCK.findall(page.read_text()):
        assert all(len(line) <= 88 for line in block.splitlines()), block


def anchors(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {*map(slug, titles), *re.findall(r'<a id="([^"]+)"></a>', text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_and_sections_that_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"""(?:\]\(|href=")([^)"]+)""", text)
    links = [link for link in links if not link.startswith("http")]
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


# These were the headings of recipes.md when it had all recipes, and other sites may link to
# them.
OLD_RECIPES = """\
a-differential-algebraic-equation a-loss-relative-to-the-size-of-the-state
a-parameter-for-each-sample a-replay-buffer a-schedule-of-cuts a-two-step-scheme
a-very-long-trajectory-piece-by-piece adaptive-weights batch-statistics causal-weights
checks-inside-the-functions complex-spectral-states conservation-laws curriculum
data-beside-the-residual deeponets-and-graph-networks dropout external-solvers hybrid-models
learn-a-physical-parameter log-each-time-level loss-scaling noise-on-the-input
offload-or-save-some-activations overlapping-tbptt-windows past-states-as-input-of-the-network
preconditioned-loss pushforward-and-burn-in recipes saving-and-resuming
several-residuals-at-once temporal-bundling the-gradient-of-each-time-level""".replace(
    "\n", " "
).split(" ")


@pytest.mark.parametrize("anchor", OLD_RECIPES)
def test_old_links_to_recipes_still_lead_there(anchor):
    assert anchor in anchors(ROOT / "docs" / "recipes.md")


def test_the_index_of_the_recipes_lists_every_recipe():
    index = (ROOT / "docs" / "recipes.md").read_text()
    links = re.findall(r"\]\((recipes_\w+\.md#[^)]+)\)", index)
    recipes = [
        f"{page.name}#{slug(title)}"
        for page in sorted((ROOT / "docs").glob("recipes_*.md"))
        for title in re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE)
    ]
    assert sorted(links) == sorted(recipes)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    listed = re.findall(r"(\w+\.md)$", navigation, re.MULTILINE)
    pages = [page.name for page in PAGES if page != README]
    assert sorted(listed) == sorted([*pages, "index.md"])  # README becomes the page index.md


def table_rows(lines):
    """Returns the rows of a Markdown table by their first cell, each as {column: cell}."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    _, *columns = cells[0]
    return {name: dict(zip(columns, row, strict=True)) for name, *row in cells[2:]}


@pytest.mark.parametrize(
    "page, study",
    [
        ("your_own_problem.md", "gray_scott"),
        ("examples.md", "shallow_water"),
        ("published_emulator.md", "ar_densed_kuramoto_sivashinsky"),
        ("published_emulator.md", "ar_densed_burgers"),
    ],
)
def test_rows_of_an_ablation_are_those_of_its_table(page, study):
    path = f"studies/{study}/ablation.md"
    before, link, _ = (ROOT / "docs" / page).read_text().partition(f"](../{path})")
    assert link
    shown = re.findall(r"(?:^\|.*\|\n)+", before, re.MULTILINE)[-1].splitlines()
    lines = (ROOT / path).read_text().splitlines()
    whole = table_rows([line for line in lines if line.startswith("|")])
    rows = table_rows(shown)
    assert {"the recipe", "nothing"} & rows.keys() and len(rows) >= 4
    for name, row in rows.items():
        assert row.items() <= whole[name].items(), name


def test_every_figure_is_shown():
    text = "".join(page.read_text() for page in PAGES)
    assert all(f"assets/{name}" in text for name in os.listdir(ROOT / "assets"))
