"""Trackers of metrics and videos behind one small interface: `log`, `log_videos` and `close`."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import tomli_w

from finetune.recipe.schema import Tracking
from finetune.runtime.errors import Problem, UserError
from finetune.runtime.logging import say
from finetune.tracking.metrics import METRICS_FILE, JsonLines
from finetune.tracking.mlflow import MLflow
from finetune.tracking.packages import imported
from finetune.tracking.tensorboard import TensorBoard
from finetune.tracking.trackio import Trackio
from finetune.tracking.wandb import WandB, lacks_login

_PACKAGES = {
    "tensorboard": "torch.utils.tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}
_PATIENCE = 60.0  # seconds after which a tracker that has failed is tried again
_MOST_WAITING = 100_000  # entries that are kept for it


class Tracker(Protocol):
    """A destination of metrics. Steps are counted from 1, the first optimizer step; step 0 is the base model."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def log_videos(self, step: int, videos: Sequence[tuple[str, Path]], sheet: Path) -> None:
        """Log generated videos as (label, mp4 file; PNG of a single frame), and a PNG that shows all of them."""

    def close(self, failed: bool) -> None:
        """End the record of a run, which has failed or is done."""


class Retrying:
    """A tracker of a service that may fail. Its failures never reach the training: they are said once, and what could not be logged
    is kept and tried again after a while, and at the end. `metrics.jsonl` has everything in any case.
    """

    def __init__(self, tracker: Tracker, name: str) -> None:
        self.tracker, self.name = tracker, name
        self._waiting: deque[Callable[[], None]] = deque()
        self._failed_before: Callable[[], None] | None = None
        self._try_again = 0.0
        self._lost = 0  # entries that are not tried any more
        self._is_said = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._do(partial(self.tracker.log, step, dict(values)))

    def log_videos(self, step: int, videos: Sequence[tuple[str, Path]], sheet: Path) -> None:
        self._do(partial(self.tracker.log_videos, step, list(videos), sheet))

    def close(self, failed: bool) -> None:
        in_vain = 0
        while self._waiting and in_vain < 2:
            count = len(self._waiting)
            self._send()
            in_vain = in_vain + 1 if len(self._waiting) == count else 0
        if lost := self._lost + len(self._waiting):
            say(f"warning: {self.name} lacks {lost} entries of this run; metrics.jsonl has them")
        self._has_worked(partial(self.tracker.close, failed))

    def _do(self, call: Callable[[], None]) -> None:
        self._waiting.append(call)
        if len(self._waiting) > _MOST_WAITING:
            self._lost += 1
            self._waiting.popleft()
        if time.monotonic() >= self._try_again:
            self._send()

    def _send(self) -> None:
        """Log what waits, up to the first entry that fails. One that fails again, where the next one does not, is left out."""
        while self._waiting:
            entry = self._waiting[0]
            if self._has_worked(entry):
                self._waiting.popleft()
            elif entry is self._failed_before and len(self._waiting) > 1 and self._has_worked(self._waiting[1]):
                self._lost += 1
                self._waiting.popleft()
                self._waiting.popleft()
            else:
                self._failed_before, self._try_again = entry, time.monotonic() + _PATIENCE
                return

    def _has_worked(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # whatever a service, a network or a full disk makes of it
            if not self._is_said:
                self._is_said = True
                reason = str(error).partition("\n")[0] or type(error).__name__
                say(
                    f"warning: {self.name} fails ({reason}); the training goes on, and what is missing there is tried again: "
                    "metrics.jsonl has everything"
                )
            return False
        return True


def open_trackers(settings: Tracking, folder: Path, config: Mapping[str, Any], first_step: int) -> list[Tracker]:
    """Open metrics.jsonl and the trackers that the recipe names.

    Args:
        folder: where files are written; its name is the run's default name in services.
        config: the recipe's values.
        first_step: the step after which the run resumes; 0 for a new run.
    Raises:
        UserError: a tracker's package is missing, a service cannot start, or an old metrics.jsonl cannot be read.
    """
    trackers: list[Tracker] = [JsonLines(folder / METRICS_FILE, first_step)]
    project, name, text = settings.project, settings.name or folder.name, tomli_w.dumps(dict(config))
    if "tensorboard" in settings.trackers:
        trackers.append(Retrying(TensorBoard(folder / "tensorboard", text, first_step), "TensorBoard"))
    if "wandb" in settings.trackers:
        trackers.append(Retrying(WandB(folder, project, name, config), "W&B"))
    if "mlflow" in settings.trackers:
        trackers.append(Retrying(MLflow(folder, project, name, text), "MLflow"))
    if "trackio" in settings.trackers:
        trackers.append(Retrying(Trackio(folder, project, name, config), "Trackio"))
    return trackers


def tracker_problems(names: Sequence[str]) -> Iterator[Problem]:
    """Why a run with these trackers could not start: packages that cannot be imported, and W&B without a key to log in with."""
    for name in names:
        try:
            imported(_PACKAGES[name], name)
        except UserError as error:
            yield from error.problems
        else:
            if name == "wandb" and lacks_login():
                yield Problem(
                    "W&B has no key to log in with", "tracking.trackers", "run `wandb login`, or set WANDB_MODE=offline"
                )
