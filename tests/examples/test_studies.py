"""The studies in benchmarks/ that train on problems of their own run in quick mode, and they
print and draw what the documentation takes from them."""

import re

import pytest
from study import read_csv

from test_residuum import slow
from tests.common import ROOT
from tests.examples.test_examples import run_example


pytestmark = slow


def run_study(name, folder, *arguments):
    """Returns the lines that it prints, once it has drawn its figure."""
    figure = folder / "figure.png"
    options = ("--quick", "--output", str(figure), *arguments)
    lines = run_example(ROOT / "benchmarks" / name, *options, cwd=folder).splitlines()
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 10_000
    assert f"Figure: {figure}" in lines
    return lines


def cells(lines, name):
    """The numbers in the row of that name."""
    (row,) = [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]
    return [float(x) for x in re.findall(r"\d+(?:\.\d+)?(?:e[+-]\d+)?", row)]


def test_published_kuramoto_sivashinsky(tmp_path):
    csv = tmp_path / "scores.csv"
    arguments = ("--seed", "0", "1", "--rollout-steps", "2", "--csv", str(csv))
    lines = run_study("published_kuramoto_sivashinsky", tmp_path, *arguments)
    models = ["1 step", "2 steps", "4 steps, bptt=1"]
    exact, published = (cells(lines, x) for x in ("exact Crank–Nicolson", "AR-DenseED"))
    assert published == [6e-4, 8.8e-3, 6.6e-2, 0.56, 13.9, 1.275, 13.3, 4820]
    assert len(exact) == 7 and exact[2] < 1e-5

    *rows, last = read_csv(csv)
    assert [(row["emulator"], row["seed"]) for row in rows] == [
        (name, seed) for name in models for seed in ("0", "1")
    ]
    assert float(last["mse_10"]) == pytest.approx(exact[2], rel=0.05)
    for name in models:
        errors = sorted(float(row["mse_1"]) for row in rows if row["emulator"] == name)
        assert exact[0] < errors[0] <= errors[1] < float("inf")
        least, most = (cells(lines, f"{name}, {which}")[0] for which in ("least", "most"))
        assert [least, most] == pytest.approx(errors, rel=0.05)
        assert least <= cells(lines, name)[0] <= most
    assert cells(lines, "std u of the solver:")[0] == pytest.approx(1.31, rel=0.05)


def test_conditioning(tmp_path):
    lines = run_study("conditioning", tmp_path)
    rows = [cells(lines, f"{num_points} points") for num_points in (16, 32, 64)]
    assert [condition for condition, *_ in rows] == [11, 42, 165]
    for _, residual, preconditioned in rows:
        assert 0 < preconditioned < residual < 1


def test_convolutions_on_cpu(tmp_path):
    lines = run_study("convolutions_on_cpu", tmp_path)
    for case in ("forward", "gradient", "gradient, bptt=1"):
        (row,) = [line for line in lines if line.startswith(f"1D, {case}  ")]
        cell = r"\s+([\d.]+) s ([\d.]+) MB ([\d.]+) ms"
        *cost, difference = re.fullmatch(rf"1D, {case}{3 * cell}\s+(\S+)", row).groups()
        assert all(float(memory) > 0 for memory in cost[1::3])
        assert 0 <= float(difference) < 1e-5
