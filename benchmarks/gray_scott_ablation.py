"""What each item of the recipe of examples/gray_scott.py gains: one at a time is other.

All rows train for the same time, with two learning rates each, of which the table shows the
better one. Errors are those after 50 steps, from patterns and from the seeds that they grow
from, of unseen samples with unseen rates.

    python benchmarks/gray_scott_ablation.py             20 minutes on one core
    python benchmarks/gray_scott_ablation.py --quick     to see that it runs
"""

import argparse
import csv
import pathlib
import sys
import time

import jax
import jax.numpy as jnp


ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import gray_scott  # noqa: E402
from gray_scott import Recipe  # noqa: E402

from residuum import Cuts  # noqa: E402


ROWS: dict[str, dict] = {
    "the recipe": {},
    "fields not scaled": dict(scale_fields=False),
    "residua not scaled": dict(scale_residua=False),
    "the next state, not its change": dict(begin_at_identity=False),
    "not preconditioned": dict(precondition=False),
    "GELU, not products": dict(products=False),
    "4 steps": dict(num_rollout_steps=4),
    "4 steps, `bptt=1`": dict(num_rollout_steps=4, cuts=Cuts(bptt=1)),
    "no pool": dict(pool_size=0),
    "no pool, 16 steps, `bptt=1`": dict(pool_size=0, num_rollout_steps=16, cuts=Cuts(bptt=1)),
    "batches of 64, not 4": dict(batch_size=64),
    "none of it": dict(
        scale_fields=False,
        scale_residua=False,
        begin_at_identity=False,
        precondition=False,
        products=False,
        pool_size=0,
        batch_size=64,
    ),
}
LEARNING_RATES = (1e-2, 1e-3)
STEPS = (1, 10, 50, 100)


def seconds_per_update(recipe, key, num_updates=10):
    start, update = gray_scott.make_update(recipe, num_updates)
    *carry, loss = update(*start(key), key)  # compiles
    loss.block_until_ready()
    begin = time.perf_counter()
    for _ in range(num_updates):
        *carry, loss = update(*carry, key)
    loss.block_until_ready()
    return (time.perf_counter() - begin) / num_updates


def judge(stepper, tests):
    """Errors of the emulator by start, field and step; and for how many steps, of the first
    50, it is better than persistence in both fields."""
    row: dict[str, float] = {}
    for start, (states, reference, standing_still) in tests.items():
        trajectories = {
            "solver": reference,
            "persistence": standing_still,
            "emulator": gray_scott.rollout(stepper, states),
        }
        errors = gray_scott.judge(trajectories)
        for field in ("u and v", "v"):
            for step in STEPS:
                row[f"{start}, {field}, {step}"] = float(errors[field, "emulator"][step])
        better = [errors[x, "emulator"] < errors[x, "persistence"] for x in ("u", "v")]
        row[f"{start}, better"] = int(jnp.sum((better[0] & better[1])[1:51]))
    return row


def score(row):
    """By which the learning rate is chosen."""
    error = float(row["patterns, u and v, 50"]) + float(row["seeds, u and v, 50"])
    return error if error == error else float("inf")  # NaN


COLUMNS = {
    "patterns, u and v, 50": "patterns: u and v",
    "patterns, v, 50": "v",
    "seeds, u and v, 50": "seeds: u and v",
    "seeds, v, 50": "v",
}


def markdown(rows):
    """The table of the rows of the CSV file, the first of which is persistence."""
    titles = ["trained with", *COLUMNS.values(), "better for", "updates", "rate"]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for name in dict.fromkeys(row["row"] for row in rows):
        best = min((row for row in rows if row["row"] == name), key=score)
        errors = [float(best[column]) for column in COLUMNS]
        errors = [f"{x:.3f}" if x < 10 else "diverges" for x in errors]  # or NaN
        steps = min(int(best[f"{start}, better"]) for start in ("patterns", "seeds"))
        better = f"{steps} of 50"
        if name == "persistence":
            name, better = "*persistence*", ""
        lines.append([name, *errors, better, best["updates"], best["learning rate"]])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0.6, help="of training for each run")
    parser.add_argument("--rows", nargs="+", default=tuple(ROWS), choices=ROWS)
    parser.add_argument("--quick", action="store_true", help="one row, 5 updates, 4 samples")
    parser.add_argument("--table", action="store_true", help="of the file that is there")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("benchmarks/gray_scott_ablation.csv"),
    )
    args = parser.parse_args()
    if args.table:
        with args.output.open() as file:
            print(markdown(list(csv.DictReader(file))))
        return
    rates = LEARNING_RATES
    if args.quick:
        args.rows, rates = ("no pool",), LEARNING_RATES[:1]
    num_test = 4 if args.quick else gray_scott.NUM_TEST

    train_key, test_key = jax.random.split(jax.random.key(args.seed))
    standing_still = lambda state: state
    tests = {
        start: (
            states,
            *(gray_scott.rollout(s, states) for s in (gray_scott.solver, standing_still)),
        )
        for start, states in gray_scott.test_states(test_key, num_test).items()
    }
    persistence = {"row": "persistence", "learning rate": "", "updates": ""}
    rows = [persistence | {"seconds": ""} | judge(standing_still, tests)]
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerow(rows[0])
        for name in args.rows:
            recipe = Recipe(**ROWS[name])
            num_updates = 5
            if not args.quick:
                num_updates = int(60 * args.minutes / seconds_per_update(recipe, train_key))
            for rate in rates:
                begin = time.perf_counter()
                stepper = gray_scott.train(
                    recipe, num_updates=num_updates, key=train_key, learning_rate=rate
                )
                seconds = time.perf_counter() - begin
                row = {"row": name, "learning rate": rate, "updates": num_updates}
                row |= {"seconds": round(seconds, 1), **judge(stepper, tests)}
                writer.writerow(row)
                file.flush()
                rows.append(row)
                print(name, rate, *(f"{row[column]:.4f}" for column in COLUMNS), flush=True)
    print("\n" + markdown(rows))


if __name__ == "__main__":
    main()
