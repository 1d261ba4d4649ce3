"""Trains the Burgers emulator of burgers.py on any number of devices and processes.

JAX does the work: the batch is one global array, of which each device holds a part, and
`jit` makes the program of each device from that, with the sum of gradients over all devices
in it. The loss is called as on one device. What a process has to do is to join the others
(`jax.distributed.initialize`), and to load its own part of each batch
(`jax.make_array_from_process_local_data`). The result is that of one process, up to rounding.

    python examples/data_parallel.py --num-processes 2        two processes on this machine
    srun python examples/data_parallel.py --cluster           what SLURM has started, say
    python examples/data_parallel.py --quick                  in seconds, to see that it runs
"""

import argparse
import pathlib
import socket
import subprocess
import sys

import equinox as eqx
import jax
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
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tqdm import tqdm

from residuum import residuum_loss


def launch(num_processes):
    """Starts this program once for each process, on this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, *sys.argv, "--coordinator", coordinator, "--process-id"]
    processes = [subprocess.Popen([*command, str(i)]) for i in range(num_processes)]
    return max(process.wait() for process in processes)


def join(args):
    if args.cpu_devices:
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    if args.cluster:
        jax.distributed.initialize()  # finds the others by what the cluster says
    elif args.num_processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)


def train(stepper, train_set, *, num_updates, num_rollout_steps, seed):
    """Returns the trained stepper and the history of the loss."""
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    on_all_devices, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("batch"))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, num_updates))
    params, static = eqx.partition(stepper, eqx.is_array)

    def loss_fn(params, data):
        stepper = eqx.combine(params, static)
        options = dict(num_rollout_steps=num_rollout_steps, unroll=True)
        return residuum_loss(stepper, data, crank_nicolson, **options)

    @jax.jit
    def update(params, opt_state, data):
        loss, grads = jax.value_and_grad(loss_fn)(params, data)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    state = jax.device_put((params, optimizer.init(params)), on_all_devices)
    # All processes draw the same samples, and each loads those that are its own.
    rng = np.random.default_rng(seed)
    per_process = BATCH_SIZE // jax.process_count()
    own = slice(jax.process_index() * per_process, (jax.process_index() + 1) * per_process)
    history = []
    for _ in tqdm(range(num_updates), disable=jax.process_index() != 0):
        samples = rng.choice(NUM_TRAIN, BATCH_SIZE, replace=False)[own]
        local_data = train_set[samples][:, None]  # [own batch, num_snapshots, channels, points]
        data = jax.make_array_from_process_local_data(split, local_data)
        *state, loss = update(*state, data)
        history.append(loss)
    return eqx.combine(jax.device_get(state[0]), static), np.array(history)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=1500)
    parser.add_argument("--rollout-steps", type=int, default=5)
    parser.add_argument("--num-processes", type=int, default=1)
    parser.add_argument("--cpu-devices", type=int, help="virtual devices of each process")
    parser.add_argument("--cluster", action="store_true", help="started by a cluster")
    parser.add_argument("--output", type=pathlib.Path, help="CSV file of the loss history")
    parser.add_argument("--quick", action="store_true", help="20 updates")
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    parser.add_argument("--process-id", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.num_processes > 1 and args.process_id is None:
        sys.exit(launch(args.num_processes))
    join(args)

    train_key, test_key, model_key = jax.random.split(jax.random.key(args.seed), 3)
    stepper, history = train(
        ConvNet(key=model_key),
        np.asarray(initial_conditions(NUM_TRAIN, train_key)),
        num_updates=20 if args.quick else args.updates,
        num_rollout_steps=args.rollout_steps,
        seed=args.seed,
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


if __name__ == "__main__":
    main()
