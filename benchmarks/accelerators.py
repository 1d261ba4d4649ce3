"""What one gradient of a rollout takes on TPUs and GPUs: compiled, not run.

XLA can compile for machines that are not present. It reports how much memory a program takes on
each chip and how the chips communicate. Run times need the machine itself.

The study compiles the value and gradient of the same loss in two ways: by `residuum_loss`,
with its options, and by a plain `jax.lax.scan` as one writes it by hand, with `stop_gradient`
under a mask where the rollout is cut. Every chip has a batch of the same size, whatever the
number of chips, unless the state is split over chips as well. The ways onto several chips:

- `shard_map`, with parameters that vary: one sum over the chips, at the end;
- `jit`, with sharded data, and nothing else;
- `jit, a term a chip`: with one term of the loss for each chip;
- `jit, space over 4`: groups of 4 chips share one batch, each has a quarter of the points.

The columns:

- `fits`: no, if a chip has less memory than the program needs. A TPU's compiler refuses such a
  program, and `needed_bytes` is the figure of its message. Everywhere else that is the sum of
  temporaries, arguments and outputs;
- `temp_bytes`, `argument_bytes`: of one chip. On a TPU, what fits into the fast memory beside
  the arithmetic is not counted;
- `loop_collectives`, `once_collectives`: operations of communication in the program, in the
  bodies of loops and outside of them; `loop_bytes` and `once_bytes` are the results of these on
  each chip, for one iteration;
- `instructions` of the compiled program, which its compile time grows with;
- `flops`: as the compiler counts them for one chip: the body of a loop counts once;
- `compile_s`: of tracing and compiling, on the machine that compiles.

A compiler that is not installed is left out, and the program says how to install it. What the
output file has of other targets and networks stays there.

    python benchmarks/accelerators.py                      everything, about 10 minutes: for a
                                                           TPU the MLP, unless `--networks` says
    python benchmarks/accelerators.py --quick              a selection, a minute
    python benchmarks/accelerators.py --target v5e:2x2     one target
    python benchmarks/accelerators.py --draw               the figure alone, from the CSV file
"""

import argparse
import functools
import importlib.metadata
import itertools
import math
import os
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple


# No TPU is present to ask the cloud about, and no GPU to check libraries against. Before JAX.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nobody shares a chip here
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import study
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tqdm import tqdm

from residuum import Cuts, residuum_loss


#
# The targets
#


class Target(NamedTuple):
    kind: str
    topology: str
    memory_gib: int  # of a chip

    @property
    def platform(self):
        return "cuda" if self.kind == "H100" else "tpu"


# Memory as in https://docs.cloud.google.com/tpu/docs/v5e, v5p and v6e. The
# compiler keeps 0.25 GiB of it or more for itself. H100: 80 GB in NVIDIA's data sheet.
TARGETS = {
    "v5e:2x2": Target("TPU v5e", "v5e:2x2", 16),
    "v5e:16x16": Target("TPU v5e", "v5e:16x16", 16),
    "v5e:1x1": Target("TPU v5e", "v5e:1x1", 16),
    "v5e:4x4": Target("TPU v5e", "v5e:4x4", 16),
    "v5p:2x2x1": Target("TPU v5p", "v5p:2x2x1", 95),
    "v6e:2x2": Target("TPU v6e", "v6e:2x2", 32),
    "H100:1": Target("H100", "1x1x1", 80),
    "H100:8": Target("H100", "1x1x8", 80),
}

COMPILERS = {  # the distribution, the extra that installs it, and where it runs
    "tpu": ("libtpu", "tpu", "x86-64 Linux"),
    "cuda": ("jax-cuda12-plugin", "gpu", "Linux"),
}

