"""Every example runs in quick mode, prints the tables it promises, and draws its figure."""

import math
import re
import sys
from typing import NamedTuple

import common
import cuts
import numpy as np
import pytest

from tests.common import num_pixels, read_picture, ROOT, run_example, slow


class Table(NamedTuple):
    heading: str
    columns: str
    rows: dict[str, str]  # "*" for a number that depends on the training run or on the machine


class Example(NamedTuple):
    tables: list[Table]
    aspect: float  # width / height of the figure
    colors: tuple[str, ...]  # of the lines in the figure
    has_fields: bool = True  # whether the figure shows fields
    options: str = ""  # options that shorten the run further
    line: str = ""  # a regular expression for one more line of output


STEPS = "step 1, step 10, step 50"
LORENZ = Table(
    "on the attractor",
    "mean z, std x, std z, Lyapunov",
    {"Runge–Kutta": "24.28 * * *", "emulator": "* * * *"},
)
UNSEEN_PLATES = {  # persistence, as plate.py prints it
    "training mesh, 644 nodes": "0.51868 1.32333 *",
    "another mesh, 645 nodes": "0.41818 1.11104 *",
    "finer mesh, 910 nodes": "0.41305 1.18455 *",
}
PERSISTENCE = {  # as gray_scott.py prints it
    "seeds": {
        "u and v": "0.0033 0.0228 0.1500 0.2598",
        "u": "0.0030 0.0180 0.1265 0.2354",
        "v": "0.0153 0.1488 0.4982 0.6008",
    },
    "patterns": {
        "u and v": "0.0029 0.0291 0.1447 0.2764",
        "u": "0.0025 0.0255 0.1286 0.2508",
        "v": "0.0060 0.0587 0.2646 0.4531",
    },
}
EXAMPLES = {
    "burgers": Example(
        [
            Table(
                "nRMSE after",
                f"{STEPS}, trained in",
                {
                    "persistence": "0.0981 0.8123 2.7413",
                    "1 step": "* * * * s",
                    "2 steps": "* * * * s",
                    "4 steps, bptt=2": "* * * * s",
                },
            )
        ],
        aspect=11 / 3.4,
        colors=common.COLORS[:4],
        options="--rollout-steps 2",
    ),
    "supervised": Example(
        [
            Table(
                "nRMSE after",
                f"{STEPS}, trained in, snapshots",
                {
                    "Crank–Nicolson": "0.0020 0.0032 0.0005",
                    "supervised": "* * * * s 3",
                    "residual": "* * * * s 1",
                },
            )
        ],
        aspect=6 / 3.4,
        colors=common.COLORS[:3],
        has_fields=False,
        line=r"Data for supervision: 0\.20 MB, made in \d+ ms",
    ),
    "error_estimate": Example(
        [
            Table(
                states,
                STEPS,
                {
                    "true nRMSE": "* * *",
                    "estimated": "* * *",
                    "corrected": "* * *",
                    "ratio, least": "* * *",
                    "ratio, largest": "* * *",
                },
            )
            for states in ("like training", "1.5 times as large", "rougher")
        ],
        aspect=15 / 3.2,
        colors=common.COLORS[1:4],
    ),
    "chemistry": Example(
        [
            Table(
                f"nRMSE of {name} after",
                "NO2, NO, O3, HCHO, CO, ALD, PAN, HNO3",
                {"5 minutes": "* * * * * * * *", "60 minutes": "* * * * * * * *"},
            )
            for name in ("persistence", "cheap scheme", "emulator")
        ],
        aspect=11 / 3.4,
        colors=common.COLORS[:3],
        has_fields=False,
    ),
    "lorenz": Example(
        [LORENZ],
        aspect=11 / 3.6,
        colors=common.COLORS[1:3],
        has_fields=False,
    ),
    "kuramoto_sivashinsky_2d": Example(
        [
            Table("memory of one gradient", "10 steps", {"bptt=2, checkpoint=True": "* MB"}),
            Table(
                "nRMSE after",
                f"{STEPS}, step 100",
                {"persistence": "0.0623 0.5891 1.4274 1.4180", "emulator": "* * * *"},
            ),
        ],
        aspect=13 / 3.3,
        colors=common.COLORS[:2],
        line=r"std u: solver 4\.\d\d, emulator \d+\.\d\d",
    ),
    "gray_scott": Example(
        [
            Table(
                f"nRMSE from {start}",
                f"{STEPS}, step 100",
                {
                    f"{fields}, {name}": errors if name == "persistence" else "* * * *"
                    for fields, errors in persistence.items()
                    for name in ("persistence", "emulator")
                },
            )
            for start, persistence in PERSISTENCE.items()
        ],
        aspect=13 / 3,
        colors=common.COLORS[:4],
        options="--updates 3",  # with a few more updates, it diverges
    ),
    "first_steps": Example(
        [
            Table(
                "nRMSE after",
                "step 1, step 10",
                {
                    "persistence": "0.78 3.5",
                    "good": "* *",
                    "wrong sign": "* *",
                    "learning rate too large": "* *",
                },
            )
        ],
        aspect=13 / 3,
        colors=common.COLORS[1:4],
    ),
    "shallow_water": Example(
        [
            Table(
                "nRMSE after",
                "step 1, step 10",
                {
                    "persistence": "0.6052 1.1228",
                    "exact Crank–Nicolson": "0.0264 0.1256",
                    "exact Hermite": "0.0044 0.0172",
                    "emulator": "* *",
                },
            )
        ],
        aspect=13 / 3,
        colors=common.COLORS[:4],
    ),
    "plate": Example(
        [
            Table(
                mesh,
                "step 1, step 10, ms / step",
                {
                    "Newton": "0.00000 0.00000 *",
                    "persistence": persistence,
                    "20 Jacobi steps": "* * *",
                    "4 steps of GCR, Jacobi": "* * *",
                    "20 steps of GCR, Jacobi": "* * *",
                    "40 steps of GCR, Jacobi": "* * *",
                    "1 step u − P r": "* * *",
                    "4 steps u − P r": "* * *",
                    "emulator": "* * *",
                    "emulator, 6 corrections": "* * *",
                    "estimated error": "* *",
                },
            )
            for mesh, persistence in UNSEEN_PLATES.items()
        ],
        aspect=13 / 3,
        colors=common.COLORS[:4],
        line=r"Largest residual of the solver: \de-1[456]",
    ),
}
EXAMPLES["burgers_2d"] = Example(
    [
        Table(
            "nRMSE after",
            "step 1, step 10",
            {
                "persistence": "0.015 0.15",
                "exact step, i.e., floor": "7e-06 0.00015",
                "emulator": "* *",
                "against the exact step": "* *",
                "its estimate": "* *",
            },
        )
    ],
    aspect=13 / 3,
    colors=common.COLORS[1:2],
    line="Loss of the solver's states: .e-.., of persistence: 1",
)
NOT_PROGRAMS = {"basin", "canonical_convolutions", "common", "conduction", "launcher", "pollu"}
NOT_PROGRAMS |= {"replay_buffer"}
WITHOUT_FIGURE = {"batch_norm", "data_parallel"}


