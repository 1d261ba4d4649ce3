"""What does each item of the recipe of examples/gray_scott.py gain? The study changes one item
at a time.

Each row is trained for the same time, with two learning rates, and the table shows the better
one. The table has the errors after 50 steps, on unseen samples with unseen rates. They start
from patterns, and from the spots that grow into patterns.

    python -m studies.gray_scott.run             20 minutes on one core
    python -m studies.gray_scott.run --quick     to see that it runs
"""

from typing import NamedTuple

import common
import equinox as eqx
import gray_scott
import jax
import jax.numpy as jnp
from gray_scott import CHANGE_SIZE, FIELD_MEAN, FIELD_SIZE, HIGHEST_RATES, LOWEST_RATES, State

from benchmarks import tables
from residuum import Cuts
from studies import train_and_tabulate


class Recipe(NamedTuple):
    """Says what is trained, and how. The defaults are those of the example."""

    scale_fields: bool = True
    scale_residuals: bool = True
    start_at_identity: bool = True
    precondition: bool = True
    bilinear: bool = True  # else GELU
    num_rollout_steps: int = 1  # the replay buffer continues the rollout in the next update
    cuts: Cuts = Cuts()
    buffer_size: int = 64  # with 0, each update has new random states
    batch_size: int = 4


ROWS: dict[str, dict] = {
    "the recipe": {},
    "fields not scaled": dict(scale_fields=False),
    "residuals not scaled": dict(scale_residuals=False),
    "the next state, not its change": dict(start_at_identity=False),
    "not preconditioned": dict(precondition=False),
    "GELU, not products": dict(bilinear=False),
    "4 steps": dict(num_rollout_steps=4),
    "4 steps, `bptt=1`": dict(num_rollout_steps=4, cuts=Cuts(bptt=1)),
    "no replay buffer": dict(buffer_size=0),
    "no replay buffer, 16 steps, `bptt=1`": dict(
        buffer_size=0, num_rollout_steps=16, cuts=Cuts(bptt=1)
    ),
    "batches of 64, not 4": dict(batch_size=64),
    "none of these": dict(
        scale_fields=False,
        scale_residuals=False,
        start_at_identity=False,
        precondition=False,
        bilinear=False,
        buffer_size=0,
        batch_size=64,
    ),
}
LEARNING_RATES = (1e-2, 1e-3)
STEPS = (1, 10, 50, 100)


#
# The emulator and the training of the example, with switches
#


def make_residuum_fn(recipe):
    def residuum_fn(u_next, u_prev):
        residual = gray_scott.imex_euler(u_next, u_prev)
        if recipe.precondition:
            residual = gray_scott.invert_diffusion(residual)
        return residual / CHANGE_SIZE if recipe.scale_residuals else residual

    return residuum_fn


class Emulator(eqx.Module):
    network: common.ConvNet
    recipe: Recipe = eqx.field(static=True)

    def __init__(self, recipe, key):
        width, activation = (16, common.bilinear) if recipe.bilinear else (32, jax.nn.gelu)
        options = dict(activation=activation, gain=3**0.5, zero_last=recipe.start_at_identity)
        self.network = common.ConvNet(2, (4, width, width, 2), (3, 1, 3), **options, key=key)
        self.recipe = recipe

    def __call__(self, state):
        fields, rates = state
        mean, size, change_size = 0.0, 1.0, 1.0
        if self.recipe.scale_fields:
            mean, size, change_size = FIELD_MEAN, FIELD_SIZE, CHANGE_SIZE
            rates = 2 * (rates - LOWEST_RATES) / (HIGHEST_RATES - LOWEST_RATES) - 1
        fields = (fields - mean) / size
        rates = jnp.broadcast_to(rates[:, None, None], fields.shape)
        output = self.network(jnp.concatenate([fields, rates]))
        if self.recipe.start_at_identity:
            return State(state.fields + change_size * output, state.rates)
        return State(mean + size * output, state.rates)


