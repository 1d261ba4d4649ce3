"""Training in several processes, by examples/data_parallel.py: as in one; one of them dies, and
the others end; training goes on from the last checkpoint as if nothing had happened."""

import contextlib
import inspect
import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from common import ROOT

from test_residuum import slow


OPTIONS = inspect.signature(jax.distributed.initialize).parameters
pytestmark = [
    slow,
    pytest.mark.skipif("heartbeat_timeout_seconds" not in OPTIONS, reason="needs a newer JAX"),
]

EXAMPLE = ROOT / "examples" / "data_parallel.py"
# One checkpoint half-way, one at the end.
TRAINING = ("--quick", "--rollout-steps", "1", "--checkpoint-every", "10")

# The example with a fault, in one process: at the 13th update, when the checkpoint of the 10th
# is there, or in the midst of writing the second one.
FAULTY_EXAMPLE = """if True:
    import io, itertools, os, pathlib, signal, sys, time
    import equinox, jax
    import data_parallel

    fault, moment, process = os.environ["FAULT"].split()
    update, writing = itertools.count(1), itertools.count(1)
    make_array = jax.make_array_from_process_local_data
    write = equinox.tree_serialise_leaves

    def fail():
        pathlib.Path("fault").touch()
        if fault == "error":
            raise MemoryError("as if there were none left")
        os.kill(os.getpid(), signal.Signals[fault])

    def make_array_or_fail(*args):
        if next(update) == 13 and moment == "update" and int(process) == jax.process_index():
            while not list(pathlib.Path("checkpoint").glob("*.eqx")):
                time.sleep(0.01)
            fail()
        return make_array(*args)

    def write_or_fail(file, tree):
        if next(writing) == 2 and moment == "writing":
            whole = io.BytesIO()
            write(whole, tree)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            fail()
        write(file, tree)

    jax.make_array_from_process_local_data = make_array_or_fail
    equinox.tree_serialise_leaves = write_or_fail
    data_parallel.main()
"""


@contextlib.contextmanager
def started(folder, *commands, fault="", variables=lambda i: {}):
    """The processes of the commands in `folder`, which write to the file `log` there; the i-th
    finds `variables(i)` in its environment. None is left afterwards, nor any that they have
    started themselves."""
    program = EXAMPLE
    if fault:
        program = folder / "faulty.py"
        program.write_text(FAULTY_EXAMPLE)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(EXAMPLE.parent)]),
        "MPLBACKEND": "agg",
        "JAX_PLATFORMS": "cpu",
        "FAULT": fault,
    }
    environment.pop("XLA_FLAGS", None)  # with this process' number of virtual devices
    processes = []
    try:
        with (folder / "log").open("w") as log:
            for i, command in enumerate(commands):
                process = subprocess.Popen(
                    [sys.executable, str(program), *command],
                    cwd=folder,
                    env=environment | variables(i),
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # so that its group is all that it starts
                )
                processes.append(process)
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def train(folder, num_processes, *arguments):
    """History of the loss, and what was printed."""
    folder.mkdir(exist_ok=True)
    command = [*TRAINING, "--num-processes", str(num_processes), "--output", "loss", *arguments]
    with started(folder, command) as [process]:
        process.wait(timeout=300)
    log = (folder / "log").read_text()
    assert process.returncode == 0, log
    return np.loadtxt(folder / "loss"), log


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """History of the loss in one process, without a fault."""
    history, _ = train(tmp_path_factory.mktemp("uninterrupted"), 1)
    assert history.shape == (20,) and history[-1] < 0.1 * history[0]
    return history


def assert_goes_on(folder, num_processes, history):
    actual, log = train(folder, num_processes, "--checkpoint", "checkpoint")
    assert "goes on after 10 of 20 updates" in log
    assert f"{num_processes} processes" in log
    np.testing.assert_allclose(actual, history, rtol=1e-4)


def seconds_since_the_fault(folder):
    return time.time() - (folder / "fault").stat().st_mtime