def read_table(output, heading):
    """Returns the columns of the table with this heading, and its rows `{name: cells}`."""
    [table] = [part for part in output.split("\n\n") if part.strip().startswith(heading)]
    lines = [re.split(" {2,}", line.strip(), maxsplit=1) for line in table.strip().split("\n")]
    (_, columns), *rows = lines
    return re.split(" {2,}", columns), {name: cells.split() for name, cells in rows}


def agree(cell, expected):
    return cell == expected or (expected == "*" and math.isfinite(float(cell)))


def assert_prints(output, table):
    columns, rows = read_table(output, table.heading)
    assert columns == table.columns.split(", ")
    assert list(rows) == list(table.rows)
    for row, expected in table.rows.items():
        cells = zip(rows[row], expected.split(), strict=True)
        assert all(agree(*pair) for pair in cells), output


@slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_prints_its_tables_and_draws_its_figure(name, tmp_path):
    example = EXAMPLES[name]
    options = ("--quick", *example.options.split(), "--output", "figures/figure.png")
    output = run_example(name, *options, cwd=tmp_path)
    for table in example.tables:
        assert_prints(output, table)
    assert re.search(f"^{example.line}$", output, re.MULTILINE), output

    figure = read_picture(tmp_path / "figures" / "figure.png")
    height, width, _ = figure.shape
    assert width / height == pytest.approx(example.aspect, rel=0.01)
    for color in example.colors:  # a legend has fewer pixels than a line
        assert num_pixels(figure, color) > 150, color
    is_colored = np.ptp(figure, axis=-1) > 0.05
    assert not example.has_fields or np.mean(is_colored) > 0.06  # a color bar alone gives 0.01


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_figure_is_in_the_documentation(name):
    shown = "shallow_water_study" if name == "shallow_water" else name
    assert (ROOT / "assets" / f"{shown}.png").exists()


@slow
def test_lorenz_runs_without_a_cut(tmp_path):
    output = run_example("lorenz", "--quick", "--no-cut", "--updates", "3", cwd=tmp_path)
    assert_prints(output, LORENZ)


def test_every_example_is_tested():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {*EXAMPLES, *NOT_PROGRAMS, *WITHOUT_FIGURE, "cuts"}


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
