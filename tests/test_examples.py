"""Every example runs, in quick mode; every figure that they make is there."""

import importlib.util
import os
import subprocess
import sys

import pytest
from common import ROOT

from test_residuum import slow


def run_example(name, *arguments, **options):
    """In a process of its own, since examples set what JAX knows before it starts."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    environment.pop("XLA_FLAGS", None)  # with this process' number of virtual devices
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


FIGURES = {
    # which `nox -s examples` starts by itself
    "burgers.py": "burgers.png",
    "conditioning.py": "conditioning.png",
    "convolutions_on_cpu.py": "convolutions_on_cpu.png",
    "cuts.py": "cuts_bptt.svg",
    "gray_scott.py": "gray_scott.png",
    "kuramoto_sivashinsky.py": "kuramoto_sivashinsky.png",
    "kuramoto_sivashinsky_2d.py": "kuramoto_sivashinsky_2d.png",
    "lorenz.py": "lorenz.png",
    "supervised.py": "supervised.png",
}


@slow
@pytest.mark.parametrize("name", [name for name in FIGURES if name != "burgers.py"])
def test_example_runs(name, tmp_path):
    output = tmp_path if name == "cuts.py" else tmp_path / FIGURES[name]
    quick = {
        "cuts.py": (),
        "kuramoto_sivashinsky_2d.py": ("--quick", "--rollout-steps", "4"),
        "supervised.py": ("--quick", "--rollout-steps", "2"),
    }
    run_example(name, *quick.get(name, ("--quick",)), "--output", str(output), cwd=tmp_path)
    assert (tmp_path / FIGURES[name]).stat().st_size > 1000
    assert (ROOT / "assets" / FIGURES[name]).exists()


def test_every_example_is_tested():
    names = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert names == {*FIGURES, "data_parallel.py"}


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    cuts = load_example("cuts")
    arrows = cuts.gradient_arrows(cuts.FIGURES[figure])
    actual = [f"{edge} {t}" for edge, flows in arrows.items() for t in range(3) if not flows[t]]
    assert sorted(actual) == sorted(missing)
    drawn = (ROOT / "assets" / f"cuts_{figure}.svg").read_text()
    assert drawn == cuts.picture(cuts.FIGURES[figure])
