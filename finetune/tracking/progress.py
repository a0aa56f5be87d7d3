"""The progress line of rank 0: a live bar in a terminal, a line every 15 seconds in a log file."""

import time

from finetune.runtime.logging import console, say

_SECONDS_BETWEEN_LINES = 15.0


class ProgressLine:
    """Shows how many of `total` are done, with a text. Nothing is shown unless `enabled`, which is meant for rank 0."""

    def __init__(self, label: str, total: int, done: int = 0, enabled: bool = True) -> None:
        self.label, self.total, self.done, self.enabled = label, total, done, enabled
        self.started, self.first, self.last_line = time.monotonic(), done, 0.0
        self.bar = None
        if enabled and console.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # not for a log file

            self.bar = Progress(
                TextColumn("{task.description}"),
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(bar_width=12),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=console,
            )
            self.bar.start()
            self.task = self.bar.add_task(label, total=total, completed=done, text="")

    def update(self, done: int, text: str) -> None:
        self.done = done
        if not self.enabled:
            return
        if self.bar:
            self.bar.update(self.task, completed=done, text=text)
            return
        now = time.monotonic()
        if done >= self.total or now - self.last_line > _SECONDS_BETWEEN_LINES:
            self.last_line = now
            say(f"{self.label} {done}/{self.total}  {text}  ETA {self._remaining(now)}")

    def close(self) -> None:
        if self.bar:
            self.bar.stop()

    def _remaining(self, now: float) -> str:
        progressed = self.done - self.first
        seconds = (now - self.started) / progressed * (self.total - self.done) if progressed else 0.0
        return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
