"""Steppers without a network for the plate of examples/conduction.py: in SciPy and float64 with
assembled matrices, and in JAX and float32 with sums over edges.

All of them start from the last state or from an extrapolation, and correct this guess a few
times: u − P r, where r is the residual. They differ in what P is: a fixed factorisation, a
fixed multigrid cycle, or a few iterations of a Krylov method with the matrix for k(u).
"""

from functools import partial
from typing import NamedTuple

import conduction
import jax
import jax.numpy as jnp
import numpy as np
import pyamg
import scipy.sparse as sp
import scipy.sparse.linalg as sla
from jax.experimental.sparse import BCOO


DAMPING = 0.7  # of Jacobi's method in a multigrid cycle


#
# Assembled matrices
#


class Assembled:
    """The step's matrices and residual in float64. The pattern of the matrices is computed
    once. Their entries are sparse products with the conductivities of the triangles."""

    def __init__(self, plate, dt=conduction.DT):
        is_index = lambda x: np.issubdtype(x.dtype, np.integer)  # with int32, SciPy is faster
        as_numpy = lambda x: np.asarray(x, np.int32 if is_index(x) else x.dtype)
        self.plate = plate = conduction.Plate(*map(as_numpy, plate))
        self.dt = dt
        num_nodes, num_edges = len(plate.points), len(plate.mass)
        num_triangles = plate.triangles.shape[1]
        nodes, triangles = (np.arange(n, dtype=np.int32) for n in (num_nodes, num_triangles))

        # The entries of a matrix are those of the edges, followed by the diagonal. `csr_array`
        # sorts them: from the numbers 1, 2, ... as entries follows the order.
        rows, columns = (np.concatenate([i, nodes]) for i in plate.edges)
        numbers = np.arange(1, len(rows) + 1)
        self.pattern = sp.csr_array((numbers, (rows, columns)))
        order = self.pattern.data - 1
        i, j = rows[order], columns[order]
        is_free = ~plate.is_fixed
        self.is_coupled, self.is_fixed_entry = is_free[i] & is_free[j], ~is_free[i] & (i == j)

        # Sparse products make the entries from the conductivities of the triangles. The entry
        # on the diagonal is the sum over the edges of its node.
        to_nodes = sp.csr_array((np.ones(num_edges), (plate.edges[0], np.arange(num_edges))))
        sides = plate.sides.ravel(), np.tile(triangles, 6)
        stiffness = sp.csr_array((plate.stiffness.ravel(), sides))
        self.to_entries = sp.vstack([-stiffness, to_nodes @ stiffness]).tocsr()[order]
        mass = plate.mass, to_nodes @ plate.mass
        losses = plate.loss, 2 * to_nodes @ plate.loss
        self.mass = self.with_entries(np.concatenate(mass)[order])
        losses = self.with_entries(np.concatenate(losses)[order])
        self.mass_and_losses = self.mass / dt + losses

        # Entry (i, j) of the derivative sums the fluxes into node i of triangles with i and j,
        # times ∂k/∂uⱼ = 1/6: k = 1 + u/2, and u is a mean over three corners.
        place = np.argsort(order)  # of edges, and then of nodes, in the pattern
        entries = place[np.concatenate([plate.sides, num_edges + plate.triangles])].ravel()
        flux = np.arange(3 * num_triangles).reshape(3, -1)
        shape = len(rows), 3 * num_triangles
        arrays = np.full(entries.size, 1 / 6), (entries, np.tile(flux, (3, 1)).ravel())
        self.to_derivative = sp.csr_array(arrays, shape=shape)
        arrays = np.ones(flux.size), (plate.triangles.ravel(), flux.ravel())
        self.to_nodes = sp.csr_array(arrays, shape=(num_nodes, flux.size))
        self.source = jax.jit(partial(conduction.source, jax.tree.map(jnp.asarray, plate)))

    def with_entries(self, entries):
        pattern = self.pattern
        return sp.csr_array((entries, pattern.indices, pattern.indptr), shape=pattern.shape)

    def set_wall(self, u, forcing):
        return np.where(
            self.plate.is_fixed, np.asarray(conduction.wall_temperature(forcing)), u
        )

    def fluxes(self, u):
        """Returns conductivities `[triangles]`, and ∫ ∇φᵢ·∇u `[3, triangles]`."""
        u, weights = u[self.plate.triangles], self.plate.stiffness
        flux = weights[:3] * (u - np.roll(u, 1, 0)) + weights[3:] * (u - np.roll(u, 2, 0))
        return 1 + u.mean(axis=0) / 2, flux

    def residual(self, u_prev, forcing):
        """Returns the residual as a function of the next state, for one that has its wall."""
        load = self.mass @ (u_prev / self.dt + np.asarray(self.source(forcing)))

        def residual(u):
            k, flux = self.fluxes(u)
            r = self.mass_and_losses @ u + self.to_nodes @ (k * flux).ravel() - load
            return np.where(self.plate.is_fixed, 0, r)

        return residual

    def matrix(self, u, derivative=False):
        """Returns the step's matrix for k(u), or with `derivative` the Jacobian. Rows and
        columns of fixed nodes are those of the identity."""
        k, flux = self.fluxes(u)
        entries = self.mass_and_losses.data + self.to_entries @ k
        if derivative:
            entries += self.to_derivative @ flux.ravel()
        return self.with_entries(np.where(self.is_coupled, entries, self.is_fixed_entry))


#
# Corrections
#


