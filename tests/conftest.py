"""Deselects tests whose compiler is missing, and fails on unexplained skips."""

import re

import pytest


# Reasons for a skip: the JAX at hand is too old, or its version of Flax does not exist.
EXPLAINED = re.compile("needs (a newer JAX|flax)|annotations that are checked say no")

num_deselected = pytest.StashKey[int]()


def pytest_collection_modifyitems(config, items):
    """Deselects tests that need a compiler that is not installed: `accelerator(False)`."""
    deselected = [
        item
        for item in items
        if any(not mark.args[0] for mark in item.iter_markers("accelerator"))
    ]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]
    config.stash[num_deselected] = len(deselected)
    if hasattr(config, "workeroutput"):  # in a worker of pytest-xdist
        config.workeroutput["num_deselected"] = len(deselected)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """The controller of pytest-xdist does not collect; each worker collects all tests."""
    number = getattr(node, "workeroutput", {}).get("num_deselected", 0)
    node.config.stash[num_deselected] = max(number, node.config.stash.get(num_deselected, 0))


def pytest_terminal_summary(terminalreporter, config):
    number = config.stash.get(num_deselected, 0)
    if number:
        terminalreporter.write_line(
            f"{number} tests of accelerators left out: no compiler installed"
        )


def pytest_sessionfinish(session):
    """A skip that is not explained is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    reasons = {str(report.longrepr) for report in skipped}
    unexplained = sorted(reason for reason in reasons if not EXPLAINED.search(reason))
    if unexplained:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.write_line(
            "\nSkipped without an explanation: " + "; ".join(unexplained), red=True
        )
