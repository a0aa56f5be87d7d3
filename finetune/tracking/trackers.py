"""Trackers of metrics and videos behind one small interface: `log`, `log_videos` and `close`."""

import importlib
import json
import netrc
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from finetune.recipe.schema import Tracking
from finetune.runtime.errors import Problem, UserError
from finetune.runtime.files import writing
from finetune.runtime.logging import say

METRICS_FILE = "metrics.jsonl"
_PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
_PATIENCE = 60.0  # seconds after which a tracker that has failed is tried again
_MOST_WAITING = 100_000  # entries that are kept for it


class Tracker(Protocol):
    """A destination of metrics. Steps are counted from 1, the first optimizer step; step 0 is the base model."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def log_videos(self, step: int, videos: Sequence[tuple[str, Path]], sheet: Path) -> None:
        """Log generated videos as (label, mp4 file), and a PNG that shows all of them."""

    def close(self, failed: bool) -> None:
        """End the record of a run, which has failed or is done."""


class Patient:
    """A tracker of a service that may fail. Its failures never reach the training: they are said once, what could not be logged is
    kept, and tried again after a while. `metrics.jsonl` has everything in any case.
    """

    def __init__(self, tracker: Tracker, name: str) -> None:
        self.tracker, self.name = tracker, name
        self._waiting: deque[Callable[[], None]] = deque(maxlen=_MOST_WAITING)
        self._try_again = 0.0
        self._is_said = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._do(partial(self.tracker.log, step, dict(values)))

    def log_videos(self, step: int, videos: Sequence[tuple[str, Path]], sheet: Path) -> None:
        self._do(partial(self.tracker.log_videos, step, list(videos), sheet))

    def close(self, failed: bool) -> None:
        self._try_again = 0.0
        self._do(partial(self.tracker.close, failed))
        if self._waiting:
            say(f"warning: {self.name} lacks {len(self._waiting)} entries of this run; metrics.jsonl has them")

    def _do(self, call: Callable[[], None]) -> None:
        self._waiting.append(call)
        if time.monotonic() < self._try_again:
            return
        try:
            while self._waiting:
                self._waiting[0]()
                self._waiting.popleft()
        except Exception as error:  # whatever a service, a network or a full disk makes of it
            self._try_again = time.monotonic() + _PATIENCE
            if not self._is_said:
                self._is_said = True
                reason = str(error).partition("\n")[0] or type(error).__name__
                say(
                    f"warning: {self.name} fails ({reason}); the training goes on, and what is missing there is tried again: "
                    "metrics.jsonl has everything"
                )


class JsonLines:
    """metrics.jsonl: one object per line, with "step" and the values. A resumed run drops the lines after its checkpoint."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Raises UserError if the file of a resumed run holds anything but rows of metrics."""
        # A run that does not resume from a checkpoint begins at step 0 and keeps no old lines.
        kept = [row for row in read_metrics(path) if row["step"] <= first_step] if first_step and path.exists() else []
        partial = path.with_name(f".partial-{path.name}")
        partial.write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")
        partial.replace(path)
        self.file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")

    def log_videos(self, step: int, videos: Sequence[tuple[str, Path]], sheet: Path) -> None:
        self.log(step, {"samples": str(sheet.parent)})

    def close(self, failed: bool = False) -> None:
        self.file.close()


class TensorBoard:
    """Event files in `tensorboard/`."""

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _import_error("tensorboard", error) from None
        with writing(folder):
            self.writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_videos(self, step: int, videos: Sequence[tuple[str, Path]], sheet: Path) -> None:
        self.writer.add_image("samples", np.asarray(Image.open(sheet)), step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases; WANDB_MODE=offline works without a network. A resumed run continues under the same id, and one that
    fails ends as crashed there.
    """

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _import_error("wandb", error) from None
        marker = folder / "wandb_id"
        run_id = marker.read_text().strip() if marker.exists() else uuid.uuid4().hex[:8]
        try:
            self.run = wandb.init(
                project=project,
                name=name,
                id=run_id,
                resume="allow",
                dir=str(folder),
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"W&B cannot start ({error})",
                "log in with `wandb login`, or set WANDB_MODE=offline",
                "tracking.trackers",
            ) from error
        marker.write_text(run_id)
        if self.run.url:
            say(f"W&B: {self.run.url}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def log_videos(self, step: int, videos: Sequence[tuple[str, Path]], sheet: Path) -> None:
        import wandb

        files = [wandb.Video(str(path), caption=label, format="mp4") for label, path in videos]
        self.run.log({"samples": files, "contact_sheet": wandb.Image(str(sheet))}, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=1 if failed else 0)


def open_trackers(settings: Tracking, folder: Path, config: Mapping[str, Any], first_step: int) -> list[Tracker]:
    """Open metrics.jsonl and the trackers that the recipe names.

    Args:
        folder: where files are written; its name is the run's default name in W&B.
        config: the recipe's values, for W&B.
        first_step: the step after which the run resumes; 0 for a new run.
    Raises:
        UserError: a tracker's package is missing, W&B cannot start, or an old metrics.jsonl cannot be read.
    """
    trackers: list[Tracker] = []
    with writing(folder):
        trackers.append(JsonLines(folder / METRICS_FILE, first_step))
    if "tensorboard" in settings.trackers:
        trackers.append(Patient(TensorBoard(folder / "tensorboard", first_step), "TensorBoard"))
    if "wandb" in settings.trackers:
        trackers.append(Patient(WandB(folder, settings.project, settings.name or folder.name, config), "W&B"))
    return trackers


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


def tracker_problems(names: Sequence[str]) -> Iterator[Problem]:
    """Why a run with these trackers could not start: packages that cannot be imported, and W&B without a key to log in with."""
    for name in names:
        try:
            importlib.import_module(_PACKAGES[name])
        except ImportError as error:
            yield from _import_error(name, error).problems
        else:
            if name == "wandb" and _lacks_login():
                yield Problem(
                    "W&B has no key to log in with", "tracking.trackers", "run `wandb login`, or set WANDB_MODE=offline"
                )


def _import_error(package: str, error: ImportError) -> UserError:
    """The package is not there, or one that it needs is not, or is too old."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package:
        what = f"{package} is not installed"
    else:
        what = f"{package} is installed, but cannot be imported ({error})"
    return UserError(what, f'in the checkout: pip install -e ".[{package}]"', "tracking.trackers")


def _lacks_login() -> bool:
    """Whether W&B would ask for a login: it is to be online, and has no key in the environment or the netrc file."""
    if os.environ.get("WANDB_MODE", "online") != "online":
        return False
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return False
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for file in map(Path, filter(None, [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"])):
        with suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(str(file.expanduser())).authenticators(host):
                return False
    return True
