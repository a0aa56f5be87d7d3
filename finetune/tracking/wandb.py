"""Weights & Biases."""

import netrc
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finetune.runtime.errors import UserError
from finetune.runtime.files import writing
from finetune.runtime.logging import say
from finetune.tracking.packages import imported


class WandB:
    """Weights & Biases; WANDB_MODE=offline works without a network. A resumed run continues under the same id, and one that
    fails ends as crashed there.
    """

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        wandb = imported("wandb", "wandb")
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


def lacks_login() -> bool:
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
