"""examples/data_parallel.py trains in several processes with the result of a single process. If
a process or the launcher dies, all processes end, and training resumes as if nothing had
happened."""

import contextlib
import functools
import inspect
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest

from tests.common import program_environment, ROOT, slow


OPTIONS = inspect.signature(jax.distributed.initialize).parameters
pytestmark = pytest.mark.skipif(
    "heartbeat_timeout_seconds" not in OPTIONS, reason="needs a newer JAX"
)

EXAMPLE = ROOT / "examples" / "data_parallel.py"
# There is one checkpoint half-way and one at the end.
TRAINING = (
    *("--quick", "--rollout-steps", "1", "--output", "loss"),
    *("--checkpoint", "checkpoint", "--checkpoint-every", "10"),
)
# Some deaths are noticed only because a heartbeat is missing. These tests wait that long for
# it.
IMPATIENT = ("--heartbeat-timeout", "8")

# This is the example with a fault in one process: at the 13th update, when the checkpoint of
# the 10th exists, or in the middle of writing the second checkpoint.
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
        if fault == "hang":
            time.sleep(600)
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
def started(folder, *commands, fault="", variables=lambda i: {}, stdout=None):
    """Starts the commands in `folder`, where they write to the file `log`, and yields their
    processes. The i-th process finds `variables(i)` in its environment. Afterwards, these
    processes and all that they have started are killed."""
    program = EXAMPLE
    if fault:
        program = folder / "faulty.py"
        program.write_text(FAULTY_EXAMPLE)
    environment = program_environment(EXAMPLE.parent)
    environment |= {"JAX_PLATFORMS": "cpu", "FAULT": fault}
    processes = []
    try:
        with (folder / "log").open("w") as log:
            for i, command in enumerate(commands):
                process = subprocess.Popen(
                    [sys.executable, str(program), *command],
                    cwd=folder,
                    env=environment | variables(i),
                    stdout=stdout or log,
                    stderr=log,
                    start_new_session=True,  # its group is all that it starts
                )
                processes.append(process)
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def launch(num_processes):
    """Returns the command that starts this many processes."""
    several = ("--num-processes", str(num_processes), "--cpu-devices", "2")
    return TRAINING if num_processes == 1 else (*TRAINING, *several)


class Training(NamedTuple):
    folder: pathlib.Path
    history: np.ndarray
    log: str
    checkpoint: bytes  # parameters, state of the optimizer, history, number of the update


