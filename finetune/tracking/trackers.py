"""Trackers of metrics and videos behind one small interface: `log`, `log_videos` and `close`."""

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from finetune.recipe.schema import Tracking
from finetune.runtime.errors import UserError
from finetune.runtime.files import writing


class Tracker(Protocol):
    """A destination of metrics. Steps are counted from 1, the first optimizer step; step 0 is the base model."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def log_videos(self, step: int, videos: Sequence[tuple[str, Path]], sheet: Path) -> None:
        """Log generated videos as (label, mp4 file), and a PNG that shows all of them."""

    def close(self) -> None: ...


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

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Event files in `tensorboard/`."""

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _missing("tensorboard") from None
        self.writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_videos(self, step: int, videos: Sequence[tuple[str, Path]], sheet: Path) -> None:
        self.writer.add_image("samples", np.asarray(Image.open(sheet)), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases; WANDB_MODE=offline works without a network. A resumed run continues under the same id."""

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise _missing("wandb") from None
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

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def log_videos(self, step: int, videos: Sequence[tuple[str, Path]], sheet: Path) -> None:
        import wandb

        files = [wandb.Video(str(path), caption=label, format="mp4") for label, path in videos]
        self.run.log({"samples": files, "contact_sheet": wandb.Image(str(sheet))}, step=step)

    def close(self) -> None:
        self.run.finish()


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
        trackers.append(JsonLines(folder / "metrics.jsonl", first_step))
    if "tensorboard" in settings.trackers:
        trackers.append(TensorBoard(folder / "tensorboard", first_step))
    if "wandb" in settings.trackers:
        trackers.append(WandB(folder, settings.project, settings.name or folder.name, config))
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


def _missing(package: str) -> UserError:
    return UserError(
        f"{package} is not installed", f'in the checkout: pip install -e ".[{package}]"', "tracking.trackers"
    )
