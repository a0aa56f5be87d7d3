"""The progress line of rank 0: a live bar in a terminal, a line every 15 seconds in a log file."""

import time
from collections import deque

from finetune.runtime.logging import console, say

_SECONDS_BETWEEN_LINES = 15.0
_RECENT = 50  # by which steps the time that remains is told


class ProgressLine:
    """Shows how many of `total` are done, with a text, and the time that remains by the pace of the last of them.

    Nothing is shown unless `enabled`, which is meant for rank 0.
    """

    def __init__(self, label: str, total: int, done: int = 0, enabled: bool = True) -> None:
        self.label, self.total, self.done, self.enabled = label, total, done, enabled
        self.last_line = 0.0
        self._updated = time.monotonic()
        self._recent: deque[float] = deque(maxlen=_RECENT)  # seconds of each of the last ones
        self.bar = None
        if enabled and console.is_terminal and not console.quiet:
            from rich.progress import Progress, TextColumn  # not for a log file
            from rich.table import Column

            self.bar = Progress(
                TextColumn("{task.fields[line]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
                console=console,
                refresh_per_second=4,
            )
            self.bar.start()
            self.task = self.bar.add_task(label, total=total, completed=done, line=f"{label} {done}/{total}")

    def update(self, done: int, text: str, seconds: float | None = None, others: float = 0.0) -> None:
        """Say that `done` are done.

        Args:
            seconds: what the last one took; the time since the last update if not given.
            others: seconds that other work will take until the end, such as samples that are due.
        """
        now = time.monotonic()
        if done > self.done:
            self._recent.append((now - self._updated) / (done - self.done) if seconds is None else seconds)
        self._updated = now
        self.done = done
        if not self.enabled:
            return
        line = self._line(text, others)
        if self.bar:
            self.bar.update(self.task, completed=done, line=line)
            return
        if done >= self.total or now - self.last_line > _SECONDS_BETWEEN_LINES:
            self.last_line = now
            say(line)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar:
            self.bar.stop()

    def _line(self, text: str, others: float) -> str:
        """What is done and what remains come first, so that a narrow terminal cuts off the rest."""
        share = f"{self.done / self.total:.0%}" if self.total else "100%"
        head = f"{self.label} {self.done}/{self.total} {share}  ETA {self._remaining(others)}"
        return f"{head}  {text}" if text else head

    def _remaining(self, others: float) -> str:
        if self.done >= self.total:
            return "0:00:00"
        if not self._recent:
            return "?"
        # The first one compiles and warms up: it counts only as long as there is no other.
        is_first_there = 1 < len(self._recent) < _RECENT
        recent = list(self._recent)[is_first_there:]
        seconds = int(sum(recent) / len(recent) * (self.total - self.done) + others)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
