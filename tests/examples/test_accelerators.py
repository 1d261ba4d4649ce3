"""XLA can compile for accelerators that are not present, and it reports memory and
communication. These tests read its reports.

The compiler of a TPU is libtpu, for x86-64 Linux (`pip install ".[test,tpu]"`), and the
compiler of an NVIDIA GPU is a plugin of JAX (`".[test,gpu]"`). Without these compilers, only
the export is tested here. Values, gradients and speed need the device itself. All other test
files verify values and gradients on the device that they run on (`JAX_PLATFORMS=cuda,cpu python
-m pytest`).
"""

import concurrent.futures
import functools
import importlib.metadata
import itertools
import multiprocessing
import re

import jax
import jax.numpy as jnp
import pytest
from jax import export

from benchmarks.tables import read_csv
from residuum import Cuts, residuum_loss
from test_residuum import assert_close, FLAGS, SINGLE_TOLERANCE
from tests.common import also_slow, ROOT, slow


PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
COMPILERS = {"v5e:2x2": "libtpu", "H100:8": "jax-cuda12-plugin"}


def is_installed(target):
    try:
        return bool(importlib.metadata.version(COMPILERS[target]))
    except importlib.metadata.PackageNotFoundError:
        return False


def on(*targets):
    """Parametrises a test with these targets, and skips a target without a compiler."""
    reason = "needs a compiler: see the top of this file"
    marks = {t: pytest.mark.skipif(not is_installed(t), reason=reason) for t in targets}
    return pytest.mark.parametrize("target", [pytest.param(t, marks=marks[t]) for t in targets])


on_all_targets, on_tpu = on(*COMPILERS), on("v5e:2x2")


#
# Compilers run in a separate process: they need another environment and another configuration
# of JAX than the other tests, and if a compiler crashes, only the tests of this file fail
#


@pytest.fixture(scope="module")
def compiler():
    """Calls a function of this module in a process where compilers may be loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        patch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)  # the programs never run
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(1, context, as_users_have_it)
        pool.submit(int).result()  # starts the process
    with pool:
        yield lambda *call, **options: pool.submit(*call, **options).result()


def as_users_have_it():
    jax.config.update("jax_enable_x64", False)
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_default_matmul_precision", None)


def describe(target, network, cut, num_steps, way="shard_map", loss="residuum", **options):
    """Returns the benchmark's description of a program."""
    from benchmarks.accelerators import programs as accelerators

    mlp = accelerators.NETWORKS["MLP"]
    accelerators.NETWORKS["MLP, twice the batch"] = mlp._replace(samples=2 * mlp.samples)
    case = accelerators.Case(network, way, loss, cut, options, num_steps)
    return accelerators.describe_program(target, case)


#
# Every option
#


def cuts_by_name(name, mask):
    cuts = {"none": Cuts(), "1": Cuts(1), "2": Cuts(2), "mask": Cuts(mask)}
    return cuts | {"prev": Cuts(prev=True, next=mask)}


OPTIONS = [
    dict(zip(("num_rollout_steps", "checkpoint", "unroll", "has_aux"), values, strict=True))
    for values in itertools.product((1, 5), (False, True, 2), (1, True), FLAGS)
]


def evaluate_everything(params, data, masks, cut, **options):
    """Evaluates the loss of a state with leaves of every kind: real, complex, narrow,
    integer."""

    def stepper(state):
        u = jnp.tanh(params["w"] @ state["u"] + state["narrow"][0].astype(jnp.float32))
        z = params["z"] * state["z"] / (1 + jnp.mean(u**2))
        narrow = jnp.tanh(params["narrow"] * state["narrow"])
        return {"u": u, "z": z, "narrow": narrow, "n": state["n"] + 1}

    def residuum_fn(u_next, u_prev):
        linear = [u_next[name] - u_prev[name] for name in ("z", "narrow")]
        return linear, u_next["u"] - u_prev["u"] ** 2

    mask = masks[: options["num_rollout_steps"]]
    cuts = cuts_by_name(cut, mask)[cut]
    return residuum_loss(stepper, data, residuum_fn, cuts=cuts, **options)


