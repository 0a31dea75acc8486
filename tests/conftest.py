"""What holds for every test."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from tests.support import gpu

# A busy machine is no fault of the data.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what there is no GPU for; and keep the tests of an `xdist_group` in one process.

    pytest 9 no longer lets xdist say so in their ids.
    """
    gpu.leave_out(items)
    for item in items:
        group = item.get_closest_marker("xdist_group")
        if group and f"@{group.args[0]}" not in item.nodeid and "PYTEST_XDIST_WORKER" in os.environ:
            item._nodeid = f"{item.nodeid}@{group.args[0]}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was measured on a GPU, and what was not run for want of one."""
    gpu.report(terminalreporter)
