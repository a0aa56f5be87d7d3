"""The run's folder: who holds it, the recipes that it was started with, and the results that are in it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.checks.output import check_output, has_checkpoints, read_saved
from finetune.engine.weights.best import RECORD, HeldOutRecord
from finetune.engine.weights.exporters import exporter_of
from finetune.models.family import Family
from finetune.preparation.encode import Prepared
from finetune.recipe import RECIPE_FILE, Recipe, write_recipe
from finetune.recipe.load import changes
from finetune.runtime.files import FolderLock, atomic, free_name, read_note, writing
from finetune.runtime.logging import say
from finetune.training.identity import CLIPS, other_adapters, other_base, prepared_identity
from finetune.training.job import Job, checkpoints_folder, write_weights
from finetune.training.samples import SHEET, forget_samples, has_prompts, has_samples, samples_folder

STARTS, RESULTS, FORMS = "starts", "results.json", "forms"
_OLDER = {"precision": None, "average": False}  # of forms whose note does not tell


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


def keep_recipe(recipe: Recipe, done: int) -> Path:
    """Write the effective recipe of a start that goes ahead: as recipe.toml, and for good among the run's starts.

    Args:
        done: the step after which it starts.
    Returns:
        the path among the starts.
    """
    starts = recipe.run_folder / STARTS
    with writing(starts):
        starts.mkdir(exist_ok=True)
    kept = free_name(starts / f"after_step_{done:08d}.toml")
    for path in (kept, recipe.run_folder / RECIPE_FILE):
        with atomic(path) as partial:
            write_recipe(recipe, partial, f"The effective recipe of a start of this run, after step {done}.")
    return kept


def is_over(recipe: Recipe, family: Family, prepared: Prepared) -> bool:
    """Whether a run of these clips and weights has all its results and the checkpoint of its last step, as far as its folder shows
    without any weights.
    """
    steps = ended_at(recipe)
    if prepared.prompts and recipe.validation.samples_at_end and not (samples_folder(recipe, steps) / SHEET).is_file():
        return False
    try:
        facts = json.loads(_trainer_file(recipe, steps).read_text())
        found = prepared_identity(recipe, family, prepared)
        continues = facts[CLIPS] == found[CLIPS] and not (other_base(facts, found) or other_adapters(facts, found))
    except (OSError, ValueError, KeyError, TypeError):
        return False  # a start of the run says what is wrong
    return continues and not _missing(recipe, family, steps)


def ended_at(recipe: Recipe) -> int:
    """The step whose weights a run has exported, if the held-out loss ended it there; else the recipe's last."""
    noted, record = read_note(recipe.run_folder / RESULTS), HeldOutRecord()
    step = noted.get("step")
    if not isinstance(step, int):
        return recipe.train.steps
    # Older runs have the record in the checkpoint alone, which may have been removed.
    record.restore(noted if RECORD in noted else read_note(_trainer_file(recipe, step)))
    return step if record.is_over(recipe.validation.patience) else recipe.train.steps


def _trainer_file(recipe: Recipe, step: int) -> Path:
    return checkpoints_folder(recipe) / f"step_{step:08d}" / "trainer.json"


def results_folder(recipe: Recipe, family: Family) -> Path:
    """The folder of the weights that a run exports: that of the run's own form, or of the first that the recipe names."""
    folders = results_folders(recipe, family)
    own = exporter_of(recipe.train.method)
    return folders[own.format] if own.format in folders else next(iter(folders.values()))


def results_folders(recipe: Recipe, family: Family) -> dict[str, Path]:
    """The folder of each form that a run's end writes, by the form's name in the recipe."""
    formats = dict.fromkeys(recipe.export.formats)
    exporters = {name: exporter_of(recipe.train.method, name) for name in formats}
    return {name: (recipe.run_folder / each.folder(family)).absolute() for name, each in exporters.items()}


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
        is_sampled = has_prompts(self.job) and self.job.recipe.validation.samples_at_end
        sampled = not is_sampled or has_samples(self.job, steps)
        missing = _missing(self.job.recipe, self.job.state.family, steps)
        return not self.job.state.runtime.from_main(missing) and sampled

    def forget(self, done: int) -> None:
        """No longer take what is there for results: steps after `done` are made, perhaps anew after going back. Collective."""
        runtime = self.job.state.runtime
        with runtime.together(), writing(self._note):
            if runtime.is_main:
                self._note.unlink(missing_ok=True)
                forget_samples(self.job, done)

    def export(self) -> Path:
        """Write the trained weights in all forms that are not there; returns the first folder. Collective."""
        recipe, state = self.job.recipe, self.job.state
        steps, runtime = self.job.end, state.runtime
        folders = results_folders(recipe, state.family)
        for name in runtime.from_main(_missing(recipe, state.family, steps)):
            details = replace(self.job.details(steps), precision=recipe.export.precision)
            with writing(folders[name]):
                write_weights(state, exporter_of(recipe.train.method, name), folders[name], details)
            with runtime.together():
                if runtime.is_main:
                    self._add_note(folders[name], steps)
        return self.folder

    def _add_note(self, folder: Path, step: int) -> None:
        """Note what has been written, so that the next start knows whether it is still there."""
        recipe, noted = self.job.recipe, read_note(self._note)
        forms = noted.get(FORMS, {}) if noted.get("step") == step else {}
        forms[folder.name] = {**_settings(recipe), "files": _sizes(folder)}
        with atomic(self._note) as partial:
            partial.write_text(json.dumps({"step": step, **self.job.record.facts(step), FORMS: forms}))


def noted_results(recipe: Recipe, family: Family) -> tuple[int | None, dict[str, dict[str, Any]]]:
    """(the step that a run has exported, None if it has no results; what was noted of each form, by its folder's name).

    A form's note has the sizes of its "files" by their names, and the settings that it was written with.
    """
    noted = read_note(recipe.run_folder / RESULTS)
    if "step" not in noted:
        return None, {}
    own = exporter_of(recipe.train.method).folder(family)
    # Older runs have noted the run's own form alone, or no files.
    return noted["step"], noted.get(FORMS) or {own: {"files": noted.get("files", {})}}


def _missing(recipe: Recipe, family: Family, step: int) -> list[str]:
    """The forms in which the weights of the run's last step are not there: every file that was noted, in its size."""
    folders = results_folders(recipe, family)
    of_step, forms = noted_results(recipe, family)
    if of_step != step:
        return list(folders)
    return [name for name, folder in folders.items() if not _is_there(folder, forms.get(folder.name), recipe)]


def _is_there(folder: Path, noted: dict[str, Any] | None, recipe: Recipe) -> bool:
    if noted is None or not folder.is_dir() or {**_OLDER, **noted} != {**noted, **_settings(recipe)}:
        return False
    return dict(noted["files"]).items() <= _sizes(folder).items()


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What may change from start to start, and makes other files of the same trained weights."""
    is_average = recipe.ema.decay is not None and "export" in recipe.ema.use
    return {"precision": recipe.export.precision, "average": is_average}


def _sizes(folder: Path) -> dict[str, int]:
    """The bytes of each exported file, by name."""
    return {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
