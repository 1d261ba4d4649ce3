"""Uses the batch norms of Equinox and of Flax NNX in a stepper.

A batch norm needs the whole batch, but `residuum_loss` calls the stepper on one sample.
`axis_name` gives the batch axis the name under which the batch norm averages. The running
statistics are a leaf of the state, with one copy for each sample. All copies remain equal.

    python examples/batch_norm.py     running statistics after one gradient, of both libraries
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx

from residuum import residuum_loss


loss_and_rollout = partial(residuum_loss, num_rollout_steps=3, axis_name="batch", has_aux=True)


def heat_residuum(u_next, u_prev):
    laplacian = jnp.roll(u_next, 1) - 2 * u_next + jnp.roll(u_next, -1)
    return u_next - u_prev - 0.5 * laplacian


def copies(statistics, data):
    """Copies the statistics for each sample, with a snapshot axis."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(data), 1, *x.shape)), statistics)


#
# Equinox: the statistics are an argument and a result
#


class EquinoxEmulator(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    out: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.hidden = eqx.nn.Linear(32, 64, key=keys[0])
        self.norm = eqx.nn.BatchNorm(64, axis_name="batch", mode="batch")
        self.out = eqx.nn.Linear(64, 32, key=keys[1])

    def __call__(self, state):
        u, statistics = state
        hidden, statistics = self.norm(self.hidden(u), statistics)
        return u + self.out(jnp.tanh(hidden)), statistics


def with_equinox(data):
    """Returns the network, its gradient, and the running statistics after the rollout."""

    @eqx.filter_jit
    @eqx.filter_grad(has_aux=True)
    def grad(network, statistics):
        states = data, copies(statistics, data)
        residuum_fn = lambda next, prev: heat_residuum(next[0], prev[0])
        return loss_and_rollout(network, states, residuum_fn)

    network, statistics = eqx.nn.make_with_state(EquinoxEmulator)(jax.random.key(1))
    grads, rollout = grad(network, statistics)
    statistics = jax.tree.map(lambda x: x[0], rollout.final_state[1])
    # This is how to evaluate the emulator on one state.
    eqx.nn.inference_mode(network)((data[0, 0], statistics))
    return network, grads, statistics


#
# Flax NNX: a call mutates a module, so the module is merged inside the stepper
#


class FlaxEmulator(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(32, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, axis_name="batch", rngs=rngs)
        self.out = nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, u):
        return u + self.out(jnp.tanh(self.norm(self.hidden(u))))


def with_flax(data):
    """Returns the network, its gradient, and the running statistics after the rollout."""
    graphdef, *states = nnx.split(FlaxEmulator(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
    params, statistics = states

    @jax.jit
    def loss(params, statistics):
        def stepper(state):
            emulator = nnx.merge(graphdef, params, state["statistics"])
            u = emulator(state["u"])
            return {"u": u, "statistics": nnx.state(emulator, nnx.BatchStat)}

        states = {"u": data, "statistics": copies(statistics, data)}
        residuum_fn = lambda next, prev: heat_residuum(next["u"], prev["u"])
        return loss_and_rollout(stepper, states, residuum_fn)

    grads, rollout = jax.grad(loss, has_aux=True)(params, statistics)
    statistics = jax.tree.map(lambda x: x[0], rollout.final_state["statistics"])
    emulator = nnx.merge(graphdef, params, statistics)
    # To evaluate the emulator on a batch, call emulator.eval() and then emulator(u).
    return emulator, grads, statistics


def main():
    data = jax.random.normal(jax.random.key(0), (64, 1, 32))  # [batch, num_snapshots, x]
    for name, run in {"Equinox": with_equinox, "Flax NNX": with_flax}.items():
        _, _, statistics = run(data)
        mean, variance = (x for x in jax.tree.leaves(statistics) if x.shape == (64,))
        print(f"{name}: mean {jnp.mean(mean):.4f}, variance {jnp.mean(variance):.4f}")


if __name__ == "__main__":
    main()
