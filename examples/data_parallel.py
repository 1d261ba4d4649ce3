"""Trains the Burgers emulator of burgers.py on any number of devices and processes.

JAX does the work: the batch is one global array, of which each device holds a part, and
`jit` makes the program of each device from that, with the sum of gradients over all devices
in it. The loss is called as on one device. What a process has to do is to join the others
(`jax.distributed.initialize`), and to load its own part of each batch
(`jax.make_array_from_process_local_data`). The result is that of one process, up to rounding.

If a process or the launcher dies, all processes end. With `--checkpoint DIR`, the same command
then resumes from the last checkpoint, with any number of processes.

    python examples/data_parallel.py --num-processes 2        two processes on this machine
    srun python examples/data_parallel.py --cluster           what SLURM has started, say
    python examples/data_parallel.py --quick                  in seconds, to see that it runs
"""

import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from burgers import (
    BATCH_SIZE,
    ConvNet,
    crank_nicolson,
    error_over_time,
    initial_conditions,
    NUM_TEST,
    NUM_TRAIN,
    reference_solver,
    rollout,
    TEST_STEPS,
)
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tqdm import tqdm

from residuum import residuum_loss


#
# Processes
#


def launch(args):
    """Starts this program once for each process, on this machine. Ends all if one of them
    ends with an error; returns what has happened then."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, *sys.argv, "--launched", "--coordinator", coordinator]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # by way of `finally`
    processes: list[subprocess.Popen] = []
    try:
        for i in range(args.num_processes):
            numbered = [*command, "--process-id", str(i)]
            processes.append(subprocess.Popen(numbered, stdin=subprocess.PIPE))
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()  # JAX does not end at SIGTERM, which it takes for an announcement
            process.wait()
    dead = [f"{i} ({describe(code)})" for i, code in enumerate(codes) if code]
    if dead:
        again = "starts anew, because no --checkpoint was given"
        if args.checkpoint:
            again = f"goes on from the last checkpoint in {args.checkpoint}"
        return f"\nDied: process {', '.join(dead)}; all were ended. The same command {again}."
    return None


def describe(code):
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def end_with_launcher():
    """Waits for the end of the pipe from the launcher, which closes however it dies."""
    os.read(0, 1)  # `sys.stdin` would hold a lock that the interpreter needs at its own end
    os._exit(1)  # even if the main thread waits for another process


def join(args):
    if args.launched:
        threading.Thread(target=end_with_launcher, daemon=True).start()
    if args.cpu_devices:
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    if args.cluster or args.num_processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        timeout = args.heartbeat_timeout
        initialize = partial(jax.distributed.initialize, heartbeat_timeout_seconds=timeout)
        if args.cluster:  # which says who the others are
            initialize()
        else:
            initialize(args.coordinator, args.num_processes, args.process_id)


#
# Checkpoints
#

# Equinox's serialisation rather than Orbax: the state of training is small, and whole on each
# device, so one file that process 0 writes is all of it, and knows of no number of processes.
# A state that is spread over the processes is for Orbax, by which each writes its own part.


def save(path, training):
    """Puts a whole checkpoint in the place of the last one: killed at any time, this leaves
    the one or the other."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        eqx.tree_serialise_leaves(file, training)
        file.flush()
        os.fsync(file.fileno())  # in case that the machine dies, too
    unfinished.replace(path)


def restore(path, training):
    """What process 0 has saved, or `training` if it has not, in all processes."""
    if jax.process_index() == 0 and path.exists():
        training = eqx.tree_deserialise_leaves(path, training)
    # Only process 0 reads, so that all go on from the same update, whatever they see on disk.
    return multihost_utils.broadcast_one_to_all(training)


#
# Training
#


