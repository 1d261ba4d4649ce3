"""What one gradient of a rollout costs: residuum and its baselines, side by side.

The study measures trace and compile time, temporaries (`temp_size_in_bytes`, deterministic) and
run time of the value and gradient of the same loss, on the same networks and data. All programs
of a case run in one process and take turns, so that the noise of the machine hits all alike;
run times are medians. Before they are timed, all programs have to return the same loss.

residuum and the baselines, as the column `baseline` of the CSV file names them:

- `residuum`, with its defaults, and with the options that its user would choose:
  `checkpoint=True` or, for 50 steps and more, `checkpoint=k` with k near the root of their
  number, where nothing is cut; `unroll=5` for segments of 5 steps; and `unroll=True` for
  convolutions on a CPU;
- `trainax`: `trainax.configuration.Residuum`, a Python loop;
- `scan`: a `jax.lax.scan` as one writes it by hand, with `stop_gradient` under a mask;
- `segments`: what one writes by hand to save memory, a scan over segments, each of which is a
  `jax.checkpoint` of a scan over its steps and ends in `stop_gradient`. Where nothing is cut,
  they are as long as the blocks of `checkpoint=k`, or of one step;
- `equinox`: as `scan`, but with `equinox.internal.scan(kind="checkpointed")`;
- `torch`: eager PyTorch with a `backward()` for each segment, if it is installed;
- `torch.compile`: the same with the time step, i.e., network and residuum, compiled, without
  what earlier runs left in its caches. Its compile time is that of the first call less a later
  one, in a process that has compiled before;
- `limit`: as many calls of a jitted one-step value and gradient as there are steps;
- `..., canonical`: of a convolutional network, the same with `canonical_convolutions` of
  `examples/canonical_convolutions.py`. `unroll=True` has no such row, since it contains no
  loop. Neither does trainax, which has such a row to show that nothing changes.

Derivatives other than the gradient are measured for the MLP and 50 steps: `forward` is
`jax.jvp` of the loss with respect to the parameters, and `hvp` a Hessian-vector product,
forward over reverse. The direction is the parameters themselves. The checkpointed scan of
equinox has no forward mode.

What is left out for the sake of time: Python loops, and PyTorch, of more than 50 steps (a
U-Net: 5, and no PyTorch); more than 200 steps of convolutions in 2D, and 50 of the U-Net;
`bptt=5` for these two, and for the others at all lengths but 50. `--cuts` and `--steps` measure
more. A program that would run for more than 20 s, estimated from the shorter rollouts, is
compiled but not run: of convolutions in 2D only the canonical ones run for 50 steps and more.

What this shows on two CPU cores:

- Truncated and streamed, a gradient needs the memory of one segment, at the same arithmetic
  as the plain scan. It takes two thirds of the run time of the plain scan, or more, up to the
  same time within a few percent. With convolutions that are not canonical, it takes up to 1.15
  times as long.
- A convolution in a loop body (jax-ml/jax#12868) costs more than all else: with JAX 0.12, in
  the ConvNets and the U-Net 6 to 35 times the run time of `unroll=True`, which compiles as long
  as trainax does. Canonical, it takes 0.9 to 1.2 times the run time of `unroll=True`, and
  compiles as fast as any loop.
- In segments of 5 steps, JAX stacks what each step leaves for the backward pass. `unroll=5` is
  faster for the canonical convolution in 1D, about as fast for the FNO, and slower for the MLP
  and for the convolution that is not canonical.
- `torch.compile` compiles all networks that PyTorch takes part with, without a graph break. In
  the FNO it has no code for complex numbers, says so, and calls the kernels of eager PyTorch
  there, as it does for convolutions.

    python benchmarks/rollout_cost.py            everything, about 45 minutes on two cores
    python benchmarks/rollout_cost.py --quick    a selection, a minute (PyTorch: one more)
    python benchmarks/rollout_cost.py --baselines residuum scan segments
                                                 only these; the other rows are kept
    python benchmarks/draw.py                    the figure and the tables from the CSV file
"""

