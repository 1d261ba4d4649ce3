"""Trains the Burgers emulator of burgers.py on any number of devices and processes.

JAX does the work. The batch is one global array, of which each device holds a part. `jit`
compiles one program for all devices, which includes the sum of the gradients over them. You
call the loss as on one device. A process has to do two things: join the others by
`jax.distributed.initialize`, and load its own part of each batch for
`jax.make_array_from_process_local_data`. Up to round-off, the result is that of one process.

If a process or the launcher dies, all processes end. With `--checkpoint DIR`, the same command
then resumes from the last checkpoint, with any number of processes.

    python examples/data_parallel.py --num-processes 2        two processes on this machine
    srun python examples/data_parallel.py --cluster           processes started by SLURM
    python examples/data_parallel.py --quick                  in seconds, to see that it runs
"""

import argparse
import os
import pathlib
import sys
import traceback
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from burgers import (
    BATCH_SIZE,
    crank_nicolson,
    Emulator,
    initial_conditions,
    NUM_TEST,
    NUM_TRAIN,
    reference_solver,
    TEST_STEPS,
)
from common import error_over_time, rollout
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from launcher import end_with_launcher, launch
from tqdm import tqdm

from residuum import residuum_loss


def join(args):
    """Makes this process one of several, as the command line or the cluster specifies."""
    if args.launched:
        end_with_launcher()
    if args.cpu_devices:
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    if args.cluster or args.num_processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        others = () if args.cluster else (args.coordinator, args.num_processes, args.process_id)
        timeout = args.heartbeat_timeout
        initialize = partial(jax.distributed.initialize, heartbeat_timeout_seconds=timeout)
        initialize(*others)


#
# Checkpoints
#

# Each device has the whole state of training, so process 0 alone writes it, to a single file.
# With Orbax, each process could write its own part of a sharded state.


def save(path, training):
    """Replaces the last checkpoint. A process killed here leaves the old one or the new one."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        eqx.tree_serialise_leaves(file, training)
        file.flush()
        os.fsync(file.fileno())  # in case the machine crashes
    unfinished.replace(path)


def restore(path, training):
    """Returns in all processes what process 0 has saved, or `training` if there is no file."""
    if jax.process_index() == 0 and path.exists():
        training = eqx.tree_deserialise_leaves(path, training)
    # Only process 0 reads, so that all processes resume from the same update.
    return multihost_utils.broadcast_one_to_all(training)


#
# Training
#


def train(stepper, train_set, args, num_updates, checkpoint=None):
    """Returns the trained stepper and the history of the loss. Resumes from the file
    `checkpoint` if it exists, and writes checkpoints to it."""
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    on_all_devices, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("batch"))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, num_updates))
    params, static = eqx.partition(stepper, eqx.is_array)

    def loss_fn(params, data):
        stepper = eqx.combine(params, static)
        options = dict(num_rollout_steps=args.rollout_steps, unroll=True)
        return residuum_loss(stepper, data, crank_nicolson, **options)

    @partial(jax.jit, out_shardings=on_all_devices)
    def update(training, data):
        params, opt_state, history, i = training
        loss, grads = jax.value_and_grad(loss_fn)(params, data)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, history.at[i].set(loss), i + 1

    # This tuple is all that is needed to resume.
    training = params, optimizer.init(params), jnp.zeros(num_updates), jnp.array(0)
    if checkpoint:
        training = restore(checkpoint, training)
    start = int(training[-1])
    training = jax.device_put(training, on_all_devices)

    is_first = jax.process_index() == 0
    if is_first and start > 0:
        print(f"resumes after {start} of {num_updates} updates", flush=True)
    own = np.split(np.arange(BATCH_SIZE), jax.process_count())[jax.process_index()]
    updates = range(start, num_updates)
    for i in tqdm(updates, initial=start, total=num_updates, disable=not is_first):
        # The samples depend only on the seed and the number of the update, so all processes
        # draw the same samples. Each process loads its own part.
        rng = np.random.default_rng((args.seed, i))
        samples = rng.choice(NUM_TRAIN, BATCH_SIZE, replace=False)[own]
        data = jax.make_array_from_process_local_data(split, train_set[samples][:, None])
        training = update(training, data)
        is_due = (i + 1) % args.checkpoint_every == 0 or i + 1 == num_updates
        if checkpoint and is_first and is_due:
            save(checkpoint, jax.device_get(training))
    params, _, history, _ = jax.device_get(training)
    return eqx.combine(params, static), history


def run(args):
    join(args)
    num_updates = 20 if args.quick else args.updates
    checkpoint = None
    if args.checkpoint:
        # The name depends on the options, since other options train another emulator.
        name = f"seed_{args.seed}_updates_{num_updates}_rollout_steps_{args.rollout_steps}"
        checkpoint = args.checkpoint / f"{name}.eqx"
        args.checkpoint.mkdir(parents=True, exist_ok=True)

    train_key, test_key, model_key = jax.random.split(jax.random.key(args.seed), 3)
    train_set = np.asarray(initial_conditions(NUM_TRAIN, train_key))
    stepper, history = train(Emulator(model_key), train_set, args, num_updates, checkpoint)
    if jax.process_index() == 0:
        test_set = initial_conditions(NUM_TEST, test_key)
        reference = rollout(reference_solver(), test_set, TEST_STEPS)
        error = error_over_time(rollout(stepper, test_set, TEST_STEPS), reference)
        print(f"\n{jax.process_count()} processes, {jax.device_count()} devices")
        print(f"loss {history[0]:.3e} before, {history[-1]:.3e} after training")
        print(f"nRMSE after {TEST_STEPS} steps: {error[TEST_STEPS]:.4f}")
        if args.output:
            np.savetxt(args.output, history, header="loss")


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--rollout-steps", type=int, default=5)
    folder = "folder for checkpoints; training resumes from it"
    parser.add_argument("--checkpoint", type=pathlib.Path, help=folder)
    parser.add_argument("--checkpoint-every", type=int, default=100, help="updates")
    parser.add_argument("--num-processes", type=int, default=1)
    parser.add_argument("--process-id", type=int, help="if not all are started from here")
    parser.add_argument("--coordinator", help="host:port of process 0, with --process-id")
    parser.add_argument("--cluster", action="store_true", help="started by a cluster")
    parser.add_argument("--launched", action="store_true", help=argparse.SUPPRESS)
    # JAX's own default of 100 seconds suits machines that are farther apart.
    silence = "seconds of silence after which a process counts as dead"
    parser.add_argument("--heartbeat-timeout", type=int, default=20, help=silence)
    parser.add_argument("--cpu-devices", type=int, help="virtual devices of each process")
    parser.add_argument("--output", type=pathlib.Path, help="CSV file of the loss history")
    parser.add_argument("--quick", action="store_true", help="20 updates")
    args = parser.parse_args()
    if args.num_processes > 1 and args.process_id is None:
        if died := launch(args.num_processes):
            resumes = f"resumes from the last checkpoint in {args.checkpoint}"
            anew = "starts anew, because no --checkpoint was given"
            sys.exit(f"\n{died} The same command {resumes if args.checkpoint else anew}.")
        return
    try:
        run(args)
    except Exception:
        # Exit at once: on a normal exit, JAX waits for the other processes, and these wait for
        # this one in the next update.
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
