"""Studies and benchmarks run in quick mode, and write the rows, tables and figures that the
documentation shows. They share benchmarks/tables.py and benchmarks/machine.py, which are tested
here as well."""

import re

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from benchmarks import machine, tables
from benchmarks.accelerators import draw as accelerators
from benchmarks.convolutions_on_cpu import run as convolutions_on_cpu
from benchmarks.rollout_cost import (
    baselines,
    draw as rollout_cost_figure,
    networks,
    run as rollout_cost,
)
from benchmarks.tables import read_csv
from benchmarks.tiny_networks import run as tiny_networks
from studies import train_and_tabulate
from studies.ar_densed_burgers import run as ar_densed_burgers
from studies.ar_densed_kuramoto_sivashinsky import run as ar_densed_kuramoto_sivashinsky
from studies.burgers_2d import run as burgers_2d
from studies.chemistry import run as chemistry
from studies.error_estimate import first_guess, run as error_estimate
from studies.gray_scott import run as gray_scott
from studies.plate import run as plate, small_meshes
from studies.shallow_water import run as shallow_water
from studies.superiority import run as superiority
from studies.which_cut import draw as which_cut
from studies.work_precision import run as work_precision
from tests.common import ROOT, run_module, slow


STUDIES, BENCHMARKS = ROOT / "studies", ROOT / "benchmarks"
ROWS = sorted([*STUDIES.rglob("*.csv"), *BENCHMARKS.rglob("*.csv")])


def name_of(path):
    return f"{path.parent.name}, {path.stem}"


#
# Rows, tables, the machine
#


@pytest.mark.parametrize("path", ROWS, ids=name_of)
def test_rows_that_are_read_and_written_again_have_the_same_bytes(path, tmp_path):
    tables.write_csv(tmp_path / "rows.csv", read_csv(path))
    assert (tmp_path / "rows.csv").read_bytes() == path.read_bytes()


def test_rows_have_all_columns_even_where_some_are_lacking(tmp_path):
    tables.write_csv(tmp_path / "rows.csv", [dict(b=1), dict(a="x, y", b=2)], ["a", "b"])
    assert read_csv(tmp_path / "rows.csv") == [dict(a="", b="1"), dict(a="x, y", b="2")]


def test_a_table_takes_the_place_of_the_old_one_below_the_text(tmp_path):
    path = tmp_path / "table.md"
    path.write_text("# Title\n\nText.\n\n| old |\n| --- |\n")
    tables.write_table(path, tables.markdown(["new", "x"], [["a", 1]]))
    assert path.read_text() == "# Title\n\nText.\n\n| new | x |\n| --- | ---: |\n| a | 1 |\n"


