"""How accurate is the emulator of examples/plate.py, on the mesh of its training, on another
mesh, and on a finer one? Each seed has its own emulator, initial states and forcings. The study
also trains emulators that subtract the directions of the network, without the GCR method.

    python -m studies.plate.small_meshes --seed 3 4 5     12 minutes on one core
    python -m studies.plate.small_meshes --quick          to see that it runs
"""

import conduction
import jax
import numpy as np
import plate as example

from benchmarks import machine, tables
from studies import train_and_tabulate


NUM_TEST, NUM_STEPS, NUM_UPDATES = 8, 50, 1600
WITHOUT_GCR = "emulator without GCR"
COLUMNS = {
    f"{mesh}, step {n}": (f"{mesh.replace(' ', '_')}_{n}", "{:.2g}")
    for mesh in example.MESHES
    for n in example.REPORT_STEPS
} | {
    "worst sample at step 50, finer mesh": ("worst_on_finer_mesh", "{:.2g}"),
    "ms / step": ("ms", "{:.2f}"),
}


class EmulatorWithoutGCR(example.Emulator):
    """Subtracts each direction that the network returns."""

    def __call__(self, plate, u_prev, forcing, num_corrections=4):
        stepper = conduction.repeat(self.preconditioner, num_corrections)
        return stepper(plate, u_prev, forcing)


def train(seed, num_updates, kind):
    plate = conduction.make_plate(*conduction.random_mesh(*example.MESHES["training mesh"]))
    return example.train_emulator(plate, jax.random.key(seed), num_updates, kind=kind)


def evaluate(seed, emulator, num_test, num_steps):
    """Returns a row for each stepper, `{name: row}`, with the errors on all meshes. The time is
    that on the mesh of the training."""
    keys = jax.random.split(jax.random.key(2000 + seed), len(example.MESHES))
    rows = {}
    with train_and_tabulate.float64():
        for (name, mesh), key in zip(example.MESHES.items(), keys, strict=True):
            _, _, errors, times = example.evaluate(emulator, mesh, key, num_test, num_steps)
            for model, error in errors.items():
                row = rows.setdefault(model, {"model": model, "seed": seed})
                for n in (n for n in example.REPORT_STEPS if n <= num_steps):
                    row[f"{name.replace(' ', '_')}_{n}"] = f"{np.mean(error[:, n]):.3g}"
                if name == "training mesh":
                    row["ms"] = f"{times[model]:.3g}" if model in times else ""
                if name == "finer mesh":
                    row["worst_on_finer_mesh"] = f"{np.max(error[:, -1]):.3g}"
    return rows


def make_rows(seed, trained, *size):
    """Returns the rows of all steppers, and below them that of the emulator without GCR."""
    (emulator, seconds), (ablated, ablated_seconds) = trained
    rows = evaluate(seed, emulator, *size)
    rows[WITHOUT_GCR] = evaluate(seed, ablated, *size)["emulator"] | {"model": WITHOUT_GCR}
    training = {"emulator": seconds, WITHOUT_GCR: ablated_seconds}
    for model, row in rows.items():
        row["training_seconds"] = f"{training[model]:.3g}" if model in training else ""
        row["machine"] = machine.describe("one core")
    return list(rows.values())


def main():
    parser = tables.make_parser(__doc__, quick="20 updates, and 10 steps of 2 samples")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or several")
    args = parser.parse_args()
    folder, _ = tables.output_folders(args, __file__)
    num_updates, size = (20, (2, 10)) if args.quick else (NUM_UPDATES, (NUM_TEST, NUM_STEPS))
    kinds = example.Emulator, EmulatorWithoutGCR
    trained = {s: [train(s, num_updates, kind) for kind in kinds] for s in args.seed}
    rows = []
    for seed, emulators in trained.items():
        rows += make_rows(seed, emulators, *size)
        columns = {title: column for title, column in COLUMNS.items() if column[0] in rows[0]}
        train_and_tabulate.write(folder, rows, columns, name="small_meshes")


if __name__ == "__main__":
    main()