# A text proto of what the compiler would ask of the GPU; h100_sxm.txtpb of openxla/xla.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def has_compiler(platform):
    distribution, _, _ = COMPILERS[platform]
    try:
        return bool(importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return False


@functools.cache
def make_topology(name):
    target = TARGETS[name]
    if target.platform == "cuda":
        options = dict(target_config=H100, topology=target.topology)
        return topologies.get_topology_desc(platform="cuda", **options)
    options = dict(topology_name=target.topology)
    if name.endswith(":1x1"):  # a host has four chips, unless one says otherwise
        options["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(platform="tpu", **options)


def versions(platform):
    distribution, _, _ = COMPILERS[platform]
    version = importlib.metadata.version(distribution)
    return f"jax {jax.__version__}, {distribution} {version}"


#
# The networks, for one sample, in plain JAX
#


class Network(NamedTuple):
    stepper: Callable[[Any, jax.Array], jax.Array]  # (params, u_prev) -> u_next
    params: Any  # shapes
    state: tuple[int, ...]  # shape of one sample
    samples: int  # for each chip


def mlp(params, u):
    hidden = u
    for matrix in params[:-1]:
        hidden = jnp.tanh(matrix @ hidden)
    return u + params[-1] @ hidden


def convolve(x, kernel):
    strides = (1,) * (x.ndim - 1)
    return jax.lax.conv_general_dilated(x[None], kernel, strides, "SAME")[0]


def conv_net(params, u):
    hidden = u[None]  # channels first
    for kernel in params[:-1]:
        hidden = jax.nn.relu(convolve(hidden, kernel))
    return u + convolve(hidden, params[-1])[0]


def fno(params, u):
    """Fourier neural operator, Li et al., https://arxiv.org/abs/2010.08895."""
    lift, layers, project = params
    hidden = lift[:, None, None] * u
    for spectral, bypass in layers:
        spectral = spectral[0] + 1j * spectral[1]  # [low and high, out, in, mode, mode]
        num_modes = spectral.shape[-1]
        modes = jnp.fft.rfft2(hidden)[..., :num_modes]
        low = jnp.einsum("oixy,ixy->oxy", spectral[0], modes[:, :num_modes])
        high = jnp.einsum("oixy,ixy->oxy", spectral[1], modes[:, -num_modes:])
        n, m = u.shape
        between = jnp.zeros((len(lift), n - 2 * num_modes, num_modes), modes.dtype)
        modes = jnp.concatenate([low, between, high], axis=1)
        modes = jnp.pad(modes, ((0, 0), (0, 0), (0, m // 2 + 1 - num_modes)))
        spectral = jnp.fft.irfft2(modes, s=(n, m))
        hidden = jax.nn.relu(spectral + jnp.einsum("oi,ixy->oxy", bypass, hidden))
    return u + jnp.einsum("i,ixy->xy", project, hidden)


def kernels(num_dims, width, depth):
    channels = [1] + [width] * (depth - 1) + [1]
    return [(m, n, *[3] * num_dims) for n, m in itertools.pairwise(channels)]


FNO_LAYER = ((2, 2, 32, 32, 16, 16), (32, 32))
NETWORKS = {
    "MLP": Network(mlp, [(512, 128), (512, 512), (512, 512), (128, 512)], (128,), 256),
    "conv 2D": Network(conv_net, kernels(2, 64, 5), (256, 256), 4),
    "FNO": Network(fno, ((32,), [FNO_LAYER] * 4, (32,)), (256, 256), 4),
    "conv 3D": Network(conv_net, kernels(3, 32, 4), (128, 128, 128), 1),
}
# The same network on more points: what no chip holds, not even for one step.
LARGE = ("conv 3D, 256³", "conv 3D, 512³")
SMALL = tuple(NETWORKS)
NETWORKS |= {x: NETWORKS["conv 3D"]._replace(state=(int(x[-4:-1]),) * 3) for x in LARGE}


def residuum_fn(u_next, u_prev):
    """An implicit Euler step of the heat equation."""
    axes = range(u_next.ndim)
    neighbours = [jnp.roll(u_next, shift, axis) for shift in (1, -1) for axis in axes]
    laplacian = sum(neighbours) - 2 * u_next.ndim * u_next
    return u_next - u_prev - 0.1 * laplacian


#
# The losses. `k` is the number of steps between cuts, or False
#


def our_loss(stepper, data, num_steps, k, **options):
    options |= dict(num_rollout_steps=num_steps, cuts=Cuts(bptt=k))
    return residuum_loss(stepper, data, residuum_fn, **options)


def plain_scan_loss(stepper, data, num_steps, k):
    def step(u_prev, cut):
        u_next = jax.vmap(stepper)(u_prev)
        level_loss = jnp.mean(jax.vmap(residuum_fn)(u_next, u_prev) ** 2)
        if k is not False:
            u_next = jnp.where(cut, jax.lax.stop_gradient(u_next), u_next)
        return u_next, level_loss

    cuts = (jnp.arange(num_steps) + 1) % (k or 1) == 0
    _, losses = jax.lax.scan(step, data[:, 0], cuts)
    return jnp.sum(losses)


LOSSES = {"residuum": our_loss, "plain scan": plain_scan_loss}


#
# The programs
#


class Case(NamedTuple):
    network: str
    way: str
    loss: str
    cut: int  # steps between cuts, or False
    options: dict[str, Any]
    num_rollout_steps: int


def make_program(topology, case):
    """The value and gradient, to be jitted, and the shapes of its arguments."""
    network = NETWORKS[case.network]
    num_chips = len(topology.devices)
    space = int(re.findall(r"space over (\d+)", case.way)[0]) if "space" in case.way else 1
    shape = (num_chips // space, space)
    devices = mesh_utils.create_device_mesh(
        shape, topology.devices, allow_split_physical_axes=True
    )
    mesh = Mesh(devices, ("batch", "space"))

    def loss(params, data):
        return LOSSES[case.loss](
            functools.partial(network.stepper, params),
            data,
            num_steps=case.num_rollout_steps,
            k=case.cut,
            **case.options,
        )

    def local_loss(params, data):
        if case.way == "shard_map":
            params = jax.lax.pcast(params, "batch", to="varying")
        return jax.lax.pmean(loss(params, data), "batch")

    def mean_of_terms(params, data):
        return jnp.mean(jax.vmap(loss, (None, 0))(params, data))

    shape = (network.samples * num_chips // space, 1, *network.state)
    spec = P("batch", None, "space") if space > 1 else P("batch")
    function = loss
    if case.way == "jit, a term a chip":
        function = mean_of_terms
        shape = (num_chips, network.samples, 1, *network.state)
    elif case.way.startswith("shard_map"):
        specs = dict(in_specs=(P(), P("batch")), out_specs=P())
        function = jax.shard_map(local_loss, mesh=mesh, **specs)

    def make(shape, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)
    params = jax.tree.map(lambda shape: make(shape, P()), network.params, is_leaf=is_shape)
    return jax.value_and_grad(function), (params, make(shape, spec))


def compile_program(platform, function, args):
    """Compiles for a machine that is not present, to which the shapes `args` belong."""
    # Without a GPU, JAX could not tell by itself whether "gpu" is CUDA or ROCm.
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,))
    if platform == "cuda":  # there is nothing to try kernels out on
        return lowered.compile({"xla_gpu_autotune_level": 0})
    return lowered.compile()


def describe_program(target_name, case):
    """A row of the table."""
    target = TARGETS[target_name]
    topology = make_topology(target_name)
    row = dict(
        target=target_name,
        kind=target.kind,
        chips=len(topology.devices),
        network=case.network,
        way=case.way,
        loss=case.loss,
        cut="no cut" if case.cut is False else f"bptt={case.cut}",
        options=", ".join(f"{name}={value}" for name, value in case.options.items()),
        num_rollout_steps=case.num_rollout_steps,
        versions=versions(target.platform),
    )
    start = time.perf_counter()
    try:
        compiled = compile_program(target.platform, *make_program(topology, case))
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        seconds = time.perf_counter() - start
        return row | dict(fits="no", needed_bytes=needed, compile_s=round(seconds, 2))
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    sizes = [memory.temp_size_in_bytes, memory.argument_size_in_bytes]
    needed = sum(sizes) + memory.output_size_in_bytes
    return row | dict(
        fits="yes" if needed <= target.memory_gib * 2**30 else "no",
        needed_bytes=needed,
        temp_bytes=sizes[0],
        argument_bytes=sizes[1],
        **count_collectives(text),
        instructions=len(re.findall(r"^ .* = ", text, re.MULTILINE)),
        flops=(compiled.cost_analysis() or {}).get("flops"),  # a GPU's compiler is silent
        compile_s=round(seconds, 2),
    )


def needed_bytes(message):
    """The figure of a TPU's compiler that refuses a program; None if it is something else."""
    found = re.search(r"memory required .*?\(([\d.]+)([KMGTP]?)\) exceeds", message)
    found = found or re.search(r"Used ([\d.]+)([KMGTP]?) of [\d.]+[KMGTP]? hbm", message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        return None
    number, prefix = found.groups()
    return round(float(number) * 2 ** (10 * " KMGTP".index(prefix or " ")))


#
# What a program communicates
#

COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
COLLECTIVE = re.compile(rf"^ .*? = (.*?) ({COLLECTIVES})(-start)?\(", re.MULTILINE)
CALL = re.compile(r"\b(body|condition|calls|to_apply|\w+_computations?)=(\{[^}]*\}|[^,\s]+)")


def count_collectives(text):
    """Operations of communication in a compiled program: in loops, and outside of them.

    In a loop is what is called from the body of a `while`, or from what that calls.
    """
    # A computation is a line that ends with a brace, and the indented lines that follow.
    blocks = re.findall(r"^(?:ENTRY )?%?([\w.-]+)(.*\{\n(?: .*\n)*)", text, re.MULTILINE)
    blocks = dict(blocks)
    calls = {
        name: [
            (kind, callee)
            for kind, callees in CALL.findall(block)
            for callee in re.findall(r"[\w.-]+", callees)
        ]
        for name, block in blocks.items()
    }
    pending = [x for pairs in calls.values() for kind, x in pairs if kind == "body"]
    in_loops = set()
    while pending:
        name = pending.pop()
        if name in blocks and name not in in_loops:
            in_loops.add(name)
            pending += [callee for _, callee in calls[name]]
    counts = dict.fromkeys(
        ("loop_collectives", "once_collectives", "loop_bytes", "once_bytes"), 0
    )
    for name, block in blocks.items():
        place = "loop" if name in in_loops else "once"
        for result, operation, start in COLLECTIVE.findall(block):
            counts[f"{place}_collectives"] += 1
            sizes = [size_of(*x) for x in re.findall(r"(\w+)\[([\d,]*)\]", result)]
            # What starts these also returns what goes in.
            both = start and operation in ("all-gather", "collective-permute")
            counts[f"{place}_bytes"] += max(sizes) if both else sum(sizes)
    return counts


def size_of(dtype, shape):
    bits = int((re.findall(r"\d+", dtype) or ["8"])[0])
    return math.prod(map(int, filter(None, shape.split(",")))) * bits // 8


#
# The table
#

STEPS = (10, 100, 1000)
# What is compiled with every option. Of other networks and targets there are few rows.
EVERYTHING = {
    "v5e:2x2": SMALL,
    "v5e:16x16": ("MLP",),
    "H100:1": SMALL,
    "H100:8": SMALL,
}
CHECKPOINT_EVERY = {100: 10, 1000: 25}  # near the root, and a divisor
FEW = [("plain scan", False, {}), ("residuum", False, dict(checkpoint=True))]
FEW += [("residuum", 1, {})]
FIELDS = ["target", "kind", "chips", "network", "way", "loss", "cut", "options"]
FIELDS += ["num_rollout_steps", "fits", "needed_bytes", "temp_bytes", "argument_bytes"]
FIELDS += ["loop_collectives", "loop_bytes", "once_collectives", "once_bytes"]
FIELDS += ["instructions", "flops", "compile_s", "versions"]


def select_cases(target_name, quick=False):
    num_chips = len(make_topology(target_name).devices)
    way = "one chip" if num_chips == 1 else "shard_map"
    if quick:
        for choice in FEW:
            yield Case("MLP", way, *choice, 100)
        return
    is_main = target_name in EVERYTHING
    for network in SMALL if is_main else ("MLP", "conv 3D"):
        for num_steps in STEPS if is_main else (100,):
            everything = network in EVERYTHING.get(target_name, ())
            for choice in select_options(num_steps) if everything else FEW:
                yield Case(network, way, *choice, num_steps)
    for network in LARGE:
        yield Case(network, way, "residuum", 1, {}, 100)
    if num_chips == 1:
        return
    if is_main:
        for way in ("jit", "jit, a term a chip", "shard_map without pcast"):
            for cut in (False, 1, 5):
                yield Case("MLP", way, "residuum", cut, {}, 100)
        for cut in (False, 1):
            yield Case("MLP", "jit", "plain scan", cut, {}, 100)
    for n in (4, 8, 16):
        if num_chips % n == 0:
            for network in ("conv 3D", *LARGE):
                yield Case(network, f"jit, space over {n}", "residuum", 1, {}, 100)


def select_options(num_steps):
    """Loss, cut and options."""
    for k in (False, 1, 5):
        yield "plain scan", k, {}
        yield "residuum", k, {}
        yield "residuum", k, dict(checkpoint=True)
    if num_steps in CHECKPOINT_EVERY:
        yield "residuum", False, dict(checkpoint=CHECKPOINT_EVERY[num_steps])


def default_networks(target_name):
    """A TPU's compiler takes up to two minutes for each program of the others."""
    return ("MLP",) if TARGETS[target_name].platform == "tpu" else tuple(NETWORKS)


#
# The figure
#

LINES = {  # loss, cut and options; colours of Okabe and Ito, colour-blind safe; ours are thick
    "plain scan": (("plain scan", "no cut", ""), dict(color="#009E73")),
    "checkpoint=True": (("residuum", "no cut", "checkpoint=True"), dict(color="#D55E00")),
    "checkpoint=k": (("residuum", "no cut", "checkpoint=*"), dict(color="#CC79A7")),
    "bptt=5": (("residuum", "bptt=5", ""), dict(color="#56B4E9")),
    "bptt=1": (("residuum", "bptt=1", ""), dict(color="#0072B2", linewidth=3)),
}
LABEL_SIZE = 8  # points


def draw(rows, target_name, path):
    import matplotlib.patheffects
    import matplotlib.pyplot as plt

    titles = {
        "MLP": "MLP",
        "conv 2D": "2D convolutions, 256²",
        "FNO": "2D FNO, 256²",
        "conv 3D": "3D convolutions, 128³",
    }
    names = {row["network"] for row in rows if row["target"] == target_name}
    titles = {name: title for name, title in titles.items() if name in names}
    columns = min(2, len(titles))
    shape = (math.ceil(len(titles) / columns), columns)
    width, height = 5.2 * shape[1], 0.6 + 3.2 * shape[0]
    figure, axes = plt.subplots(*shape, figsize=(width, height), sharex=True, squeeze=False)
    edges = (0.8 / width, 0.5 / height, 1 - 1.45 / width, 1 - 0.35 / height)
    figure.subplots_adjust(*edges, 0.8, 0.2)
    limit = TARGETS[target_name].memory_gib * 2**30
    outline = [matplotlib.patheffects.withStroke(linewidth=2.5, foreground="white")]
    for (name, title), axis in zip(titles.items(), axes.flat, strict=False):
        ends = {}
        for label, (key, style) in LINES.items():
            points = [
                (int(row["num_rollout_steps"]), float(row["needed_bytes"]), row["fits"])
                for row in rows
                if row["target"] == target_name and row["network"] == name
                if row["way"] in ("shard_map", "one chip") and is_of_line(row, key)
            ]
            if not points:
                continue
            x, y, fits = zip(*sorted(points), strict=True)
            axis.plot(x, y, **(dict(linewidth=1.5) | style), zorder=3)
            for point in zip(x, y, fits, strict=True):
                face = style["color"] if point[2] == "yes" else "white"
                marks = dict(markersize=4.5, color=style["color"], markerfacecolor=face)
                axis.plot(*point[:2], marker="o", **marks, zorder=4)
            ends[label] = y[-1]
        axis.set(xscale="log", yscale="log", title=title)
        axis.axhline(limit, color="#444444", linewidth=1, linestyle=(0, (5, 3)))
        axis.annotate(
            f"{TARGETS[target_name].kind}: {TARGETS[target_name].memory_gib} GB",
            (10, limit),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=LABEL_SIZE,
            color="#444444",
            path_effects=outline,
        )
        low, high = axis.get_ylim()
        axis.set_ylim(low / 1.3, max(high, 2 * limit))
        axis.set_xticks(STEPS, [str(n) for n in STEPS])
        exponents = range(math.ceil(math.log10(axis.get_ylim()[0])), 15)
        ticks = [10.0**n for n in exponents if 10.0**n <= axis.get_ylim()[1]]
        axis.set_yticks(ticks, [study.with_prefix(tick, "B") for tick in ticks])
        axis.minorticks_off()
        axis.set_xlim(8, 1250)
        axis.tick_params(labelsize=LABEL_SIZE)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        label_lines(figure, axis, ends)
    for axis in axes[-1]:
        axis.set_xlabel("rollout steps T", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("memory of a chip", fontsize=9)
    figure.savefig(path, dpi=130)


def is_of_line(row, key):
    loss, cut, options = key
    if (row["loss"], row["cut"]) != (loss, cut):
        return False
    if options.endswith("*"):
        return row["options"] not in ("", "checkpoint=True")
    return row["options"] == options


def label_lines(figure, axis, ends):
    """Labels at the right ends of the lines, moved apart where they would touch."""
    point = figure.dpi / 72
    figure.canvas.draw()
    place = {x: axis.transData.transform((1000, y))[1] / point for x, y in ends.items()}
    height = LABEL_SIZE + 2
    labels = sorted(place, key=place.get)
    positions = [place[label] for label in labels]
    for _ in range(100):
        for i in range(len(positions) - 1):
            overlap = height - (positions[i + 1] - positions[i])
            if overlap > 0:
                positions[i] -= overlap / 2
                positions[i + 1] += overlap / 2
    for label, position in zip(labels, positions, strict=True):
        axis.annotate(
            f"{label}: {study.with_prefix(ends[label], 'B')}",
            (1000, ends[label]),
            xytext=(9, position - place[label]),
            textcoords="offset points",
            va="center",
            fontsize=LABEL_SIZE,
            color=LINES[label][1]["color"],
            fontweight="bold" if label == "bptt=1" else None,
            annotation_clip=False,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", nargs="+", choices=tuple(TARGETS), default=tuple(TARGETS))
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS))
    parser.add_argument("--quick", action="store_true", help="the MLP, three rows a target")
    parser.add_argument("--draw", action="store_true", help="the figure alone")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("benchmarks/accelerators.csv")
    )
    parser.add_argument("--figure", type=pathlib.Path)
    parser.add_argument("--of", default="H100:1", help="the target that the figure is about")
    args = parser.parse_args()
    figure = args.figure or pathlib.Path("assets/accelerators.png")
    if args.draw:
        draw(study.read_csv(args.output), args.of, figure)
        return

    targets = []
    for platform, (_, extra, where) in COMPILERS.items():
        names = [name for name in args.target if TARGETS[name].platform == platform]
        if has_compiler(platform):
            targets += names
        elif names:
            line = f'pip install ".[benchmarks,{extra}]"'
            print(f"Left out, without a compiler: {', '.join(names)}. On {where}: {line}")
    cases = [
        (name, case)
        for name in targets
        for case in select_cases(name, args.quick)
        if case.network in (args.networks or default_networks(name))
    ]
    made = {(name, case.network) for name, case in cases}
    rows = study.read_csv(args.output) if args.output.exists() else []
    rows = [x for x in rows if (x["target"], x["network"]) not in made]
    with tqdm(cases) as progress:
        for name, case in progress:
            progress.set_description(f"{name}, {case.network}, T={case.num_rollout_steps}")
            rows.append(describe_program(name, case))
            study.write_csv(args.output, rows, FIELDS)
    if args.of in targets and (args.figure or not args.quick):
        draw(study.read_csv(args.output), args.of, figure)


if __name__ == "__main__":
    main()
