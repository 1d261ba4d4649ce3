"""How accurate is the emulator of examples/plate.py, on the mesh of its training, on another
mesh, and on a finer one? Each seed has its own emulator, initial states and forcings.

    python -m studies.plate.small_meshes --seed 3 4 5     7 minutes on one core
    python -m studies.plate.small_meshes --quick          to see that it runs
"""

import conduction
import jax
import numpy as np
import plate as example

from benchmarks import machine, tables
from studies import train_and_tabulate


NUM_TEST, NUM_STEPS, NUM_UPDATES = 8, 50, 1600
COLUMNS = {
    f"{mesh}, step {n}": (f"{mesh.replace(' ', '_')}_{n}", "{:.5f}")
    for mesh in example.MESHES
    for n in example.REPORT_STEPS
} | {
    "worst sample at step 50, finer mesh": ("worst", "{:.5f}"),
    "ms / step": ("ms", "{:.2f}"),
}


def train(seed, num_updates):
    plate = conduction.make_plate(*conduction.random_mesh(*example.MESHES["training mesh"]))
    return example.train_emulator(plate, jax.random.key(seed), num_updates)


def make_rows(seed, emulator, seconds, num_test, num_steps):
    """Returns a row for each stepper, with the errors on all meshes. The time is that on the
    mesh of the training."""
    with train_and_tabulate.float64():
        keys = jax.random.split(jax.random.key(2000 + seed), len(example.MESHES))
        results = [
            example.evaluate(emulator, mesh, key, num_test, num_steps)
            for mesh, key in zip(example.MESHES.values(), keys, strict=True)
        ]
    times = results[0][3]
    for name in results[0][2]:
        row = {"model": name, "seed": seed}
        for mesh, (_, _, errors, _) in zip(example.MESHES, results, strict=True):
            for n in (n for n in example.REPORT_STEPS if n <= num_steps):
                mean = np.mean(errors[name][:, n])
                row[f"{mesh.replace(' ', '_')}_{n}"] = f"{mean:.3g}"
        row["worst"] = f"{np.max(errors[name][:, -1]):.3g}"
        row["ms"] = f"{times[name]:.3g}" if name in times else ""
        row["training_seconds"] = f"{seconds:.3g}" if name == "emulator" else ""
        yield row | {"machine": machine.describe("one core")}


def main():
    parser = tables.make_parser(__doc__, quick="20 updates, and 10 steps of 2 samples")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    args = parser.parse_args()
    folder, _ = tables.output_folders(args, __file__)
    num_updates, size = (20, (2, 10)) if args.quick else (NUM_UPDATES, (NUM_TEST, NUM_STEPS))
    trained = {seed: train(seed, num_updates) for seed in args.seed}
    rows = []
    for seed, (emulator, seconds) in trained.items():
        rows += make_rows(seed, emulator, seconds, *size)
        columns = {title: column for title, column in COLUMNS.items() if column[0] in rows[0]}
        train_and_tabulate.write(folder, rows, columns, name="small_meshes")


if __name__ == "__main__":
    main()
