"""Skips by mark, and a table of seconds per suite at the end of a run."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import PurePosixPath

import pytest


class SuiteTimes:
    """Adds up what set-up, call and tear-down of the tests of each suite took.

    A suite is a folder of tests/, or a file that lies in tests/ itself.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.tests: dict[str, set[str]] = defaultdict(set)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        parts = PurePosixPath(report.nodeid.split("::")[0]).parts
        suite = "/".join(parts[:2])
        self.seconds[suite] += report.duration
        self.tests[suite].add(report.nodeid)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.seconds:
            return
        terminalreporter.section("seconds per suite")
        for suite, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            terminalreporter.write_line(f"{seconds:8.1f}  {suite}  ({len(self.tests[suite])} tests)")
        terminalreporter.write_line(f"{sum(self.seconds.values()):8.1f}  total")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SuiteTimes(), "suite-times")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="gpu: this machine has no CUDA device"))
        if item.get_closest_marker("root") and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason=f"root: running as user {os.geteuid()}"))


def _has_cuda() -> bool:
    import torch  # not at the top: most runs have no gpu test and need not wait for the import

    return torch.cuda.is_available()
