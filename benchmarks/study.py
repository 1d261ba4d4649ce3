"""What the studies share: the path to the examples, options, CSV files, tables, the machine.

It imports nothing beyond the standard library, since some studies configure JAX first.
"""

import argparse
import csv
import multiprocessing
import os
import pathlib
import platform
import re
import statistics
import sys
import time


ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))  # whose problems the studies train


def make_parser(description, output, csv, quick):
    """With `--output` and `--csv`, which have these defaults, and `--quick`."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=style)
    parser.add_argument("--output", type=pathlib.Path, default=output, help="%(default)s")
    parser.add_argument("--csv", type=pathlib.Path, help=f"{csv}; with --quick none")
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


#
# CSV files
#


def write_csv(path, rows, columns=None):
    """Rows `[{column: value}]`, with the columns of the first one unless `columns` are given.

    What a row lacks is left empty. Call it after each row: then a study that is interrupted
    keeps what it has measured.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


#
# Tables
#


def markdown(columns, rows, num_names=1):
    """A table for the documentation: `num_names` columns of names, then numbers."""
    numbers = ["---:"] * (len(columns) - num_names)
    lines = [columns, ["---"] * num_names + numbers, *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write_table(path, table):
    """Replaces the table in the Markdown file beside a CSV file, for the documentation."""
    path = path.with_suffix(".md")
    text = path.read_text() if path.exists() else f"# {path.stem}"
    head = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    path.write_text(f"{head.rstrip()}\n\n{table}\n")


def with_prefix(x, unit):
    """Three digits and a prefix: 1.5 ms, 20 MB."""
    prefixes = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1, "m": 1e-3, "µ": 1e-6}
    for prefix, scale in prefixes.items():
        if x >= 0.9995 * scale or prefix == "µ":
            return f"{x / scale:.3g} {prefix}{unit}"


def over_seeds(values):
    """Median, least and most."""
    return statistics.median(values), min(values), max(values)


#
# Measuring
#


def heat_residuum(u_next, u_prev, axes, roll):
    """One implicit Euler step of the heat equation, periodic in `axes`, by `roll` of any
    library."""
    laplacian = sum(roll(u_next, 1, a) - 2 * u_next + roll(u_next, -1, a) for a in axes)
    return u_next - u_prev - 0.01 * laplacian


def seconds_per_update(update, carry, key, num_updates=10):
    """Of `carry, loss = update(carry, key)`, without compilation."""
    carry, loss = update(carry, key)
    loss.block_until_ready()
    start = time.perf_counter()
    for _ in range(num_updates):
        carry, loss = update(carry, key)
    loss.block_until_ready()
    return (time.perf_counter() - start) / num_updates


def on_single_cores(function, cases, num_workers=None):
    """Yields `function(case)` of each case as it is finished. The workers are processes with a
    core each, so that two that run at the same time measure the same as one."""
    context = multiprocessing.get_context("spawn")
    cores = context.SimpleQueue()
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    num_workers = num_workers or len(available)
    for i in range(num_workers):
        cores.put(available[i % len(available)])
    with context.Pool(num_workers, start_worker, (cores,)) as pool:
        yield from pool.imap_unordered(function, cases)
        pool.close()
        pool.join()


def start_worker(cores):
    """Restricts a process to one core, before JAX starts a thread for each available one."""
    import jax

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})
    jax.config.update("jax_platforms", "cpu")


def machine(share, *modules):
    """The accelerator, or the processor and the `share` of it in use ("2 cores", say); the
    versions of JAX and of further modules."""
    import jax

    if jax.default_backend() == "cpu":
        model = f"{processor()}, {share}"
    else:
        model = jax.devices()[0].device_kind
    return ", ".join([model, *(f"{m.__name__} {m.__version__}" for m in (jax, *modules))])


def all_cores():
    return f"{os.cpu_count()} cores"


def processor():
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = re.findall(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return names[0].strip() if names else platform.processor() or platform.machine()
