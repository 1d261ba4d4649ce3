"""What tests/conftest.py does, in runs of pytest on a small file."""

import subprocess
import sys

import pytest

from tests.common import ROOT


def run_pytest(folder, *arguments):
    """The exit status of pytest, with this conftest.py, and what pytest prints."""
    file = folder / "test_small.py"
    file.write_text(
        """if True:
        import pytest

        @pytest.mark.accelerator(False)
        def test_that_needs_a_compiler():
            assert False

        @pytest.mark.accelerator(True)
        def test_whose_compiler_is_installed():
            pass

        def test_skipped_for_a_reason():
            pytest.skip("needs a newer JAX")

        def test_skipped_for_no_reason():
            pytest.skip("no time")
        """
    )
    options = ("-c", str(ROOT / "pyproject.toml"), "-p", "tests.conftest", *arguments)
    command = [sys.executable, "-m", "pytest", *options, str(file)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("processes", ["0", "1"])  # pytest-xdist's controller does not collect
def test_tests_without_a_compiler_are_counted(processes, tmp_path):
    status, output = run_pytest(tmp_path, "-n", processes, "-k", "not no_reason")
    assert status == 0 and "1 passed, 1 skipped" in output, output
    assert "1 tests of accelerators left out: no compiler installed" in output


def test_a_skip_without_an_explanation_is_a_failure(tmp_path):
    status, output = run_pytest(tmp_path)
    assert status == 1 and "1 passed, 2 skipped" in output, output
    assert "Skipped without an explanation" in output and "no time" in output
    assert "newer JAX" not in output
