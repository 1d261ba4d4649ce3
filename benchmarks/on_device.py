"""Measures tests, memory and run time on the GPU or TPU at hand, in at most eight minutes.

The program has four parts, the most valuable first. Each part is a process with a time limit of
its own. It writes a row after each measurement, into benchmarks/on_device/, so an interruption
loses only the rest:

1. `tests` runs the library's tests on the device, by file.
2. `memory` compares the compiler's figure for a gradient with the peak that the device reports
   (`memory_stats()`). The programs run in the order of the compiler's figure, since the peak
   is never reset.
3. `time` measures the median run time of a gradient. The programs of a case run in turns:
   residuum, residuum with other values of `unroll`, a plain scan, checkpointed segments,
   trainax if it is installed, and as many calls of a one-step gradient as there are steps.
4. `largest` finds the longest rollout and the largest field whose gradient fits into the
   memory, by the compiler's figure. It also runs the gradient if that takes less than 20 s.

The networks are those of benchmarks/accelerators. The program needs JAX, jaxtyping, chex,
pytest and pytest-xdist. If the machine lacks a package, put it into a folder:

    pip install --no-deps --target packages trainax==0.0.2
    python benchmarks/on_device.py --packages packages

    python benchmarks/on_device.py --quick     on a CPU, in a minute, to see that it runs
    python benchmarks/on_device.py --table     the table alone, from the rows
"""

import argparse
import functools
import importlib.util
import itertools
import os
import pathlib
import subprocess
import sys
import time
import xml.etree.ElementTree


ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # Python would only look next to this file

import jax  # noqa: E402

from benchmarks import losses, machine, tables  # noqa: E402
from benchmarks.accelerators.networks import NETWORKS, residuum_fn  # noqa: E402


SECONDS = {"tests": 155, "memory": 100, "time": 105, "largest": 80}  # and 10 more for each part
LONGEST_RUN = 20  # seconds


def append(path, row):
    rows = tables.read_csv(path) if path.exists() else []
    tables.write_csv(path, [*rows, row])


#
# Tests
#

TOPICS = ("cost", "meshes", "inputs", "precision")
TEST_FILES = ("test_residuum.py", *(f"tests/test_{topic}.py" for topic in TOPICS))


def run_tests(folder, deadline, quick):
    """Writes a row for each test file. Tests that need trainax are left out if it is
    missing."""
    backend = jax.default_backend()
    environment = dict(os.environ)
    if backend != "cpu":
        environment["JAX_PLATFORMS"] = f"{'cuda' if backend == 'gpu' else backend},cpu"
    report = folder / "report.xml"
    options = ["-m", "not slow", "-n", str(min(8, os.cpu_count())), f"--junitxml={report}"]
    if importlib.util.find_spec("trainax") is None:
        options += ["-k", "not trainax"]
    if quick:
        options += ["-k", "mse"]
    for name in TEST_FILES[:1] if quick else TEST_FILES:
        start = time.perf_counter()
        try:
            result = subprocess.run(
                [sys.executable, "-m", "pytest", *options, name],
                cwd=ROOT,
                env=environment,
                timeout=deadline - time.time(),
                capture_output=True,
                text=True,
            )
        except subprocess.TimeoutExpired:
            return
        seconds = time.perf_counter() - start
        if not report.exists():  # pytest did not even start
            raise RuntimeError(result.stdout + result.stderr)
        append(folder / "tests.csv", read_report(report) | describe(file=name, seconds=seconds))
        report.unlink()


def read_report(path):
    suite = xml.etree.ElementTree.parse(path).getroot().find("testsuite")
    count = lambda name: int(suite.get(name))
    is_bad = lambda case: any(case.find(x) is not None for x in ("failure", "error"))
    failed = [case.get("name") for case in suite if is_bad(case)]
    return {
        "passed": count("tests") - count("failures") - count("errors") - count("skipped"),
        "failed": count("failures") + count("errors"),
        "skipped": count("skipped"),
        "names_of_failed": "; ".join(failed[:10]),
    }


