"""The module is a file to copy: these tests check what it imports and touches, and its public
names."""

import ast
import re
import subprocess
import sys

import residuum
from tests.common import ROOT


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


def test_versions_and_dates_agree():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    version, date = re.search(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", changelog, re.M).groups()
    assert version == residuum.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\ndate-released: {date}\n" in citation
