"""What one gradient of a rollout costs: residuum and its peers, side by side.

Measures trace and compile time, temporaries (`temp_size_in_bytes`, deterministic) and run
time of the value and gradient of the same loss, on the same networks and data. All peers of
a row run in one process and take turns, so that the noise of the machine hits all alike; run
times are medians. Before it is timed, every peer has to return the same loss.

The peers:

- `residuum`, with its defaults, and with the options that its user would choose:
  `checkpoint=True` where nothing is cut, `unroll=5` for segments of 5 steps, and
  `unroll=True` for convolutions on a CPU;
- `trainax`: `trainax.configuration.Residuum`, a Python loop;
- `scan`: a `jax.lax.scan` as one writes it by hand, with `stop_gradient` under a mask;
- `equinox`: the same with `equinox.internal.scan(kind="checkpointed")`;
- `torch`: eager PyTorch with a `backward()` for each segment, if it is installed;
- `limit`: as many calls of a jitted one-step value and gradient as there are steps.

What this shows on two CPU cores:

- Truncated and streamed, a gradient keeps to the memory of one segment, and is as fast as the
  plain scan or up to a fifth faster, at the same arithmetic.
- A convolution in a loop body (jax-ml/jax#12868) costs more than all else: two to four times
  the run time of `unroll=True`, which compiles as long as trainax does.
- In segments of 5 steps JAX stacks what each step leaves for the backward pass. Unrolled,
  they are faster for FNO and convolution, and slower for the MLP.

    python benchmarks/rollout_cost.py            everything, about 25 minutes on two cores
    python benchmarks/rollout_cost.py --quick    a selection, about a minute
    python benchmarks/draw.py                    the figure and the table from the CSV file
"""

import argparse
import csv
import itertools
import os
import pathlib
import platform
import random
import statistics
import time

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import pdequinox
import trainax
from tqdm import tqdm

from residuum import Cuts, residuum_loss


# PyTorch's idle threads would spin for a while and disturb whoever runs next.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
try:
    import torch
except ImportError:
    torch = None


BATCH_SIZE = 16
NUM_POINTS = 128  # in 1D; 32² in 2D
CUTS = {"no cut": False, "bptt=1": 1, "bptt=5": 5}
NUM_STEPS = (1, 5, 10, 50, 200, 1000)
CONVOLUTIONAL = ("conv 1D", "conv 2D", "U-Net")

# What is left out because it takes too long or too much memory
MAX_PYTHON_LOOP = {"MLP": 50, "FNO": 50, "conv 1D": 50, "conv 2D": 50, "U-Net": 5}
MAX_STEPS = {"MLP": 1000, "FNO": 1000, "conv 1D": 1000, "conv 2D": 50, "U-Net": 50}
MAX_TORCH = 50
MAX_TEMPORARIES = 4e9


#
# The problem: an implicit Euler step of the heat equation, for one sample or a batch
#


def heat_residuum(u_next, u_prev, roll=jnp.roll):
    axes = (-1,) if u_next.shape[-1] == NUM_POINTS else (-2, -1)
    laplacian = sum(roll(u_next, 1, a) - 2 * u_next + roll(u_next, -1, a) for a in axes)
    return u_next - u_prev - 0.01 * laplacian


#
# The networks
#


class MLP(eqx.Module):
    layers: list

    def __init__(self, key, width=128, depth=2):
        sizes = [NUM_POINTS] + [width] * depth + [NUM_POINTS]
        keys = jax.random.split(key, depth + 1)
        self.layers = [
            eqx.nn.Linear(n, m, key=k) for n, m, k in zip(sizes, sizes[1:], keys, strict=False)
        ]

    def __call__(self, u):
        hidden = u[0]
        for layer in self.layers[:-1]:
            hidden = jax.nn.relu(layer(hidden))
        return u + self.layers[-1](hidden)[None]