def train(folder, num_processes):
    with started(folder, launch(num_processes)) as [process]:
        process.wait(timeout=300)
    log = (folder / "log").read_text()
    assert process.returncode == 0, log
    [checkpoint] = (folder / "checkpoint").glob("*.eqx")
    return Training(folder, np.loadtxt(folder / "loss"), log, checkpoint.read_bytes())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Returns the training run by a number of processes without a fault."""
    return functools.cache(lambda n: train(tmp_path_factory.mktemp("undisturbed"), n))


def assert_resumes(folder, num_processes, expected, *, bitwise):
    actual = train(folder, num_processes)
    assert "resumes after 10 of 20 updates" in actual.log
    assert f"{num_processes} processes" in actual.log
    np.testing.assert_allclose(actual.history, expected.history, rtol=1e-4)
    if bitwise:
        np.testing.assert_array_equal(actual.history, expected.history)
        assert actual.checkpoint == expected.checkpoint


def seconds_since_the_fault(folder):
    return time.time() - (folder / "fault").stat().st_mtime


@slow
def test_processes_train_like_one(undisturbed):
    one, two = undisturbed(1), undisturbed(2)
    assert "2 processes, 4 devices" in two.log
    np.testing.assert_allclose(two.history, one.history, rtol=1e-4)


@pytest.mark.parametrize(
    "fault, what",
    [
        ("SIGKILL", "1 (killed by SIGKILL)"),  # perhaps after 0, which ends because of 1
        # The process exists but does not answer, like a machine that is cut off from the
        # network.
        pytest.param("SIGSTOP", "Died: process 0", marks=slow),
    ],
)
def test_all_end_with_the_one_that_dies(fault, what, tmp_path):
    command = (*launch(2), *IMPATIENT)
    with started(tmp_path, command, fault=f"{fault} update 1") as [launcher]:
        launcher.wait(timeout=300)
        assert seconds_since_the_fault(tmp_path) < 30
        with pytest.raises(ProcessLookupError):  # the launcher leaves no process behind
            os.killpg(launcher.pid, 0)
    log = (tmp_path / "log").read_text()
    assert launcher.returncode == 1, log
    assert what in log and "The same command resumes from the last checkpoint" in log


@pytest.fixture(scope="module")
def launcher_killed(tmp_path_factory):
    """Returns the folder of a training run whose launcher was killed, and the seconds until no
    process was left. One process hangs in Python, the other in a collective that waits for the
    first."""
    folder = tmp_path_factory.mktemp("launcher_killed")
    options = dict(fault="hang update 1", stdout=subprocess.PIPE)
    with started(folder, launch(2), **options) as [launcher]:
        while not (folder / "fault").exists():
            assert launcher.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        launcher.kill()
        start = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.communicate(timeout=30)  # until no process holds the pipe
        return folder, time.monotonic() - start


def test_processes_end_with_a_killed_launcher(launcher_killed):
    _, seconds = launcher_killed
    assert seconds < 30


@slow
def test_training_resumes_bit_for_bit_after_its_launcher_was_killed(
    launcher_killed, undisturbed
):
    folder, _ = launcher_killed
    assert_resumes(folder, 2, undisturbed(2), bitwise=True)


@slow
@pytest.mark.parametrize(
    "num_processes, fault, process",
    [(4, "SIGKILL", 3), (2, "SIGKILL", 0), (2, "error", 1)],
)
def test_all_end_where_nobody_looks_after_them(
    num_processes, fault, process, undisturbed, tmp_path
):
    """Without a launcher, all processes end when one of them dies. On a cluster, each process
    is started by itself in this way."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    options = ("--num-processes", str(num_processes), "--coordinator", coordinator)
    command = (*TRAINING, *IMPATIENT, *options, "--process-id")
    commands = [(*command, str(i)) for i in range(num_processes)]
    with started(tmp_path, *commands, fault=f"{fault} update {process}") as processes:
        processes[process].wait(timeout=300)
        for other in processes:
            other.wait(timeout=60 - seconds_since_the_fault(tmp_path))
    codes = [process.returncode for process in processes]
    assert all(codes), codes
    assert codes[process] == (-signal.SIGKILL if fault == "SIGKILL" else 1)
    if num_processes == 4:  # resumes with another number of processes
        assert_resumes(tmp_path, 1, undisturbed(1), bitwise=False)


@slow
def test_processes_of_a_cluster_find_each_other(undisturbed, tmp_path):
    """On a cluster, processes find each other by the environment variables that Slurm sets for
    each of them."""

    job = random.randrange(10**6)  # JAX derives the port from it

    def variables(i):
        names = dict(JOB_ID=job, STEP_NODELIST="localhost", NTASKS=2, PROCID=i, LOCALID=i)
        return {f"SLURM_{name}": str(value) for name, value in names.items()}

    command = (*TRAINING, "--cluster")
    with started(tmp_path, command, command, variables=variables) as processes:
        codes = [process.wait(timeout=300) for process in processes]
    log = (tmp_path / "log").read_text()
    assert codes == [0, 0] and "2 processes, 2 devices" in log, log
    np.testing.assert_allclose(np.loadtxt(tmp_path / "loss"), undisturbed(1).history, rtol=1e-4)


def test_training_resumes_bit_for_bit_from_the_last_whole_checkpoint(undisturbed, tmp_path):
    with started(tmp_path, launch(1), fault="SIGKILL writing 0") as [process]:
        process.wait(timeout=300)
    assert process.returncode == -signal.SIGKILL
    sizes = [path.stat().st_size for path in (tmp_path / "checkpoint").iterdir()]
    assert len(sizes) == 2 and 0 < 2 * min(sizes) <= max(sizes) + 1
    assert_resumes(tmp_path, 1, undisturbed(1), bitwise=True)


@slow
def test_a_complete_training_is_not_repeated(undisturbed):
    first = undisturbed(1)
    second = train(first.folder, 1)
    assert "resumes after 20 of 20 updates" in second.log
    assert second.checkpoint == first.checkpoint
    np.testing.assert_array_equal(second.history, first.history)
    assert first.history[-1] < 0.1 * first.history[0]