def make_training(recipe, key, **options):
    """Returns the carry and the update of `gray_scott.make_training`."""
    model_key, buffer_key = jax.random.split(key)
    return gray_scott.make_training(
        Emulator(recipe, model_key),
        buffer_key,
        residuum_fn=make_residuum_fn(recipe),
        num_rollout_steps=recipe.num_rollout_steps,
        cuts=recipe.cuts,
        buffer_size=recipe.buffer_size or recipe.batch_size,
        batch_size=recipe.batch_size,
        fresh_share=0.01 if recipe.buffer_size else 1.0,
        **options,
    )


#
# The table
#


def evaluate(stepper, tests):
    """Returns the errors by initial states, field and step, and at how many of the first 50
    steps these errors are smaller than those of persistence in both fields."""
    row: dict[str, float] = {}
    for start, states in tests.items():
        _, errors = gray_scott.evaluate(stepper, states)
        for field in ("u and v", "v"):
            for step in STEPS:
                row[f"{start}, {field}, {step}"] = float(errors[f"{field}, emulator"][step])
        better = [errors[f"{x}, emulator"] < errors[f"{x}, persistence"] for x in ("u", "v")]
        row[f"{start}, better"] = int(jnp.sum((better[0] & better[1])[1:51]))
    return row


def score(row):
    """Returns the score of a learning rate. The better learning rate has the lower score."""
    error = float(row["patterns, u and v, 50"]) + float(row["seeds, u and v, 50"])
    return error if error == error else float("inf")  # NaN


COLUMNS = {
    "patterns, u and v, 50": "patterns: u and v",
    "patterns, v, 50": "v",
    "seeds, u and v, 50": "spots: u and v",
    "seeds, v, 50": "v",
}


def markdown(rows):
    """Makes the table of the rows of the CSV file, the first of which is persistence."""
    lines = []
    for name in dict.fromkeys(row["row"] for row in rows):
        best = min((row for row in rows if row["row"] == name), key=score)
        errors = [float(best[column]) for column in COLUMNS]
        errors = [f"{x:.3f}" if x < 10 else "diverges" for x in errors]  # NaN diverges as well
        steps = min(int(best[f"{start}, better"]) for start in ("patterns", "seeds"))
        better = f"{steps} of 50 steps"
        if name == "persistence":
            name, better = "*persistence*", ""
        lines.append([name, *errors, better, best["updates"]])
    columns = ["trained with", *COLUMNS.values(), "better than persistence", "updates"]
    return tables.markdown(columns, lines)


def main():
    parser = tables.make_parser(__doc__, quick="one row, 5 updates, 4 samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0.6, help="of training for each run")
    parser.add_argument("--rows", nargs="+", default=tuple(ROWS), choices=ROWS)
    args = parser.parse_args()
    folder, _ = tables.output_folders(args, __file__)
    rates, num_test = LEARNING_RATES, gray_scott.NUM_TEST
    if args.quick:
        args.rows, rates, num_test = ("no replay buffer",), LEARNING_RATES[:1], 4

    train_key, test_key = jax.random.split(jax.random.key(args.seed))
    start_key, updates_key = jax.random.split(train_key)
    tests = gray_scott.evaluation_states(test_key, num_test)
    row = {"row": "persistence", "learning rate": "", "updates": "", "seconds": ""}
    rows = [row | evaluate(lambda state: state, tests)]
    for name in args.rows:
        recipe, num_updates = Recipe(**ROWS[name]), 5
        if not args.quick:
            carry, update = make_training(recipe, start_key, num_updates=10)
            seconds = train_and_tabulate.seconds_per_update(update, carry, updates_key)
            num_updates = int(60 * args.minutes / seconds)
        for rate in rates:
            options = dict(num_updates=num_updates, learning_rate=rate)
            carry, update = make_training(recipe, start_key, **options)
            keys = jax.random.split(updates_key, num_updates)
            (stepper, *_), seconds = common.train(update, carry, keys)
            row = {"row": name, "learning rate": rate, "updates": num_updates}
            row |= {"seconds": round(seconds, 1), **evaluate(stepper, tests)}
            rows.append(row)
            tables.write_csv(folder / "ablation.csv", rows)
            print(name, rate, *(f"{row[column]:.4f}" for column in COLUMNS), flush=True)
    print("\n" + markdown(rows))
    tables.write_table(folder / "ablation.md", markdown(rows))


if __name__ == "__main__":
    main()
