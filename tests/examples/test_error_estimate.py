"""The estimate of examples/error_estimate.py is exact for linear problems, and of second order
for others."""

import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_estimate import estimate_error, gmres

from test_residuum import assert_close
from tests.common import ROOT


NUM_STEPS = 4


def dense(operator, right_hand_side):
    matrix = jax.jacfwd(operator)(jnp.zeros_like(right_hand_side))
    return jnp.linalg.solve(matrix, right_hand_side)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def state(seed=0):
    """A state with leaves of every kind, of which u and z are unknowns."""
    return {
        "key": jax.random.key(seed),
        "mask": jnp.array([1.0, 0.0, 1.0]),  # is returned as it was received
        "n": jnp.int32(seed),
        "u": normal(3, seed=seed),
        "z": normal(2, seed=seed + 1) + 1j * normal(2, seed=seed + 2),
    }


A, B = 3 * jnp.eye(3) + 0.3 * normal(3, 3, seed=5), normal(3, 3, seed=6)


def linear_residuum(u_next, u_prev, f):
    """It mixes z with its conjugate, so that real and imaginary parts are separate unknowns."""
    return {
        "a": A @ u_next["u"] - B @ u_prev["u"] - u_prev["mask"] * f + u_next["z"][0].real,
        "b": 2 * u_next["z"] + 0.5j * u_next["z"].conj() - u_prev["z"] * u_prev["n"],
    }


def emulator(state, f):
    z = 0.3 * state["z"] + 0.1j
    return state | {"n": state["n"] + 1, "u": jnp.tanh(state["u"] + f), "z": z}


def exact_step(state, f):
    z_next = jnp.linalg.solve(
        jnp.array([[2.0, 0.5], [0.5, 2.0]]),  # 2 z + 0.5i z̄ for real and imaginary part
        jnp.stack([(state["z"] * state["n"]).real, (state["z"] * state["n"]).imag]),
    )
    z_next = z_next[0] + 1j * z_next[1]
    u_next = jnp.linalg.solve(A, B @ state["u"] + state["mask"] * f - z_next[0].real)
    return state | {"n": state["n"] + 1, "u": u_next, "z": z_next}


def trajectory(stepper, u_0, inputs):
    states = []
    for f in inputs:
        u_0 = stepper(u_0, f)
        states.append(u_0)
    return {name: jnp.stack([u[name] for u in states]) for name in u_0}


@pytest.mark.parametrize("solve", [dense, partial(gmres, tol=1e-13)])
def test_the_estimate_is_exact_for_a_linear_residual(solve):
    inputs = normal(NUM_STEPS, seed=7)
    options = dict(num_rollout_steps=NUM_STEPS, solve=solve)
    estimate = jax.jit(partial(estimate_error, emulator, linear_residuum, **options))
    states, errors = estimate(state(), inputs)
    emulated, exact = (trajectory(f, state(), inputs) for f in (emulator, exact_step))
    for name in ("mask", "n", "u", "z"):
        assert_close(states[name], emulated[name])
        assert_close(errors[name], emulated[name] - exact[name] + 0.0)
    assert jnp.linalg.norm(errors["u"]) > 0.1
    assert errors["key"].shape == (NUM_STEPS,) and not jnp.any(errors["key"])


def test_several_samples_by_vmap():
    inputs = normal(2, NUM_STEPS, seed=7)
    of_one = partial(estimate_error, emulator, linear_residuum, num_rollout_steps=NUM_STEPS)
    starts = [state(0), state(1)]
    together = jax.tree.map(lambda *x: jnp.stack(x), *starts)
    _, errors = jax.jit(jax.vmap(of_one))(together, inputs)
    for i, start in enumerate(starts):
        assert_close(errors["u"][i], of_one(start, inputs[i])[1]["u"], 1e-6)


def test_the_corrected_trajectory_is_of_second_order():
    """If the emulator's error is half as large, that of the corrected one is a quarter."""

    def residuum_fn(u_next, u_prev):
        return u_next + 0.3 * u_next**3 - u_prev

    def exact(u_prev):
        u = u_prev
        for _ in range(50):
            u = u - residuum_fn(u, u_prev) / (1 + 0.9 * u**2)
        return u

    def errors(size):
        stepper = lambda u: exact(u) + size * jnp.cos(u)
        options = dict(num_rollout_steps=NUM_STEPS, solve=dense)
        states, estimated = estimate_error(stepper, residuum_fn, u_0, **options)
        u, solution = u_0, []
        for _ in range(NUM_STEPS):
            u = exact(u)
            solution.append(u)
        true = states - jnp.stack(solution)
        return jnp.linalg.norm(true), jnp.linalg.norm(true - estimated)

    u_0 = normal(5)
    (true, corrected), (half, quarter) = errors(1e-2), errors(5e-3)
    assert true / half == pytest.approx(2, rel=0.05)
    assert corrected / quarter == pytest.approx(4, rel=0.05)
    assert corrected < 0.01 * true


def test_a_stepper_may_widen_the_state():
    stepper = lambda u: jnp.tanh(u) * np.arange(1.0, 4.0)
    u_0 = jnp.ones(3, jnp.float32)
    states, errors = estimate_error(stepper, lambda n, p: n - p, u_0, num_rollout_steps=2)
    assert states.dtype == errors.dtype == jnp.float64
    assert_close(errors, states - 1, 1e-6)  # the exact step changes nothing


def test_the_file_may_be_copied(tmp_path):
    """Its functions need nothing but jax."""
    shutil.copy(ROOT / "examples" / "error_estimate.py", tmp_path)
    program = """if True:
        import sys
        for name in ("residuum", "equinox", "exponax", "matplotlib", "burgers", "common"):
            sys.modules[name] = None  # an import of it fails
        import jax.numpy as jnp
        from error_estimate import estimate_error
        residuum_fn = lambda u_next, u_prev: 2 * u_next - u_prev
        stepper, u_0 = lambda u: 1.0 * u, jnp.ones(3)
        _, errors = estimate_error(stepper, residuum_fn, u_0, num_rollout_steps=1)
        assert jnp.allclose(errors, 0.5), errors
    """
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


def test_a_residual_of_another_size_is_named():
    stepper, residuum_fn = (lambda u: u / 2), (lambda n, p: (n - p)[1:])
    with pytest.raises(ValueError, match=r"residuum_fn has 2 entries.* 3 unknowns"):
        estimate_error(stepper, residuum_fn, jnp.ones(3), num_rollout_steps=2)
