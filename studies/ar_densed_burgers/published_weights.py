r"""Evaluates the published weights of AR-DenseED on its tests: the weights for Burgers'
equation on the test of studies/ar_densed_burgers, and the weights for the Kuramoto–Sivashinsky
equation on the test of studies/ar_densed_kuramoto_sivashinsky. Prints the row for the table
there.

    git clone https://github.com/zabaras/ar-pde-cnn
    python -m studies.ar_densed_burgers.published_weights \
        --weights ar-pde-cnn/1D-KS-SWAG/post/networks/torchSwagModel_epoch100.pth
    python -m studies.ar_densed_burgers.published_weights \
        --weights ar-pde-cnn/1D-Burger-SWAG/post/networks/torchSwagModel_epoch100.pth \
        --output studies/ar_densed_burgers/published_error.csv

The second run takes about 7 minutes on one core, half of it for the solver.

You need PyTorch to read the file, and the packages of the examples. The file belongs to N.
Geneva, N. Zabaras: Modeling the dynamics of PDE systems with physics-constrained deep
auto-regressive networks. J. Comput. Phys. 403, 109056 (2020), arXiv 1906.05747, commit
adeb9f313d70 of their repository. The networks are reimplemented here, without their code.
"""

import argparse
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from common import error_over_time
from tqdm import tqdm

from benchmarks import tables
from studies import train_and_tabulate
from studies.ar_densed_burgers import problem as burgers, run as burgers_study
from studies.ar_densed_kuramoto_sivashinsky import problem as ks, run as ks_study


#
# The networks take two past states `[2, x]`, or five for Burgers' equation. Inside, they have
# half the resolution.
#


def read_weights(path):
    """Returns the network in the file, `{name: array}`, which is the contents of `base`. The
    file also has the moments of SWAG, which are still zero after epoch 100."""
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    prefix = "base.model.features."
    return {
        name.removeprefix(prefix): jnp.asarray(value.numpy())
        for name, value in state.items()
        if name.startswith(prefix) and not name.endswith("num_batches_tracked")
    }


def of_burgers(weights):
    """Returns whether the network is the one for Burgers' equation, which begins with three
    layers."""
    return "In_conv3.weight" in weights


def num_parameters(weights):
    """Counts the trained parameters of the network. The moments of the normalisation do not
    count. Neither does `log_beta`, a number that only the loss uses."""
    return sum(value.size for name, value in weights.items() if "running" not in name)


def convolve(u, kernel, stride=1):
    """Convolves `[c_in, x]` periodically with `[c_out, c_in, kernel_size]`. In the PyTorch of
    that time, the published `padding=kernel_size - 1` meant half of that number on each
    side."""
    half = kernel.shape[-1] // 2
    u = jnp.pad(u, ((0, 0), (half, half)), "wrap")
    return jax.lax.conv(u[None], kernel, (stride,), "VALID")[0]


def ar_densed(weights, u):
    """Returns the next state `[1, x]` after the last two or five states, `[past, x]`, of which
    the newest comes last."""

    def normalise(name, u):
        mean, variance, scale, shift = (
            weights[f"{name}.{key}"][:, None]
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return jax.nn.relu((u - mean) / jnp.sqrt(variance + 1e-5) * scale + shift)

    if of_burgers(weights):
        for i in ("", "2"):
            u = normalise(f"In_conv_norm{i}", convolve(u, weights[f"In_conv{i}.weight"]))
        last, num_layers = "In_conv3", 1
    else:
        last, num_layers = "In_conv", 4
    hidden = convolve(u, weights[f"{last}.weight"], stride=2)
    for layer in (f"DecBlock1.denselayer{i + 1}" for i in range(num_layers)):
        new = convolve(normalise(f"{layer}.norm1", hidden), weights[f"{layer}.conv1.weight"])
        hidden = jnp.concatenate([hidden, new])
    for i in (1, 2, 3):
        hidden = normalise(f"LastTransUp.norm{i}", hidden)
        if i == 2:  # back to full resolution, by the nearest point
            hidden = jnp.repeat(hidden, 2, axis=-1)
        hidden = convolve(hidden, weights[f"LastTransUp.conv{i}.weight"])
    return hidden


@partial(jax.jit, static_argnames="num_steps")
def trajectories(weights, states, num_steps):
    """Rolls out `[batch, num_steps + 1, 1, x]` from states `[batch, 1, x]`. Each state also
    serves as all of its own predecessors."""

    def step(past, _):
        u = jnp.concatenate([past[:, 1:], jax.vmap(partial(ar_densed, weights))(past)], axis=1)
        return u, u[:, -1:]

    past = jnp.repeat(states, weights["In_conv.weight"].shape[1], axis=1)
    _, u = jax.lax.scan(step, past, length=num_steps)
    return jnp.concatenate([states[:, None], jnp.moveaxis(u, 0, 1)], axis=1)


#
# The tests: each prints a row for each draw, and returns the times, MSE and nRMSE of the first
# draw
#


def run_kuramoto_sivashinsky(weights, num_draws):
    rows = []
    for draw in tqdm(range(num_draws)):
        reference = ks.published_test(seed=draw)
        u = trajectories(weights, reference[:, 0], ks.TEST_STEPS)
        scores = ks_study.evaluate(u, reference)
        row = ks_study.make_row(f"{ks_study.PUBLISHED}, draw {draw}", scores.numbers)
        rows.append(row | dict(parameters=num_parameters(weights)))
        if draw == 0:
            first = scores
            error = error_over_time(u, reference)
    print(train_and_tabulate.markdown(rows, ks_study.COLUMNS))
    print("\nEnergy of its modes from 2 on, relative to the solver's, draw 0:")
    print(" ".join(f"{x:.3f}" for x in first.energy))
    return ks.DT * np.arange(len(error)), first.mse, error


def run_burgers(weights):
    reference = burgers.reference(
        burgers.published_states(range(burgers_study.NUM_TEST), num_points=1024)
    )
    u = trajectories(weights, reference[:, 0], burgers.TEST_STEPS)
    mse = burgers_study.mean_squared_error(u, reference)
    row = burgers_study.make_row(burgers_study.PUBLISHED, mse) | dict(
        parameters=num_parameters(weights)
    )
    print(train_and_tabulate.markdown([row], burgers_study.COLUMNS))
    return burgers.DT * np.arange(len(mse)), mse, error_over_time(u, reference)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=pathlib.Path, required=True)
    parser.add_argument(
        "--draws",
        type=int,
        default=1,
        help="of 200 trajectories for Kuramoto–Sivashinsky; those for Burgers are fixed",
    )
    parser.add_argument("--output", type=pathlib.Path, help="CSV of the first draw's error")
    args = parser.parse_args()

    weights = read_weights(args.weights)
    if of_burgers(weights):
        columns = run_burgers(weights)
    else:
        columns = run_kuramoto_sivashinsky(weights, args.draws)
    if args.output:
        columns = np.stack(columns, axis=-1)
        rows = [dict(zip(("time", "mse", "nrmse"), x, strict=True)) for x in columns]
        tables.write_csv(args.output, [{k: f"{x:.6g}" for k, x in row.items()} for row in rows])


if __name__ == "__main__":
    main()
