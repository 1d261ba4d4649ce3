"""Trains an emulator of nonlinear heat conduction (conduction.py) on an unstructured mesh: a
plate with a hole, a moving source of heat, and a wall whose temperature changes in time.

*Source and wall* are `inputs`: the parameters of their formulas, and the time. *The emulator*
corrects a guess by the GCR method, with a network as preconditioner that sends messages along
the edges of the mesh. *The loss* is that of the residual, preconditioned by a few conjugate
gradients, so no matrix is inverted. *Newton's method*, with scikit-fem, checks the residual and
evaluates the emulator and untrained steppers, on meshes unseen in training as well.

    python examples/plate.py             trains and writes assets/plate.png
    python examples/plate.py --quick     the same in seconds, to see that it runs
"""

from functools import partial

import common
import conduction
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from error_estimate import estimate_error, gmres
from replay_buffer import diverged, put_back, sample

from residuum import residuum_loss


REPORT_STEPS = (1, 10, 50)
SHOWN = "persistence", "20 steps of GCR, Jacobi", "4 steps u − P r", "emulator"
# The spacing of the nodes, and the seed of their positions.
MESHES = {"training mesh": (0.04, 0), "another mesh": (0.04, 1), "finer mesh": (0.033, 2)}


#
# The emulator
#


class Emulator(eqx.Module):
    """Corrects a guess by the GCR method, with a network as the preconditioner. The network is
    linear in the residual. Mesh and conductivity enter through gates on edges and nodes."""

    edge_network: eqx.nn.MLP
    node_network: eqx.nn.MLP
    first: jax.Array  # [width]
    layers: jax.Array  # [depth, 2 * width, width]
    last: jax.Array  # [width]

    def __init__(self, key, *, width=16, depth=4):
        keys = jax.random.split(key, 4)
        self.edge_network = eqx.nn.MLP(4, width, 16, 1, jax.nn.gelu, key=keys[0])
        self.node_network = eqx.nn.MLP(3, width, 16, 1, jax.nn.gelu, key=keys[1])
        self.first = jax.random.normal(keys[2], (width,))
        self.layers = jax.random.normal(keys[3], (depth, 2 * width, width)) / (6 * width) ** 0.5
        self.last = jnp.zeros(width)

    def __call__(self, plate, u_prev, forcing, num_corrections=4):
        stepper = conduction.gcr(self.preconditioner, num_corrections)
        return stepper(plate, u_prev, forcing)

    def preconditioner(self, plate, u, entries):
        """Returns a function that maps a residual `[nodes]` to a direction of correction."""
        edge_gates, node_gates = self.gates(plate, u, *entries)

        @jax.checkpoint  # computing the messages again takes less time than storing them
        def exchange(hidden, weights):
            messages = conduction.sum_edges(plate, edge_gates * hidden[plate.edges[1]])
            inputs = jnp.concatenate([node_gates * hidden, messages], axis=1)
            return hidden + inputs @ weights, None

        def divide(r):
            r = r / entries[0]
            hidden, _ = jax.lax.scan(exchange, r[:, None] * self.first, self.layers)
            return r + 0.1 * hidden @ self.last  # at first, Jacobi's method

        return divide

    def gates(self, plate, u, diagonal, others):
        """Computes gates `[edges, width]` and `[nodes, width]` from ratios without units, the
        conductivity, and the nodes that are fixed."""
        ratios = lambda x, of_nodes: [x / of_nodes[i] for i in plate.edges]
        edges = ratios(others, diagonal) + ratios(plate.mass, plate.lumped_mass)
        edge_gates = 0.3 * jax.vmap(self.edge_network)(4 * jnp.stack(edges, axis=1))
        share_of_mass = plate.lumped_mass / conduction.DT / diagonal
        nodes = jnp.stack([1 + u / 2, share_of_mass, plate.is_fixed], axis=1)
        free = ~plate.is_fixed[plate.edges[1], None]
        return free * edge_gates, 1 + jax.vmap(self.node_network)(nodes)


#
# Training
#


