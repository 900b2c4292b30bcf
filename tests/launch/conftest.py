"""Says at the end of a run which tests of clusters were not run, and why."""

from __future__ import annotations

from collections import defaultdict

import pytest

SUITE = "tests/launch/"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    done = [report for report in _reports(terminalreporter, "passed", "failed") if report.when == "call"]
    reasons: dict[str, list[str]] = defaultdict(list)
    for report in _reports(terminalreporter, "skipped"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")].append(report.nodeid.removeprefix(SUITE))
    left = sum(map(len, reasons.values()))
    if not done and not left:
        return
    terminalreporter.section("cluster tests")
    terminalreporter.write_line(f"{len(done)} run, {left} not run")
    for reason, tests in reasons.items():
        terminalreporter.write_line(f"not run, {reason}: {', '.join(tests)}")


def _reports(terminalreporter: pytest.TerminalReporter, *outcomes: str) -> list[pytest.TestReport]:
    found = [report for outcome in outcomes for report in terminalreporter.stats.get(outcome, [])]
    return [report for report in found if isinstance(report, pytest.TestReport) and report.nodeid.startswith(SUITE)]
