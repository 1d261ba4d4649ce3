"""Compiles programs for TPUs and GPUs that are not present, and describes each program in a
row."""

import functools
import importlib.metadata
import math
import os
import re
import time
from typing import Any, NamedTuple


# The compilers must not ask the cloud about a TPU, or check libraries against a GPU, since
# neither is present. These variables have to be set before JAX is imported.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no other process uses a chip
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from benchmarks import losses
from benchmarks.accelerators.networks import NETWORKS, residuum_fn


LOSSES = {"residuum": losses.with_residuum, "plain scan": losses.with_plain_scan}


#
# The targets
#


class Target(NamedTuple):
    kind: str
    topology: str
    memory_gib: int  # per chip

    @property
    def platform(self):
        return "cuda" if self.kind == "H100" else "tpu"


# The memory of TPUs is that of https://docs.cloud.google.com/tpu/docs/v5e, v5p and v6e. The
# compiler keeps 0.25 GiB of it or more for itself. NVIDIA's data sheet gives an H100 80 GB.
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

# This text proto says what the compiler would otherwise ask the GPU. It is h100_sxm.txtpb of
# openxla/xla.
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
    if name.endswith(":1x1"):  # the default is four chips per host
        options["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(platform="tpu", **options)


def versions(platform):
    distribution, _, _ = COMPILERS[platform]
    version = importlib.metadata.version(distribution)
    return f"jax {jax.__version__}, {distribution} {version}"


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
    """Returns the value and gradient as a function to be jitted, and the shapes of its
    arguments."""
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
            residuum_fn,
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
    """Compiles for the machine, which is not present, to which the shapes `args` belong."""
    # Without a GPU, JAX cannot tell by itself whether "gpu" means CUDA or ROCm.
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,))
    if platform == "cuda":  # there is no GPU on which to try out kernels
        return lowered.compile({"xla_gpu_autotune_level": 0})
    return lowered.compile()


def describe_program(target_name, case):
    """Returns a row of the table."""
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
        flops=(compiled.cost_analysis() or {}).get("flops"),  # a GPU's compiler gives no figure
        compile_s=round(seconds, 2),
    )


def needed_bytes(message):
    """Returns the memory in the message of a TPU's compiler that refuses a program, or None if
    the message says something else."""
    found = re.search(r"memory required .*?\(([\d.]+)([KMGTP]?)\) exceeds", message)
    found = found or re.search(r"Used ([\d.]+)([KMGTP]?) of [\d.]+[KMGTP]? hbm", message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        return None
    number, prefix = found.groups()
    return round(float(number) * 2 ** (10 * " KMGTP".index(prefix or " ")))


#
# The communication of a program
#

COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
COLLECTIVE = re.compile(rf"^ .*? = (.*?) ({COLLECTIVES})(-start)?\(", re.MULTILINE)
CALL = re.compile(r"\b(body|condition|calls|to_apply|\w+_computations?)=(\{[^}]*\}|[^,\s]+)")


def count_collectives(text):
    """Counts the communication operations of a compiled program, in loops and outside of them.

    Everything that the body of a `while` calls, directly or indirectly, counts as in a loop.
    """
    # In the text, a computation is a line that ends with a brace, and the indented lines after
    # it.
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
            # The operation that starts one of these also returns its input.
            both = start and operation in ("all-gather", "collective-permute")
            counts[f"{place}_bytes"] += max(sizes) if both else sum(sizes)
    return counts


def size_of(dtype, shape):
    bits = int((re.findall(r"\d+", dtype) or ["8"])[0])
    return math.prod(map(int, filter(None, shape.split(",")))) * bits // 8
