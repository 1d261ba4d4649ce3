"""The studies in benchmarks/ run in quick mode, and they print and draw what the documentation
takes from them. What they have in common is benchmarks/study.py."""

import re
from functools import partial

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import study
from study import read_csv

from test_residuum import slow
from tests.common import ROOT
from tests.examples.test_examples import run_example


#
# What the studies share
#


TABLES = sorted((ROOT / "benchmarks").glob("*.csv"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_a_table_that_is_read_and_written_again_has_the_same_bytes(path, tmp_path):
    study.write_csv(tmp_path / "table.csv", read_csv(path))
    assert (tmp_path / "table.csv").read_bytes() == path.read_bytes()


def test_a_table_has_all_columns_even_where_rows_lack_some(tmp_path):
    path = tmp_path / "new folder" / "table.csv"
    study.write_csv(path, [dict(b=1), dict(a="x, y", b=2)], ["a", "b"])
    assert read_csv(path) == [dict(a="", b="1"), dict(a="x, y", b="2")]


def test_numbers_have_three_digits_and_a_prefix():
    numbers = {0.00153: "1.53 ms", 0.9996: "1 s", 2e-7: "0.2 µs", 20: "20 s", 4.5e12: "4.5 Ts"}
    assert {x: study.with_prefix(x, "s") for x in numbers} == numbers


def test_a_machine_has_a_processor_and_versions():
    processor, *cores, of_jax, of_pytest = study.machine("2 cores", pytest).split(", ")
    assert processor
    assert cores == (["2 cores"] if jax.default_backend() == "cpu" else [])
    assert of_jax == f"jax {jax.__version__}" and of_pytest == f"pytest {pytest.__version__}"


#
# The studies
#


def run_study(name, folder, *arguments, figure=True):
    """Returns the lines that it prints, once it has drawn its figure, if it has one."""
    path = folder / "figure.png"
    options = ("--quick", "--output", str(path), *arguments)
    lines = run_example(ROOT / "benchmarks" / name, *options, cwd=folder).splitlines()
    if not figure:
        return lines
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert f"Figure: {path}" in lines
    return lines


def cells(lines, name):
    """The numbers in the row of that name."""
    (row,) = [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]
    return [float(x) for x in re.findall(r"\d+(?:\.\d+)?(?:e[+-]\d+)?", row)]


@slow
def test_published_kuramoto_sivashinsky(tmp_path):
    import published_kuramoto_sivashinsky as ks

    csv = tmp_path / "scores.csv"
    lines = run_study("published_kuramoto_sivashinsky", tmp_path, "--csv", str(csv))
    rows = read_csv(csv)
    models = ["persistence", ks.PUBLISHED, *ks.MODELS, ks.EXACT, "solver"]
    assert [row["model"] for row in rows] == models
    errors = {row["model"]: float(row["mse_1"]) for row in rows[:-1]}
    assert errors[ks.EXACT] < 1e-5 < errors[ks.PUBLISHED] < min(errors[m] for m in ks.MODELS)
    assert min(errors, key=errors.get) == ks.EXACT
    assert float(rows[-1]["std"]) == pytest.approx(1.31, rel=0.05)
    assert ks.published.markdown(rows, ks.COLUMNS) in "\n".join(lines)

    arguments = ("--ablation", "--csv", str(csv))
    lines = run_study("published_kuramoto_sivashinsky", tmp_path, *arguments, figure=False)
    assert [row["model"] for row in read_csv(csv)] == list(ks.ABLATION)[:2]


@slow
def test_published_burgers(tmp_path):
    import published_burgers

    csv = tmp_path / "scores.csv"
    lines = run_study("published_burgers", tmp_path, "--seed", "0", "1", "--csv", str(csv))
    rows = read_csv(csv)
    ours = 2 * [published_burgers.OURS]
    exact = list(published_burgers.EXACT)
    assert [row["model"] for row in rows] == ["persistence", "AR-DenseED", *ours, *exact]
    assert rows[1]["mse_0.25"] == "0.0499"
    errors = {row["model"]: float(row["mse_0.5"]) for row in rows}
    published, crank_nicolson, hermite, *moving = (errors[model] for model in exact)
    assert hermite < crank_nicolson / 100 < published / 100 < errors["persistence"]
    assert moving[0] < crank_nicolson and moving[1] < hermite
    assert published_burgers.published.markdown(rows, published_burgers.COLUMNS) in "\n".join(
        lines
    )
    assert len(read_csv(tmp_path / "scores_error.csv")) == published_burgers.TEST_STEPS + 1

    lines = run_study("published_burgers", tmp_path, "--ablation", figure=False)
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")][2:] == [
        f"| {name}" for name in list(published_burgers.ABLATION)[:2]
    ]


@slow
def test_published_superiority(tmp_path):
    import published_superiority

    csv = tmp_path / "scores.csv"
    lines = run_study("published_superiority", tmp_path, "--seed", "0", "1", "--csv", str(csv))
    rows = read_csv(csv)
    models = [published_superiority.RESIDUAL, *published_superiority.DATA]
    found = [row["model"] for row in rows]
    assert all(found.count(model) == 2 for model in models)
    [paper] = [row for row in rows if row["model"] in published_superiority.PUBLISHED]
    assert (paper["superiority_1"], paper["superiority_10"]) == ("1", "1.14")
    [exact] = [row for row in rows if row["model"].startswith("exact step")]
    assert float(exact["superiority_largest"]) < 1e-3
    table = published_superiority.published.markdown(rows, published_superiority.COLUMNS)
    assert table in "\n".join(lines)


@slow
def test_shallow_water_study(tmp_path):
    import shallow_water_study

    csv = tmp_path / "scores.csv"
    lines = run_study("shallow_water_study", tmp_path, "--seed", "0", "1", "--csv", str(csv))
    rows = read_csv(csv)
    ours, models = 2 * [shallow_water_study.OURS], list(shallow_water_study.OTHERS)[1:]
    assert [row["model"] for row in rows] == [*models, *ours]
    errors = {row["model"]: float(row["refined_10"]) for row in rows}
    runge_kutta, persistence = errors["Runge–Kutta, dt / 16"], errors["persistence"]
    assert 100 * runge_kutta < errors[shallow_water_study.EXACT] < persistence / 20
    assert f"Animation: {tmp_path / 'figure.gif'}" in lines
    assert (tmp_path / "figure.gif").read_bytes().startswith(b"GIF8")
    assert (tmp_path / "scores_checks.md").exists()

    run_study("shallow_water_study", tmp_path, "--ablation", "--csv", str(csv), figure=False)
    assert [row["model"] for row in read_csv(csv)][1:] == list(shallow_water_study.ABLATION)[:2]


@slow
def test_conditioning(tmp_path):
    csv = tmp_path / "conditioning.csv"
    lines = run_study("conditioning", tmp_path, "--seed", "0", "1", "--csv", str(csv))
    rows = [cells(lines, f"{num_points} points") for num_points in (16, 32, 64)]
    assert [condition for condition, *_ in rows] == [11, 42, 165]
    for _, *medians in rows:
        residual, preconditioned = medians
        assert 0 < preconditioned < residual < 1

    written = read_csv(csv)
    assert [row["seed"] for row in written] == ["0", "1"] * 6
    for row in written:
        error, residual = (float(row[f"{name}_last"]) for name in ("error", "residual"))
        assert error < float(row["error_first"]) < 1
        assert error < residual < float(row["condition_number"]) ** 2 * error
    first, second = (float(row["error_last"]) for row in written[:2])
    assert rows[0][1] == pytest.approx((first + second) / 2, rel=0.05)


def test_the_documentation_has_the_errors_of_conditioning():
    page = (ROOT / "docs" / "diverted_chain.md").read_text()
    rows = [
        row
        for row in read_csv(ROOT / "benchmarks" / "conditioning.csv")
        if (row["trained_on"], row["seed"]) == ("residual", "0")
    ]
    assert [row["num_points"] for row in rows] == ["16", "32", "64"]
    for row in rows:
        first, last = (f"{float(row[f'error_{when}']):.1g}" for when in ("first", "last"))
        assert f"{first} to {last}".replace("e-0", "e-") in page
        assert f" {row['condition_number']}" in page


def test_the_documentation_has_the_tables_of_rollout_cost(tmp_path, monkeypatch, capsys):
    import draw

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["draw.py", "--output", str(tmp_path / "figure.png")])
    draw.main()
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    page = (ROOT / "benchmarks" / "rollout_cost.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("|")] == tables


def test_the_documentation_has_the_rows_of_checkpointed_segments():
    rows = read_csv(ROOT / "benchmarks" / "checkpointed_segments.csv")
    by_case = {
        (f"{row['network']}, {row['cut']}, {row['num_rollout_steps']}", row["baseline"]): row
        for row in rows
        if row["derivative"] == "gradient"
    }
    page = (ROOT / "docs" / "cost.md").read_text().split("## Checkpointed segments")[1]
    lines = [line for line in page.splitlines() if line.startswith("| ")][2:]
    assert len(lines) == 9
    for line in lines:
        case, *cells = line.strip("| ").split(" | ")
        names = ["residuum", "scan", "segments"]
        names = [f"{name}, canonical" if "conv" in case else name for name in names]
        ours, *others = [by_case[case, name] for name in names]
        megabytes = [float(row["temp_bytes"]) / 1e6 for row in (ours, *others)]
        megabytes = [f"{x:.0f}" if x >= 100 else f"{x:.3g}" for x in megabytes]
        ratios = [f"{float(row['run_s']) / float(ours['run_s']):.2f}" for row in others]
        assert cells == megabytes + ratios


@pytest.mark.parametrize("cut", ["no cut", "bptt=1", "bptt=5"])
def test_the_baselines_of_rollout_cost_have_the_same_loss_and_gradient(cut):
    import rollout_cost

    network = rollout_cost.MLP(jax.random.key(0), width=8, depth=1)
    params, static = eqx.partition(network, eqx.is_array)
    data = jax.random.normal(jax.random.key(1), (2, 1, 1, rollout_cost.NUM_POINTS))
    results = {}
    for name, (loss, _) in rollout_cost.select_baselines("MLP", cut, 7, "gradient").items():
        of_params = lambda params, loss=loss: loss(
            eqx.combine(params, static), data, 7, rollout_cost.CUTS[cut]
        )
        results[name] = jax.jit(jax.value_and_grad(of_params))(params)
    assert {"residuum", "trainax", "scan", "segments", "equinox"} <= set(results)
    chex.assert_trees_all_close(*results.values(), rtol=1e-9)


def test_rows_of_rollout_cost_take_the_place_of_old_ones_of_the_same_case_and_baseline():
    import rollout_cost

    old = read_csv(ROOT / "benchmarks" / "rollout_cost.csv")
    replaced = old[0] | dict(num_rollout_steps=1, run_s=1.0)
    added = replaced | dict(baseline="another")
    end = sum(all(row[x] == old[0][x] for x in rollout_cost.CASE) for row in old)
    expected = [replaced, *old[1:end], added, *old[end:]]
    assert rollout_cost.merge(old, [added, replaced]) == expected


@slow
def test_tiny_networks(tmp_path):
    csv = tmp_path / "tiny_networks.csv"
    options = ("--quick", "--rounds", "3", "--csv", str(csv))
    lines = run_example(ROOT / "benchmarks" / "tiny_networks", *options, cwd=tmp_path)
    rows = read_csv(csv)
    for line, row in zip(lines.splitlines(), rows, strict=True):
        ratio = float(row["residuum_s"]) / float(row["scan_s"])
        assert line.startswith(f"3 20 {row['bptt']} {ratio:.2f} ")


def test_the_three_ways_of_tiny_networks_have_the_same_gradient():
    import tiny_networks

    params = {"in": jnp.linspace(-1, 1, 6).reshape(2, 3), "out": jnp.ones((3, 2))}
    data = jnp.linspace(0, 1, 3)[None, None]
    unrolled = partial(tiny_networks.with_residuum, unroll=2)
    ways = tiny_networks.with_scan, tiny_networks.with_residuum, unrolled
    grads = [jax.grad(way)(params, data, num_steps=5, bptt=2) for way in ways]
    chex.assert_trees_all_close(*grads, rtol=1e-9)


def test_the_documentation_has_the_ratios_of_tiny_networks():
    page = (ROOT / "docs" / "cost.md").read_text()
    rows = read_csv(ROOT / "benchmarks" / "tiny_networks.csv")
    ratio = lambda row: float(row["residuum_s"]) / float(row["scan_s"])
    smallest = max(ratio(row) for row in rows if row["size"] == "3")
    others = max(ratio(row) for row in rows if row["size"] != "3")
    assert f"{smallest:.1f} times faster for a state of 3 numbers" in page
    assert f"{others:.1f} times for 8 to 32" in page


@slow
def test_convolutions_on_cpu(tmp_path):
    import convolutions_on_cpu

    csv = tmp_path / "convolutions.csv"
    lines = run_study("convolutions_on_cpu", tmp_path, "--csv", str(csv))
    rows = read_csv(csv)
    assert len(rows) == 3 * 3
    for row in rows:
        assert all(float(row[name]) > 0 for name in ("compile_s", "temp_bytes", "run_s"))
        assert 0 <= float(row["difference"]) < 1e-5
    assert convolutions_on_cpu.markdown(rows) in "\n".join(lines)


def test_the_documentation_has_the_table_of_convolutions_on_cpu():
    import convolutions_on_cpu

    path = ROOT / "benchmarks" / "convolutions_on_cpu.csv"
    table = convolutions_on_cpu.markdown(read_csv(path))
    assert table in path.with_suffix(".md").read_text()
