"""The wheel and the sdist contain what they should, to the byte."""

import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import residuum
from tests.common import ROOT


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Builds a wheel and an sdist twice, from copies of the project in two folders."""
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