def train_emulator(plate, key, num_updates, *, kind=Emulator, batch_size=4, buffer_size=64):
    """Returns a trained emulator, and the training time in seconds."""
    keys = jax.random.split(key, 3)
    rate = optax.warmup_cosine_decay_schedule(0, 3e-3, num_updates // 20, num_updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))
    # Conjugate gradients return 0 for a residual that is NaN, so check the gradient instead.
    optimizer = optax.apply_if_finite(optimizer, num_updates)
    arrays, static = eqx.partition(kind(keys[0]), eqx.is_array)

    def update(carry, key):
        arrays, opt_state, buffer = carry
        sample_key, replay_key, fresh_key = jax.random.split(key, 3)
        samples, (u, forcing) = sample(buffer, batch_size, sample_key)
        inputs = conduction.forcing_series(forcing, 1)

        def loss_fn(arrays):
            stepper = partial(eqx.combine(arrays, static), plate)
            residuum_fn = partial(conduction.relative_residual, plate)
            return residuum_loss(stepper, u[:, None], residuum_fn, inputs=inputs, has_aux=True)

        (loss, rollout), grads = jax.value_and_grad(loss_fn, has_aux=True)(arrays)
        updates, opt_state = optimizer.update(grads, opt_state, arrays)
        final = rollout.final_state, forcing._replace(time=inputs.time[:, -1])
        fresh = conduction.random_samples(plate, fresh_key, batch_size)
        # Within the bound, u > −2, so that the conductivity is positive.
        lost = diverged(rollout.final_state - 1, bound=3) | (forcing.time > 0.5)
        buffer = put_back(buffer, samples, final, fresh, lost=lost, share=0.2, key=replay_key)
        return (optax.apply_updates(arrays, updates), opt_state, buffer), loss

    @jax.jit
    def updates(carry, keys):
        carry, losses = jax.lax.scan(update, carry, keys)
        return carry, jnp.mean(losses)

    buffer = conduction.random_samples(plate, keys[1], buffer_size)
    carry = arrays, optimizer.init(arrays), buffer
    chunks = jax.random.split(keys[2], (num_updates // 20, 20))
    (arrays, *_), seconds = common.train(updates, carry, chunks, "20 updates each")
    return eqx.combine(arrays, static), seconds


#
# Evaluation
#


def evaluate(emulator, mesh, key, num_samples, num_steps):
    """Returns plate, states, nRMSE `{name: [sample, time]}` and times of all steppers."""
    emulator, mesh = common.to_float64(emulator), conduction.random_mesh(*mesh)
    plate = conduction.make_plate(*mesh)
    u_0, forcing = conduction.random_samples(plate, key, num_samples)
    inputs = conduction.forcing_series(forcing, num_steps)
    steppers = conduction.UNTRAINED | {"emulator": emulator}
    steppers["emulator, 6 corrections"] = partial(emulator, num_corrections=6)
    states, errors, times = conduction.compare(steppers, mesh, u_0, inputs)
    errors["estimated error"] = estimated_error(emulator, plate, u_0, inputs)
    return plate, states, errors, times


def estimated_error(emulator, plate, u_0, inputs):
    """Estimates the nRMSE `[sample, time]` of the emulator, without a solver."""
    stepper, residuum_fn = partial(emulator, plate), partial(conduction.residual, plate)
    divide = lambda r: r / conduction.matrix(plate, 0 * r)[0]  # Jacobi, for k = 1
    options = dict(num_rollout_steps=inputs.time.shape[1], solve=partial(gmres, M=divide))
    estimate = partial(estimate_error, stepper, residuum_fn, **options)
    u, errors = jax.jit(jax.vmap(estimate))(u_0, inputs)
    return jnp.pad(conduction.relative_error(plate, u, u - errors), ((0, 0), (1, 0)))


def draw(path, plate, states, errors):
    """Draws one sample of solver and emulator, their difference, and errors over time."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
    n = len(errors["emulator"]) // 2
    pictures = {"solver": states["Newton"][0, n], "emulator": states["emulator"][0, n]}
    pictures["difference × 100"] = 100 * (pictures["emulator"] - pictures["solver"])
    for axis, (name, u) in zip(axes, pictures.items(), strict=False):
        limit = jnp.max(abs(pictures["solver"]))
        image = conduction.show_plate(axis, f"u, {name}, step {n}", plate, u, limit)
    figure.colorbar(image, ax=axes[2], shrink=0.8)
    common.plot_errors(axes[3], conduction.DT, {name: errors[name] for name in SHOWN})
    axes[3].legend(fontsize="x-small")
    common.save_figure(path, figure)


def main():
    args = common.parse_options(__doc__, "assets/plate.png", updates=(1600, 100))
    keys = jax.random.split(jax.random.key(args.seed), 1 + len(MESHES))
    plate = conduction.make_plate(*conduction.random_mesh(*MESHES["training mesh"]))
    emulator, _ = train_emulator(plate, keys[0], args.updates)

    jax.config.update("jax_enable_x64", True)  # float32 would hide small residuals
    num_test, steps = (2, REPORT_STEPS[:2]) if args.quick else (8, REPORT_STEPS)
    for (title, mesh), key in zip(MESHES.items(), keys[1:], strict=True):
        plate, states, errors, times = evaluate(emulator, mesh, key, num_test, steps[-1])
        errors = {name: jnp.mean(each, axis=0) for name, each in errors.items()}
        rows = {name: [f"{error[n]:.5f}" for n in steps] for name, error in errors.items()}
        for name, ms in times.items():
            rows[name].append(f"{ms:.2f}")
        columns = [*(f"step {n}" for n in steps), "ms / step"]
        common.print_table(f"{title}, {len(plate.points)} nodes", columns, rows)
    draw(args.output, plate, states, errors)


if __name__ == "__main__":
    main()