def describe(**columns):
    columns = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in columns.items()}
    return columns | {"device": machine.describe(machine.all_cores())}


#
# Programs
#

WAYS = {  # loss, number of steps between cuts, options
    "bptt=1": (losses.with_residuum, 1, {}),
    "bptt=5": (losses.with_residuum, 5, {}),
    "checkpoint=True": (losses.with_residuum, False, dict(checkpoint=True)),
    "checkpoint=25": (losses.with_residuum, False, dict(checkpoint=25)),
    "segments": (losses.with_checkpointed_segments, 1, {}),
    "plain scan": (losses.with_plain_scan, False, {}),
}


def compile_gradient(network, batch, way, num_steps, options=None, state=None):
    """Returns a program of no arguments, and how many bytes it needs, as the compiler
    reports."""
    loss, k, more = WAYS[way] if isinstance(way, str) else way
    network = NETWORKS[network]
    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)
    normal = lambda shape: 0.05 * jax.random.normal(jax.random.key(0), shape)
    params = jax.tree.map(normal, network.params, is_leaf=is_shape)
    data = normal((batch, 1, *(state or network.state)))

    def loss_of(params, data):
        stepper = functools.partial(network.stepper, params)
        return loss(stepper, data, residuum_fn, num_steps, k, **more, **(options or {}))

    compiled = jax.jit(jax.value_and_grad(loss_of)).lower(params, data).compile()
    analysis = compiled.memory_analysis()
    needed = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    needed += analysis.argument_size_in_bytes
    return lambda: jax.block_until_ready(compiled(params, data)), needed


def memory_limit(quick=False):
    stats = None if quick else jax.devices()[0].memory_stats()
    return stats["bytes_limit"] if stats else 2e7


def fits(program, needed, quick):
    """Whether a program fits: by the compiler's figure first, and then by running it."""
    if needed > memory_limit(quick):
        return False
    try:
        program()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return False
    return True


#
# Memory
#


def measure_memory(folder, deadline, quick):
    networks = ("MLP",) if quick else ("conv 2D", "conv 3D", "FNO")
    ways = ("bptt=1", "checkpoint=True", "plain scan", "bptt=5", "checkpoint=25")
    programs = []
    all_steps = (4,) if quick else (1000, 100, 10)
    for num_steps, way, network in itertools.product(all_steps, ways, networks):
        if time.time() > deadline - 40:  # keeps time for the runs
            break
        program, needed = compile_gradient(network, NETWORKS[network].samples, way, num_steps)
        case = dict(network=network, way=way, num_rollout_steps=num_steps, needed_bytes=needed)
        programs.append((needed, len(programs), case, program))
    for needed, _, case, program in sorted(programs):
        if time.time() > deadline - LONGEST_RUN:
            break
        does_fit = fits(program, needed, quick)
        stats = jax.devices()[0].memory_stats() or {}
        peak = stats.get("peak_bytes_in_use", "") if does_fit else ""
        row = case | dict(fits="yes" if does_fit else "no", peak_bytes=peak)
        append(folder / "memory.csv", row | describe())


#
# Run time
#


