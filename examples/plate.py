"""Trains an emulator of nonlinear heat conduction (conduction.py) on an unstructured mesh: a plate
with a hole, a moving source of heat, and a wall whose temperature changes in time.

*The source and the wall* are passed as `inputs`: the parameters of their formulas, and the time.
*The emulator* maps the residual of a guess to a correction, several times, by messages along the
edges of the mesh. *The loss* measures the residual after division by the step's matrix for k = 1,
which conjugate gradients do: no matrix is inverted. Training needs no solver. Newton's method with
scikit-fem only checks the residual and evaluates the emulator, also on meshes that are unseen in
training. The table includes what no training is needed for.

    python examples/plate.py             trains and writes assets/plate.png
    python examples/plate.py --quick     the same in seconds, to see that it runs
"""

import time
from functools import partial

import common
import conduction
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from error_estimate import estimate_error, gmres
from jax.scipy.sparse.linalg import bicgstab
from replay_buffer import diverged, put_back, sample

from residuum import residuum_loss


BUFFER_SIZE, BATCH_SIZE = 64, 4
REPORT_STEPS = (1, 10, 50)
# The spacing of the nodes, and the seed of their positions.
MESHES = {"training mesh": (0.04, 0), "another mesh": (0.04, 1), "finer mesh": (0.033, 2)}


#
# The emulator
#


class Emulator(eqx.Module):
    """Maps the residual to a correction several times, with the same weights. It is linear in
    the residual. The mesh and the conductivity enter through gates on edges and nodes."""

    edge_network: eqx.nn.MLP
    node_network: eqx.nn.MLP
    first: jax.Array  # [width]
    layers: jax.Array  # [depth, 2 * width, width]
    last: jax.Array  # [width]
    num_corrections: int = eqx.field(static=True)

    def __init__(self, key, *, width=16, depth=4, num_corrections=4):
        keys = jax.random.split(key, 4)
        self.edge_network = eqx.nn.MLP(4, width, 16, 1, jax.nn.gelu, key=keys[0])
        self.node_network = eqx.nn.MLP(3, width, 16, 1, jax.nn.gelu, key=keys[1])
        self.first = jax.random.normal(keys[2], (width,))
        shape = (depth, 2 * width, width)
        self.layers = jax.random.normal(keys[3], shape) / (6 * width) ** 0.5
        self.last = jnp.zeros(width)
        self.num_corrections = num_corrections

    def __call__(self, plate, u_prev, forcing):
        start = conduction.set_wall(plate, u_prev, forcing)
        diagonal, others = conduction.matrix(plate, start)
        edge_gates, node_gates = self.gates(plate, start, diagonal, others)

        def exchange(hidden, weights):
            messages = conduction.sum_edges(plate, edge_gates * hidden[plate.edges[1]])
            return hidden + jnp.concatenate(
                [node_gates * hidden, messages], axis=1
            ) @ weights, None

        def correct(u, _):
            r = conduction.residual(plate, u, u_prev, forcing) / diagonal
            hidden, _ = jax.lax.scan(
                jax.checkpoint(exchange), r[:, None] * self.first, self.layers
            )
            return jnp.where(plate.is_fixed, start, u - r - 0.1 * hidden @ self.last), None

        return jax.lax.scan(correct, start, length=self.num_corrections)[0]

    def gates(self, plate, u, diagonal, others):
        i, j = plate.edges
        mass = plate.lumped_mass
        features = [
            others / diagonal[i],
            others / diagonal[j],
            plate.mass / mass[i],
            plate.mass / mass[j],
        ]
        edge_gates = 0.3 * jax.vmap(self.edge_network)(4 * jnp.stack(features, axis=1))
        features = jnp.stack(
            [1 + u / 2, mass / conduction.DT / diagonal, plate.is_fixed], axis=1
        )
        node_gates = 1 + jax.vmap(self.node_network)(features)
        return edge_gates * ~plate.is_fixed[j, None], node_gates


#
# Training
#