def train(
    stepper,
    train_set,
    *,
    num_updates,
    num_rollout_steps,
    seed,
    checkpoint=None,
    checkpoint_every=100,
):
    """Returns the trained stepper and the history of the loss. Goes on from the file
    `checkpoint` if it is there, and writes it."""
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    on_all_devices, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("batch"))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, num_updates))
    params, static = eqx.partition(stepper, eqx.is_array)

    def loss_fn(params, data):
        stepper = eqx.combine(params, static)
        options = dict(num_rollout_steps=num_rollout_steps, unroll=True)
        return residuum_loss(stepper, data, crank_nicolson, **options)

    @partial(jax.jit, out_shardings=on_all_devices)
    def update(training, data):
        params, opt_state, history, i = training
        loss, grads = jax.value_and_grad(loss_fn)(params, data)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, history.at[i].set(loss), i + 1

    # All that training goes on from.
    training = params, optimizer.init(params), jnp.zeros(num_updates), jnp.array(0)
    if checkpoint:
        training = restore(checkpoint, training)
    start = int(training[-1])
    training = jax.device_put(training, on_all_devices)

    is_first = jax.process_index() == 0
    if is_first and start > 0:
        print(f"goes on after {start} of {num_updates} updates", flush=True)
    per_process = BATCH_SIZE // jax.process_count()
    own = slice(jax.process_index() * per_process, (jax.process_index() + 1) * per_process)
    updates = range(start, num_updates)
    for i in tqdm(updates, initial=start, total=num_updates, disable=not is_first):
        # All processes draw the same samples, which depend on nothing but the number of the
        # update, and each loads those that are its own.
        rng = np.random.default_rng((seed, i))
        samples = rng.choice(NUM_TRAIN, BATCH_SIZE, replace=False)[own]
        local_data = train_set[samples][:, None]  # [own batch, num_snapshots, channels, points]
        data = jax.make_array_from_process_local_data(split, local_data)
        training = update(training, data)
        is_due = (i + 1) % checkpoint_every == 0 or i + 1 == num_updates
        if checkpoint and is_first and is_due:
            save(checkpoint, jax.device_get(training))
    params, _, history, _ = jax.device_get(training)
    return eqx.combine(params, static), history


def run(args):
    join(args)
    num_updates = 20 if args.quick else args.updates
    checkpoint = None
    if args.checkpoint:
        # The name says whose it is: another training in the same folder is not mixed up.
        name = f"seed_{args.seed}_updates_{num_updates}_rollout_steps_{args.rollout_steps}"
        checkpoint = args.checkpoint / f"{name}.eqx"
        args.checkpoint.mkdir(parents=True, exist_ok=True)

    train_key, test_key, model_key = jax.random.split(jax.random.key(args.seed), 3)
    stepper, history = train(
        ConvNet(key=model_key),
        np.asarray(initial_conditions(NUM_TRAIN, train_key)),
        num_updates=num_updates,
        num_rollout_steps=args.rollout_steps,
        seed=args.seed,
        checkpoint=checkpoint,
        checkpoint_every=args.checkpoint_every,
    )
    if jax.process_index() == 0:
        test_set = initial_conditions(NUM_TEST, test_key)
        reference = rollout(reference_solver(), test_set)
        error = error_over_time(rollout(stepper, test_set), reference)
        print(f"\n{jax.process_count()} processes, {jax.device_count()} devices")
        print(f"loss {history[0]:.3e} before, {history[-1]:.3e} after training")
        print(f"nRMSE after {TEST_STEPS} steps: {error[TEST_STEPS]:.4f}")
        if args.output:
            np.savetxt(args.output, history, header="loss")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--rollout-steps", type=int, default=5)
    parser.add_argument("--checkpoint", type=pathlib.Path, help="folder to save to, go on from")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="updates")
    parser.add_argument("--num-processes", type=int, default=1)
    parser.add_argument("--process-id", type=int, help="if not all are started from here")
    parser.add_argument("--coordinator", help="host:port of process 0, with --process-id")
    parser.add_argument("--cluster", action="store_true", help="started by a cluster")
    parser.add_argument("--launched", action="store_true", help=argparse.SUPPRESS)
    # JAX's own 100 seconds are for machines that are farther apart.
    silence = "seconds of silence after which a process counts as dead"
    parser.add_argument("--heartbeat-timeout", type=int, default=20, help=silence)
    parser.add_argument("--cpu-devices", type=int, help="virtual devices of each process")
    parser.add_argument("--output", type=pathlib.Path, help="CSV file of the loss history")
    parser.add_argument("--quick", action="store_true", help="20 updates")
    args = parser.parse_args()
    if args.num_processes > 1 and args.process_id is None:
        sys.exit(launch(args))
    try:
        run(args)
    except Exception:
        # At once: what JAX does when a program ends is to wait for the other processes, which
        # in turn wait for this one in the next update.
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
