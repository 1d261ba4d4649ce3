"""Names the machine that measures, gives each process a core of its own, and measures run
times.

JAX is imported inside the functions, since some programs configure JAX first.
"""

import multiprocessing
import os
import pathlib
import platform
import random
import re
import statistics
import time


def on_single_cores(function, cases, num_workers=None):
    """Yields `function(case)` for each case, in their order. Each worker is a process with a
    core of its own, so two workers that run at the same time measure the same as one."""
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
    """Restricts a process to one core, before JAX starts a thread for each available core."""
    import jax

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})
    jax.config.update("jax_platforms", "cpu")


def describe(share, *modules):
    """Returns the accelerator, or the processor and the `share` of it in use, such as "2
    cores". The versions of JAX and of other modules follow."""
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


def medians_in_turns(programs, is_measured, clock=time.perf_counter):
    """Returns the median run time [s] of each program in `{name: function of no arguments}`.
    On a shared core, use `time.process_time`, which excludes the time of other programs.

    The programs run in turns, so that the noise of the machine affects all of them alike, each
    until `is_measured(times)`. The order is random, because a program that runs after another
    one with as much memory finds that memory already mapped.
    """
    times = {name: [] for name in programs}
    while unfinished := [name for name in programs if not is_measured(times[name])]:
        for name in random.sample(unfinished, len(unfinished)):
            times[name].append(time_of(programs[name], clock))
    return {name: statistics.median(x) for name, x in times.items()}


def time_of(program, clock=time.perf_counter):
    start = clock()
    program()
    return clock() - start
