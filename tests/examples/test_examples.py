"""Every example runs in quick mode, prints the tables it promises, and draws its figure."""

import math
import os
import re
import subprocess
import sys
from typing import NamedTuple

import common
import cuts
import matplotlib.image
import pytest

from test_residuum import slow
from tests.common import ROOT


class Example(NamedTuple):
    rows: dict[str, str]  # of its tables; "*" for a number that depends on the training
    columns: str
    aspect: float  # width / height of the figure
    heading: str = "nRMSE after"  # of the table
    options: str = ""  # that make it quicker still


EXAMPLES = {
    "burgers": Example(
        {
            "persistence": "0.0981 0.8123 2.7413",
            "1 step": "* * * * s",
            "2 steps": "* * * * s",
            "4 steps, bptt=2": "* * * * s",
        },
        columns="step 1, step 10, step 50, trained in",
        aspect=11 / 3.4,
        options="--rollout-steps 2",
    ),
    "supervised": Example(
        {
            "Crank–Nicolson": "0.0020 0.0032 0.0005",
            "supervised": "* * * * s 3",
            "residual": "* * * * s 1",
        },
        columns="step 1, step 10, step 50, trained in, snapshots",
        aspect=6 / 3.4,
    ),
    "lorenz": Example(
        {"Runge–Kutta": "* * * *", "emulator": "* * * *"},
        columns="mean z, std x, std z, Lyapunov",
        aspect=11 / 3.6,
        heading="on the attractor",
    ),
    "kuramoto_sivashinsky_2d": Example(
        {"persistence": "* * * *", "emulator": "* * * *"},
        columns="step 1, step 10, step 50, step 100",
        aspect=13 / 3.3,
    ),
    "gray_scott": Example(
        {
            f"{fields}, {name}": "* * * *"
            for fields in ("u and v", "u", "v")
            for name in ("persistence", "emulator")
        },
        columns="step 1, step 10, step 50, step 100",
        aspect=13 / 3,
        heading="nRMSE from patterns",
    ),
}
NOT_PROGRAMS = {"canonical_convolutions", "common", "launcher"}


def run_example(name, *arguments, cwd):
    """In a process of its own, since examples set what JAX knows before it starts."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    environment.pop("XLA_FLAGS", None)  # with this process' number of virtual devices
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def read_table(output, heading):
    """The columns of the table with this heading, and its rows `{name: cells}`."""
    [table] = [part for part in output.split("\n\n") if part.strip().startswith(heading)]
    lines = [re.split(" {2,}", line.strip(), maxsplit=1) for line in table.strip().split("\n")]
    (_, columns), *rows = lines
    return re.split(" {2,}", columns), {name: cells.split() for name, cells in rows}


def agree(cell, expected):
    return cell == expected or (expected == "*" and math.isfinite(float(cell)))


@slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_prints_its_table_and_draws_its_figure(name, tmp_path):
    example = EXAMPLES[name]
    options = ("--quick", *example.options.split(), "--output", "figures/figure.png")
    output = run_example(name, *options, cwd=tmp_path)

    columns, rows = read_table(output, example.heading)
    assert columns == example.columns.split(", ")
    assert list(rows) == list(example.rows)
    for row, expected in example.rows.items():
        cells = zip(rows[row], expected.split(), strict=True)
        assert all(agree(*pair) for pair in cells), output

    figure = matplotlib.image.imread(tmp_path / "figures" / "figure.png")[..., :3]
    height, width, _ = figure.shape
    assert width / height == pytest.approx(example.aspect, rel=0.01)
    assert figure.std() > 0.05  # not blank
    assert (ROOT / "assets" / f"{name}.png").exists()


def test_every_example_is_tested():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {*EXAMPLES, *NOT_PROGRAMS, "cuts", "data_parallel"}


def test_options_have_defaults_and_others_for_a_quick_run(monkeypatch):
    def parse(command):
        monkeypatch.setattr(sys, "argv", command.split())
        options = dict(updates=(1000, 5), rollout_steps=(8, 2), bptt=3, cut=True)
        args = common.parse_options("", "figure.png", **options)
        return args.updates, args.rollout_steps, args.bptt, args.cut, args.seed

    assert parse("example.py") == (1000, 8, 3, True, 0)
    assert parse("example.py --quick") == (5, 2, 3, True, 0)
    assert parse("example.py --quick --updates 0 --no-cut --seed 7") == (0, 2, 3, False, 7)


@slow
@pytest.mark.parametrize(
    "figure, missing",
    [
        ("none", []),
        ("bptt", ["chain 1", "chain 2", "prev 1", "prev 2"]),
        ("bptt_every_2", ["chain 2", "prev 2"]),
        ("prev", ["prev 0", "prev 1", "prev 2"]),
        ("next", ["next 0", "next 1", "next 2", "chain 2", "made 2"]),
    ],
)
def test_cuts_are_drawn_as_the_library_makes_them(figure, missing):
    arrows = cuts.gradient_arrows(cuts.FIGURES[figure])
    actual = [f"{edge} {t}" for edge, flows in arrows.items() for t in range(3) if not flows[t]]
    assert sorted(actual) == sorted(missing)


@slow
def test_the_pictures_of_the_cuts_are_those_of_the_documentation(tmp_path):
    run_example("cuts", "--output", str(tmp_path), cwd=tmp_path)
    for name in cuts.FIGURES:
        picture = (tmp_path / f"cuts_{name}.svg").read_text()
        assert picture == (ROOT / "assets" / f"cuts_{name}.svg").read_text()