def measure_time(folder, deadline, quick):
    cases = [  # network, batch, steps between cuts, some launch-bound and some compute-bound
        ("MLP", 16, 1),
        ("conv 2D", 4, 1),
        ("MLP", 4096, 1),
        ("FNO", 4, 1),
        ("MLP", 1, 1),
        ("conv 2D", 32, 1),
        ("MLP", 256, 5),
        ("conv 2D", 4, 5),
        ("conv 2D", 1, 1),
        ("FNO", 32, 1),
        ("conv 3D", 1, 1),
    ]
    num_steps = 4 if quick else 50
    for network, batch, k in cases[:1] if quick else cases:
        losses_of_case = {
            "residuum": (losses.with_residuum, k, {}),
            **{
                f"residuum, unroll={n}": (losses.with_residuum, k, dict(unroll=n))
                for n in (2, 4, 8)
                if n <= num_steps
            },
            "plain scan": (losses.with_plain_scan, k, {}),
            "segments": (losses.with_checkpointed_segments, k, {}),
        }
        if importlib.util.find_spec("trainax") and num_steps <= 50 and network == "MLP":
            losses_of_case["trainax"] = (with_trainax, k, {})
        programs = {}
        for name, way in losses_of_case.items():
            if time.time() > deadline:
                return
            program, needed = compile_gradient(network, batch, way, num_steps)
            if fits(program, needed, quick):
                programs[name] = program
        one_step, _ = compile_gradient(network, batch, (losses.with_residuum, False, {}), 1)
        programs["one step, T times"] = lambda f=one_step: [f() for _ in range(num_steps)][-1]
        is_measured = lambda times: len(times) >= 3 and sum(times) > (0.01 if quick else 0.5)
        for name, median in machine.medians_in_turns(programs, is_measured).items():
            row = dict(network=network, batch=batch, bptt=k, num_rollout_steps=num_steps)
            row |= dict(way=name, run_s=f"{median:.4g}")
            append(folder / "time.csv", row | describe())


def with_trainax(stepper, data, residuum_fn, num_steps, k):
    import trainax

    options = dict(cut_bptt=k is not False, cut_bptt_every=k or 1)
    configuration = trainax.configuration.Residuum(num_steps, **options)
    return configuration(stepper, data, residuum_fn=jax.vmap(residuum_fn))


#
# What fits
#


