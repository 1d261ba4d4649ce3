"""How are the residual loss and the diverted-chain loss related, and what does preconditioning
change?

An implicit linear step `A u_next = B u_prev` has the residual `A u_next - B u_prev` and the
solver `u_prev -> A⁻¹ B u_prev`. The diverted chain compares the emulator with the solver: its
error is `e = u_next - A⁻¹ B u_prev`, and the residual equals `A e`. Hence, at each time level,

    s_min(A)² · mean|e|²  ≤  mean|A e|²  ≤  s_max(A)² · mean|e|²

with the smallest and the largest singular value of A. Both losses have the same minimum. But
the weights of the residual loss differ by up to cond(A)² between directions of the error, which
slows down the optimiser. The preconditioned residual `A⁻¹ r` is the error itself.

In this study, a linear emulator learns one implicit Euler step of the heat equation. The
condition number of its matrix A grows with the number of points.

The table has the median over the seeds, and the figure shows the first seed. All seeds are in
the CSV file.

    python -m studies.conditioning.run                    trains; assets/conditioning.png
    python -m studies.conditioning.run --seed 0 1 2       the same with three seeds
    python -m studies.conditioning.run --quick            seconds, to see that it runs
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import COLORS, print_table, save_figure
from tqdm import tqdm

from benchmarks import tables
from residuum import mse, residuum_loss
from studies import train_and_tabulate


DIFFUSION = 0.01  # time step · diffusivity, in units of the squared domain extent
NUM_POINTS = (16, 32, 64)
BATCH_SIZE = 128


def implicit_euler_matrix(num_points):
    """Returns the A of `A u_next = u_prev`, for the heat equation on [0, 1), periodic."""
    identity = np.eye(num_points)
    laplacian = np.roll(identity, 1, axis=0) - 2 * identity + np.roll(identity, -1, axis=0)
    return identity - DIFFUSION * num_points**2 * laplacian


def singular_values(num_points):
    """Returns the smallest and the largest singular value."""
    values = np.linalg.svd(implicit_euler_matrix(num_points), compute_uv=False)
    return values[-1], values[0]


def condition_number(num_points):
    smallest, largest = singular_values(num_points)
    return f"{largest / smallest:.0f}"


def losses(matrix, emulator, data):
    """Computes the residual loss, and the diverted-chain loss as a preconditioned residual
    loss."""
    stepper = lambda u_prev: emulator @ u_prev
    residuum_fn = lambda u_next, u_prev: matrix @ u_next - u_prev
    error_loss = lambda residual: mse(jnp.linalg.solve(matrix, residual))
    return (
        residuum_loss(stepper, data, residuum_fn),
        residuum_loss(stepper, data, residuum_fn, time_level_loss=error_loss),
    )


def train(num_points, *, preconditioned, num_updates, seed):
    """Returns both losses `[num_updates, 2]` during training on one of them."""
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


def draw(histories):
    """Draws both losses within their bounds, and the error for each loss that was minimised."""
    _, error_color, residual_color, *_ = COLORS
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for axis, num_points in zip(axes, (NUM_POINTS[0], NUM_POINTS[-1]), strict=False):
        residual, error = histories[num_points, False].T
        updates = np.arange(1, len(residual) + 1)
        bounds = (value**2 * error for value in singular_values(num_points))
        axis.fill_between(updates, *bounds, color="#BBBBBB", alpha=0.5, label="bounds")
        axis.loglog(updates, residual, color=residual_color, label="residual")
        axis.loglog(updates, error, "--", color=error_color, label="diverted chain")
        axis.set(title=f"{num_points} points, cond(A) = {condition_number(num_points)}")
        axis.set(xlabel="updates, of the residual loss", ylabel="loss")
        axis.legend(loc="center left", fontsize="small")

    colors = dict(zip(NUM_POINTS, (COLORS[2], COLORS[3], COLORS[1]), strict=True))
    for num_points, color in colors.items():
        for preconditioned, line in ((False, "-"), (True, ":")):
            error = histories[num_points, preconditioned][:, 1]
            axes[2].loglog(np.arange(1, len(error) + 1), error, line, color=color)
        axes[2].plot([], color=color, label=f"cond(A) = {condition_number(num_points)}")
    axes[2].plot([], "k-", label="residual")
    axes[2].plot([], "k:", label="preconditioned")
    axes[2].set(title="effect of preconditioning", xlabel="updates", ylabel="mean|e|²")
    axes[2].set(ylim=(1e-10, 3))
    axes[2].legend(loc="lower left")
    return figure


def csv_row(num_points, preconditioned, seed, history):
    """Makes a row from both losses `[num_updates, 2]`, at the first and at the last update."""
    (residual_first, error_first), (residual_last, error_last) = history[[0, -1]]
    return dict(
        num_points=num_points,
        condition_number=condition_number(num_points),
        trained_on="preconditioned residual" if preconditioned else "residual",
        seed=seed,
        updates=len(history),
        error_first=f"{error_first:.6g}",
        error_last=f"{error_last:.6g}",
        residual_first=f"{residual_first:.6g}",
        residual_last=f"{residual_last:.6g}",
    )


def main():
    parser = tables.make_parser(__doc__, quick="50 updates")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    parser.add_argument("--updates", type=int, default=3000, help="updates of each training")
    args = parser.parse_args()
    folder, figures = tables.output_folders(args, __file__)
    num_updates = 50 if args.quick else args.updates
    jax.config.update("jax_enable_x64", True)

    cases = [
        (n, preconditioned, seed)
        for n in NUM_POINTS
        for preconditioned in (False, True)
        for seed in args.seed
    ]
    histories = {
        (n, p, seed): train(n, preconditioned=p, num_updates=num_updates, seed=seed)
        for n, p, seed in tqdm(cases)
    }

    rows = {}
    for n in NUM_POINTS:
        last = [[histories[n, p, s][-1, 1] for s in args.seed] for p in (False, True)]
        medians = (train_and_tabulate.over_seeds(errors)[0] for errors in last)
        rows[f"{n} points"] = [condition_number(n), *(f"{error:.1e}" for error in medians)]
    columns = ("cond(A)", "residual", "precond.")
    print_table("mean|e|² after training", columns, rows)
    tables.write_csv(folder / "rows.csv", [csv_row(*case, histories[case]) for case in cases])
    first = {(n, p): histories[n, p, args.seed[0]] for n, p, _ in cases}
    save_figure(figures / "conditioning.png", draw(first))


if __name__ == "__main__":
    main()
