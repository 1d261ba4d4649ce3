"""Runs every check of the project by its name.

    pip install nox uv
    nox --list                      lists all sessions, with a line about each
    nox -s lint                     runs one session, in an environment of its own
    nox -s "tests(3.12, newest)"    runs the tests on one Python and one JAX
    nox -s quick -- -k meshes       passes everything after -- to pytest

uv makes the environments where it is installed. A missing interpreter is an error.
"""

import re
import shutil
import tomllib
from pathlib import Path

import nox


nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = True
nox.options.reuse_venv = "yes"
nox.options.sessions = ["quick", "two_files", "lint", "types", "docs", "dist"]

NEWEST, OLDEST = "3.13", "3.11"
VERSIONS = [(NEWEST, "newest"), ("3.12", "newest"), (OLDEST, "newest")]
VERSIONS += [(OLDEST, "0.7"), (OLDEST, "lower bounds"), (NEWEST, "pre-release")]
PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]


def requirements(*extras):
    """Returns the requirements of the project and of the given extras, without the project."""
    found = {*PROJECT["dependencies"]}
    for extra in extras:
        for requirement in PROJECT["optional-dependencies"][extra]:
            own = re.fullmatch(rf"{PROJECT['name']}\[(.*)\]", requirement)
            found |= {*requirements(*own[1].split(","))} if own else {requirement}
    return sorted(found)


def pytest(session, *args, **env):
    session.run("python", "-m", "pytest", "-n", "auto", *args, *session.posargs, env=env)


@nox.session
@nox.parametrize("python, jax", VERSIONS, ids=[", ".join(version) for version in VERSIONS])
def tests(session, jax):
    """Runs the library's tests by Python and JAX; `-- -m "not slow"` selects the quick ones."""
    needed = requirements("test")
    if jax == "lower bounds":
        needed = [r.replace(">=", "==") for r in needed]
    session.install(*needed)
    if jax == "0.7":
        session.install("jax==0.7.2")
    if jax == "pre-release":
        session.install("--upgrade", "--pre", "jax", "jaxlib")
    pytest(session)


@nox.session(python=NEWEST)
def quick(session):
    """Runs the library's tests that are not slow, on the newest Python and JAX."""
    session.install(*requirements("test"))
    pytest(session, "-m", "not slow")


@nox.session(python="3.12")
def flags(session):
    """Runs quick tests with XLA's optimisations, and with JAX's new rematerialisation."""
    session.install(*requirements("test-examples"))
    files = ["test_residuum.py", "tests/test_cost.py"]
    optimized = ["tests/examples/test_canonical_convolutions.py", "tests/test_precision.py"]
    pytest(session, "-m", "not slow", *files, *optimized, RESIDUUM_TEST_OPTIMIZED="1")
    # In nested loops the new rematerialisation has one barrier more than is needed.
    barrier = "test_rematerialisation_is_protected_from_xla_only_where_there_is_no_loop"
    deselect = ["--deselect", f"tests/test_cost.py::{barrier}[3-1-False]"]
    pytest(session, "-m", "not slow", *files, "tests/test_rule.py", *deselect, JAX_REMAT3="1")


@nox.session(python=OLDEST)
def annotations(session):
    """Tests the library at its lower bounds, with annotations checked at run time."""
    needed = [r.replace(">=", "==") for r in requirements("test")]
    session.install("beartype==0.19.0", *needed)
    # Not the files about messages: where the annotations object first, ours are not seen.
    names = ("constants", "cost", "precision", "rule", "transformations")
    files = ["test_residuum.py", *(f"tests/test_{name}.py" for name in names)]
    files = [] if session.posargs else files  # those of posargs instead
    pytest(session, "-m", "not slow", "--jaxtyping-packages=residuum,beartype.beartype", *files)


@nox.session(python=NEWEST)
def mutants(session):
    """Runs mutation tests of residuum.py, except for the checks at its end (takes hours)."""
    session.install("cosmic-ray", *requirements("test"), env={"UV_COMPILE_BYTECODE": "1"})
    copy, config, results = Path(session.create_tmp(), "copy"), "tests/mutants.toml", "results"
    fresh = "continue" not in session.posargs
    if fresh:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(".", copy, ignore=shutil.ignore_patterns(".*"))
    with session.chdir(copy):
        if fresh:
            session.run("cosmic-ray", "baseline", config)
            session.run("cosmic-ray", "init", config, results)
            session.run("cr-filter-operators", results, config)
            lines = (
                Path("residuum.py").read_text().split("\n# Checks of arguments")[0].splitlines()
            )
            typing = re.compile(r"Literal|TypedDict|^ *\*,$")  # no code, nor is a lone `*`
            rows = [str(n) for n, line in enumerate(lines, 1) if not typing.search(line)]
            with open(config, "a") as file:
                file.write(f'[cosmic-ray.filters.line-filter.lines]\n"residuum.py" = {rows}')
            session.run("cr-filter-lines", results, "--config", config)
        session.run("cosmic-ray", "exec", config, results)
        session.run("cr-report", "--surviving-only", "--show-diff", results)


