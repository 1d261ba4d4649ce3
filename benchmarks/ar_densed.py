"""Runs the published weights of AR-DenseED on the test of examples/kuramoto_sivashinsky.py, and
prints its row of the table there.

    git clone https://github.com/zabaras/ar-pde-cnn
    python benchmarks/ar_densed.py \
        --weights ar-pde-cnn/1D-KS-SWAG/post/networks/torchSwagModel_epoch100.pth

Needs PyTorch to read the file, and the packages of the examples. The file is from
N. Geneva, N. Zabaras: Modeling the dynamics of PDE systems with physics-constrained deep
auto-regressive networks. J. Comput. Phys. 403, 109056 (2020), arXiv 1906.05747,
commit adeb9f313d70 of their repository. None of it is used here: the network was written anew.
"""

import argparse
import pathlib
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm


ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import kuramoto_sivashinsky as ks  # noqa: E402


#
# The network: two past states `[2, x]`, at half the resolution inside
#


def read_weights(path):
    """The network of the file, `{name: array}`: what its `base` holds. What is beside it, the
    moments of SWAG, is still zero after epoch 100."""
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    prefix = "base.model.features."
    return {
        name.removeprefix(prefix): jnp.asarray(value.numpy())
        for name, value in state.items()
        if name.startswith(prefix) and not name.endswith("num_batches_tracked")
    }


def num_parameters(weights):
    """Those that were trained: the moments of the normalisation are not."""
    return sum(value.size for name, value in weights.items() if "running" not in name)


def convolve(u, kernel, stride=1):
    """Periodic convolution of `[c_in, x]` with `[c_out, c_in, kernel_size]`. Their
    `padding=kernel_size - 1` was shared between the two sides by their PyTorch."""
    half = kernel.shape[-1] // 2
    u = jnp.pad(u, ((0, 0), (half, half)), "wrap")
    return jax.lax.conv(u[None], kernel, (stride,), "VALID")[0]


def ar_densed(weights, u):
    """The next state `[1, x]` of the two before, `[2, x]`, the newest last."""

    def normalise(name, u):
        mean, variance, scale, shift = (
            weights[f"{name}.{key}"][:, None]
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return jax.nn.relu((u - mean) / jnp.sqrt(variance + 1e-5) * scale + shift)

    hidden = convolve(u, weights["In_conv.weight"], stride=2)
    for layer in (f"DecBlock1.denselayer{i}" for i in (1, 2, 3, 4)):
        new = convolve(normalise(f"{layer}.norm1", hidden), weights[f"{layer}.conv1.weight"])
        hidden = jnp.concatenate([hidden, new])
    for i in (1, 2, 3):
        hidden = normalise(f"LastTransUp.norm{i}", hidden)
        if i == 2:
            hidden = jnp.repeat(hidden, 2, axis=-1)  # the nearest point: full resolution
        hidden = convolve(hidden, weights[f"LastTransUp.conv{i}.weight"])
    return hidden


@partial(jax.jit, static_argnames="num_steps")
def trajectories(weights, states, num_steps):
    """`[batch, num_steps + 1, 1, x]` from states `[batch, 1, x]`. They are their own past."""

    def step(past, _):
        u = jnp.concatenate([past[:, 1:], jax.vmap(partial(ar_densed, weights))(past)], axis=1)
        return u, u[:, 1:]

    past = jnp.concatenate([states, states], axis=1)
    _, u = jax.lax.scan(step, past, length=num_steps)
    return jnp.concatenate([states[:, None], jnp.moveaxis(u, 0, 1)], axis=1)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=pathlib.Path, required=True)
    parser.add_argument("--draws", type=int, default=1, help="tests of 200 trajectories each")
    parser.add_argument("--output", type=pathlib.Path, help="CSV of the first one's error")
    args = parser.parse_args()

    weights = read_weights(args.weights)
    rows = {}
    for draw in tqdm(range(args.draws)):
        reference = ks.published_test(seed=draw)
        u = trajectories(weights, reference[:, 0], ks.TEST_STEPS)
        verdict = ks.judge(u, reference, num_parameters(weights))
        rows[f"AR-DenseED, draw {draw}"] = verdict.row
        if draw == 0:
            first = verdict
            error = ks.relative_error(u, reference)
    ks.print_table(rows)
    print("\nEnergy of its modes from 2 on, relative to the solver's, draw 0:")
    print(" ".join(f"{x:.3f}" for x in first.energy))
    if args.output:
        columns = np.stack([ks.DT * np.arange(len(error)), first.mse, error], axis=-1)
        header = "time,mse,nrmse"
        np.savetxt(args.output, columns, "%.6g", ",", header=header, comments="")


if __name__ == "__main__":
    main()
