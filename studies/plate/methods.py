"""The problem of this study, and all methods that compete on it."""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import conduction
import jax
import jax.numpy as jnp
import numpy as np
import pyamg
import scipy.sparse as sp
import scipy.sparse.linalg as sla
from jax.scipy.sparse.linalg import bicgstab, cg

from studies.plate import solvers


EMULATOR, COARSE_EMULATOR = "emulator", "coarser mesh, emulator"
START = {False: "from persistence", True: "from extrapolation"}


class Problem(NamedTuple):
    """A mesh with samples, in float64 for SciPy, and the mesh in float32 for JAX."""

    plate: conduction.Plate
    single: conduction.Plate
    assembled: solvers.Assembled
    u_0: np.ndarray  # [sample, nodes]
    inputs: conduction.Forcing  # [sample, step]

    @property
    def matrix(self):
        """The step's matrix for u = 1/2, the mean of the initial states."""
        return self.assembled.matrix(np.full(len(self.plate.points), 0.5))


class Method(NamedTuple):
    family: str
    variant: str
    step: Callable  # u_prev, before, forcing -> u_next
    problem: Problem
    setup: float = 0.0  # seconds
    dtype: type = np.float32  # or float64 with SciPy


def plural(n, noun):
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def to_dtype(tree, dtype):
    """Converts floats, and shortens indices."""
    types = {"f": dtype, "i": np.int32, "b": bool}
    return jax.tree.map(lambda x: jnp.asarray(x, types[x.dtype.kind]), tree)


def make_problem(spacing, num_samples, num_steps):
    """Draws samples that are unseen in training: the same functions of x on every mesh."""
    plate = conduction.make_plate(*conduction.random_mesh(spacing, seed=7))
    u_0, forcing = conduction.random_samples(plate, jax.random.key(50_001), num_samples)
    inputs = conduction.forcing_series(forcing, num_steps)
    single = to_dtype(plate, np.float32)
    return Problem(plate, single, solvers.Assembled(plate), np.asarray(u_0), inputs)


#
# The methods
#


def timed(function, *args):
    """Returns the result, and the CPU seconds."""
    start = time.process_time()
    result = function(*args)
    return result, time.process_time() - start


def without_history(problem, stepper):
    """Compiles a stepper of the examples as one that ignores the state before the last."""
    return jax.jit(lambda u, before, forcing: stepper(problem.single, u, forcing))


def emulator_methods(family, problem, emulator, seconds, num_nodes, corrections):
    """Yields an emulator with several numbers of corrections."""
    for n in corrections:
        step = without_history(problem, partial(emulator, num_corrections=n))
        text = f"trained on {num_nodes} nodes, {plural(n, 'correction')}"
        yield Method(family, text, step, problem, seconds)


def fixed_methods(problem):
    """Yields steppers u − P r with a fixed P."""
    lu, lu_seconds = timed(solvers.factorise, problem.matrix)
    hierarchy, seconds = timed(solvers.multigrid, problem.matrix)
    cycle = hierarchy.aspreconditioner().matvec
    v_cycle = partial(solvers.v_cycle, *solvers.hierarchy_in_jax(hierarchy))
    scipy = partial(solvers.scipy_stepper, problem.assembled)
    for extrapolated, start in START.items():
        for n in (1, 2, 3):
            options = dict(num_corrections=n, extrapolated=extrapolated)
            text = f"{start}, {plural(n, 'correction')}"
            for name, divide, setup in (
                ("LU", lu, lu_seconds),
                ("multigrid cycle (pyamg)", cycle, seconds),
            ):
                step = scipy(lambda u, r, divide=divide: divide(r), **options)
                yield Method(f"fixed {name}", text, step, problem, setup, np.float64)
            step = solvers.jax_stepper(problem.single, lambda *_: v_cycle, **options)
            yield Method("fixed multigrid cycle (JAX)", text, step, problem, seconds)


def krylov_methods(problem):
    """Yields steppers that solve with the matrix of the present guess, or with its Jacobian."""
    lu, lu_seconds = timed(solvers.factorise, problem.matrix)
    hierarchy, seconds = timed(solvers.multigrid, problem.matrix)
    ruge_stuben, rs_seconds = timed(pyamg.ruge_stuben_solver, sp.csr_matrix(problem.matrix))
    cycle, classical_cycle = (h.aspreconditioner().matvec for h in (hierarchy, ruge_stuben))
    v_cycle = partial(solvers.v_cycle, *solvers.hierarchy_in_jax(hierarchy))
    of_scipy = {
        "CG, LU": (sla.cg, lu, lu_seconds),
        "CG, multigrid (pyamg)": (sla.cg, cycle, seconds),
        "CG, Ruge–Stüben multigrid (pyamg)": (sla.cg, classical_cycle, rs_seconds),
        "Newton, BiCGSTAB, multigrid (pyamg)": (sla.bicgstab, cycle, seconds),
    }
    multigrid = lambda *_: v_cycle
    of_jax = {
        "CG, diagonal (JAX)": (conduction.jacobi, 0),
        "CG, multigrid (JAX)": (multigrid, seconds),
    }
    for n, tol in ((1, 1e-1), (1, 1e-2), (2, 1e-2)):
        text = f"{START[True]}, {plural(n, 'solve')} to {tol}"
        for name, (solve, divide, setup) in of_scipy.items():
            options = dict(rtol=tol, derivative=solve is sla.bicgstab)
            divide = solvers.scipy_krylov(problem.assembled, solve, divide, **options)
            step = solvers.scipy_stepper(problem.assembled, divide, n, extrapolated=True)
            yield Method(name, text, step, problem, setup, np.float64)
        for name, (inner, setup) in of_jax.items():
            preconditioner = solvers.jax_krylov(cg, inner, tol=tol)
            step = solvers.jax_stepper(problem.single, preconditioner, n, extrapolated=True)
            yield Method(name, text, step, problem, setup)
    # The emulator's four corrections multiply by a matrix 24 times.
    for n in (24, 96):
        options = dict(tol=0.0, maxiter=n // 2)  # two products in each iteration
        for name, preconditioner in {
            "Chebyshev, diagonal (JAX)": solvers.chebyshev(n),
            "BiCGSTAB, diagonal (JAX)": solvers.jax_krylov(
                bicgstab, conduction.jacobi, **options
            ),
        }.items():
            step = solvers.jax_stepper(problem.single, preconditioner, 1)
            yield Method(name, f"{START[False]}, {n} products", step, problem)
    # The emulator's own method, with another preconditioner than the network.
    for name, n, preconditioner, setup in (
        ("GCR, diagonal (JAX)", 24, conduction.jacobi, 0),
        ("GCR, multigrid (JAX)", 2, multigrid, seconds),
        ("GCR, multigrid (JAX)", 4, multigrid, seconds),
    ):
        step = without_history(problem, conduction.gcr(preconditioner, n))
        yield Method(name, f"{START[False]}, {plural(n, 'correction')}", step, problem, setup)


def coarser_methods(problem):
    """Yields steppers u − P r on a coarser mesh."""
    lu, seconds = timed(solvers.factorise, problem.matrix)
    for n in (1, 2):
        divide = lambda u, r: lu(r)
        step = solvers.scipy_stepper(problem.assembled, divide, n, extrapolated=True)
        text = f"{len(problem.plate.points)} nodes, {START[True]}, {plural(n, 'correction')}"
        yield Method("coarser mesh, fixed LU", text, step, problem, seconds, np.float64)