@pytest.mark.parametrize(
    "options, in_the_project", [("", True), ("--quick", False), ("--output new/folder", False)]
)
def test_a_quick_run_writes_nothing_into_the_project(
    options, in_the_project, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    args = tables.make_parser("", quick="").parse_args(options.split())
    folders = tables.output_folders(args, which_cut.__file__)
    expected = (STUDIES / "which_cut", ROOT / "assets")
    assert (folders == expected) == in_the_project
    assert all(folder.is_dir() for folder in folders)


def test_numbers_have_three_digits_and_a_prefix():
    numbers = {0.00153: "1.53 ms", 0.9996: "1 s", 2e-7: "0.2 µs", 20: "20 s", 4.5e12: "4.5 Ts"}
    assert {x: tables.with_prefix(x, "s") for x in numbers} == numbers


def test_a_machine_has_a_processor_and_versions():
    processor, *cores, of_jax, of_pytest = machine.describe("2 cores", pytest).split(", ")
    assert processor
    assert cores == (["2 cores"] if jax.default_backend() == "cpu" else [])
    assert of_jax == f"jax {jax.__version__}" and of_pytest == f"pytest {pytest.__version__}"


#
# The tables that the documentation shows are made from the rows
#

with_seeds = train_and_tabulate.markdown
TABLES = {  # Markdown file: rows, and the function that makes the table from them
    "studies/ar_densed_burgers/table": ("rows", with_seeds, ar_densed_burgers.COLUMNS),
    "studies/ar_densed_burgers/ablation": (
        "ablation",
        with_seeds,
        ar_densed_burgers.ABLATION_COLUMNS,
    ),
    "studies/ar_densed_kuramoto_sivashinsky/table": (
        "rows",
        with_seeds,
        ar_densed_kuramoto_sivashinsky.COLUMNS,
    ),
    "studies/ar_densed_kuramoto_sivashinsky/ablation": (
        "ablation",
        with_seeds,
        ar_densed_kuramoto_sivashinsky.ABLATION_COLUMNS,
    ),
    "studies/superiority/table": ("rows", with_seeds, superiority.COLUMNS),
    "studies/shallow_water/ablation": ("ablation", with_seeds, shallow_water.ABLATION_COLUMNS),
    **{
        f"studies/shallow_water/{name}": ("rows", with_seeds, columns)
        for name, columns in shallow_water.TABLES.items()
    },
    "studies/gray_scott/ablation": ("ablation", gray_scott.markdown),
    "studies/error_estimate/table": ("rows", error_estimate.markdown),
    "studies/error_estimate/first_guess": ("first_guess", first_guess.markdown),
    "studies/burgers_2d/table": ("rows", with_seeds, burgers_2d.COLUMNS),
    "studies/burgers_2d/ablation": ("ablation", with_seeds, burgers_2d.ABLATION_COLUMNS),
    "studies/chemistry/table": ("rows", with_seeds, chemistry.ERRORS | chemistry.OTHER),
    "studies/chemistry/work": ("work", chemistry.work_table),
    "studies/plate/small_meshes": ("small_meshes", with_seeds, small_meshes.COLUMNS),
    "studies/work_precision/table": ("rows", work_precision.markdown),
    "studies/plate/table": ("rows", plate.markdown),
    "studies/which_cut/table": ("rows", which_cut.markdown),
    "benchmarks/convolutions_on_cpu/table": ("rows", convolutions_on_cpu.markdown),
    "benchmarks/rollout_cost/table": (
        "rows",
        lambda rows: rollout_cost_figure.all_tables(rollout_cost_figure.as_numbers(rows)),
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_documentation_is_that_of_its_rows(name):
    path = ROOT / f"{name}.md"
    stem, markdown, *columns = TABLES[name]
    rows = read_csv(path.with_name(f"{stem}.csv"))
    shown = [line for line in path.read_text().splitlines() if line.startswith("|")]
    table = markdown(rows, *columns).splitlines()
    assert shown == [line for line in table if line] and len(shown) > 4


#
# The studies
#


def run_quickly(name, folder, *arguments, figure=True):
    """Runs a program, checks that it draws its figure if it has one, and returns the lines that
    it prints."""
    options = ("--quick", "--output", str(folder), *arguments)
    lines = run_module(name, *options, cwd=folder).splitlines()
    if figure:
        [path] = folder.glob("*.png")
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
        assert f"Figure: {path}" in lines
        path.unlink()
    return lines


def cells(lines, name):
    """Returns the numbers in the row of that name."""
    (row,) = [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]
    return [float(x) for x in re.findall(r"\d+(?:\.\d+)?(?:e[+-]\d+)?", row)]


@slow
def test_ar_densed_kuramoto_sivashinsky(tmp_path):
    ks = ar_densed_kuramoto_sivashinsky
    lines = run_quickly(ks.__name__, tmp_path)
    rows = read_csv(tmp_path / "rows.csv")
    models = ["persistence", ks.PUBLISHED, *ks.MODELS, ks.EXACT, "solver"]
    assert [row["model"] for row in rows] == models
    errors = {row["model"]: float(row["mse_1"]) for row in rows[:-1]}
    assert errors[ks.EXACT] < 1e-5 < errors[ks.PUBLISHED] < min(errors[m] for m in ks.MODELS)
    assert min(errors, key=errors.get) == ks.EXACT
    assert float(rows[-1]["std"]) == pytest.approx(1.31, rel=0.05)
    assert with_seeds(rows, ks.COLUMNS) in "\n".join(lines)
    assert with_seeds(rows, ks.COLUMNS) in (tmp_path / "table.md").read_text()

    run_quickly(ks.__name__, tmp_path, "--ablation", figure=False)
    assert [row["model"] for row in read_csv(tmp_path / "ablation.csv")] == list(ks.ABLATION)[
        :2
    ]


@slow
def test_ar_densed_burgers(tmp_path):
    study = ar_densed_burgers
    run_quickly(study.__name__, tmp_path, "--seed", "0", "1")
    rows = read_csv(tmp_path / "rows.csv")
    ours = 2 * [study.OURS]
    exact = list(study.EXACT)
    assert [row["model"] for row in rows] == ["persistence", "AR-DenseED", *ours, *exact]
    assert rows[1]["mse_0.25"] == "0.0499"
    errors = {row["model"]: float(row["mse_0.5"]) for row in rows}
    published, crank_nicolson, hermite, *moving = (errors[model] for model in exact)
    assert hermite < crank_nicolson / 100 < published / 100 < errors["persistence"]
    assert moving[0] < crank_nicolson and moving[1] < hermite
    assert len(read_csv(tmp_path / "error.csv")) == study.TEST_STEPS + 1

    run_quickly(study.__name__, tmp_path, "--ablation", figure=False)
    rows = read_csv(tmp_path / "ablation.csv")
    assert [row["model"] for row in rows] == list(study.ABLATION)[:2]


@slow
def test_superiority(tmp_path):
    run_quickly(superiority.__name__, tmp_path, "--seed", "0", "1")
    rows = read_csv(tmp_path / "rows.csv")
    models = [superiority.RESIDUAL, *superiority.DATA]
    found = [row["model"] for row in rows]
    assert all(found.count(model) == 2 for model in models)
    [paper] = [row for row in rows if row["model"] in superiority.PUBLISHED]
    assert (paper["superiority_1"], paper["superiority_10"]) == ("1", "1.14")
    [exact] = [row for row in rows if row["model"].startswith("exact step")]
    assert float(exact["superiority_largest"]) < 1e-3


@slow
def test_shallow_water(tmp_path):
    lines = run_quickly(shallow_water.__name__, tmp_path, "--seed", "0", "1")
    rows = read_csv(tmp_path / "rows.csv")
    ours, models = 2 * [shallow_water.OURS], list(shallow_water.OTHERS)[1:]
    assert [row["model"] for row in rows] == [*models, *ours]
    errors = {row["model"]: float(row["refined_10"]) for row in rows}
    runge_kutta, persistence = errors["Runge–Kutta, dt / 16"], errors["persistence"]
    assert 100 * runge_kutta < errors[shallow_water.EXACT] < persistence / 20
    animation = tmp_path / "shallow_water_study.gif"
    assert f"Animation: {animation}" in lines
    assert animation.read_bytes().startswith(b"GIF8")
    assert all((tmp_path / f"{name}.md").exists() for name in shallow_water.TABLES)

    run_quickly(shallow_water.__name__, tmp_path, "--ablation", figure=False)
    rows = read_csv(tmp_path / "ablation.csv")
    assert [row["model"] for row in rows][1:] == list(shallow_water.ABLATION)[:2]


@slow
def test_error_estimate(tmp_path):
    run_quickly(error_estimate.__name__, tmp_path, figure=False)
    rows = read_csv(tmp_path / "rows.csv")
    assert [row["step"] for row in rows] == 3 * ["1", "10", "all"]
    for row in rows[::3]:  # even a poor emulator is as wrong as the estimate says
        assert float(row["least, below 0.2"]) == pytest.approx(1, abs=0.02)
        assert float(row["largest, below 0.2"]) == pytest.approx(1, abs=0.02)
    bad = read_csv(tmp_path / "bad.csv")
    assert [row["emulator"] for row in bad][2:] == ["walls, 50 updates", "viscosity × 10"]
    assert all(row["above 0.3"] == row["estimated in time"] for row in bad)
    assert int(bad[0]["above 0.3"]) == int(bad[0]["samples"])
    assert all(row["above 0.3"] == row["warned in time"] for row in bad)
    assert all(row["false warnings"] == "0" for row in bad)


@slow
def test_burgers_2d(tmp_path):
    run_quickly(burgers_2d.__name__, tmp_path, "--seed", "0", "1", figure=False)
    rows = read_csv(tmp_path / "rows.csv")
    assert [row["model"] for row in rows] == ["persistence", "exact step", *2 * ["residuum"]]
    errors = [float(row["finer_10"]) for row in rows]
    assert errors[1] < 1e-3 < max(errors[2:]) < errors[0]
    for row in rows[2:]:  # even a poor emulator is as wrong as the estimate says
        assert float(row["estimate_least"]) == pytest.approx(1, abs=0.05)
        assert float(row["estimate_largest"]) == pytest.approx(1, abs=0.05)

    run_quickly(burgers_2d.__name__, tmp_path, "--ablation", figure=False)
    rows = read_csv(tmp_path / "ablation.csv")
    assert [row["model"] for row in rows] == list(burgers_2d.ABLATION)[:2]


@slow
def test_work_precision(tmp_path):
    run_quickly(work_precision.__name__, tmp_path)
    rows = read_csv(tmp_path / "rows.csv")
    of = {(row["family"], row["variant"]): float(row["error"]) for row in rows}
    families = {family for family, _ in of}
    assert families == set(work_precision.STYLES)
    resolved = of["explicit Runge–Kutta", "8 substeps"]
    assert resolved < 1e-4 < of["exponential Runge–Kutta", "order 2, 1 substeps"] < 2e-3
    guess = [
        of[f"implicit, from {x}", "2 iterations"] for x in ("persistence", "extrapolation")
    ]
    assert guess[1] < guess[0] < 1e-3
    # A correction makes even a bad emulator good.
    corrected = of["emulator, corrected", "Newton, 4 GMRES"]
    assert corrected < 1e-2 < of["emulator", ""]
    assert all(float(row[f"us_{n}"]) > 0 for row in rows for n in work_precision.BATCHES)


def test_no_row_beats_the_pareto_front():
    rows = read_csv(STUDIES / "work_precision" / "rows.csv")
    for name in {row["problem"] for row in rows}:
        for column in ("us_1", "us_64"):
            of_problem = [row for row in rows if row["problem"] == name]
            front = work_precision.pareto(of_problem, column)
            value = lambda row, column=column: (float(row[column]), float(row["error"]))
            for row in of_problem:
                time, error = value(row)
                is_beaten = any(t <= time and e <= error for t, e in map(value, front))
                assert is_beaten, row
            assert sorted(map(value, front)) == [value(row) for row in front]


@slow
def test_plate(tmp_path):
    run_quickly(plate.__name__, tmp_path, figure=False)
    rows = read_csv(tmp_path / "rows.csv")
    of = {row["family"]: float(row["error_last"]) for row in rows}
    assert of["fixed LU"] < of["fixed multigrid cycle (JAX)"] < 0.01
    for name in ("CG, LU", "CG, multigrid (JAX)", "CG, diagonal (JAX)"):
        assert of[name] < 1e-3
    assert of["emulator"] < of["persistence"]
    table = plate.markdown(rows)
    assert "| emulator, trained on" in table and "| floor, " in table
    assert all(float(row["ms"]) > 0 for row in rows if row["family"] != plate.FLOOR)


@slow
def test_first_guess(tmp_path):
    run_quickly(first_guess.__name__, tmp_path, figure=False)
    rows = read_csv(tmp_path / "first_guess.csv")
    assert [row["first guess"] for row in rows] == ["persistence", "extrapolation", "emulator"]
    persistence, extrapolation, _ = (float(row["iterations"]) for row in rows)
    assert 1 < extrapolation < persistence < 20


@slow
def test_conditioning(tmp_path):
    lines = run_quickly("studies.conditioning.run", tmp_path, "--seed", "0", "1")
    rows = [cells(lines, f"{num_points} points") for num_points in (16, 32, 64)]
    assert [condition for condition, *_ in rows] == [11, 42, 165]
    for _, *medians in rows:
        residual, preconditioned = medians
        assert 0 < preconditioned < residual < 1

    written = read_csv(tmp_path / "rows.csv")
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
        for row in read_csv(STUDIES / "conditioning" / "rows.csv")
        if (row["trained_on"], row["seed"]) == ("residual", "0")
    ]
    assert [row["num_points"] for row in rows] == ["16", "32", "64"]
    for row in rows:
        first, last = (f"{float(row[f'error_{when}']):.1g}" for when in ("first", "last"))
        assert f"{first} to {last}".replace("e-0", "e-") in page
        assert f" {row['condition_number']}" in page


def test_the_documentation_has_the_rows_of_checkpointed_segments():
    rows = read_csv(BENCHMARKS / "rollout_cost" / "checkpointed_segments.csv")
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
    network = networks.MLP(jax.random.key(0), width=8, depth=1)
    params, static = eqx.partition(network, eqx.is_array)
    data = jax.random.normal(jax.random.key(1), (2, 1, 1, networks.NUM_POINTS))
    results = {}
    for name, (loss, _) in baselines.select_baselines("MLP", cut, 7, "gradient").items():
        of_params = lambda params, loss=loss: loss(
            eqx.combine(params, static), data, networks.heat_residuum, 7, rollout_cost.CUTS[cut]
        )
        results[name] = jax.jit(jax.value_and_grad(of_params))(params)
    assert {"residuum", "trainax", "scan", "segments", "equinox"} <= set(results)
    chex.assert_trees_all_close(*results.values(), rtol=1e-9)


def test_rows_of_rollout_cost_take_the_place_of_old_ones_of_the_same_case_and_baseline():
    old = read_csv(BENCHMARKS / "rollout_cost" / "rows.csv")
    replaced = old[0] | dict(num_rollout_steps=1, run_s=1.0)
    added = replaced | dict(baseline="another")
    end = sum(all(row[x] == old[0][x] for x in rollout_cost.CASE) for row in old)
    expected = [replaced, *old[1:end], added, *old[end:]]
    assert rollout_cost.merge(old, [added, replaced]) == expected


@slow
def test_tiny_networks(tmp_path):
    lines = run_quickly(tiny_networks.__name__, tmp_path, "--rounds", "3", figure=False)
    for line, row in zip(lines, read_csv(tmp_path / "rows.csv"), strict=True):
        ratio = float(row["residuum_s"]) / float(row["scan_s"])
        assert line.startswith(f"3 20 {row['bptt']} {ratio:.2f} ")


def test_the_three_ways_of_tiny_networks_have_the_same_gradient():
    params = {"in": jnp.linspace(-1, 1, 6).reshape(2, 3), "out": jnp.ones((3, 2))}
    data = jnp.linspace(0, 1, 3)[None, None]
    grads = [
        jax.grad(tiny_networks.loss_in, argnums=1)(way, params, data, num_steps=5, bptt=2)
        for way in tiny_networks.ways(bptt=2).values()
    ]
    chex.assert_trees_all_close(*grads, rtol=1e-9)


def test_the_documentation_has_the_ratios_of_tiny_networks():
    page = (ROOT / "docs" / "cost.md").read_text()
    rows = read_csv(BENCHMARKS / "tiny_networks" / "rows.csv")
    ratio = lambda row: float(row["residuum_s"]) / float(row["scan_s"])
    smallest = max(ratio(row) for row in rows if row["size"] == "3")
    others = max(ratio(row) for row in rows if row["size"] != "3")
    assert f"{smallest:.1f} times faster for a state of 3 numbers" in page
    assert f"{others:.1f} times for 8 to 32" in page


@slow
def test_convolutions_on_cpu(tmp_path):
    lines = run_quickly(convolutions_on_cpu.__name__, tmp_path)
    rows = read_csv(tmp_path / "rows.csv")
    assert len(rows) == 3 * 3
    for row in rows:
        assert all(float(row[name]) > 0 for name in ("compile_s", "temp_bytes", "run_s"))
        assert 0 <= float(row["difference"]) < 1e-5
    assert convolutions_on_cpu.markdown(rows) in "\n".join(lines)


def test_accelerators_are_drawn_from_the_rows():
    figure = accelerators.draw(read_csv(BENCHMARKS / "accelerators" / "rows.csv"), "H100:1")
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["MLP", "2D convolutions, 256²", "2D FNO, 256²", "3D convolutions, 128³"]
    assert all(len(axis.lines) > len(accelerators.LINES) for axis in figure.axes)
