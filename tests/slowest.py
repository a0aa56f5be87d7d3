"""Which files of tests take longest: fixtures, tests and what is cleared away, over all workers."""

from collections import Counter
from collections.abc import Iterable

import pytest

SHOWN = 10


def seconds_of_files(reports: Iterable[object]) -> Counter[str]:
    """Seconds of set-up, call and tear-down of each file's tests, from pytest's reports of them."""
    seconds: Counter[str] = Counter()
    for report in reports:
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid.partition("::")[0]] += report.duration
    return seconds


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A hook of pytest: prints the files that take longest, if there is more than one."""
    seconds = seconds_of_files(report for reports in terminalreporter.stats.values() for report in reports)
    if len(seconds) > 1:
        terminalreporter.section(f"{min(SHOWN, len(seconds))} slowest files")
        for file, duration in seconds.most_common(SHOWN):
            terminalreporter.write_line(f"{duration:7.1f} s  {file}")
        terminalreporter.write_line(f"{seconds.total():7.1f} s  all {len(seconds)} files, added up over workers")