def first_guess(u_prev, before, extrapolated):
    return 2 * u_prev - before if extrapolated else u_prev


def scipy_stepper(assembled, divide, num_corrections, extrapolated=False):
    """Returns `step(u_prev, before, forcing)`, where `before` is the state before `u_prev`.
    `divide(u, r)` divides the residual by an approximation of the step's matrix."""

    def step(u_prev, before, forcing):
        u = assembled.set_wall(first_guess(u_prev, before, extrapolated), forcing)
        residual = assembled.residual(u_prev, forcing)
        for _ in range(num_corrections):
            u = u - divide(u, residual(u))
        return u

    return step


def jax_stepper(plate, preconditioner, num_corrections, extrapolated=False):
    """Returns a compiled `step(u_prev, before, forcing)`. The preconditioner is a function of
    the kind that conduction.py describes."""

    @jax.jit
    def step(u_prev, before, forcing):
        u = conduction.set_wall(plate, first_guess(u_prev, before, extrapolated), forcing)
        for _ in range(num_corrections):
            divide = preconditioner(plate, u, conduction.matrix(plate, u))
            u -= divide(conduction.residual(plate, u, u_prev, forcing))
        return u

    return step


def factorise(matrix):
    """Returns a function that divides by a symmetric matrix. The factors are in float32, which
    is faster. Corrections by residuals in float64 still converge in float64."""
    options = dict(permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0)
    matrix = matrix.tocsc().astype(np.float32)
    lu = sla.splu(matrix, options=dict(SymmetricMode=True), **options)
    return lambda r: lu.solve(r.astype(np.float32))


def scipy_krylov(assembled, solve, divide, rtol, derivative=False):
    """Returns `divide(u, r)` that solves with the matrix for k(u), or with the Jacobian. The
    preconditioner of this solver is `divide(r)`."""

    def divide_by_matrix(u, r):
        matrix = assembled.matrix(u, derivative)
        M = sla.LinearOperator(matrix.shape, divide, dtype=r.dtype)
        return solve(matrix, r, rtol=rtol, M=M)[0]

    return divide_by_matrix


def jax_krylov(solve, preconditioner, **options):
    """Returns a preconditioner, of the kind that conduction.py describes, that solves with the
    matrix for k(u)."""

    def divide_by_matrix(plate, u, matrix):
        operator = conduction.fix(plate, partial(conduction.product, plate, matrix))
        M = preconditioner(plate, u, matrix)
        return lambda r: solve(operator, r, M=M, **options)[0]

    return divide_by_matrix


def chebyshev(num_products):
    """Returns a preconditioner that is a polynomial of the matrix divided by its diagonal. The
    eigenvalues are estimated to lie between the least share of the mass in the diagonal and the
    largest row sum of absolute values."""

    def divide_by_polynomial(plate, u, matrix):
        operator = conduction.fix(plate, partial(conduction.product, plate, matrix))
        diagonal, others = matrix
        least = jnp.min(plate.lumped_mass / conduction.DT / diagonal)
        largest = 1 + jnp.max(conduction.sum_edges(plate, jnp.abs(others)) / diagonal)
        centre, radius = (largest + least) / 2, (largest - least) / 2

        def divide(r):
            def improve(_, carry):
                x, change, rho = carry
                rest = (r - operator(x)) / diagonal
                new_rho = 1 / (2 * centre / radius - rho)
                change = new_rho * (rho * change + 2 / radius * rest)
                return x + change, change, new_rho

            x = r / diagonal / centre
            return jax.lax.fori_loop(0, num_products, improve, (x, x, radius / centre))[0]

        return divide

    return divide_by_polynomial


#
# Multigrid
#


def multigrid(matrix):
    """Sets up smoothed aggregation. The options were tuned: couplings that are weaker than
    10 % are dropped, and one sweep before and after the coarser levels replaces two."""
    sweep = lambda direction: ("gauss_seidel", {"sweep": direction})
    return pyamg.smoothed_aggregation_solver(
        sp.csr_matrix(matrix),
        strength=("symmetric", {"theta": 0.1}),
        presmoother=sweep("forward"),
        postsmoother=sweep("backward"),
    )


class Level(NamedTuple):
    """A level of a hierarchy: its matrix, 1 / diagonal, and the transfers to and from the next
    coarser one."""

    matrix: BCOO
    scale: jax.Array
    restriction: BCOO
    prolongation: BCOO


def hierarchy_in_jax(hierarchy):
    """Returns the levels of a hierarchy of pyamg, and the inverse of its coarsest matrix, all
    in float32."""
    single = lambda matrix: BCOO.from_scipy_sparse(matrix.tocsr().astype(np.float32))
    levels = [
        Level(
            single(level.A),
            jnp.asarray(1 / level.A.diagonal(), jnp.float32),
            single(level.R),
            single(level.P),
        )
        for level in hierarchy.levels[:-1]
    ]
    coarsest = np.linalg.inv(hierarchy.levels[-1].A.toarray())
    return levels, jnp.asarray(coarsest, jnp.float32)


def v_cycle(levels, coarsest, r):
    """Divides r by the finest matrix, approximately: one symmetric V-cycle with a step of the
    damped Jacobi method before and after the coarser levels."""
    if not levels:
        return coarsest @ r
    level, *coarser = levels
    x = DAMPING * level.scale * r
    coarse_r = level.restriction @ (r - level.matrix @ x)
    x += level.prolongation @ v_cycle(coarser, coarsest, coarse_r)
    return x + DAMPING * level.scale * (r - level.matrix @ x)