class ConvNet(eqx.Module):
    layers: list

    def __init__(self, key, num_spatial_dims, width=32, depth=3):
        channels = [1] + [width] * depth + [1]
        keys = jax.random.split(key, depth + 1)
        self.layers = [
            eqx.nn.Conv(
                num_spatial_dims, n, m, 3, padding="SAME", padding_mode="CIRCULAR", key=k
            )
            for n, m, k in zip(channels, channels[1:], keys, strict=False)
        ]

    def __call__(self, u):
        hidden = u
        for layer in self.layers[:-1]:
            hidden = jax.nn.relu(layer(hidden))
        return u + self.layers[-1](hidden)


class FNO(eqx.Module):
    """Fourier neural operator, Li et al., https://arxiv.org/abs/2010.08895."""

    lift: eqx.nn.Conv1d
    bypasses: list
    spectral_weights: jax.Array
    project: eqx.nn.Conv1d

    def __init__(self, key, width=16, num_modes=12, depth=4):
        *keys, spectral_key, lift_key, project_key = jax.random.split(key, depth + 3)
        self.lift = eqx.nn.Conv1d(1, width, 1, key=lift_key)
        self.bypasses = [eqx.nn.Conv1d(width, width, 1, key=k) for k in keys]
        shape = (depth, 2, width, width, num_modes)
        self.spectral_weights = jax.random.normal(spectral_key, shape) / width
        self.project = eqx.nn.Conv1d(width, 1, 1, key=project_key)

    def __call__(self, u):
        hidden = self.lift(u)
        num_modes = self.spectral_weights.shape[-1]
        for (re, im), bypass in zip(self.spectral_weights, self.bypasses, strict=True):
            modes = jnp.fft.rfft(hidden)[:, :num_modes]
            modes = jnp.einsum("iom,im->om", re + 1j * im, modes)
            padding = ((0, 0), (0, hidden.shape[-1] // 2 + 1 - num_modes))
            spectral = jnp.fft.irfft(jnp.pad(modes, padding), n=hidden.shape[-1])
            hidden = jax.nn.relu(spectral + bypass(hidden))
        return u + self.project(hidden)


def make_problems(names):
    key = jax.random.key(0)
    networks = {
        "MLP": lambda: MLP(key),
        "FNO": lambda: FNO(key),
        "conv 1D": lambda: ConvNet(key, 1),
        "conv 2D": lambda: ConvNet(key, 2),
        "U-Net": lambda: pdequinox.arch.ClassicUNet(1, 1, 1, hidden_channels=8, key=key),
    }
    for name in names:
        shape = (32, 32) if name == "conv 2D" else (NUM_POINTS,)
        data = jax.random.normal(jax.random.key(1), (BATCH_SIZE, 1, 1, *shape))
        yield name, networks[name](), data


#
# The peers. Each takes `(stepper, data, num_steps, k)` and returns the loss; `k` is the
# number of steps between cuts, or False
#


def residuum_peer(**options):
    def loss(stepper, data, num_steps, k):
        return residuum_loss(
            stepper,
            data,
            heat_residuum,
            num_rollout_steps=num_steps,
            cuts=Cuts(bptt=k),
            **options,
        )

    return loss


def trainax_loss(stepper, data, num_steps, k):
    configuration = trainax.configuration.Residuum(
        num_steps, cut_bptt=k is not False, cut_bptt_every=k or 1
    )
    return configuration(stepper, data, residuum_fn=heat_residuum)


def scan_peer(scan):
    def loss(stepper, data, num_steps, k):
        def step(u_prev, cut):
            u_next = jax.vmap(stepper)(u_prev)
            level_loss = jnp.mean(heat_residuum(u_next, u_prev) ** 2)
            if k is not False:
                u_next = jnp.where(cut, jax.lax.stop_gradient(u_next), u_next)
            return u_next, level_loss

        cuts = (jnp.arange(num_steps) + 1) % (k or 1) == 0
        _, losses = scan(step, data[:, 0], cuts)
        return jnp.sum(losses)

    return loss


def equinox_scan(step, init, xs):
    return eqxi.scan(step, init, xs, kind="checkpointed")


def select_peers(network_name, cut_name, num_steps):
    peers = {"residuum": residuum_peer()}
    if num_steps > 1:
        if cut_name == "no cut":
            peers["residuum, checkpoint"] = residuum_peer(checkpoint=True)
        if cut_name == "bptt=5" and num_steps > 5:
            peers["residuum, unroll=5"] = residuum_peer(unroll=5)
        if network_name in CONVOLUTIONAL and num_steps <= MAX_PYTHON_LOOP[network_name]:
            peers["residuum, unroll=True"] = residuum_peer(unroll=True)
    if num_steps <= MAX_PYTHON_LOOP[network_name]:
        peers["trainax"] = trainax_loss
    peers["scan"] = scan_peer(jax.lax.scan)
    peers["equinox"] = scan_peer(equinox_scan)
    return peers


def compile_peer(loss, network, data, num_steps, k):
    """Returns a program of no arguments, and its trace time, compile time and memory."""
    params, static = eqx.partition(network, eqx.is_array)

    def value_and_grad(params, data):
        return jax.value_and_grad(
            lambda params: loss(eqx.combine(params, static), data, num_steps, k)
        )(params)

    start = time.perf_counter()
    lowered = jax.jit(value_and_grad).lower(params, data)
    traced = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    costs = dict(
        trace_s=traced - start,
        compile_s=end - traced,
        temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
    )
    return lambda: jax.block_until_ready(compiled(params, data))[0], costs


#
# PyTorch: the same networks with the same parameters
#


def torch_program(name, network, data, num_steps, k):
    """The program, or None for a network that has no twin here, or for a long rollout."""
    if torch is None or name == "U-Net" or num_steps > MAX_TORCH:
        return None
    params, static = eqx.partition(network, eqx.is_array)
    leaves, treedef = jax.tree.flatten(params)
    tensors = [torch.tensor(np.asarray(x), requires_grad=True) for x in leaves]
    twin = eqx.combine(jax.tree.unflatten(treedef, tensors), static)
    u_0 = torch.tensor(np.asarray(data[:, 0]))
    nn = torch.nn.functional

    def convolve(layer, x):
        dims = x.ndim - 2
        pad = (layer.kernel_size[0] // 2,) * (2 * dims)
        x = nn.pad(x, pad, mode="circular") if any(pad) else x
        return (nn.conv1d if dims == 1 else nn.conv2d)(x, layer.weight, layer.bias.flatten())

    def stepper(u):
        if name == "FNO":
            hidden = convolve(twin.lift, u)
            num_modes = twin.spectral_weights.shape[-1]
            for (re, im), bypass in zip(twin.spectral_weights, twin.bypasses, strict=True):
                modes = torch.fft.rfft(hidden)[..., :num_modes]
                modes = torch.einsum("iom,bim->bom", torch.complex(re, im), modes)
                spectral = torch.fft.irfft(modes, n=hidden.shape[-1])
                hidden = torch.relu(spectral + convolve(bypass, hidden))
            return u + convolve(twin.project, hidden)
        if name == "MLP":
            apply = lambda layer, x: nn.linear(x, layer.weight, layer.bias)
        else:
            apply = convolve
        hidden = u
        for layer in twin.layers[:-1]:
            hidden = torch.relu(apply(layer, hidden))
        return u + apply(twin.layers[-1], hidden)

    def program():
        for tensor in tensors:
            tensor.grad = None
        total, segment_loss, u_prev = 0.0, 0.0, u_0
        for t in range(num_steps):
            u_next = stepper(u_prev)
            residuum = heat_residuum(u_next, u_prev, roll=torch.roll)
            segment_loss = segment_loss + torch.mean(residuum**2)
            u_prev = u_next
            if t == num_steps - 1 or (k is not False and (t + 1) % k == 0):
                segment_loss.backward()
                total, segment_loss = total + float(segment_loss), 0.0
                u_prev = u_next.detach()
        return total

    return program


#
# Measuring
#


def measure(name, network, data, cut_name, num_steps, limit, seconds):
    """A row of the table for every peer."""
    k = CUTS[cut_name]
    programs, rows = {}, {}
    for peer, loss in select_peers(name, cut_name, num_steps).items():
        program, costs = compile_peer(loss, network, data, num_steps, k)
        rows[peer] = costs
        if costs["temp_bytes"] <= MAX_TEMPORARIES:
            programs[peer] = program
    torch_peer = torch_program(name, network, data, num_steps, k)
    if torch_peer is not None:
        programs["torch"], rows["torch"] = torch_peer, {}

    expected = float(programs["residuum"]())
    for peer, program in programs.items():
        np.testing.assert_allclose(float(program()), expected, rtol=1e-3, err_msg=peer)

    limit_steps = min(num_steps, 10)
    programs["limit"], rows["limit"] = lambda: [limit() for _ in range(limit_steps)], {}
    times = {peer: [] for peer in programs}
    deadline = time.perf_counter() + seconds
    while len(times["limit"]) < 5 or (
        time.perf_counter() < deadline and len(times["limit"]) < 50
    ):
        # In random order: who runs behind a peer of as much memory finds it mapped already.
        for peer in random.sample(list(programs), len(programs)):
            start = time.perf_counter()
            programs[peer]()
            times[peer].append(time.perf_counter() - start)
    for peer, samples in times.items():
        rows[peer]["run_s"] = statistics.median(samples)
    rows["limit"]["run_s"] *= num_steps / limit_steps
    for peer, row in rows.items():
        yield dict(network=name, cut=cut_name, num_rollout_steps=num_steps, peer=peer, **row)


def machine():
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if jax.default_backend() != "cpu":
        model = jax.devices()[0].device_kind
    elif cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = f"{lines[0].split(':')[1].strip()}, {os.cpu_count()} cores"
    versions = [f"{m.__name__} {m.__version__}" for m in (jax, torch) if m is not None]
    return ", ".join([model, *versions])


FIELDS = ["network", "cut", "num_rollout_steps", "peer"]
FIELDS += ["trace_s", "compile_s", "temp_bytes", "run_s", "machine"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("MLP", "FNO", "conv 1D", "conv 2D", "U-Net")
    parser.add_argument("--networks", nargs="+", default=names, choices=names)
    parser.add_argument("--cuts", nargs="+", default=tuple(CUTS), choices=tuple(CUTS))
    parser.add_argument("--steps", nargs="+", type=int, default=NUM_STEPS)
    parser.add_argument("--seconds", type=float, default=1.0, help="of runs for each row")
    parser.add_argument("--quick", action="store_true", help="MLP and FNO, few steps")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("benchmarks/rollout_cost.csv")
    )
    args = parser.parse_args()
    if args.quick:
        args.networks, args.steps, args.seconds = ("MLP", "FNO"), (1, 10), 0.5
    rollouts = [
        (cut, num_steps)
        for cut, num_steps in itertools.product(args.cuts, args.steps)
        if cut == "no cut" or num_steps > (CUTS[cut] or 0)
    ]

    print(machine())
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        args.output.open("w", newline="") as file,
        tqdm(total=len(args.networks) * len(rollouts)) as progress,
    ):
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for name, network, data in make_problems(args.networks):
            limit, _ = compile_peer(residuum_peer(), network, data, 1, False)
            for cut, num_steps in rollouts:
                progress.set_description(f"{name}, {cut}, {num_steps} steps")
                if num_steps <= MAX_STEPS[name]:
                    for row in measure(
                        name, network, data, cut, num_steps, limit, args.seconds
                    ):
                        writer.writerow(row | dict(machine=machine()))
                    file.flush()
                progress.update()


if __name__ == "__main__":
    main()