def train_emulator(plate, key, num_updates, **options):
    """Returns a trained emulator, and the training time in seconds."""
    keys = jax.random.split(key, 3)
    rate = optax.warmup_cosine_decay_schedule(0, 3e-3, num_updates // 20, num_updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))
    arrays, static = eqx.partition(Emulator(keys[0]), eqx.is_array)

    def update(carry, key):
        arrays, opt_state, buffer = carry
        sample_key, replay_key, fresh_key = jax.random.split(key, 3)
        samples, (u, forcing) = sample(buffer, BATCH_SIZE, sample_key)
        inputs = conduction.forcing_series(forcing, 1)

        def loss_fn(arrays):
            stepper = partial(eqx.combine(arrays, static), plate)
            residuum_fn = partial(conduction.relative_residual, plate)
            return residuum_loss(stepper, u[:, None], residuum_fn, inputs=inputs, has_aux=True)

        (loss, rollout), grads = jax.value_and_grad(loss_fn, has_aux=True)(arrays)
        updates, opt_state = optimizer.update(grads, opt_state, arrays)
        u = rollout.final_state
        forcing = forcing._replace(time=inputs.time[:, -1])
        fresh = conduction.random_samples(plate, fresh_key, BATCH_SIZE)
        lost = diverged(u, bound=20) | (forcing.time > 0.5)
        buffer = put_back(
            buffer, samples, (u, forcing), fresh, lost=lost, share=0.2, key=replay_key
        )
        return (optax.apply_updates(arrays, updates), opt_state, buffer), loss

    @jax.jit
    def updates(carry, keys):
        carry, losses = jax.lax.scan(update, carry, keys)
        return carry, jnp.mean(losses)

    carry = (
        arrays,
        optimizer.init(arrays),
        conduction.random_samples(plate, keys[1], BUFFER_SIZE),
    )
    chunks = jax.random.split(keys[2], (num_updates // 20, 20))
    (arrays, *_), seconds = common.train(updates, carry, chunks, "20 updates each")
    return eqx.combine(arrays, static), seconds


#
# Evaluation
#


def correct_by(divide, num_corrections=1):
    """Returns an untrained stepper. It corrects as the emulator does, but instead of a network
    it has `divide(plate, u, r)`: the residual, divided by an approximate matrix."""

    def stepper(plate, u_prev, forcing):
        u = conduction.set_wall(plate, u_prev, forcing)
        for _ in range(num_corrections):
            u -= divide(plate, u, conduction.residual(plate, u, u_prev, forcing))
        return u

    return stepper


def jacobi(plate, u, r):
    return r / conduction.matrix(plate, u)[0]


def krylov(plate, u, r, num_products=18):
    """Divides by the Jacobian, as in Newton's method, with BiCGSTAB: two products each time."""
    step = lambda u: conduction.product(plate, conduction.matrix(plate, u), u)
    jacobian = jax.linearize(step, u)[1]
    operator = lambda x: jnp.where(plate.is_fixed, x, jacobian(x))
    options = dict(tol=0.0, maxiter=num_products // 2, M=partial(jacobi, plate, u))
    return bicgstab(operator, r, **options)[0]


UNTRAINED = {
    "persistence": lambda plate, u, forcing: u,
    "15 Jacobi steps": correct_by(jacobi, 15),
    "BiCGSTAB, 18 products": correct_by(krylov),
    "u − P(residual)": correct_by(lambda plate, u, r: conduction.precondition(plate, r)),
    "the same, 3 times": correct_by(lambda plate, u, r: conduction.precondition(plate, r), 3),
}


def rollout(stepper, plate, u_0, inputs):
    """Returns states `[sample, time, nodes]`."""

    def trajectory(u_0, inputs):
        step = lambda u, inputs_t: 2 * (stepper(plate, u, inputs_t),)
        return jnp.concatenate([u_0[None], jax.lax.scan(step, u_0, inputs)[1]])

    return jax.jit(jax.vmap(trajectory))(u_0, inputs)


def solve(points, triangles, plate, u_0, inputs):
    """Does the same with Newton's method."""
    step = conduction.newton_solver(points, triangles)
    sources = jax.vmap(jax.vmap(partial(conduction.source, plate)))(inputs)
    trajectories = []
    for u, *series in zip(
        *map(np.asarray, (u_0, sources, conduction.wall_temperature(inputs)))
    ):
        trajectory = [u]
        for source, wall in zip(*series):
            trajectory.append(step(trajectory[-1], source, wall))
        trajectories.append(trajectory)
    return jnp.array(trajectories)


def evaluate(emulator, mesh, key, *, num_test, num_steps):
    """Returns rows `{name: (errors [time], ms)}`, and what the figure needs."""
    points, triangles = conduction.random_mesh(*mesh)
    plate = conduction.make_plate(points, triangles)
    u_0, forcing = conduction.random_samples(plate, key, num_test)
    inputs = conduction.forcing_series(forcing, num_steps)
    norm = lambda u: jnp.sqrt(jnp.sum(plate.lumped_mass * u**2, axis=-1))
    solver = partial(solve, points, triangles, plate)
    solution, ms = timed(solver, u_0, inputs)
    rows, states = {"Newton": (0 * norm(solution)[0], ms)}, {"solver": solution}
    for name, stepper in (UNTRAINED | {"emulator": emulator}).items():
        states[name], ms = timed(partial(rollout, stepper, plate), u_0, inputs)
        rows[name] = jnp.mean(norm(states[name] - solution) / norm(solution), axis=0), ms
    functions = (partial(f, plate) for f in (emulator, conduction.residual))
    divide = partial(jacobi, plate, jnp.zeros_like(u_0[0]))
    options = dict(num_rollout_steps=num_steps, solve=partial(gmres, M=divide, tol=1e-3))
    estimate = lambda u_0, inputs: estimate_error(*functions, u_0, inputs, **options)[1]
    (errors), ms = timed(jax.jit(jax.vmap(estimate)), u_0, inputs)
    estimated = jnp.mean(norm(errors) / norm(solution[:, 1:]), axis=0)
    rows["its error, estimated"] = jnp.pad(estimated, (1, 0)), ms
    residual = jax.vmap(jax.vmap(partial(conduction.residual, plate)))
    largest = jnp.max(jnp.abs(residual(solution[:, 1:], solution[:, :-1], inputs)))
    print(f"\nLargest residual of the solver: {largest:.0e}")
    return plate, states, rows


def timed(f, *args):
    """Returns the result, and the milliseconds of CPU time that a step and sample take."""
    jax.block_until_ready(f(*args))
    start = time.process_time()
    result = jax.block_until_ready(f(*args))
    num_steps = args[1].time.size
    return result, 1000 * (time.process_time() - start) / num_steps


def draw(path, plate, states, rows):
    figure, axes = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
    n = states["solver"].shape[1] // 2
    solution, emulated = states["solver"][0, n], states["emulator"][0, n]
    pictures = {"solver": solution, "emulator": emulated}
    pictures["difference × 100"] = 100 * (emulated - solution)
    limit = jnp.max(jnp.abs(solution))
    for axis, (name, u) in zip(axes, pictures.items(), strict=False):
        style = dict(cmap="RdBu_r", vmin=-limit, vmax=limit, edgecolors="face")
        image = axis.tripcolor(
            *plate.points.T,
            plate.triangles.T,
            u,
            shading="gouraud",
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
        )
        axis.triplot(*plate.points.T, plate.triangles.T, color="black", linewidth=0.1)
        axis.set(title=f"u, {name}, step {n}", aspect="equal", xticks=[], yticks=[])
    figure.colorbar(image, ax=axes[2], shrink=0.8)
    shown = {name: rows[name][0] for name in [*UNTRAINED, "emulator"] if "3" not in name}
    common.plot_errors(axes[3], conduction.DT, shown, "finer mesh")
    axes[3].legend(fontsize="small")
    common.save_figure(path, figure)


def main():
    args = common.parse_options(__doc__, "assets/plate.png", updates=(3000, 20))
    keys = jax.random.split(jax.random.key(args.seed), 1 + len(MESHES))
    plate = conduction.make_plate(*conduction.random_mesh(*MESHES["training mesh"]))
    emulator, _ = train_emulator(plate, keys[0], args.updates)

    jax.config.update("jax_enable_x64", True)  # shows that the residual is that of the solver
    double = lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x
    emulator = jax.tree.map(double, emulator)
    options = dict(num_test=2, num_steps=10) if args.quick else dict(num_test=8, num_steps=50)
    steps = [n for n in REPORT_STEPS if n <= options["num_steps"]]
    for (title, mesh), key in zip(MESHES.items(), keys[1:], strict=True):
        plate, states, rows = evaluate(emulator, mesh, key, **options)
        cells = {
            k: [f"{x[n]:.4f}" for n in steps] + [f"{ms:.2f}"] for k, (x, ms) in rows.items()
        }
        columns = [*(f"step {n}" for n in steps), "ms per step"]
        common.print_table(f"{title}, {len(plate.points)} nodes", columns, cells)
    draw(args.output, plate, states, rows)


if __name__ == "__main__":
    main()
