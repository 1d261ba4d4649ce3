"""Defines nonlinear heat conduction on a plate with a hole, with a moving source of heat, and a
wall whose temperature changes in time.

    ∂u/∂t − ∇·(k ∇u) = s,   k = 1 + u/2
    u = g(t) on the left edge,   k ∂u/∂n = −β u on the other edges and around the hole

The residual is that of an implicit Euler step with linear triangular elements (P1). It consists
of sums over the edges of the mesh. Newton's method uses matrices that scikit-fem assembles, so
the two check each other.
"""

import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import skfem
from jax.scipy.sparse.linalg import cg
from scipy.spatial import Delaunay
from skfem.helpers import dot, grad


DT, BETA, HOLE_RADIUS = 0.01, 1.0, 0.15


#
# The mesh
#


def random_mesh(spacing, seed):
    """Triangulates the unit square without a disc. Returns the points `[nodes, 2]`, of which
    the inner ones are shifted at random, and the triangles `[3, triangles]`."""
    x = np.linspace(0, 1, round(1 / spacing) + 1)
    points = np.stack(np.meshgrid(x, x), axis=-1).reshape(-1, 2)
    is_inside = np.max(np.abs(points - 0.5), axis=1) < 0.499
    noise = np.random.default_rng(seed).uniform(-0.3, 0.3, points.shape)
    points += spacing * is_inside[:, None] * noise
    to_centre = lambda x: np.linalg.norm(x - 0.5, axis=-1)
    angles = np.arange(0, 2 * np.pi, spacing / HOLE_RADIUS)
    circle = 0.5 + HOLE_RADIUS * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    points = np.concatenate([points[to_centre(points) > HOLE_RADIUS + spacing / 2], circle])
    triangles = Delaunay(points).simplices
    return points, triangles[to_centre(points[triangles].mean(axis=1)) > HOLE_RADIUS].T


class Plate(NamedTuple):
    """A mesh, and integrals of its hat functions φ. An edge is a pair (i, j) of neighbours.
    Each pair appears in both directions, sorted by i."""

    points: jax.Array  # [nodes, 2]
    is_fixed: jax.Array  # [nodes]
    lumped_mass: jax.Array  # ∫ φᵢ, [nodes]
    edges: jax.Array  # [2, edges]
    mass: jax.Array  # ∫ φᵢ φⱼ, [edges]
    loss: jax.Array  # ∫ β φᵢ φⱼ along the boundary, [edges]
    triangles: jax.Array  # [3, triangles]
    sides: jax.Array  # the edges around each triangle, [6, triangles]
    stiffness: jax.Array  # −∫ ∇φᵢ·∇φⱼ over each triangle, for each of its sides, [6, triangles]


def make_plate(points, triangles):
    """Integrates products of hat functions, and of their gradients, over the triangles."""
    both_ways = [np.stack([triangles, np.roll(triangles, n, axis=0)]) for n in (1, 2)]
    pairs = np.concatenate(both_ways, axis=1)  # [2, 6, triangles]
    edges, sides = np.unique(pairs.reshape(2, -1), axis=1, return_inverse=True)
    sides = sides.reshape(pairs.shape[1:])
    corners = points[triangles.sum(axis=0) - pairs.sum(axis=0)]  # opposite to the sides
    a, b = points[pairs[0]] - corners, points[pairs[1]] - corners
    areas = np.abs(a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]) / 2
    stiffness = np.sum(a * b, axis=-1) / (4 * areas)  # half the cotangent of the corner
    mass = np.bincount(sides.ravel(), areas.ravel() / 12)
    is_fixed = points[:, 0] < 1e-9
    is_lossy = (np.bincount(sides.ravel()) == 1) & ~np.all(is_fixed[edges], axis=0)
    loss = is_lossy * BETA / 6 * np.linalg.norm(points[edges[0]] - points[edges[1]], axis=1)
    lumped_mass = 2 * np.bincount(edges[0], mass)
    arrays = points, is_fixed, lumped_mass, edges, mass, loss, triangles, sides, stiffness
    return Plate(*map(jnp.asarray, arrays))


