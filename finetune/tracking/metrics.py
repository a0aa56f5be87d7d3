"""metrics.jsonl: every figure of a run, whatever else tracks it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.runtime.errors import UserError
from finetune.runtime.files import atomic, writing
from finetune.runtime.logging import say
from finetune.runtime.units import counted

METRICS_FILE = "metrics.jsonl"


class JsonLines:
    """metrics.jsonl: one object per line, with "step" and the values. A resumed run drops the lines after its checkpoint.

    While the file cannot be written the training goes on, and its lines are kept and written once they can be.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        """Raises UserError if the file of a resumed run holds anything but rows of metrics, or cannot be written."""
        # A run that does not resume from a checkpoint begins at step 0 and keeps no old lines.
        kept = [row for row in read_metrics(path) if row["step"] <= first_step] if first_step and path.exists() else []
        with atomic(path) as partial:
            partial.write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")
        self.path = path
        self._waiting: list[str] = []
        self._is_said = False

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        self._waiting.append(json.dumps({"step": step, **values}) + "\n")
        try:
            self._write()
        except UserError as error:
            if not self._is_said:
                self._is_said = True
                say(f"warning: the training goes on, and its metrics are written once they can be: {error}")
            return
        if self._is_said:
            self._is_said = False
            say(f"{self.path} is complete again")

    def log_videos(self, step: int, videos: Sequence[tuple[str, Path]], sheet: Path) -> None:
        self.log(step, {"samples": str(sheet.parent)})

    def close(self, failed: bool = False) -> None:
        """Raises UserError if lines of a run that has not failed are lost."""
        if not self._waiting:
            return
        try:
            self._write()
        except UserError as error:
            lost = f"lost: {counted(len(self._waiting), 'row')} of metrics ({error.problems[0].what})"
            if not failed:
                cure = "nothing else is; --resume-step makes their steps again"
                raise UserError(lost, cure, str(self.path)) from None
            say(f"warning: {self.path}: {lost}")

    def _write(self) -> None:
        """Write all lines that wait, or none. Raises UserError."""
        text = "".join(self._waiting).encode()
        # Opened each time: the file may have been moved, and a buffer would keep what could not be written.
        with writing(self.path), self.path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                while text:
                    text = text[file.write(text) :]
            except OSError:
                file.truncate(end)
                raise
        self._waiting.clear()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, each a dict with "step".

    A last line that was cut short by a kill is ignored, and so are zero bytes, which a crash of the machine can leave.

    Raises:
        UserError: names the first line that is no such row.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        if not (line := line.strip("\0 \r")):
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(
                f"not a row of metrics: {line[:60]!r}", "remove the line, then try again", f"{path}, line {number}"
            )
        rows.append(row)
    return rows


def check_metrics(folder: Path, first_step: int) -> None:
    """Raise UserError if a run cannot go on with the metrics.jsonl of its folder, before anything there is changed."""
    if first_step and (folder / METRICS_FILE).exists():
        read_metrics(folder / METRICS_FILE)