@nox.session(python=NEWEST)
def lint(session):
    """Lints the code, and validates workflows and CITATION.cff against their schemas."""
    session.install("check-jsonschema", *[r for r in requirements("dev") if "ruff" in r])
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    check = ("check-jsonschema", "--builtin-schema")
    session.run(*check, "vendor.github-workflows", *map(str, Path(".github").rglob("*.yml")))
    session.run(*check, "vendor.citation-file-format", "CITATION.cff")


@nox.session(python=NEWEST)
def types(session):
    """Runs mypy on the examples, and mypy, mypy --strict and pyright on residuum.py."""
    session.install(*[r for r in requirements("dev") if not r.startswith("trainax")])
    session.run("mypy")
    session.run("mypy", "--strict", "residuum.py")
    session.run("pyright", "--pythonpath", f"{session.bin}/python")


@nox.session(python=NEWEST)
def docs(session):
    """Builds the site in strict mode, and tests its pages, links, notebook and search."""
    session.install("pytest", *requirements("docs"), ".")
    env = {"NO_MKDOCS_2_WARNING": "1"}
    session.run("mkdocs", "build", "--strict", "--quiet", *session.posargs, env=env)
    session.run("python", "-m", "pytest", "--noconftest", "tests/published/test_site.py")


@nox.session(python=NEWEST)
def pages(session):
    """Runs every block of README and docs/, and tests their claims, links and messages."""
    session.install(*requirements("test-examples"), ".")
    pytest(session, "tests/published/test_pages.py")


@nox.session(python=NEWEST)
def two_files(session):
    """Runs test_residuum.py in a folder that has only this file and residuum.py."""
    folder = Path(session.create_tmp()) / "project"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ("residuum.py", "test_residuum.py"):
        shutil.copy(name, folder)
    session.install("jax", "jaxtyping", "chex", "pytest")
    with session.chdir(folder):
        session.run("pytest", "-q", "-W", "error::pytest.PytestWarning")


@nox.session(python=NEWEST)
def examples(session):
    """Tests what all examples and studies print and draw in quick mode, slow ones included."""
    session.install(*requirements("test-examples"), ".")
    pytest(session, "tests/examples")


@nox.session(python=NEWEST)
def benchmarks(session):
    """Runs the benchmark of a rollout's cost for one network, in seconds, with its figure."""
    session.install(*requirements("benchmarks"), ".")
    folder = session.create_tmp()
    quick = ["--networks", "MLP", "--steps", "10", "--seconds", "0.5", "--cuts", "bptt=5"]
    session.run("python", "-m", "benchmarks.rollout_cost.run", *quick, "--output", folder)
    figure = ["--quick", "--cut", "bptt=5", "--input", folder, "--output", folder]
    session.run("python", "-m", "benchmarks.rollout_cost.draw", *figure)


@nox.session(python=NEWEST)
def dist(session):
    """Tests the distributions, and runs README's example and type checkers on the wheel."""
    folder = Path(session.create_tmp())
    session.install("hatchling", "pytest", *requirements())
    options = ("--noconftest", "tests/published/test_distribution.py")
    session.run("python", "-m", "pytest", *options)
    session.run("python", "-m", "hatchling", "build", "-t", "wheel", "-d", f"{folder}/dist")
    wheel = max(folder.glob("dist/*.whl"), key=lambda path: path.stat().st_mtime)
    session.install(str(wheel))
    example = re.search(r"^```python\n(.*?)^```", Path("README.md").read_text(), re.M | re.S)
    (folder / "example.py").write_text(example[1])
    (folder / "typed_user.py").write_text(Path("tests/typed_user.py").read_text())
    with session.chdir(folder):
        session.run("python", "example.py")
        session.install("equinox", "mypy", "pyright")
        session.run("mypy", "--strict", "typed_user.py")
        session.run("pyright", "--pythonpath", f"{session.bin}/python", "typed_user.py")


@nox.session(python="3.12")
def accelerators(session):
    """Compiles programs for TPUs and GPUs without the devices, in 6 GB of memory."""
    compilers = ("tpu",) if "v5e" in " ".join(session.posargs) else ("tpu", "gpu")
    session.install(*requirements("test-examples", *compilers))
    file = "tests/examples/test_accelerators.py"
    session.run("python", "-m", "pytest", file, *session.posargs)