def sum_edges(plate, x):
    """Sums numbers or vectors of edges (i, j) over the neighbours j of each node i."""
    num_nodes = len(plate.points)
    return jax.ops.segment_sum(x, plate.edges[0], num_nodes, indices_are_sorted=True)


#
# The residual
#


class Forcing(NamedTuple):
    """The parameters of source and wall, and the time at which both are evaluated."""

    time: jax.Array
    heat: jax.Array  # strength of the source
    speed: jax.Array  # angular velocity of the source around the hole
    angle: jax.Array  # its angle at time 0
    wall: jax.Array  # mean temperature of the wall
    swing: jax.Array  # amplitude of the wall's temperature


def source(plate, forcing):
    """Computes s `[nodes]`: a spot of heat that moves around the hole."""
    angle = forcing.angle + forcing.speed * forcing.time
    centre = 0.5 + 0.33 * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
    return forcing.heat * jnp.exp(-jnp.sum((plate.points - centre) ** 2, axis=1) / 0.0128)


def wall_temperature(forcing):
    """Computes g, the temperature of the left edge."""
    return forcing.wall + forcing.swing * jnp.sin(10 * forcing.time + forcing.angle)


def set_wall(plate, u, forcing):
    """Replaces the temperatures of the left edge by g."""
    return jnp.where(plate.is_fixed, wall_temperature(forcing), u)


def matrix(plate, u):
    """Computes the matrix of mass / dt, conduction with k(u) and losses: its diagonal `[nodes]`
    and its other entries `[edges]`."""
    k = 1 + jnp.mean(u[plate.triangles], axis=0) / 2
    sides, weights = plate.sides.ravel(), (k * plate.stiffness).ravel()
    conduction = jax.ops.segment_sum(weights, sides, num_segments=len(plate.mass))
    diagonal = sum_edges(plate, conduction + plate.mass / DT + 2 * plate.loss)
    return diagonal, plate.mass / DT + plate.loss - conduction


def product(plate, entries, u):
    """Multiplies u by the matrix with these entries, as `matrix` returns them."""
    diagonal, others = entries
    return diagonal * u + sum_edges(plate, others * u[plate.edges[1]])


def residual(plate, u_next, u_prev, forcing):
    """Computes (M / dt + K(u_next) + B) u_next − M (u_prev / dt + s), with mass M, conduction K
    and losses B. At nodes of the wall, the residual is u_next − g."""
    load = u_prev / DT + source(plate, forcing)
    load = sum_edges(plate, plate.mass * (load[plate.edges[0]] + load[plate.edges[1]]))
    r = product(plate, matrix(plate, u_next), u_next) - load
    return jnp.where(plate.is_fixed, u_next - wall_temperature(forcing), r)


def fix(plate, operator):
    """Replaces the operator by the identity in the rows and columns of fixed nodes."""
    free = ~plate.is_fixed
    return lambda x: jnp.where(free, operator(free * x), x)


def precondition(plate, r, tol=1e-2):
    """Divides the residual, which must be 0 at fixed nodes, by the step's matrix for k = 1.
    Conjugate gradients need no inverse, and JAX differentiates them by a second solve."""
    diagonal, others = matrix(plate, jnp.zeros_like(r))
    operator = fix(plate, partial(product, plate, (diagonal, others)))
    return cg(operator, r, tol=tol, M=lambda x: x / diagonal)[0]


def relative_residual(plate, u_next, u_prev, forcing):
    """Scales the residual such that its mean square is 1 if nothing but the wall changes."""
    divided = lambda u: precondition(plate, residual(plate, u, u_prev, forcing))
    weights = jnp.sqrt(plate.lumped_mass / jnp.mean(plate.lumped_mass))
    unchanged = weights * divided(set_wall(plate, u_prev, forcing))
    size = jnp.sqrt(jnp.mean(unchanged**2)) + 1e-6
    return weights * divided(u_next) / jax.lax.stop_gradient(size)


#
# Corrections by the residual
#
# A preconditioner is a function of the plate, the state u and the entries of its matrix. It
# returns a function that applies an approximation of the matrix's inverse to a residual.
#


def jacobi(plate, u, entries):
    """Divides by the diagonal."""
    return lambda r: r / entries[0]


def conjugate_gradients(plate, u, entries):
    """Solves with the matrix for k = 1, up to a tolerance of 1 %."""
    return partial(precondition, plate)


