"""What the studies share: the problems of the examples, tables in CSV files, and seeds."""

import csv
import pathlib
import statistics
import sys
import time


ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))  # whose problems the studies train


def write_csv(path, rows):
    """Rows `[{column: value}]`, all with the same columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def markdown(columns, rows):
    """A table for the documentation: names on the left, numbers on the right."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def over_seeds(values):
    """Median, least and most."""
    return statistics.median(values), min(values), max(values)


def seconds_per_update(update, carry, key, num_updates=10):
    """Of `carry, loss = update(carry, key)`, without compilation."""
    carry, loss = update(carry, key)
    loss.block_until_ready()
    start = time.perf_counter()
    for _ in range(num_updates):
        carry, loss = update(carry, key)
    loss.block_until_ready()
    return (time.perf_counter() - start) / num_updates
