"""The machine that measures: its name, and a core of it for each process.

JAX is imported inside of the functions, since some programs configure it first.
"""

import multiprocessing
import os
import pathlib
import platform
import re


def on_single_cores(function, cases, num_workers=None):
    """Yields `function(case)` of each case, in their order. Each worker is a process with a
    core of its own, so that two that run at the same time measure the same as one."""
    context = multiprocessing.get_context("spawn")
    cores = context.SimpleQueue()
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    num_workers = num_workers or len(available)
    for i in range(num_workers):
        cores.put(available[i % len(available)])
    with context.Pool(num_workers, start_worker, (cores,)) as pool:
        yield from pool.imap(function, cases)
        pool.close()
        pool.join()


def start_worker(cores):
    """Restricts a process to one core, before JAX starts a thread for each available one."""
    import jax

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})
    jax.config.update("jax_platforms", "cpu")


def describe(share, *modules):
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
