"""Trackio: a database on this machine (in TRACKIO_DIR, if that is set), which `trackio show` shows. Needs no network."""

import io
import uuid
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from finetune.runtime.files import writing
from finetune.tracking.names import grouped
from finetune.tracking.packages import imported


class Trackio:
    """A run of the project. A resumed run continues under the same name, which is unique."""

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        """
        Args:
            folder: the run's, for the note of its name in Trackio.
            config: the recipe's values.
        Raises:
            UserError: the package is missing.
        """
        self._trackio = imported("trackio", "trackio")
        marker = folder / "trackio_run"
        # Trackio knows a run by its name alone.
        run = marker.read_text().strip() if marker.exists() else f"{name}-{uuid.uuid4().hex[:8]}"
        quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        with redirect_stdout(io.StringIO()):
            self.run = self._trackio.init(project=project, name=run, config=dict(config), resume="allow", **quiet)
        with writing(marker):
            marker.write_text(run)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({grouped(name): value for name, value in values.items()}, step=step)

    def log_videos(self, step: int, videos: Sequence[tuple[str, Path]], sheet: Path) -> None:
        media = {"samples/sheet": self._trackio.Image(str(sheet))}
        for label, path in videos:
            kind = self._trackio.Image if path.suffix == ".png" else self._trackio.Video
            media[f"samples/{path.stem}"] = kind(str(path), caption=label)
        self.run.log(media, step=step)

    def close(self, failed: bool) -> None:
        with redirect_stdout(io.StringIO()):
            self.run.finish()