def test_processes_train_like_one(uninterrupted, tmp_path):
    history, log = train(tmp_path, 2, "--cpu-devices", "2")
    assert "2 processes, 4 devices" in log
    np.testing.assert_allclose(history, uninterrupted, rtol=1e-4)


@pytest.mark.parametrize(
    "fault, what",
    [
        ("SIGKILL", "1 (killed by SIGKILL)"),  # perhaps after 0, which ends of it
        # It is there, but does not answer, like a machine that is cut off from the network.
        ("SIGSTOP", "Died: process 0"),
    ],
)
def test_all_end_with_the_one_that_dies(fault, what, uninterrupted, tmp_path):
    command = (*TRAINING, "--num-processes", "2", "--checkpoint", "checkpoint")
    with started(tmp_path, command, fault=f"{fault} update 1") as [launcher]:
        launcher.wait(timeout=300)
        assert seconds_since_the_fault(tmp_path) < 60
        with pytest.raises(ProcessLookupError):  # the launcher leaves no process behind
            os.killpg(launcher.pid, 0)
    log = (tmp_path / "log").read_text()
    assert launcher.returncode == 1, log
    assert what in log and "The same command goes on from the last checkpoint" in log
    if fault == "SIGKILL":
        assert_goes_on(tmp_path, 2, uninterrupted)


@pytest.mark.parametrize(
    "num_processes, fault, process",
    [(4, "SIGKILL", 3), (2, "SIGKILL", 0), (2, "error", 1)],
)
def test_all_end_where_nobody_looks_after_them(
    num_processes, fault, process, uninterrupted, tmp_path
):
    """As on a cluster, where each is started by itself."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    options = ("--num-processes", str(num_processes), "--coordinator", coordinator)
    commands = [
        (*TRAINING, *options, "--process-id", str(i), "--checkpoint", "checkpoint")
        for i in range(num_processes)
    ]
    with started(tmp_path, *commands, fault=f"{fault} update {process}") as processes:
        processes[process].wait(timeout=300)
        for other in processes:
            other.wait(timeout=60 - seconds_since_the_fault(tmp_path))
    codes = [process.returncode for process in processes]
    assert all(codes), codes
    assert codes[process] == (-signal.SIGKILL if fault == "SIGKILL" else 1)
    if num_processes == 4:  # goes on with another number of processes
        assert_goes_on(tmp_path, 2, uninterrupted)


def test_processes_of_a_cluster_find_each_other(uninterrupted, tmp_path):
    """By what Slurm tells each process that it starts."""

    job = random.randrange(10**6)  # from which JAX makes the port

    def variables(i):
        names = dict(JOB_ID=job, STEP_NODELIST="localhost", NTASKS=2, PROCID=i, LOCALID=i)
        return {f"SLURM_{name}": str(value) for name, value in names.items()}

    command = (*TRAINING, "--cluster", "--output", "loss")
    with started(tmp_path, command, command, variables=variables) as processes:
        codes = [process.wait(timeout=300) for process in processes]
    log = (tmp_path / "log").read_text()
    assert codes == [0, 0] and "2 processes, 2 devices" in log, log
    np.testing.assert_allclose(np.loadtxt(tmp_path / "loss"), uninterrupted, rtol=1e-4)


def test_a_file_that_was_being_written_is_no_checkpoint(uninterrupted, tmp_path):
    command = (*TRAINING, "--checkpoint", "checkpoint")
    with started(tmp_path, command, fault="SIGKILL writing 0") as [process]:
        process.wait(timeout=300)
    assert process.returncode == -signal.SIGKILL
    sizes = [path.stat().st_size for path in (tmp_path / "checkpoint").iterdir()]
    assert len(sizes) == 2 and 0 < 2 * min(sizes) <= max(sizes) + 1
    assert_goes_on(tmp_path, 1, uninterrupted)
    # What is complete is not trained again.
    (tmp_path / "loss").unlink()
    history, log = train(tmp_path, 1, "--checkpoint", "checkpoint")
    assert "goes on after 20 of 20 updates" in log
    np.testing.assert_allclose(history, uninterrupted, rtol=1e-4)