def values_and_grads(cut, all_options, params, data, masks):
    """Computes all values and gradients in a single program, because the compiler's time grows
    with the number of programs."""
    return [
        jax.value_and_grad(
            functools.partial(evaluate_everything, cut=cut, **options),
            has_aux=options["has_aux"],
        )(params, data, masks)
        for options in all_options
    ]


def inputs_of_every_kind(make, batch=8):
    """Returns params, data and masks, each array of which comes from `make(shape, dtype,
    is_batch)`."""
    params = {
        "w": make((4, 4), jnp.float32, False),
        "z": make((3,), jnp.complex64, False),
        "narrow": make((4,), jnp.bfloat16, False),
    }
    data = {
        "u": make((batch, 1, 4), jnp.float32, True),
        "z": make((batch, 1, 3), jnp.complex64, True),
        "narrow": make((batch, 1, 4), jnp.bfloat16, True),
        "n": make((batch, 1), jnp.int32, True),
    }
    return params, data, make((5,), jnp.bool, False)


def compile_every_option(target, cut):
    """Compiles every combination of options with this cut, and returns the names of the dtypes
    in each result."""
    import numpy as np

    from benchmarks.accelerators import programs as accelerators

    topology = accelerators.make_topology(target)
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("batch",))

    def make(shape, dtype, is_batch):
        spec = jax.sharding.PartitionSpec("batch") if is_batch else jax.sharding.PartitionSpec()
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    function = functools.partial(values_and_grads, cut, OPTIONS)
    platform = accelerators.TARGETS[target].platform
    compiled = accelerators.compile_program(platform, function, inputs_of_every_kind(make))
    return [[x.dtype.name for x in jax.tree.leaves(out)] for out in compiled.out_info]


@on_all_targets
@pytest.mark.parametrize("cut", also_slow("none", "2", slowly=["1", "mask", "prev"]))
def test_every_combination_of_options_compiles(compiler, target, cut):
    outputs = compiler(compile_every_option, target, cut)
    assert len(outputs) == len(OPTIONS)
    for options, dtypes in zip(OPTIONS, outputs, strict=True):
        loss, *rest = dtypes
        assert loss == "float32"
        assert rest[-3:] == ["bfloat16", "float32", "complex64"]  # gradients of the parameters
        assert ("int32" in rest) == options["has_aux"]  # the final state


@pytest.mark.parametrize("cut", also_slow("1", "2", slowly=["none", "mask", "prev"]))
def test_exports_for_all_platforms_at_once(cut):
    """A program exported for all platforms at once computes the same on the platform at hand
    after it is read back. This test needs no compiler."""
    ones = lambda shape, dtype, _: jnp.ones(shape, dtype)
    inputs = inputs_of_every_kind(ones, batch=2)
    options = [o for o in OPTIONS if o["has_aux"] and o["num_rollout_steps"] > 1]
    function = jax.jit(lambda *x: jax.tree.leaves(values_and_grads(cut, options, *x)))
    exported = export.export(function, platforms=PLATFORMS)(*inputs)
    assert exported.platforms == PLATFORMS
    if jax.default_backend() in ("gpu", *PLATFORMS):
        actual = export.deserialize(exported.serialize()).call(*inputs)
        assert_close(actual, function(*inputs), SINGLE_TOLERANCE)


#
# Memory
#


@on_all_targets
@pytest.mark.parametrize(
    "network, bptt", [("MLP", 1), ("MLP", 5), pytest.param("conv 2D", 1, marks=slow)]
)
def test_a_truncated_rollout_takes_the_memory_of_one_segment(compiler, target, network, bptt):
    short, long = (compiler(describe, target, network, bptt, n) for n in (20, 1000))
    assert long["temp_bytes"] == short["temp_bytes"]
    assert long["fits"] == "yes"


STATE = 256 * 128 * 4  # bytes of the MLP's states on one chip
PARAMS = 2 * (128 * 512 + 512 * 512) * 4


def growth(compiler, target, *args, network="MLP", steps=(1000, 2000), **options):
    """Returns how many bytes of a chip each further step takes."""
    sizes = [compiler(describe, target, network, False, n, *args, **options) for n in steps]
    return (sizes[1]["temp_bytes"] - sizes[0]["temp_bytes"]) / (steps[1] - steps[0])