def gcr(preconditioner, num_corrections):
    """Returns a stepper that starts from the last state, and corrects it several times.

    This is the generalised conjugate residual method (GCR, doi.org/10.1137/0720023) with a
    preconditioner that may change (GMRESR, doi.org/10.1002/nla.1680010404). A correction is the
    combination of all preconditioned residuals so far that makes the residual smallest, in the
    norm weighted by 1 / diagonal. A preconditioner that is far from the inverse makes this
    slow. But the residual cannot grow, except because the matrix changes with u.
    """

    def stepper(plate, u_prev, forcing):
        start = set_wall(plate, u_prev, forcing)
        at_start = matrix(plate, start)
        divide, diagonal = preconditioner(plate, start, at_start), at_start[0]
        inner_product = lambda x, y: jnp.sum(x * y / diagonal, axis=-1)
        free = ~plate.is_fixed

        def correct(carry, n):
            u, directions, images = carry  # [nodes], and twice [num_corrections, nodes]
            r = residual(plate, u, u_prev, forcing)
            direction = free * divide(r)
            image = free * product(plate, matrix(plate, u), direction)
            # Make the image orthogonal to the earlier ones. Rows of directions to come are 0.
            shares = inner_product(images, image)
            direction -= shares @ directions
            image -= shares @ images
            length = jnp.sqrt(inner_product(image, image) + 1e-16)  # not 0, if r is 0
            directions = directions.at[n].set(direction / length)
            images = images.at[n].set(image / length)
            return (u - inner_product(images, r) @ directions, directions, images), None

        nothing = jnp.zeros((num_corrections, *start.shape), start.dtype)
        carry, steps = (start, nothing, nothing), jnp.arange(num_corrections)
        return jax.lax.scan(correct, carry, steps)[0][0]

    return stepper


#
# Random states and forcings
#


def random_samples(plate, key, num_samples):
    """Draws smooth states `[num_samples, nodes]`, and forcings at time 0."""
    keys = jax.random.split(key, 4)
    uniform = lambda key, *shape: jax.random.uniform(key, (num_samples, *shape))
    waves = 2 * np.pi * jax.random.normal(keys[0], (num_samples, 12, 2))
    phases = 2 * np.pi * uniform(keys[1], 12, 1) + waves @ plate.points.T
    sizes = jax.random.normal(keys[2], (num_samples, 12, 1)) / 24**0.5
    u = 0.5 + jnp.sum(sizes * jnp.cos(phases), axis=1)
    scale, shift = np.array([[40, 24, 2 * np.pi, 1, 0.5], [10, -12, 0, 0, 0]])
    parameters = scale * uniform(keys[3], 5) + shift
    return u, Forcing(jnp.zeros(num_samples), *parameters.T)


def forcing_series(forcing, num_steps):
    """Returns the forcings `[batch, num_steps]` of the next steps."""
    series = jax.tree.map(lambda x: jnp.repeat(x[:, None], num_steps, axis=1), forcing)
    return series._replace(time=series.time + DT * np.arange(1, num_steps + 1))


#
# A solver and untrained steppers, which are used only for the evaluation
#


def newton_solver(points, triangles):
    """Returns `step(u_prev, source, wall)`: Newton's method in float64, with scikit-fem."""
    mesh = skfem.MeshTri(*map(np.ascontiguousarray, (points.T, triangles)))
    basis = skfem.Basis(mesh, skfem.ElementTriP1())
    lossy = mesh.facets_satisfying(lambda x: x[0] > 1e-9, boundaries_only=True)
    edge = skfem.FacetBasis(mesh, skfem.ElementTriP1(), facets=lossy)
    integral = skfem.BilinearForm(lambda u, v, w: u * v)
    conduction = skfem.BilinearForm(lambda u, v, w: (1 + w.u / 2) * dot(grad(u), grad(v)))
    derivative = skfem.BilinearForm(lambda u, v, w: u / 2 * dot(grad(w.u), grad(v)))
    mass, losses = integral.assemble(basis), BETA * integral.assemble(edge)
    fixed = mesh.nodes_satisfying(lambda x: x[0] < 1e-9)

    def step(u_prev, source, wall):
        u, change = np.array(u_prev), np.inf
        u[fixed] = wall
        while np.max(np.abs(change)) > 1e-12:
            values = basis.interpolate(u)
            A = mass / DT + conduction.assemble(basis, u=values) + losses
            r = A @ u - mass @ (u_prev / DT + source)
            jacobian = A + derivative.assemble(basis, u=values)
            change = skfem.solve(*skfem.condense(jacobian, r, D=fixed))
            u -= change
        return u

    return step


