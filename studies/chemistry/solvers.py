"""Solvers of the chemistry of examples/pollu.py, for thousands of cells at once. The cells are
the last axis, and each operation is vectorised over them.

A solver is a function `step(y, day, h) -> y` for states `[20, cells]`. Except for Radau, the
light is constant during a step, as in air-quality models.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pollu
from pollu import SPECIES


#
# Rosenbrock methods, in the form and with the coefficients of KPP (Sandu et al., 1997)
#


class Rosenbrock(NamedTuple):
    """Solves (1/(γh) − J) kᵢ = f(y + Σⱼ aᵢⱼ kⱼ) + Σⱼ cᵢⱼ/h kⱼ for each stage i. J is ∂f/∂y at
    y. The result is y + Σᵢ mᵢ kᵢ."""

    order: int
    gamma: float
    a: list
    c: list
    m: list


_G = 1 + 0.5**0.5
ROSENBROCK = {
    "ROS2": Rosenbrock(2, _G, [[], [1 / _G]], [[], [-2 / _G]], [1.5 / _G, 0.5 / _G]),
    "ROS3": Rosenbrock(
        3,
        0.43586652150845899941601945119356,
        [[], [1.0], [1.0, 0.0]],
        [[], [-1.0156171083877702], [4.0759956452537699, 9.2076794298330791]],
        [1.0, 6.1697947043828245, -0.42772256543218573],
    ),
    "RODAS3": Rosenbrock(
        3,
        0.5,
        [[], [0.0], [2.0, 0.0], [2.0, 0.0, 1.0]],
        [[], [4.0], [1.0, -1.0], [1.0, -1.0, -8 / 3]],
        [2.0, 0.0, 1.0, 1.0],
    ),
}


def rosenbrock(method, y, day, h):
    light, once = pollu.sun(day, h / 2), pollu.computed_once
    entries = once(pollu.jacobian(y, light))
    factors = pollu.factorise(shifted(entries, 1 / (method.gamma * h)))
    ks, last_place = [], None
    for a, c in zip(method.a, method.c, strict=True):
        place = [w for w in a if w]
        if place != last_place:  # otherwise two stages share their rates
            rates, last_place = once(pollu.tendency(combine(y, a, ks), light)), place
        ks.append(pollu.solve(factors, combine(rates, c, ks, 1 / h)))
    return jnp.stack(combine(y, method.m, ks))


def shifted(matrix, diagonal):
    """Returns diagonal · identity − matrix."""
    result = {place: -x for place, x in matrix.items()}
    return result | {(i, i): diagonal + result.get((i, i), 0.0) for i in range(len(SPECIES))}


def combine(y, weights, ks, scale=1.0):
    """Returns y + scale · Σ weights · ks, as a list of 20 arrays."""
    terms = [(scale * w, k) for w, k in zip(weights, ks, strict=True) if w]
    return [x + sum(w * k[i] for w, k in terms) for i, x in enumerate(y)]


#
# Radau IIA: Newton's method
#


def simplified_radau(y, day, h, num_iterations):
    """Solves the Radau step by Newton's method with J = ∂f/∂y at y, factorised once. The
    eigenvalues λ and conj(λ) of the 2×2 matrix of the method reduce the linear systems of 40
    unknowns to one complex system of 20: (1/(hλ) − J) w = v⁻¹ r / (hλ)."""
    values, vectors = np.linalg.eig(pollu.RADAU)
    shift, (v, v_inverse) = 1 / (h * values[0]), (vectors[:, 0], np.linalg.inv(vectors)[0])
    entries = pollu.computed_once(pollu.jacobian(y, pollu.sun(day, h / 2)))
    real = {place: jax.lax.complex(x, jnp.zeros_like(x)) for place, x in entries.items()}
    kind = real[0, 0].dtype
    factors = pollu.factorise(shifted(real, jnp.asarray(shift, kind)))
    to_complex, to_real = jnp.asarray(v_inverse * shift, kind), jnp.asarray(2 * v, kind)

    def iterate(_, stages):
        residual = jnp.stack(pollu.radau_residual(stages, y, day, h))
        residual = residual.reshape(2, len(SPECIES), -1)
        right = to_complex[0] * residual[0] + to_complex[1] * residual[1]
        solution = jnp.stack(pollu.solve(factors, right))
        return stages - (to_real[:, None, None] * solution).real

    return jax.lax.fori_loop(0, num_iterations, iterate, jnp.stack([y, y]))[1]


#
# Richardson extrapolation of EBI, and QSSA
#


def extrapolated(y, day, h, num_sweeps):
    """Extrapolates two half steps and a whole one to second order, unless that is negative."""
    middle = euler_backward(y, day, h / 2, num_sweeps)
    later = day._replace(minute=day.minute + h / 2)
    fine = euler_backward(middle, later, h / 2, num_sweeps)
    result = 2 * fine - euler_backward(y, day, h, num_sweeps)
    return jnp.where(result > fine / 4, result, fine)


def qssa(y, day, h):
    """Solves dy/dt = gain − loss · y for each species, with constant gain and loss."""
    light = pollu.sun(day, h / 2)
    rates = []
    for i, x in enumerate(y):
        gain, loss, _ = pollu.gain_and_loss(i, y, light)
        decay = -jnp.expm1(-h * loss)
        slope = jnp.where(h * loss > 1e-6, decay / jnp.maximum(loss, 1e-12), h)
        rates.append(x - decay * x + slope * gain)
    return jnp.stack(rates)


#
# Solvers of diffrax, one cell at a time under jax.vmap
#


def diffrax_step(name, rtol, y, day, h):
    """Advances cells by a solver of diffrax, which only this function needs."""
    import diffrax

    def of_cell(y, day):
        field = lambda t, y, _: jnp.stack(pollu.tendency(y, pollu.sun(day, t)))
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            getattr(diffrax, name)(),
            0.0,
            h,
            h / 20,
            y,
            stepsize_controller=diffrax.PIDController(rtol, rtol * 1e-3 * pollu.TYPICAL),
            saveat=diffrax.SaveAt(t1=True),
            max_steps=1000,
        )
        return solution.ys[0]

    return jax.vmap(of_cell, (1, 0), 1)(y, day)


#
# All of them, by name, with the light of their steps
#


def euler_backward(y, day, h, num_sweeps):
    return pollu.euler_backward(y, pollu.sun(day, h), h, num_sweeps)


SOLVERS = {name: partial(rosenbrock, method) for name, method in ROSENBROCK.items()}
SOLVERS |= {f"EBI, {n} sweeps": partial(euler_backward, num_sweeps=n) for n in (2, 4)}
SOLVERS["Radau, 3 iterations"] = partial(simplified_radau, num_iterations=3)
SOLVERS["EBI, extrapolated"] = partial(extrapolated, num_sweeps=3)
SOLVERS["QSSA"] = qssa