import argparse
import collections
import functools
import os
import pathlib
import random
import re
import statistics
import time
import warnings

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import study  # makes the examples importable
import trainax
from canonical_convolutions import canonical_convolutions
from tqdm import tqdm

from residuum import Cuts, residuum_loss


# PyTorch's idle threads would spin for a while and disturb whoever runs next.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
try:
    import torch
except ImportError:
    torch = None


BASELINES = ("residuum", "trainax", "scan", "segments", "equinox")
BASELINES += ("torch", "torch.compile", "limit")
BATCH_SIZE = 16
NUM_POINTS = 128  # in 1D; 32² in 2D
CUTS = {"no cut": False, "bptt=1": 1, "bptt=5": 5}
NUM_STEPS = {  # unless `--steps` says otherwise
    "no cut": (1, 5, 50, 200, 1000),
    "bptt=1": (5, 50, 200, 1000),
    "bptt=5": (50,),
}
CONVOLUTIONAL = ("FNO", "conv 1D", "conv 2D", "U-Net")  # of an FNO those of width 1
CHECKPOINT_EVERY = {50: 10, 200: 20, 1000: 25}  # near the root, and a divisor

# What is left out because it takes too long or too much memory
FEW_CUTS = ("conv 2D", "U-Net")  # no `bptt=5`, unless `--cuts` says otherwise
MAX_PYTHON_LOOP = {"MLP": 50, "FNO": 50, "conv 1D": 50, "conv 2D": 50, "U-Net": 5}
MAX_STEPS = {"MLP": 1000, "FNO": 1000, "conv 1D": 1000, "conv 2D": 200, "U-Net": 50}
MAX_TORCH = 50
MAX_TEMPORARIES = 4e9
MAX_RUN_S = 20
ROUNDS = {5: 1, 2: 3, 0: 5}  # what runs so many seconds runs so often, at least


#
# The problem, for one sample or a batch
#


