"""Defines the problems of the study, each with the methods that compete in it.

A method advances a state of one sample by one time step: `step(u_prev, before, inputs_t)`. Here
`before` is the state before `u_prev`. All methods compute in float32, as the emulators do.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import basin
import burgers
import burgers_2d
import exponax as ex
import jax
import jax.numpy as jnp
import numpy as np
import shallow_water
from error_estimate import gmres
from jax.flatten_util import ravel_pytree

from residuum import residuum_loss
from studies.burgers_2d import run as burgers_2d_study


EMULATOR, CORRECTED = "emulator", "emulator, corrected"
EXPLICIT, EXPONENTIAL = "explicit Runge–Kutta", "exponential Runge–Kutta"
PERSISTENCE, EXTRAPOLATION = "implicit, from persistence", "implicit, from extrapolation"
COARSER = "exponential, coarser grid"


class Method(NamedTuple):
    family: str
    variant: str  # such as the number of substeps
    step: Callable
    num_points: int | None = None  # of a grid other than that of the problem


class Problem(NamedTuple):
    title: str
    methods: list[Method]
    states: Any  # of the tests, leaves `[sample, ...]`
    inputs: Any  # leaves `[sample, time, ...]`, or `None`
    reference: np.ndarray  # at the last step, `[sample, ...]`
    num_steps: int
    fields: Callable = lambda state: state  # whose nRMSE is the error


#
# Families of methods
#


def runge_kutta_4(slope, dt, num_substeps):
    def substep(_, u):
        h = dt / num_substeps
        k1 = slope(u)
        k2 = slope(u + h / 2 * k1)
        k3 = slope(u + h / 2 * k2)
        return u + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(u + h * k3))

    return lambda u, before, inputs_t: jax.lax.fori_loop(0, num_substeps, substep, u)


def iterations(residuum_fn, k):
    """Returns `u_next, u_prev -> u_next` with k iterations `u - r`, where the residual r is
    preconditioned."""

    def improve(u, u_prev):
        return jax.lax.fori_loop(0, k, lambda _, u: u - residuum_fn(u, u_prev), u)

    return improve


def newton(residuum_fn, k):
    """Returns `u_next, u_prev -> u_next` with one step of Newton's method and k iterations of
    GMRES."""

    def improve(u, u_prev):
        r, operator = jax.linearize(lambda u: residuum_fn(u, u_prev), u)
        flat, unravel = ravel_pytree(r)
        flat_operator = lambda x: ravel_pytree(operator(unravel(x)))[0]
        return u - unravel(gmres(flat_operator, flat, restart=k, maxiter=1))

    return improve


def without_inputs(stepper):
    return lambda u, before, inputs_t: stepper(u)


def spectral_methods(stepper, slope, residuum_fn, exponential, dt, num_points):
    """Returns the methods for a periodic problem. `exponential(num_points, order,
    num_substeps)` makes a stepper of exponax."""
    methods = [Method(EMULATOR, "", without_inputs(stepper))]
    improvements = {f"{k} iterations": iterations(residuum_fn, k) for k in (1, 2)}
    improvements["Newton, 4 GMRES"] = newton(residuum_fn, 4)
    for variant, improve in improvements.items():
        step = lambda u, before, _, improve=improve: improve(stepper(u), u)
        methods.append(Method(CORRECTED, variant, step))
    for n in (1, 2, 4, 8):
        methods.append(Method(EXPLICIT, f"{n} substeps", runge_kutta_4(slope, dt, n)))
    for order, num_substeps in ((1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (4, 2)):
        step = without_inputs(exponential(num_points, order, num_substeps))
        methods.append(Method(EXPONENTIAL, f"order {order}, {num_substeps} substeps", step))
    for fraction in (1 / 2, 3 / 4):
        coarse = int(fraction * num_points)
        for order in (2, 4):
            step = without_inputs(exponential(coarse, order, 1))
            methods.append(Method(COARSER, f"{coarse} points, order {order}", step, coarse))
    for k in (1, 2, 4, 8):
        improve = iterations(residuum_fn, k)
        from_persistence = lambda u, before, _, improve=improve: improve(u, u)
        methods.append(Method(PERSISTENCE, f"{k} iterations", from_persistence))
        from_both = lambda u, before, _, improve=improve: improve(2 * u - before, u)
        methods.append(Method(EXTRAPOLATION, f"{k} iterations", from_both))
    return methods


#
# Burgers' equation in one and in two dimensions
#


def burgers_problem(quick):
    keys = jax.random.split(jax.random.key(0), 3)
    loss_fn = partial(
        residuum_loss, residuum_fn=burgers.crank_nicolson, num_rollout_steps=5, unroll=True
    )
    data = burgers.initial_conditions(burgers.NUM_TRAIN, keys[0])[:, None]
    num_updates = 20 if quick else 1500
    train = partial(burgers.train_emulator, num_updates=num_updates, key=keys[1])
    stepper, _ = train("Burgers", loss_fn, data)
    symbol = 1 + burgers.DT / 2 * burgers.VISCOSITY * burgers.WAVENUMBERS**2

    def preconditioned(u_next, u_prev):
        residual = burgers.crank_nicolson(u_next, u_prev)
        return jnp.fft.irfft(jnp.fft.rfft(residual) / symbol)

    def exponential(num_points, order, num_substeps):
        dt = burgers.DT / num_substeps
        step = ex.stepper.Burgers(
            1, 1.0, num_points, dt, diffusivity=burgers.VISCOSITY, order=order
        )
        return ex.RepeatedStepper(step, num_substeps)

    states = burgers.initial_conditions(64, keys[2])
    return Problem(
        "Burgers, 64 points",
        spectral_methods(
            stepper, burgers.time_derivative, preconditioned, exponential, burgers.DT, 64
        ),
        states,
        None,
        resolved(exponential(256, 4, 8), states, 256, 50),
        50,
    )


def resolved(solver, states, num_points, num_steps):
    """Returns the last state of a solver on a finer grid, at the points of the coarser grid."""
    finer = jax.vmap(partial(ex.map_between_resolutions, new_num_points=num_points))(states)
    last = ex.repeat(solver, num_steps)
    solution = jax.jit(lambda states: jax.lax.map(last, states))(finer)
    stride = num_points // states.shape[-1]
    return np.asarray(solution[(..., *[slice(None, None, stride)] * (states.ndim - 2))])


def burgers_2d_problem(num_points, num_steps, num_updates, _):
    """Trains the emulator of examples/burgers_2d.py on a grid of `num_points`² points."""
    initial_conditions = partial(burgers_2d.initial_conditions, num_points=num_points)
    case = f"{num_points}²", burgers_2d_study.Recipe(), 0, num_updates
    stepper, _ = burgers_2d_study.train(case, initial_conditions)

    def exponential(num_points, order, num_substeps):
        return burgers_2d.solver(num_points, num_substeps, order)

    slope = lambda u: burgers_2d.to_fields(burgers_2d.slope(u))
    states, finer = initial_conditions(16, jax.random.key(2000)), 2 * num_points
    return Problem(
        f"Burgers, {num_points} × {num_points} points",
        spectral_methods(
            stepper, slope, burgers_2d.crank_nicolson, exponential, burgers_2d.DT, num_points
        ),
        states,
        None,
        resolved(exponential(finer, 4, 2), states, finer, num_steps),
        num_steps,
    )


#
# Basins
#


def basin_problem(_):
    emulator, _ = shallow_water.train_emulator(0, 3200)
    residuum_fn = shallow_water.scaled_residual

    def gmres_iterations(guess, k):
        def step(state, before, wind):
            u = guess(state, before, wind)
            residual = lambda u, _: residuum_fn(state._replace(fields=u), state, wind)
            return state._replace(fields=newton(residual, k)(u, None))

        return step

    def of_emulator(state, before, wind):
        return emulator(state, wind).fields

    methods = [Method(EMULATOR, "", lambda state, before, wind: emulator(state, wind))]
    for k in (2, 4):
        methods.append(Method(CORRECTED, f"{k} GMRES", gmres_iterations(of_emulator, k)))
    for n in (2, 4, 6, 8, 16):
        step = lambda state, _, wind, n=n: basin.runge_kutta(state, wind, num_substeps=n)
        methods.append(Method(EXPLICIT, f"{n} substeps", step))
    for k in (4, 8, 16, 32):
        persistence = lambda state, before, wind: state.fields
        extrapolation = lambda state, before, wind: 2 * state.fields - before.fields
        name = f"{k} GMRES"
        methods.append(Method(PERSISTENCE, name, gmres_iterations(persistence, k)))
        methods.append(Method(EXTRAPOLATION, name, gmres_iterations(extrapolation, k)))
    keys = jax.random.split(jax.random.key(17), 2)
    states, amplitudes = basin.random_samples(keys[0], 64)
    winds = basin.wind_stress(basin.amplitude_series(amplitudes, 20, keys[1]))
    fine = partial(basin.runge_kutta, num_substeps=32)
    reference = basin.rollout(fine, states, winds)[:, -1] / basin.FIELD_SIZE
    return Problem(
        "shallow water in basins",
        methods,
        states,
        winds,
        np.asarray(reference),
        20,
        lambda state: state.fields / basin.FIELD_SIZE,
    )


PROBLEMS = {
    "burgers": burgers_problem,
    "burgers_2d_64": partial(burgers_2d_problem, 64, 100, 20_000),
    "burgers_2d_128": partial(burgers_2d_problem, 128, 100, 10_000),
    "basin": basin_problem,
}
