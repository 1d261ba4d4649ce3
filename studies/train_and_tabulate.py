"""The studies share these functions: training on states from a replay buffer, computation in
float64, and tables with medians over seeds."""

import contextlib
import statistics
import time

import equinox as eqx
import jax
import jax.numpy as jnp
from replay_buffer import diverged, put_back, sample

from benchmarks import machine, tables
from residuum import residuum_loss


def num_parameters(stepper):
    return sum(x.size for x in jax.tree.leaves(eqx.filter(stepper, eqx.is_array)))


@contextlib.contextmanager
def float64():
    """Lets JAX compute in float64 inside the context. Training and the emulators stay in
    float32 outside of it."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


#
# Training
#


def on_replayed_states(
    residuum_fn, initial_conditions, *, batch_size, fresh_share, bound, **options
):
    """Returns, for `minimise`, the residual loss of states from a replay buffer, with `options`
    of `residuum_loss`. Final states go back into the buffer. Diverged states, and a random
    share of the others, are replaced by fresh `initial_conditions(num_samples, key)`. The share
    is a number, or one number for each place in the buffer."""

    def loss_fn(stepper, buffer, key):
        sample_key, replay_key, states_key = jax.random.split(key, 3)
        samples, states = sample(buffer, batch_size, sample_key)
        data = states[:, None]  # [batch, num_snapshots, ...]
        loss, rollout = residuum_loss(stepper, data, residuum_fn, has_aux=True, **options)
        buffer = put_back(
            buffer,
            samples,
            rollout.final_state,
            fresh=initial_conditions(batch_size, states_key),
            lost=diverged(rollout.final_state, bound),
            share=jnp.broadcast_to(fresh_share, len(buffer))[samples],
            key=replay_key,
        )
        return loss, buffer

    return loss_fn


def seconds_per_update(update, carry, key, num_updates=10):
    """Measures the seconds of `carry, loss = update(carry, key)`, without compilation."""
    carry, loss = update(carry, key)
    loss.block_until_ready()
    start = time.perf_counter()
    for _ in range(num_updates):
        carry, loss = update(carry, key)
    loss.block_until_ready()
    return (time.perf_counter() - start) / num_updates


#
# Rows of CSV files, `{"model": name, "seed": seed, column: number}`, and tables from them
#


def training_columns(emulator, updates, seconds):
    """Returns the columns of a row that describe training. They are empty if nothing was
    trained, i.e., if `emulator=None`."""
    if emulator is None:
        return dict.fromkeys(("parameters", "updates", "seconds", "machine"), "")
    return {
        "parameters": num_parameters(emulator),
        "updates": updates,
        "seconds": f"{seconds:.1f}",
        "machine": machine.describe("one core"),
    }


def over_seeds(values):
    """Returns median, least and most."""
    return statistics.median(values), min(values), max(values)


def medians(rows, column):
    """Returns `{model: (median, least, most)}` over seeds, for models that have the column."""
    values = {}
    for row in rows:
        if row[column] != "":
            values.setdefault(row["model"], []).append(float(row[column]))
    return {model: over_seeds(x) for model, x in values.items()}


def markdown(rows, columns):
    """Makes a table with the medians over seeds, and with least and most below them. The
    columns are `{heading: (name in the rows, format)}`."""
    scores = {heading: medians(rows, column) for heading, (column, _) in columns.items()}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        median, ranges = [model], ["*least, most*"]
        for heading, (_, form) in columns.items():
            middle, least, most = scores[heading].get(model, ("", "", ""))
            median.append("" if middle == "" else form.format(middle))
            same = least == most
            ranges.append("" if same else f"{form.format(least)}, {form.format(most)}")
        lines += [median, ranges] if any(ranges[1:]) else [median]
    return tables.markdown(["", *columns], lines)


def write(folder, rows, columns, name=""):
    """Prints a table of rows, and writes the rows and the table. The files are `rows.csv` and
    `table.md`, or `{name}.csv` and `{name}.md`."""
    table = markdown(rows, columns)
    print(f"\n{table}")
    tables.write_csv(folder / f"{name or 'rows'}.csv", rows)
    tables.write_table(folder / f"{name or 'table'}.md", table)