def find_largest(folder, deadline, quick):
    """Finds the largest size whose gradient fits. The compiler's figure grows linearly with the
    number of steps, and with the number of points of a field. Two programs give the line, and a
    third one checks the prediction of the line."""
    limit = 0.95 * memory_limit(quick)
    sizes = dict(steps=(16, 32), points=(64, 96))
    if quick:
        sizes = dict(steps=(2, 4), points=(4, 8))
    ways = ("plain scan", "bptt=1", "segments", "checkpoint=True")
    for what, way in itertools.product(("steps", "points"), ways[:1] if quick else ways):
        if time.time() > deadline:
            return
        make = functools.partial(largest_case, what, way, quick)
        (x, a), (y, b) = ((size, make(size)[1]) for size in sizes[what])
        power = 1 if what == "steps" else 3
        slope = (b - a) / (y**power - x**power)
        row = dict(what=what, way=way, **describe())
        if what == "steps" and slope * 1e6 < limit:
            append(folder / "largest.csv", row | dict(size="over 1000000", run_s=""))
            continue
        largest = int((x**power + (limit - a) / slope) ** (1 / power))
        size = 8 * (largest // 8) if what == "points" else largest
        program, needed = make(size)
        while needed > memory_limit(quick):  # the line is not exact
            size = int(0.95 * size)
            program, needed = make(size)
        seconds = ""
        is_short = expected_seconds(what, make, sizes, size) < LONGEST_RUN
        if is_short and fits(program, needed, quick):
            seconds = f"{machine.time_of(program):.3g}"
        append(folder / "largest.csv", row | dict(size=size, run_s=seconds))


def largest_case(what, way, quick, size):
    """Compiles a gradient of `size` steps of a 2D field, or of 10 steps of a field with `size`³
    points."""
    if what == "steps":
        network = "MLP" if quick else "conv 2D"
        return compile_gradient(network, NETWORKS[network].samples, way, size)
    return compile_gradient("conv 3D", 1, way, 2 if quick else 10, state=3 * (size,))


def expected_seconds(what, make, sizes, size):
    small = sizes[what][1]
    program, _ = make(small)
    program()
    return machine.time_of(program) * (size / small) ** (1 if what == "steps" else 3)


#
# All parts, and the table
#

PARTS = {
    "tests": run_tests,
    "memory": measure_memory,
    "time": measure_time,
    "largest": find_largest,
}


def files_of(folder):
    paths = {part: folder / f"{part}.csv" for part in PARTS}
    return {part: path for part, path in paths.items() if path.exists()}


def table_of(folder):
    """Makes the tables of the documentation for all parts that have rows."""
    rows_of = {part: tables.read_csv(path) for part, path in files_of(folder).items()}
    read = lambda part: rows_of.get(part, [])
    found = []
    if devices := {row["device"] for part in PARTS for row in read(part)}:
        found.append(tables.markdown(["device"], [[device] for device in sorted(devices)]))
    if rows := read("tests"):
        columns = ["tests on the device", "passed", "failed", "skipped"]
        lines = [[f"`{x['file']}`", x["passed"], x["failed"], x["skipped"]] for x in rows]
        found.append(tables.markdown(columns, lines))
    if rows := read("memory"):
        gigabytes = lambda x: f"{float(x) / 1e9:.3g} GB" if x else ""
        columns = ["network, steps", "way", "compiler", "peak"]
        lines = [
            [
                f"{x['network']}, {x['num_rollout_steps']}",
                x["way"],
                gigabytes(x["needed_bytes"]),
                gigabytes(x["peak_bytes"]) if x["fits"] == "yes" else "does not fit",
            ]
            for x in rows
        ]
        found.append(tables.markdown(columns, lines, num_names=2))
    seconds = lambda x: tables.with_prefix(float(x), "s") if x else ""
    if rows := read("time"):
        ways = dict.fromkeys(x["way"] for x in rows)
        cases = {}
        for x in rows:
            case = f"{x['network']}, batch {x['batch']}, bptt={x['bptt']}"
            cases.setdefault(case, {})[x["way"]] = x["run_s"]
        columns = [f"run time, {rows[0]['num_rollout_steps']} steps", *ways]
        lines = [[case, *(seconds(x.get(way)) for way in ways)] for case, x in cases.items()]
        found.append(tables.markdown(columns, lines))
    if rows := read("largest"):
        columns = ["largest", "way", "size", "run time"]
        lines = [[x["what"], x["way"], x["size"], seconds(x["run_s"])] for x in rows]
        found.append(tables.markdown(columns, lines, num_names=2))
    return "\n\n".join(found)


def main():
    parser = tables.make_parser(__doc__, quick="small programs, on any device")
    parser.add_argument("--packages", type=pathlib.Path, help="a folder with further packages")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=tuple(PARTS))
    parser.add_argument("--table", action="store_true", help="from the rows that are there")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in its own process
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        PARTS[args.part](args.output, args.deadline, args.quick)
        return
    folder, _ = tables.output_folders(args, ROOT / "benchmarks" / "on_device" / "rows")
    if not args.table:
        packages = str(args.packages.resolve()) if args.packages else ""
        environment = os.environ | {"PYTHONPATH": packages}
        # No process keeps more memory than it uses, and one process may use nearly all of it.
        environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        environment |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
        for part in args.parts:
            (folder / f"{part}.csv").unlink(missing_ok=True)
            limit = 60 if args.quick else SECONDS[part]
            command = [sys.executable, __file__, "--part", part, "--output", str(folder)]
            command += ["--deadline", str(time.time() + limit)] + ["--quick"] * args.quick
            print(f"{part}, at most {limit} s", flush=True)
            try:
                # The limit is a little longer, for a measurement that has begun.
                subprocess.run(command, env=environment, timeout=limit + 10)
            except subprocess.TimeoutExpired:
                print(f"{part} was stopped; its rows so far are kept", flush=True)
    if table := table_of(folder):
        (folder / "table.md").write_text(f"# On a GPU or TPU\n\n{table}\n")
    print(f"\n{table or 'No rows.'}\n\nFolder: {folder}")


if __name__ == "__main__":
    main()
