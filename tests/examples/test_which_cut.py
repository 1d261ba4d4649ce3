"""Whatever studies/which_cut treats as the same program has the same gradient in everything
that it compares. Its error measure, its table and its figure are tested as well."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from benchmarks.tables import read_csv, write_csv
from studies.which_cut import draw, run as which_cut
from test_residuum import assert_close, evaluate, problem, residuum_loss
from tests.common import num_pixels, read_picture, ROOT, run_module, slow


@functools.cache
def gradients(num_rollout_steps):
    """Returns the gradient for every cut, with respect to the parameters and everything that
    the residual closes over."""
    params, data, weights, coefficient = problem(num_rollout_steps)

    def loss(inputs, cuts):
        args = (inputs, data, weights, coefficient)
        options = dict(num_rollout_steps=num_rollout_steps, cuts=cuts)
        return evaluate(residuum_loss, *args, **options)

    @jax.jit
    def all_of_them(params):
        return {name: jax.grad(loss)(params, cuts) for name, cuts in which_cut.CUTS.items()}

    return all_of_them(params)


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.max(jnp.abs(x - y))) for x, y in pairs)


STEPS = pytest.mark.parametrize("num_rollout_steps", which_cut.NUM_STEPS)


@STEPS
def test_what_counts_as_the_same_program_has_the_same_gradient(num_rollout_steps):
    grads = gradients(num_rollout_steps)
    for cut, grad in grads.items():
        same = which_cut.same_program(cut, num_rollout_steps)
        expected = jax.tree.map(jnp.zeros_like, grad) if same is None else grads[same]
        assert_close(grad, expected, what=(cut, same))


@STEPS
def test_programs_that_are_trained_have_different_gradients(num_rollout_steps):
    grads = gradients(num_rollout_steps)
    trained = [
        cut for cut in which_cut.CUTS if which_cut.same_program(cut, num_rollout_steps) == cut
    ]
    assert len(trained) == {1: 1, 2: 4, 4: 5, 8: 6, 16: 6}[num_rollout_steps]
    for one, other in itertools.combinations(trained, 2):
        assert distance(grads[one], grads[other]) > 1e-3, (one, other)


def test_all_cuts_and_lengths_are_trained_or_equal_to_one_that_is():
    cases = which_cut.select_cases(tuple(which_cut.PROBLEMS), which_cut.NUM_STEPS, (0, 1), 1.0)
    assert len(cases) == len(set(cases)) == 22 * 3 * 2
    trained = {(cut, num_steps) for _, cut, num_steps, _, _ in cases}
    for cut, num_steps in itertools.product(which_cut.CUTS, which_cut.NUM_STEPS):
        same = which_cut.same_program(cut, num_steps)
        assert (same, num_steps) in trained or (cut, num_steps) == ("next", 1)


@slow
def test_quick_mode_measures(tmp_path):
    options = ("--quick", "--workers", "1", "--output", str(tmp_path))
    run_module("studies.which_cut.run", *options, cwd=tmp_path)
    rows = read_csv(tmp_path / "rows.csv")
    assert len(rows) == 5
    for row in rows:
        assert int(row["updates"]) >= 1
        assert float(row["loss"]) > 0 and float(row["seconds"]) > 0
    # All were trained in the same way with the same seed, so they began with the same states
    # and parameters.
    assert len({row["error"] for row in rows}) == 5


def made_up_rows():
    for case in which_cut.select_cases(("Burgers", "Lorenz"), (1, 2, 4), (0, 1, 2), 1.0):
        name, cut, num_steps, seed, seconds = case
        error = {0: 0.01, 1: 0.02, 2: 0.5}[seed] / num_steps
        if (name, cut) == ("Burgers", "next"):
            error = [0.1, float("nan"), 1e9][seed]  # the median is infinite
        if (name, cut) == ("Lorenz", "prev"):
            error = [0.001, 0.001, float("inf")][seed]  # the median is finite
        key = dict(problem=name, cut=cut, num_rollout_steps=num_steps, seed=seed)
        yield key | dict(error=error, loss=1.0, updates=100 // num_steps, seconds=seconds)


def test_a_table_and_a_figure_are_made_from_the_rows(tmp_path):
    write_csv(tmp_path / "rows.csv", list(made_up_rows()))
    options = ("--input", str(tmp_path), "--output", str(tmp_path))
    output = run_module("studies.which_cut.draw", *options, cwd=tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert all(line in output for line in lines[1:])
    burgers, lorenz = (
        lines[i : i + 9]
        for i in (lines.index(f"| {name} | T = 1 | 2 | 4 |") for name in ("Burgers", "Lorenz"))
    )
    assert burgers[2] == "| `Cuts()` | 0.020 | 0.010 | **0.0050** |"
    assert burgers[3] == "| `Cuts(bptt=4)` | 0.020 | 0.010 | **0.0050** |"
    assert burgers[7] == "| `Cuts(next=True)` | no gradient | diverged | diverged |"
    assert burgers[8] == "| *updates* | 100 | 50 | 25 |"
    assert lorenz[6] == "| `Cuts(prev=True)` | 0.020 | **0.0010** | **0.0010** |"
    picture = read_picture(tmp_path / "which_cut.png")
    for cut, style in draw.STYLES.items():
        assert num_pixels(picture, style["color"]) > 0, cut


@pytest.mark.parametrize(
    "study, name, column, digits",
    [
        ("gray_scott", "Gray–Scott", "patterns, u and v, 50", ".3f"),
        ("ar_densed_burgers", "AR-DenseED, Burgers", "mse_0.25", ".1e"),
        ("ar_densed_kuramoto_sivashinsky", "AR-DenseED, Kuramoto–Sivashinsky", "mse_10", ".1e"),
        ("shallow_water", "Shallow water", "finite", ".0f"),
    ],
)
def test_the_documentation_has_the_cuts_of_the_ablations(study, name, column, digits):
    """docs/cuts.md has the results of the ablations for training on four-step rollouts, each
    with the better of several learning rates."""
    rows = read_csv(ROOT / "studies" / study / "ablation.csv")
    # The recipe for Kuramoto–Sivashinsky already trains on four-step rollouts.
    four = "nothing" if study == "ar_densed_kuramoto_sivashinsky" else "4 steps"
    cells = []
    for model in (four, "4 steps, `bptt=1`"):
        best = min(float(row[column]) for row in rows if model in row.values())
        cells.append(f"{best:{digits}}".replace("e-0", "e-"))
    lines = (ROOT / "docs" / "cuts.md").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"| [{name}]")]
    assert line.endswith(f" | {cells[0]} | {cells[1]} |")
