"""Shows how the residuum loss and the diverted-chain loss are related, and what that costs.

An implicit linear step `A u_next = B u_prev` has the residuum `A u_next - B u_prev` and the
solver `u_prev -> A⁻¹ B u_prev`. The diverted chain compares with the solver, so its error is
`e = u_next - A⁻¹ B u_prev`, and the residuum is nothing but `A e`. Hence, at every time level,

    s_min(A)² · mean|e|²  ≤  mean|A e|²  ≤  s_max(A)² · mean|e|²

with the smallest and the largest singular value of A. Both losses have the same minimum, but
the residuum weighs its directions by up to cond(A)² differently, which is what an optimiser
has to cope with. The preconditioned residuum `A⁻¹ r` is the error itself.

Here a linear emulator learns one implicit Euler step of the heat equation, whose A is the
worse conditioned the more points there are.

    python examples/conditioning.py             trains and writes assets/conditioning.png
    python examples/conditioning.py --quick     the same in seconds, to see that it runs
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

from residuum import mse, residuum_loss


DIFFUSION = 0.01  # time step · diffusivity, in units of the squared domain extent
NUM_POINTS = (16, 32, 64)
BATCH_SIZE = 128


def implicit_euler_matrix(num_points):
    """A of `A u_next = u_prev`, for the heat equation on [0, 1), periodic."""
    identity = np.eye(num_points)
    laplacian = np.roll(identity, 1, axis=0) - 2 * identity + np.roll(identity, -1, axis=0)
    return identity - DIFFUSION * num_points**2 * laplacian


def losses(matrix, emulator, data):
    """The residuum loss, and the diverted-chain loss as a preconditioned residuum loss."""
    stepper = lambda u_prev: emulator @ u_prev
    residuum_fn = lambda u_next, u_prev: matrix @ u_next - u_prev
    error_loss = lambda residuum: mse(jnp.linalg.solve(matrix, residuum))
    return (
        residuum_loss(stepper, data, residuum_fn),
        residuum_loss(stepper, data, residuum_fn, time_level_loss=error_loss),
    )


def train(num_points, *, preconditioned, num_updates, seed):
    """Returns both losses `[num_updates, 2]` along the training by one of them."""
    matrix = implicit_euler_matrix(num_points)
    data = np.random.default_rng(seed).normal(size=(BATCH_SIZE, 1, num_points))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, num_updates))
    emulator = jnp.eye(num_points)

    @jax.jit
    def update(state, _):
        emulator, opt_state = state

        def loss(emulator):
            both = losses(matrix, emulator, data)
            return both[preconditioned], both

        grad, both = jax.grad(loss, has_aux=True)(emulator)
        updates, opt_state = optimizer.update(grad, opt_state)
        return (optax.apply_updates(emulator, updates), opt_state), jnp.stack(both)

    state = emulator, optimizer.init(emulator)
    _, history = jax.lax.scan(update, state, length=num_updates)
    return np.asarray(history)


def singular_values(num_points):
    values = np.linalg.svd(implicit_euler_matrix(num_points), compute_uv=False)
    return values[-1], values[0]


def save_figure(path, histories):
    """Both losses within their bounds; the error by what was trained on."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    colors = ("#0072B2", "#009E73", "#D55E00")  # Okabe and Ito, colour-blind safe
    for axis, num_points in zip(axes, (NUM_POINTS[0], NUM_POINTS[-1]), strict=False):
        residuum, diverted = histories[num_points, False].T
        smallest, largest = singular_values(num_points)
        updates = np.arange(1, len(residuum) + 1)
        bounds = smallest**2 * diverted, largest**2 * diverted
        axis.fill_between(updates, *bounds, color="#BBBBBB", alpha=0.5, label="bounds")
        axis.loglog(updates, residuum, color="#0072B2", label="residuum")
        axis.loglog(updates, diverted, "--", color="#D55E00", label="diverted chain")
        title = f"{num_points} points, cond(A) = {largest / smallest:.0f}"
        axis.set(title=title, xlabel="updates, of the residuum loss", ylabel="loss")
        axis.legend(loc="center left", fontsize="small")
    for color, num_points in zip(colors, NUM_POINTS, strict=True):
        smallest, largest = singular_values(num_points)
        for preconditioned, line in ((False, "-"), (True, ":")):
            diverted = histories[num_points, preconditioned][:, 1]
            updates = np.arange(1, len(diverted) + 1)
            axes[2].loglog(updates, diverted, line, color=color)
        axes[2].plot([], color=color, label=f"cond(A) = {largest / smallest:.0f}")
    axes[2].plot([], "k-", label="residuum")
    axes[2].plot([], "k:", label="preconditioned")
    axes[2].set(
        title="effect of preconditioning", xlabel="updates", ylabel="mean|e|²", ylim=(1e-10, 3)
    )
    axes[2].legend(loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=3000, help="updates of each emulator")
    parser.add_argument("--output", type=pathlib.Path, default="assets/conditioning.png")
    parser.add_argument("--quick", action="store_true", help="50 updates of each emulator")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    histories = {}
    cases = [(n, preconditioned) for n in NUM_POINTS for preconditioned in (False, True)]
    for num_points, preconditioned in tqdm(cases):
        histories[num_points, preconditioned] = train(
            num_points,
            preconditioned=preconditioned,
            num_updates=50 if args.quick else args.updates,
            seed=args.seed,
        )
    columns = f"{'cond(A)':>10}{'residuum':>12}{'preconditioned':>18}"
    print(f"\n{'mean|e|² after training':<26}{columns}")
    for num_points in NUM_POINTS:
        smallest, largest = singular_values(num_points)
        errors = [histories[num_points, p][-1, 1] for p in (False, True)]
        row = f"{largest / smallest:>10.0f}{errors[0]:>12.1e}{errors[1]:>18.1e}"
        print(f"{f'{num_points} points':<26}{row}")
    save_figure(args.output, histories)
    print(f"\nFigure: {args.output}")


if __name__ == "__main__":
    main()
