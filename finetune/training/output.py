"""The run's folder: who holds it, the recipes that it was started with, and the results that are in it."""

import json
from pathlib import Path
from typing import Any

from finetune.checks.output import check_output, has_checkpoints, read_saved
from finetune.engine.weights.best import HeldOutRecord
from finetune.engine.weights.exporters import exporter_of
from finetune.models.family import Family
from finetune.preparation.encode import Prepared
from finetune.recipe import RECIPE_FILE, Recipe, write_recipe
from finetune.recipe.load import changes
from finetune.runtime.files import FolderLock, atomic, free_name, writing
from finetune.runtime.logging import say
from finetune.training.identity import CLIPS, other_base, prepared_identity
from finetune.training.job import Job, checkpoints_folder, export_weights
from finetune.training.samples import SHEET, forget_samples, has_prompts, has_samples, samples_folder

STARTS, RESULTS = "starts", "results.json"


def claim_output(recipe: Recipe) -> FolderLock:
    """Lock the output folder; say what has changed since its last start.

    Raises:
        UserError: another process holds it, or has begun another training in it in the meantime.
    """
    saved = recipe.run_folder / RECIPE_FILE
    with writing(recipe.run_folder):
        recipe.run_folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(recipe.run_folder)
    check_output(recipe)
    if not saved.exists() and has_checkpoints(recipe):
        say(f"warning: {saved} is gone, so settings that have changed since its checkpoints were made are not noticed")
    if saved.exists():
        for change in changes(recipe, read_saved(saved)):
            say(f"changed since the last start: {change}")
    return lock


def keep_recipe(recipe: Recipe, done: int) -> None:
    """Write the effective recipe of a start that goes ahead: as recipe.toml, and for good among the run's starts.

    Args:
        done: the step after which it starts.
    """
    starts = recipe.run_folder / STARTS
    with writing(starts):
        starts.mkdir(exist_ok=True)
    for path in (free_name(starts / f"after_step_{done:08d}.toml"), recipe.run_folder / RECIPE_FILE):
        with atomic(path) as partial:
            write_recipe(recipe, partial, f"The effective recipe of a start of this run, after step {done}.")


def is_over(recipe: Recipe, family: Family, prepared: Prepared) -> bool:
    """Whether a run of these clips and weights has all its results and the checkpoint of its last step, as far as its folder shows
    without any weights.
    """
    steps = _ended_at(recipe)
    if prepared.prompts and not (samples_folder(recipe, steps) / SHEET).is_file():
        return False
    try:
        facts = json.loads((checkpoints_folder(recipe) / f"step_{steps:08d}" / "trainer.json").read_text())
        found = prepared_identity(family, prepared)
        continues = facts[CLIPS] == found[CLIPS] and not other_base(facts, found)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # a start of the run says what is wrong
    return continues and _are_exported(recipe, results_folder(recipe, family), steps)


def _ended_at(recipe: Recipe) -> int:
    """The step whose weights a run has exported, if the held-out loss ended it there; else the recipe's last."""
    step, record = _noted(recipe.run_folder / RESULTS).get("step"), HeldOutRecord()
    if isinstance(step, int):
        facts = _noted(checkpoints_folder(recipe) / f"step_{step:08d}" / "trainer.json")
        record.restore(facts)
    return record.step if record.is_over(recipe.validation.patience) else recipe.train.steps


def results_folder(recipe: Recipe, family: Family) -> Path:
    """The folder of the weights that a run exports."""
    return (recipe.run_folder / exporter_of(recipe.train.method).folder(family)).absolute()


class Results:
    """What is left of a run that has made all its steps: the exported weights, and samples of its prompts.

    The weights' step is noted beside them, since the folder of an earlier end, of fewer steps, has the same name.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.folder = results_folder(job.recipe, job.state.family)
        self._note = job.recipe.run_folder / RESULTS

    def are_complete(self) -> bool:
        """Whether all are there, after the recipe's last step. Collective."""
        steps = self.job.end
        sampled = not has_prompts(self.job) or has_samples(self.job, steps)
        return self.job.state.runtime.from_main(_are_exported(self.job.recipe, self.folder, steps)) and sampled

    def forget(self, done: int) -> None:
        """No longer take what is there for results: steps after `done` are made, perhaps anew after going back. Collective."""
        runtime = self.job.state.runtime
        with runtime.together(), writing(self._note):
            if runtime.is_main:
                self._note.unlink(missing_ok=True)
                forget_samples(self.job, done)

    def export(self) -> Path:
        """Write the trained weights, unless they are there; returns their folder. Collective."""
        steps, runtime = self.job.end, self.job.state.runtime
        if runtime.from_main(_are_exported(self.job.recipe, self.folder, steps)):
            return self.folder
        with writing(self.folder):
            export_weights(self.job.state, self.job.recipe.train.method, self.folder)
        with runtime.together():
            if runtime.is_main:
                with atomic(self._note) as partial:
                    partial.write_text(json.dumps({"step": steps, "files": _sizes(self.folder)}))
        return self.folder


def _are_exported(recipe: Recipe, folder: Path, step: int) -> bool:
    """Whether the weights of the run's last step are there: every file that was noted, in its size."""
    noted = _noted(recipe.run_folder / RESULTS)
    if noted.get("step") != step or not folder.is_dir():
        return False
    return dict(noted.get("files", {})).items() <= _sizes(folder).items()  # older runs have noted none


def _sizes(folder: Path) -> dict[str, int]:
    """The bytes of each exported file, by name."""
    return {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}


def _noted(note: Path) -> dict[str, Any]:
    try:
        noted = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}
