"""Which tests are not run, and that nobody misses them."""

import re

import pytest


# Reasons for a skip: the JAX at hand is too old, or its version of Flax does not exist.
EXPLAINED = re.compile("needs (a newer JAX|flax)|annotations that are checked say no")


def pytest_collection_modifyitems(config, items):
    """Deselects tests that need a compiler that is not installed: `accelerator(False)`."""
    absent = [
        item
        for item in items
        if any(not mark.args[0] for mark in item.iter_markers("accelerator"))
    ]
    config.hook.pytest_deselected(items=absent)
    items[:] = [item for item in items if item not in absent]
    config.stash[absent_key] = len(absent)


absent_key = pytest.StashKey[int]()


def pytest_report_collectionfinish(config):
    absent = config.stash.get(absent_key, 0)
    return f"{absent} tests of accelerators left out: no compiler installed" if absent else None


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
