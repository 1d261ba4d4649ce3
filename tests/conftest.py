"""Sets up JAX for all tests of this folder, and demands a reason for each skip."""

import re

import jax
import pytest


pytest.register_assert_rewrite("test_residuum", "tests.common")
import test_residuum  # noqa: E402


for name, value in test_residuum.SETTINGS.items():  # before any test file computes anything
    jax.config.update(name, value)

EXPLAINED = re.compile("needs (a newer JAX|a compiler)|annotations that are checked say no")


def pytest_sessionfinish(session):
    """Makes a skip without an explanation a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    reasons = {str(report.longrepr) for report in skipped}
    unexplained = sorted(reason for reason in reasons if not EXPLAINED.search(reason))
    if unexplained:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        text = "\nSkipped without an explanation: " + "; ".join(unexplained)
        reporter.write_line(text, red=True)
