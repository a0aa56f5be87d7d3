"""Which trainer's settings some files have, and the recipe that is made of them."""

from collections.abc import Sequence
from types import ModuleType

from finetune.importers import ai_toolkit, cogvideox_factory, diffusion_pipe, finetrainers, musubi, simpletuner
from finetune.importers.draft import Draft
from finetune.importers.sources import read_source
from finetune.runtime.errors import UserError

# Each module has NAME, READS (what it reads, in words), `fits(sources)`, and `convert(draft, sources)`.
TRAINERS: tuple[ModuleType, ...] = (cogvideox_factory, finetrainers, diffusion_pipe, musubi, ai_toolkit, simpletuner)


def import_files(paths: Sequence[str], gpus: int | None = None, clips: int | None = None) -> Draft:
    """Read the settings of another trainer.

    Args:
        paths: its files; "-" is the standard input. Files that these name are read, too, where they lie.
        gpus: how many GPUs it was started on, if the files do not say it, or say it wrongly.
        clips: how many clips there are, where epochs are counted.
    Raises:
        UserError: a file cannot be read, is of no known trainer, or has a setting that no recipe can have.
    """
    sources = [read_source(path) for path in paths]
    for trainer in TRAINERS:
        if trainer.fits(sources):
            draft = Draft(trainer.NAME, clips=clips)
            draft.gpus = gpus or 0
            trainer.convert(draft, sources)
            _settle(draft)
            for source in sources:
                if not source.is_used:
                    draft.drop(f"the file {source.file}", f"nothing of it is read for {trainer.NAME}")
            return draft
    known = "; ".join(f"{trainer.NAME}: {trainer.READS}" for trainer in TRAINERS)
    raise UserError("no trainer is known that has such settings", f"what is read: {known}", ", ".join(paths))


def _settle(draft: Draft) -> None:
    """Take back what has no effect beside the rest, and say which models lie in another layout than that of diffusers."""
    if not draft.get("validation.prompts"):
        draft.take_back("validation.samples_every", "there are no prompts that samples could be made of")
    if not set(draft.get("tracking.trackers", [])) & {"wandb", "mlflow", "trackio"}:
        for key in ("tracking.project", "tracking.name"):
            draft.take_back(key, "it is for W&B, MLflow and Trackio, and none of them is on")
    path = str(draft.get("model.path", ""))
    if path.startswith(("tencent/", "Wan-AI/")) and "diffusers" not in path.lower():
        draft.todo.append(
            f"model.path: {path} may be in the layout of its authors; take its sister in that of diffusers"
        )