@on_all_targets
def test_memory_grows_by_activations_or_by_states(compiler, target):
    """Without a cut, memory grows as docs/scaling_out.md says: by T A without `checkpoint` and
    by T S with it. A and S are proportional to the batch size."""
    activations = growth(compiler, target)
    assert activations > 5 * STATE
    assert growth(compiler, target, "shard_map", "plain scan") > 5 * STATE
    assert growth(compiler, target, checkpoint=True) == pytest.approx(STATE, rel=0.1)
    twice = growth(compiler, target, network="MLP, twice the batch")
    assert twice == pytest.approx(2 * activations, rel=0.1)


@on_all_targets
def test_memory_with_checkpoint_k_grows_by_one_state_for_k_steps_and_one_for_each_of_k(
    compiler, target
):
    """With `checkpoint=k`, memory grows by (T / k + k) S, as docs/scaling_out.md says."""
    # With so many steps, the states do not fit into the fast memory of a TPU, which is not
    # counted.
    options = dict(steps=(40_000, 80_000), checkpoint=20)
    assert growth(compiler, target, **options) == pytest.approx(STATE / 20, rel=0.1)
    short, long = (
        compiler(describe, target, "MLP", False, 40_000, checkpoint=k)["temp_bytes"]
        for k in (2000, 4000)
    )
    assert long - short == pytest.approx((4010 - 2020) * STATE, rel=0.1)


@on_all_targets
@pytest.mark.parametrize("cut, options", [(False, {}), (False, {"checkpoint": 20}), (5, {})])
def test_the_program_grows_neither_with_steps_nor_with_batch_or_chips(
    compiler, target, cut, options
):
    """Neither the program nor the communication between chips, which is the sum of the
    gradients, grows with the number of steps, the batch size, or the number of chips."""
    larger = {"v5e:2x2": "v5e:16x16"}
    programs = [(target, "MLP", 100), (target, "MLP", 1000)]
    programs += [(target, "MLP, twice the batch", 100)]
    programs += [(larger[target], "MLP", 100)] if target in larger else []
    rows = [
        compiler(describe, name, network, cut, num_steps, **options)
        for name, network, num_steps in programs
    ]
    for row in rows:
        assert row["instructions"] == pytest.approx(rows[0]["instructions"], rel=0.1)
        for name in ("loop_collectives", "once_bytes"):
            assert row[name] == rows[0][name]


@on_tpu
@slow
def test_rematerialisation_saves_memory_in_an_unrolled_rollout(compiler, target):
    """Rematerialisation saves memory in an unrolled rollout on a TPU. On a GPU it does not,
    because the compiler recomputes all activations ahead of their use."""
    stored, again = (
        compiler(describe, target, "MLP", False, 100, **options)
        for options in (dict(unroll=True), dict(unroll=True, checkpoint=True))
    )
    assert again["temp_bytes"] < stored["temp_bytes"] / 2


@on_tpu
def test_what_does_not_fit_is_told_with_the_figure(compiler, target):
    row = compiler(describe, target, "MLP", False, 10_000, "shard_map", "plain scan")
    assert row["fits"] == "no"
    assert row["needed_bytes"] > 20e9
    assert "temp_bytes" not in row


#
# Communication
#


@on_all_targets
@pytest.mark.parametrize("bptt", also_slow(1, slowly=[5]))
@pytest.mark.parametrize("way", ["jit", "jit, a term a chip", "shard_map"])
def test_communication_is_as_documented(compiler, target, way, bptt):
    row = compiler(describe, target, "MLP", bptt, 100, way)
    once, in_loops = row["once_collectives"], row["loop_collectives"]
    if way == "jit":
        assert in_loops > 0
        # For one-step segments, both compilers move the sum of the gradients out of the loop on
        # their own. Only the sum of the loss stays in the loop.
        assert row["loop_bytes"] < 100 if bptt == 1 else row["loop_bytes"] > 0.9 * PARAMS
    else:
        assert in_loops == 0
        assert 1 <= once <= 5  # at most one per layer, and one for the loss
        assert row["once_bytes"] == pytest.approx(PARAMS, rel=0.01)


