"""The module as a file that may be copied: what it imports and touches, its public names, and
that its annotations are true. The distributions: what is in them, to the byte."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile

import jax
import jaxtyping
import pytest

import residuum
from test_residuum import assert_close, evaluate, MASK, problem, textbook_loss, value_and_grad
from tests.common import ROOT


def test_annotations_hold_at_run_time():
    original = sys.modules.pop("residuum")
    try:
        with jaxtyping.install_import_hook("residuum", "beartype.beartype"):
            checked = importlib.import_module("residuum")
    finally:
        sys.modules["residuum"] = original

    inputs = problem(3)

    def values_and_grads(loss_fn, inputs):
        for bptt, prev in ((False, False), (True, MASK[:3]), (2, True), (MASK[:3], False)):
            cuts = checked.Cuts(bptt, prev, True)
            yield value_and_grad(loss_fn, inputs, num_rollout_steps=3, cuts=cuts)

    functions = (checked.residuum_loss, textbook_loss)
    both = jax.jit(lambda inputs: [list(values_and_grads(f, inputs)) for f in functions])
    assert_close(*both(inputs))
    with pytest.raises(jaxtyping.TypeCheckError, match="weights"):
        evaluate(checked.residuum_loss, *inputs, num_rollout_steps=4)


def test_it_imports_jax_and_jaxtyping_only():
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "residuum.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"jax", "jaxtyping"}


def test_importing_it_touches_no_network_no_file_and_no_environment():
    program = """if True:
        import collections, os, sys
        import jax, jaxtyping
        from jaxtyping import PyTree  # loaded lazily

        touched = []

        class Environment(collections.UserDict):
            def __getitem__(self, name, default=None):
                touched.append(("environment", name))
                raise KeyError(name)

            __contains__ = get = __getitem__

        def audit(event, args):
            is_module = event == "open" and "residuum" in os.path.basename(str(args[0]))
            watched = ("open", "socket.", "subprocess.", "os.putenv", "os.system", "urllib.")
            if event.startswith(watched) and not is_module:
                touched.append((event, args))

        sys.addaudithook(audit)
        os.environ = Environment()
        import residuum
        assert touched == [], touched
        for touch in (lambda: os.getenv("HOME"), lambda: open("/no/such/file")):
            try:
                touch()
            except (KeyError, FileNotFoundError):
                pass
        assert len(touched) == 2, "this program notices nothing"
    """
    command = [sys.executable, "-B", "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_public_names():
    assert sorted(residuum.__all__) == ["Cuts", "Rollout", "mse", "residuum_loss"]
    assert all(getattr(residuum, name).__doc__ for name in residuum.__all__)
    assert f"## {residuum.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Two builds, from copies of the project in two folders; each a wheel and an sdist."""
    builds = []
    for name in ("one", "another"):
        folder = tmp_path_factory.mktemp(name)
        ignored = shutil.ignore_patterns(".*", "site", "dist", "__pycache__")
        shutil.copytree(ROOT, folder / "project", ignore=ignored)
        shutil.copy(ROOT / ".gitignore", folder / "project")
        command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder / "dist")]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
        subprocess.run(command, cwd=folder / "project", env=environment, check=True)
        builds.append(sorted((folder / "dist").iterdir()))
    return builds


def test_two_builds_give_the_same_bytes(distributions):
    one, another = distributions
    assert [path.name for path in one] == [path.name for path in another]
    assert len(one) == 2
    for path, other in zip(one, another, strict=True):
        assert path.read_bytes() == other.read_bytes()


def test_the_wheel_is_the_one_module_typed(distributions):
    (wheel,) = [path for path in distributions[0] if path.suffix == ".whl"]
    assert wheel.name.startswith(f"residuum_jax-{residuum.__version__}-")
    contents = zipfile.ZipFile(wheel)
    names = [name for name in contents.namelist() if ".dist-info/" not in name]
    assert sorted(names) == ["residuum/__init__.py", "residuum/py.typed"]
    assert contents.read("residuum/__init__.py") == (ROOT / "residuum.py").read_bytes()


def test_links_of_the_readme_on_pypi_are_absolute(distributions):
    (wheel,) = [path for path in distributions[0] if path.suffix == ".whl"]
    contents = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in contents.namelist() if name.endswith("/METADATA")]
    links = re.findall(r"\]\(([^)]*)\)", contents.read(metadata).decode())
    assert any(link.endswith(".png") for link in links)
    assert all(link.startswith(("https:", "#")) for link in links)


def test_versions_agree():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {residuum.__version__}\n" in citation
