"""Runs a program in several processes on this machine, and ends all of them if one dies.

It is made for programs whose processes need each other, such as those that `jax.distributed`
joins. The program that calls `launch` is started again once for each process, with the same
arguments and three more: `--launched`, `--coordinator HOST:PORT` and `--process-id I`. Each of
these processes calls `end_with_launcher` first. This file needs only the standard library.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time


def launch(num_processes):
    """Starts the processes and waits for them. As soon as one fails, all others are killed.
    Returns a message that says which processes failed and how, or None if none failed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, *sys.argv, "--launched", "--coordinator", coordinator]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that `finally` runs
    processes: list[subprocess.Popen] = []
    try:
        for i in range(num_processes):
            numbered = [*command, "--process-id", str(i)]
            processes.append(subprocess.Popen(numbered, stdin=subprocess.PIPE))
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()  # JAX treats SIGTERM as a preemption notice and keeps running
            process.wait()
    dead = [f"{i} ({describe(code)})" for i, code in enumerate(codes) if code]
    return f"Died: process {', '.join(dead)}; all were ended." if dead else None


def describe(code):
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def end_with_launcher():
    """Ends this process as soon as its launcher does, however the launcher ends."""

    def wait():
        # This read ends when the pipe from the launcher closes. `sys.stdin` would hold a lock
        # here that the interpreter needs when it exits.
        os.read(0, 1)
        os._exit(1)  # even if the main thread waits for another process

    threading.Thread(target=wait, daemon=True).start()