@on_all_targets
def test_without_pcast_a_shard_map_stores_every_step(compiler, target):
    way = "shard_map without pcast"
    short, long = (compiler(describe, target, "MLP", 1, n, way) for n in (20, 1000))
    assert long["temp_bytes"] > 10 * short["temp_bytes"]


@on_tpu
@slow
def test_chips_that_share_the_batch_or_the_space_share_the_memory(compiler, target):
    whole, part = (
        compiler(describe, target, "conv 2D", 1, 100, way)
        for way in ("shard_map", "jit, space over 4")
    )
    # It is even less than a quarter, since the fast memory holds a larger share of the state.
    assert part["temp_bytes"] < 1.1 * whole["temp_bytes"] / 4
    assert part["loop_collectives"] > 0  # neighbours exchange borders


@on_tpu
@slow
def test_many_chips_are_as_few(compiler, target):
    few, many = (compiler(describe, name, "MLP", 1, 100) for name in (target, "v5e:16x16"))
    same = ("temp_bytes", "argument_bytes", "loop_collectives", "once_collectives")
    assert [few[name] for name in same] == [many[name] for name in same]


#
# The tables of benchmarks/accelerators are those of its rows
#

PROGRAMS = {  # loss, cut, options
    "plain scan": ("plain scan", "no cut", ""),
    "`checkpoint=True`": ("residuum", "no cut", "checkpoint=True"),
    "`checkpoint=k`": ("residuum", "no cut", r"checkpoint=\d+"),
    "`bptt=5`": ("residuum", "bptt=5", ""),
    "`bptt=5`, `checkpoint=True`": ("residuum", "bptt=5", "checkpoint=True"),
    "`bptt=1`": ("residuum", "bptt=1", ""),
}
PROGRAMS["plain scan, with any cut"] = PROGRAMS["plain scan"]
IN_2D = {
    "convolutions, H100 of 80 GB": ("H100:1", "conv 2D"),
    "FNO, H100": ("H100:1", "FNO"),
    "convolutions, TPU v5e of 16 GB": ("v5e:2x2", "conv 2D"),
    "FNO, TPU v5e": ("v5e:2x2", "FNO"),
}
OF_2D = [("plain scan", 10), ("plain scan", 100), ("plain scan", 1000)]
OF_2D += [("`checkpoint=True`", 1000), ("`bptt=1`", 1000)]


def figures_of_the_page():
    """Yields target, network, program, number of steps, and the cell of the tables for them."""
    names = ("table_2d", "table_3d_h100", "table_3d_tpu")
    page = "".join(
        (ROOT / "benchmarks" / "accelerators" / f"{name}.md").read_text() for name in names
    )
    tables = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
        for table in re.findall(r"(?:^\|.*\|\n)+", page, re.MULTILINE)
        if " GB |" in table
    )
    in_2d, *in_3d = ({name: cells for name, *cells in table} for table in tables)
    for name, place in IN_2D.items():
        for (program, num_steps), cell in zip(OF_2D, in_2d[name], strict=True):
            yield *place, program, num_steps, cell
    for target, table in zip(("H100:1", "v5e:2x2"), in_3d, strict=True):
        for program, cells in table.items():
            for num_steps, cell in zip((10, 100, 1000), cells, strict=True):
                yield target, "conv 3D", program, num_steps, cell


def test_the_page_has_the_figures_of_the_file():
    rows = read_csv(ROOT / "benchmarks" / "accelerators" / "rows.csv")
    rows = [row for row in rows if row["way"] in ("one chip", "shard_map")]
    figures = [figure for figure in figures_of_the_page() if figure[-1]]
    assert len(figures) == 20 + 14 + 17
    for target, network, program, num_steps, cell in figures:
        *names, options = PROGRAMS[program]
        names = dict(zip(("loss", "cut"), names, strict=True), target=target, network=network)
        (row,) = (
            row
            for row in rows
            if names.items() <= row.items() and row["num_rollout_steps"] == str(num_steps)
            if re.fullmatch(options, row["options"])
        )
        number, decimals = re.search(r"(\d+\.?(\d*)) GB", cell).groups()
        assert number == f"{int(row['needed_bytes']) / 1e9:.{len(decimals)}f}", row
        assert ("does not fit" in cell) == (row["fits"] == "no"), row
