"""Trains an emulator of incompressible flow, a differential-algebraic equation: the pressure
has no time derivative, and the velocity has a constraint.

Pressure and velocity are fields of the state, and each equation is a field of the residual. The
residual is that of one implicit–explicit step of the Navier–Stokes equations in a periodic
square, with spectral derivatives. It does not read the pressure of the previous state, so the
initial pressure may be anything. A projection method solves the same step and checks the
residual. The pressure depends on the whole square, so the small network here learns it slowly.

    python examples/navier_stokes.py             checks the residual, trains for seconds
    python examples/navier_stokes.py --quick     the same with fewer updates
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import optax
from canonical_convolutions import canonical_convolutions

from residuum import Cuts, residuum_loss


SIZE, TIME_STEP, VISCOSITY = 16, 0.1, 0.02

#
# Spectral derivatives
#

FREQUENCIES = jnp.fft.fftfreq(SIZE, 1 / SIZE).at[SIZE // 2].set(0)
WAVES = jnp.stack(jnp.meshgrid(FREQUENCIES, FREQUENCIES[: SIZE // 2 + 1], indexing="ij"))
MINUS_LAPLACIAN = jnp.sum(WAVES**2, axis=0)


def to_field(x):
    return jnp.fft.irfft2(x, (SIZE, SIZE))


def gradient(p):
    return to_field(1j * WAVES * jnp.fft.rfft2(p))


def divergence(velocity):
    return to_field(jnp.sum(1j * WAVES * jnp.fft.rfft2(velocity), axis=0))


#
# The step: advection is explicit, viscosity and pressure are implicit
#


def advected(velocity):
    advect = lambda component: jnp.sum(velocity * gradient(component), axis=0)
    return velocity - TIME_STEP * jax.vmap(advect)(velocity)


def navier_stokes_residuum(next, prev):
    velocity, pressure = next["velocity"], next["pressure"]
    viscous = to_field(-MINUS_LAPLACIAN * jnp.fft.rfft2(velocity))
    forces = VISCOSITY * viscous - gradient(pressure)
    return {
        "momentum": velocity - advected(prev["velocity"]) - TIME_STEP * forces,
        "continuity": divergence(velocity),
        "gauge": jnp.mean(pressure),  # the pressure is unique up to a constant
    }


def projection_step(state):
    """Takes the exact step, in which the pressure removes the divergence."""
    velocity = advected(state["velocity"])
    is_constant = MINUS_LAPLACIAN == 0
    inverse = jnp.where(is_constant, 0, 1 / jnp.where(is_constant, 1, MINUS_LAPLACIAN))
    pressure = to_field(-inverse * jnp.fft.rfft2(divergence(velocity))) / TIME_STEP
    velocity = jnp.fft.rfft2(velocity - TIME_STEP * gradient(pressure))
    velocity = to_field(velocity / (1 + TIME_STEP * VISCOSITY * MINUS_LAPLACIAN))
    return {"velocity": velocity, "pressure": pressure}


def random_flow(key):
    """Draws a flow from a random stream function, so that it is free of divergence."""
    noise = jnp.fft.rfft2(jax.random.normal(key, (SIZE, SIZE)))
    d_x, d_y = gradient(to_field(noise * jnp.exp(-MINUS_LAPLACIAN / 4)))
    velocity = jnp.stack([d_y, -d_x])
    return {"velocity": velocity / jnp.std(velocity), "pressure": jnp.zeros((SIZE, SIZE))}


#
# Training
#


def convolve(kernel, fields):  # periodic, [channels, x, y]
    fields = jnp.pad(fields, ((0, 0), (1, 1), (1, 1)), "wrap")
    return jax.lax.conv(fields[None], kernel, (1, 1), "VALID")[0]


def emulate(kernels, state):
    hidden = jnp.tanh(convolve(kernels["in"], state["velocity"]))
    change = convolve(kernels["out"], hidden)
    return {"velocity": state["velocity"] + change[:2], "pressure": change[2]}


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--quick", action="store_true", help="20 updates instead of 500")
    args = parser.parse_args()

    flows = jax.vmap(random_flow)(jax.random.split(jax.random.key(1), 8))
    flows = jax.tree.map(lambda x: x[:, None], flows)  # with a snapshot axis
    check = jax.jit(partial(residuum_loss, projection_step, residuum_fn=navier_stokes_residuum))
    print(f"loss of the exact step: {check(flows):.0e}")

    def loss(kernels):
        stepper = partial(emulate, kernels)
        cuts = Cuts(bptt=True)
        return residuum_loss(
            stepper, flows, navier_stokes_residuum, num_rollout_steps=2, cuts=cuts
        )

    @jax.jit
    def update(kernels, opt_state):
        value, grads = canonical_convolutions(jax.value_and_grad(loss))(kernels)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(kernels, updates), opt_state, value

    kernels = {"in": 0.2 * jax.random.normal(jax.random.key(2), (8, 2, 3, 3))}
    kernels["out"] = jnp.zeros((3, 8, 3, 3))
    optimizer, history = optax.adam(3e-3), []
    opt_state = optimizer.init(kernels)
    for _ in range(20 if args.quick else 500):
        kernels, opt_state, value = update(kernels, opt_state)
        history.append(value)
    print(f"loss of the emulator: from {history[0]:.2e} to {history[-1]:.2e}")


if __name__ == "__main__":
    main()
