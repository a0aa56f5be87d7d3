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
from finetune.runtime.files import atomic, writing
from finetune.runtime.logging import say

METRICS_FILE = "metrics.jsonl"
_PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
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
            lost = f"{len(self._waiting)} rows of metrics are lost ({error.problems[0].what})"
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
        with writing(marker):
            marker.write_text(run_id)
        if self.run.url:
            say(f"W&B: {self.run.url}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def log_videos(self, step: int, videos: Sequence[tuple[str, Path]], sheet: Path) -> None:
        import wandb

        images = [wandb.Image(str(path), caption=label) for label, path in videos if path.suffix == ".png"]
        files = [wandb.Video(str(path), caption=label, format="mp4") for label, path in videos if path.suffix != ".png"]
        made = {"samples": files, "sample_images": images}  # W&B takes one kind of media under a name
        shown = {name: media for name, media in made.items() if media}
        self.run.log(shown | {"contact_sheet": wandb.Image(str(sheet))}, step=step)

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
    trackers: list[Tracker] = [JsonLines(folder / METRICS_FILE, first_step)]
    if "tensorboard" in settings.trackers:
        trackers.append(Retrying(TensorBoard(folder / "tensorboard", first_step), "TensorBoard"))
    if "wandb" in settings.trackers:
        trackers.append(Retrying(WandB(folder, settings.project, settings.name or folder.name, config), "W&B"))
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
    """Whether W&B would ask for a login: by its settings it is to be online, and there is no key in them or in a netrc file."""
    import wandb

    settings = wandb.setup().settings  # of its files, too: `wandb offline` and `wandb login --host` write there
    if settings.mode != "online" or settings.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return False
    hosts = {urlsplit(settings.base_url).hostname}
    if settings.base_url == wandb.Settings().base_url:
        hosts.add("api.wandb.ai")  # the default's name in netrc, whatever it is called since
    for file in map(Path, filter(None, [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"])):
        with suppress(OSError, netrc.NetrcParseError):
            entries = netrc.netrc(str(file.expanduser()))
            if any(host and entries.authenticators(host) for host in hosts):
                return False
    return True
