"""The progress line of rank 0: a live bar in a terminal, a line every 15 seconds in a pipe or a file."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from finetune.runtime.logging import console, is_quiet, say

_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_BETWEEN_PICTURES = 0.25
PATIENCE = 3.0  # seconds of work that need no progress
_RECENT = 50  # by which updates the time that remains is told
_one_bar = threading.Lock()
_outer: "ProgressLine | None" = None  # whose bar a terminal shows


class ProgressLine:
    """Shows how many of `total` are done, with a text, and the time that remains by the pace of the last of them.

    Nothing is shown unless `enabled`, which is meant for rank 0, and nothing with --quiet.
    """

    def __init__(
        self,
        label: str,
        total: int,
        done: int = 0,
        enabled: bool = True,
        amount: Callable[[int], str] = str,
        patience: float = 0.0,
    ) -> None:
        """
        Args:
            amount: how a number of what is done reads.
            patience: seconds that nothing is shown for at first, since what is done in less needs no progress. The bar then
                leaves nothing behind, and in a pipe the first line comes after the usual time.
        """
        self.label, self.total, self.done, self.enabled = label, total, done, enabled
        self._amount, self._shown_from = amount, time.monotonic() + patience
        self._is_passing = patience > 0
        self._refreshed = 0.0
        self.last_line = time.monotonic() if patience else 0.0
        self._updated = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RECENT)  # (seconds, how many were done in them)
        self.bar: Any = None  # of rich, which is imported where one is drawn
        if patience == 0:
            self._start_bar()

    def _start_bar(self) -> None:
        if self.bar or not self.enabled or not _is_terminal() or not _one_bar.acquire(blocking=False):
            return  # a terminal has one bar: work inside of other work is shown in its place
        from rich.progress import Progress, TextColumn  # not for a log file
        from rich.table import Column

        self.bar = Progress(
            TextColumn("{task.fields[line]}", table_column=Column(no_wrap=True, overflow="ellipsis"), markup=False),
            console=console,
            refresh_per_second=4,
            transient=self._is_passing,
        )
        self.bar.start()
        global _outer
        _outer = self
        self.task = self.bar.add_task(self.label, total=self.total, completed=self.done, line=self._line("", 0.0))

    def update(self, done: int, text: str, seconds: float | None = None, others: float = 0.0) -> None:
        """Say that `done` are done.

        Args:
            seconds: what each of the last ones took; the time since others were done if not given.
            others: seconds that other work will take until the end, such as samples that are due.
        """
        now = time.monotonic()
        if done > self.done:
            count = done - self.done
            self._recent.append((now - self._updated if seconds is None else seconds * count, count))
            self._updated = now
        self.done = done
        if not self.enabled or now < self._shown_from:
            return
        self._start_bar()
        line = self._line(text, others)
        if self.bar:
            self.bar.update(self.task, completed=done, line=line)
            if now - self._refreshed > _SECONDS_BETWEEN_PICTURES:  # also where the console is quiet in between
                self._refreshed = now
                self.bar.refresh()
            return
        if _is_terminal():
            if _outer and (bar := _outer.bar):
                bar.update(_outer.task, line=line)
            return
        if done >= self.total or now - self.last_line > _SECONDS_BETWEEN_LINES:
            self.last_line = now
            say(line)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar:
            self.bar.stop()
            global _outer
            self.bar, self.enabled, _outer = None, False, None
            _one_bar.release()

    def _line(self, text: str, others: float) -> str:
        """What is done and what remains come first, so that a narrow terminal cuts off the rest."""
        share = f"{self.done / self.total:.0%}" if self.total else "100%"
        head = f"{self.label} {self._amount(self.done)}/{self._amount(self.total)} {share}"
        head += f"  ETA {self._remaining(others)}"
        return f"{head}  {text}" if text else head

    def _remaining(self, others: float) -> str:
        if self.done >= self.total:
            return "0:00:00"
        if not self._recent:
            return "?"
        # The first one compiles and warms up: it counts only as long as there is no other.
        is_first_there = 1 < len(self._recent) < _RECENT
        recent = list(self._recent)[is_first_there:]
        pace = sum(seconds for seconds, _ in recent) / sum(count for _, count in recent)
        return in_hours(pace * (self.total - self.done) + others)

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Polled:
    """Inside a `with` block, a thread asks every so often how much is done, and updates a progress line with it."""

    def __init__(
        self, line: ProgressLine, done: Callable[[], int], text: Callable[[], str], every: float = 0.5
    ) -> None:
        """
        Args:
            done: how many are done; it must not raise.
            text: what is shown behind.
        """
        self.line, self._done, self._text, self._every = line, done, text, every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def _poll(self) -> None:
        while not self._ended.wait(self._every):
            # Less than all: only the end of the block says that nothing is left to do.
            self.line.update(max(self.line.done, min(self._done(), self.line.total - 1)), self._text())

    def __enter__(self) -> "Polled":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None:
            self.line.update(self.line.total, "")
        self.line.close()


def in_hours(seconds: float) -> str:
    """A time as "1:02:03"."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _is_terminal() -> bool:
    """Whether a line can be drawn again and again: into a pipe or file it would be control codes, whatever FORCE_COLOR says."""
    return (
        sys.stderr.isatty()
        and console.is_terminal
        and not console.is_dumb_terminal
        and not (console.quiet or is_quiet())
    )