def solve(points, triangles, u_0, inputs):
    """Returns the solver's states `[sample, time, nodes]`."""
    step, plate = newton_solver(points, triangles), make_plate(points, triangles)
    sources = np.asarray(jax.vmap(jax.vmap(partial(source, plate)))(inputs))
    walls = np.asarray(wall_temperature(inputs))
    states = [np.asarray(u_0)]
    for t in range(walls.shape[1]):
        samples = zip(states[-1], sources[:, t], walls[:, t], strict=True)
        states.append(np.stack([step(*sample) for sample in samples]))
    return np.stack(states, axis=1)


def repeat(preconditioner, num_corrections):
    """Returns a stepper that subtracts the preconditioned residual several times."""

    def stepper(plate, u_prev, forcing):
        u = set_wall(plate, u_prev, forcing)
        for _ in range(num_corrections):
            divide = preconditioner(plate, u, matrix(plate, u))
            u -= divide(residual(plate, u, u_prev, forcing))
        return u

    return stepper


UNTRAINED = {
    "persistence": lambda plate, u, forcing: u,
    "20 Jacobi steps": repeat(jacobi, 20),
    "4 steps of GCR, Jacobi": gcr(jacobi, 4),
    "20 steps of GCR, Jacobi": gcr(jacobi, 20),
    "40 steps of GCR, Jacobi": gcr(jacobi, 40),
    "1 step u − P r": repeat(conjugate_gradients, 1),
    "4 steps u − P r": repeat(conjugate_gradients, 4),
}


def rollout(stepper, plate, u_0, inputs):
    """Returns the states `[time, nodes]` of one sample."""
    step = lambda u, inputs_t: 2 * (stepper(plate, u, inputs_t),)
    return jnp.concatenate([u_0[None], jax.lax.scan(step, u_0, inputs)[1]])


def relative_error(plate, u, solution):
    """Computes the nRMSE `[sample, time]` of states `[sample, time, nodes]`."""
    norm = lambda u: jnp.sqrt(jnp.sum(plate.lumped_mass * u**2, axis=-1))
    return norm(u - solution) / norm(solution)


def compare(steppers, mesh, u_0, inputs):
    """Rolls out Newton's method and the steppers `{name: stepper}`. Returns their states, the
    errors of the steppers, and the CPU times in ms of one step of one sample, all by name. Also
    prints the residual of the solver's states, which checks both."""
    plate = make_plate(*mesh)
    rollouts: dict = {"Newton": partial(solve, *mesh)}
    for name, stepper in steppers.items():
        batch = jax.jit(jax.vmap(partial(rollout, stepper, plate)))
        rollouts[name] = batch.lower(u_0, inputs).compile()
    states, times = {}, {}
    for name, function in rollouts.items():
        start = time.process_time()
        states[name] = jax.block_until_ready(function(u_0, inputs))
        times[name] = 1000 * (time.process_time() - start) / inputs.time.size
    solution = states["Newton"]
    r = jax.vmap(jax.vmap(partial(residual, plate)))(solution[:, 1:], solution[:, :-1], inputs)
    print(f"\nLargest residual of the solver: {jnp.max(abs(r)):.0e}")
    errors = {name: relative_error(plate, states[name], solution) for name in rollouts}
    return states, errors, times


def show_plate(axis, title, plate, u, limit):
    """Draws u in colours, and the edges of the mesh."""
    mesh = (*plate.points.T, plate.triangles.T)
    style = dict(cmap="RdBu_r", vmin=-limit, vmax=limit, shading="gouraud")
    image = axis.tripcolor(*mesh, u, **style)
    axis.triplot(*mesh, color="black", linewidth=0.15)
    axis.set(title=title, aspect="equal", xticks=[], yticks=[])
    return image