def heat_residuum(u_next, u_prev, roll=jnp.roll):
    axes = (-1,) if u_next.shape[-1] == NUM_POINTS else (-2, -1)
    return study.heat_residuum(u_next, u_prev, axes, roll)


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
        for (real, imag), bypass in zip(self.spectral_weights, self.bypasses, strict=True):
            modes = jnp.fft.rfft(hidden)[:, :num_modes]
            modes = jnp.einsum("iom,im->om", real + 1j * imag, modes)
            padding = ((0, 0), (0, hidden.shape[-1] // 2 + 1 - num_modes))
            spectral = jnp.fft.irfft(jnp.pad(modes, padding), n=hidden.shape[-1])
            hidden = jax.nn.relu(spectral + bypass(hidden))
        return u + self.project(hidden)


def unet(key):
    import pdequinox  # which is installed for the benchmarks, and not for their tests

    return pdequinox.arch.ClassicUNet(1, 1, 1, hidden_channels=8, key=key)


def make_problems(names):
    key = jax.random.key(0)
    networks = {
        "MLP": lambda: MLP(key),
        "FNO": lambda: FNO(key),
        "conv 1D": lambda: ConvNet(key, 1),
        "conv 2D": lambda: ConvNet(key, 2),
        "U-Net": lambda: unet(key),
    }
    for name in names:
        shape = (32, 32) if name == "conv 2D" else (NUM_POINTS,)
        data = jax.random.normal(jax.random.key(1), (BATCH_SIZE, 1, 1, *shape))
        yield name, networks[name](), data


#
# residuum and its baselines. Each takes `(stepper, data, num_steps, k)` and returns the loss;
# `k` is the number of steps between cuts, or False
#


def residuum_loss_with(**options):
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


def scan_baseline(scan):
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


def segments_loss(stepper, data, num_steps, k):
    def step(u_prev, _):
        u_next = jax.vmap(stepper)(u_prev)
        return u_next, jnp.mean(heat_residuum(u_next, u_prev) ** 2)

    def segment_of(length):
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def segment(u, _):
            u, losses = jax.lax.scan(step, u, length=length)
            return u if k is False else jax.lax.stop_gradient(u), jnp.sum(losses)

        return segment

    length = k or CHECKPOINT_EVERY.get(num_steps, 1)
    num_segments, remainder = divmod(num_steps, length)
    u, losses = jax.lax.scan(segment_of(length), data[:, 0], length=num_segments)
    loss = jnp.sum(losses)
    if remainder:
        loss += segment_of(remainder)(u, None)[1]
    return loss


def equinox_scan(step, init, xs):
    return eqxi.scan(step, init, xs, kind="checkpointed")


def select_baselines(network_name, cut_name, num_steps, derivative):
    """The loss of residuum and of each baseline, and the transformation of its derivative."""
    baselines = {"residuum": residuum_loss_with()}
    if num_steps > 1:
        if cut_name == "no cut":
            baselines["residuum, checkpoint"] = residuum_loss_with(checkpoint=True)
            if num_steps in CHECKPOINT_EVERY:
                k = CHECKPOINT_EVERY[num_steps]
                baselines[f"residuum, checkpoint={k}"] = residuum_loss_with(checkpoint=k)
        if cut_name == "bptt=5" and num_steps > 5:
            baselines["residuum, unroll=5"] = residuum_loss_with(unroll=5)
        if network_name in CONVOLUTIONAL and num_steps <= MAX_PYTHON_LOOP[network_name]:
            baselines["residuum, unroll=True"] = residuum_loss_with(unroll=True)
    if num_steps <= MAX_PYTHON_LOOP[network_name]:
        baselines["trainax"] = trainax_loss
    baselines["scan"] = scan_baseline(jax.lax.scan)
    baselines["segments"] = segments_loss
    if derivative != "forward":
        baselines["equinox"] = scan_baseline(equinox_scan)

    selected = {baseline: (loss, lambda fun: fun) for baseline, loss in baselines.items()}
    if network_name in CONVOLUTIONAL and num_steps > 1:
        for baseline, loss in baselines.items():
            if baseline != "residuum, unroll=True":
                selected[f"{baseline}, canonical"] = (loss, canonical_convolutions)
    return selected


# Of a function `loss` of the parameters. What comes first is compared before it is timed
DERIVATIVES = {
    "gradient": lambda loss, params: jax.value_and_grad(loss)(params),
    "forward": lambda loss, params: jax.jvp(loss, (params,), (params,))[::-1],
    "hvp": lambda loss, params: jax.jvp(jax.grad(loss), (params,), (params,))[::-1],
}


def compile_baseline(
    loss, network, data, num_steps, k, derivative="gradient", transform=lambda fun: fun
):
    """Returns a program of no arguments, and its trace time, compile time and memory."""
    params, static = eqx.partition(network, eqx.is_array)

    def differentiate(params, data):
        return DERIVATIVES[derivative](
            lambda params: loss(eqx.combine(params, static), data, num_steps, k), params
        )

    start = time.perf_counter()
    lowered = jax.jit(transform(differentiate)).lower(params, data)
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


def torch_step(name):
    """The time step, a function of network and state. Returns the next state and its loss."""
    nn = torch.nn.functional

    def convolve(layer, x):
        dims = x.ndim - 2
        pad = (layer.kernel_size[0] // 2,) * (2 * dims)
        x = nn.pad(x, pad, mode="circular") if any(pad) else x
        return (nn.conv1d if dims == 1 else nn.conv2d)(x, layer.weight, layer.bias.flatten())

    def stepper(twin, u):
        if name == "FNO":
            hidden = convolve(twin.lift, u)
            num_modes = twin.spectral_weights.shape[-1]
            for (real, imag), bypass in zip(twin.spectral_weights, twin.bypasses, strict=True):
                modes = torch.fft.rfft(hidden)[..., :num_modes]
                modes = torch.einsum("iom,bim->bom", torch.complex(real, imag), modes)
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

    def step(twin, u_prev):
        u_next = stepper(twin, u_prev)
        residuum = heat_residuum(u_next, u_prev, roll=torch.roll)
        return u_next, torch.mean(residuum**2)

    return step


def torch_programs(name, network, data, num_steps, k, derivative):
    """The programs, unless the network has no twin here, or the rollout is long."""
    if torch is None or name == "U-Net" or num_steps > MAX_TORCH:
        return {}
    params, static = eqx.partition(network, eqx.is_array)
    leaves, treedef = jax.tree.flatten(params)
    params = [torch.tensor(np.asarray(x), requires_grad=True) for x in leaves]
    u_0 = torch.tensor(np.asarray(data[:, 0]))
    step = torch_step(name)

    def segments(step, params):
        """The loss of one segment after the other."""
        twin = eqx.combine(jax.tree.unflatten(treedef, params), static)
        segment_loss, u_prev = 0.0, u_0
        for t in range(num_steps):
            u_prev, level_loss = step(twin, u_prev)
            segment_loss = segment_loss + level_loss
            if t == num_steps - 1 or (k is not False and (t + 1) % k == 0):
                yield segment_loss
                segment_loss, u_prev = 0.0, u_prev.detach()

    def gradient(step):
        total = 0.0
        for x in params:
            x.grad = None
        for segment_loss in segments(step, params):
            segment_loss.backward()
            total += segment_loss.item()
        return total

    if derivative == "gradient":
        # What was compiled is kept by the code of `step`, which is the same for all networks.
        torch.compiler.reset()
        compiled_step = torch.compile(step)
        return {
            "torch": lambda: gradient(step),
            "torch.compile": lambda: gradient(compiled_step),
        }

    loss = lambda params: sum(segments(step, params))
    fun = loss if derivative == "forward" else torch.func.grad(loss)
    direction = [x.detach() for x in params]
    return {"torch": lambda: torch.func.jvp(fun, (direction,), (direction,))[1]}


def start_torch_compiler():
    """The first compilation of a process takes seconds more than any other."""
    x = torch.ones(8, requires_grad=True)
    torch.compile(lambda x: torch.sum(x**2))(x).backward()


#
# Measuring
#


def flatten(value):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(value)])


def measure(
    name, network, data, cut_name, num_steps, derivative, baselines, limit, seconds, step_s
):
    """A row of the table for each of `baselines`, and for each choice of residuum's options.

    `step_s` has their run times for each time step, from the shorter rollouts; that of this
    rollout is added.
    """
    k = CUTS[cut_name]
    programs, rows = {}, {}
    for baseline, (loss, transform) in select_baselines(
        name, cut_name, num_steps, derivative
    ).items():
        if baseline.split(",")[0] not in baselines:
            continue
        program, rows[baseline] = compile_baseline(
            loss, network, data, num_steps, k, derivative, transform
        )
        similar = re.sub(r"=\d+", "", baseline)  # of another k
        is_fast = step_s.get(similar, 0) * num_steps <= MAX_RUN_S
        if is_fast and rows[baseline]["temp_bytes"] <= MAX_TEMPORARIES:
            programs[baseline] = program
    for baseline, program in torch_programs(
        name, network, data, num_steps, k, derivative
    ).items():
        if baseline in baselines:
            programs[baseline], rows[baseline] = program, {}
    if "torch.compile" in programs:
        calls = [time_call(programs["torch.compile"]) for _ in range(3)]
        rows["torch.compile"]["compile_s"] = calls[0] - calls[-1]

    values = {baseline: flatten(program()) for baseline, program in programs.items()}
    # An untrained network diverges in a longer rollout, and then there is nothing to compare.
    for baseline, value in values.items() if num_steps <= 50 else ():
        expected = next(iter(values.values()))
        error = np.linalg.norm(value - expected) / np.linalg.norm(expected)
        if not error < 1e-3:
            raise AssertionError(f"{baseline} has a relative error of {error} in {derivative}")

    limit_steps = min(num_steps, 10)
    if derivative == "gradient" and "limit" in baselines:
        programs["limit"], rows["limit"] = lambda: [limit() for _ in range(limit_steps)], {}
    times = {baseline: [] for baseline in programs}
    deadline = time.perf_counter() + seconds
    while unfinished := [p for p in programs if not is_measured(times[p], deadline)]:
        # In random order: who runs after a program of as much memory finds it mapped already.
        for baseline in random.sample(unfinished, len(unfinished)):
            times[baseline].append(time_call(programs[baseline]))
    for baseline, samples in times.items():
        rows[baseline]["run_s"] = statistics.median(samples)
        step_s[re.sub(r"=\d+", "", baseline)] = rows[baseline]["run_s"] / num_steps
    if "limit" in rows:
        rows["limit"]["run_s"] *= num_steps / limit_steps
    case = dict(network=name, cut=cut_name, num_rollout_steps=num_steps, derivative=derivative)
    return [case | dict(baseline=baseline, **row) for baseline, row in rows.items()]


def time_call(program):
    start = time.perf_counter()
    program()
    return time.perf_counter() - start


def is_measured(samples, deadline):
    run_time = statistics.median(samples or [0])
    num_rounds = next(rounds for seconds, rounds in ROUNDS.items() if run_time >= seconds)
    time_is_up = time.perf_counter() > deadline
    return len(samples) >= num_rounds and (time_is_up or len(samples) >= 50)


CASE = ["network", "cut", "num_rollout_steps", "derivative"]
FIELDS = [*CASE, "baseline", "trace_s", "compile_s", "temp_bytes", "run_s", "machine"]


def merge(old_rows, new_rows):
    """Replaces old rows of the same case and baseline; other new rows end their case."""
    case = lambda row: tuple(str(row[field]) for field in CASE)
    rows = {(case(row), row["baseline"]): row for row in [*old_rows, *new_rows]}
    cases = list(dict.fromkeys(map(case, rows.values())))
    return sorted(rows.values(), key=lambda row: cases.index(case(row)))


def select_cases(name, cuts, steps):
    """Cut, number of steps and derivative of all that is measured for a network.

    What the options do not ask for, where they are `None`, is selected such that it takes
    half an hour.
    """
    for cut in cuts or CUTS:
        if cuts is None and cut == "bptt=5" and name in FEW_CUTS:
            continue
        for num_steps in steps or NUM_STEPS[cut]:
            if num_steps > (CUTS[cut] or 0) and num_steps <= MAX_STEPS[name]:
                yield cut, num_steps, "gradient"
                if name == "MLP" and num_steps == 50 and cut != "bptt=5":
                    yield cut, num_steps, "forward"
                    yield cut, num_steps, "hvp"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("MLP", "FNO", "conv 1D", "conv 2D", "U-Net")
    parser.add_argument("--networks", nargs="+", default=names, choices=names)
    parser.add_argument("--cuts", nargs="+", choices=tuple(CUTS))
    parser.add_argument("--steps", nargs="+", type=int)
    help = "measure these, and keep the other rows of the output"
    parser.add_argument("--baselines", nargs="+", choices=BASELINES, help=help)
    parser.add_argument("--seconds", type=float, default=1.0, help="of runs for each row")
    parser.add_argument("--quick", action="store_true", help="MLP and FNO, few steps")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("benchmarks/rollout_cost.csv")
    )
    args = parser.parse_args()
    if args.quick:
        args.networks, args.steps, args.seconds = ("MLP", "FNO"), (1, 10), 0.5
    cases = {name: list(select_cases(name, args.cuts, args.steps)) for name in args.networks}

    machine = study.machine(study.all_cores(), *([torch] if torch else []))
    print(machine)
    if torch is not None:
        warnings.filterwarnings("ignore", module="torch")  # on complex numbers, see above
        start_torch_compiler()
    keep = args.baselines and args.output.exists()
    all_rows = study.read_csv(args.output) if keep else []
    with tqdm(total=sum(map(len, cases.values()))) as progress:
        for name, network, data in make_problems(args.networks):
            limit, _ = compile_baseline(residuum_loss_with(), network, data, 1, False)
            step_s = collections.defaultdict(dict)
            for case in cases[name]:
                cut, num_steps, derivative = case
                progress.set_description(f"{name}, {cut}, {num_steps} steps, {derivative}")
                rows = measure(
                    name,
                    network,
                    data,
                    *case,
                    args.baselines or BASELINES,
                    limit,
                    args.seconds,
                    step_s[cut, derivative],
                )
                all_rows = merge(all_rows, [row | dict(machine=machine) for row in rows])
                study.write_csv(args.output, all_rows, FIELDS)
                progress.update()


if __name__ == "__main__":
    main()
