"""What a finished run has to show: the verified weights of its last step in all their forms, held-out losses, samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from finetune.checks.output import read_saved
from finetune.engine.weights.exporters import EXPORTERS, exporter_of
from finetune.engine.weights.exporters.exporter import Exporter
from finetune.models.family import Family
from finetune.recipe import RECIPE_FILE, Recipe, load_recipe
from finetune.recipe.experts import recipes_of_experts
from finetune.recipe.prompts import validation_prompts
from finetune.recipe.schema import ExpertName
from finetune.recipe.validation import Prompt
from finetune.runtime.errors import UserError
from finetune.runtime.files import read_note
from finetune.runtime.units import counted
from finetune.tracking.metrics import METRICS_FILE, read_metrics
from finetune.training.identity import CLIP_LIST, DIGITS
from finetune.training.job import checkpoints_folder
from finetune.training.output import ended_at, noted_results
from finetune.training.samples import SHEET, sample_name, samples_folder

_AGAIN = "start the training again with the same command: of a finished run it makes what is missing, and verifies it"


@dataclass(frozen=True)
class Form:
    """A form of exported weights: what wrote it, its folder, and the files in it that were verified."""

    exporter: Exporter
    folder: Path
    files: list[Path]


@dataclass(frozen=True)
class Trained:
    """A trained transformer, with its recipe and family as those of the one expert that it is, if it is one.

    Attributes:
        forms: of its weights, the run's own form first if it is there.
        clips: how many clips, or pieces of clips, it was trained on; None if no checkpoint says so.
        heldout: (step, held-out loss, that of predicting zero) of each measurement, by step.
    """

    recipe: Recipe
    family: Family
    forms: list[Form]
    clips: int | None
    heldout: list[tuple[int, float, float]]


@dataclass(frozen=True)
class FinalSample:
    """A video, or an image, of one of the recipe's prompts after the last step; with its strength where that is told."""

    prompt: str
    seed: int
    strength: float | None
    file: Path


def recipe_of_run(run: Path, overrides: list[str]) -> Recipe:
    """The recipe that a run keeps of itself, with the run's folder as `output`, wherever it lies now.

    Raises:
        UserError: there is no run in the folder, or its recipe is damaged.
    """
    saved = run / RECIPE_FILE
    if not saved.is_file():
        experts = [str(run / name) for name in get_args(ExpertName) if (run / name / RECIPE_FILE).is_file()]
        cure = f"give the folder of an expert: {' or '.join(experts)}" if experts else "give the run's output folder"
        raise UserError(f"there is no {RECIPE_FILE} of a run in it", cure, str(run))
    recipe = load_recipe(saved, overrides) if overrides else read_saved(saved)
    experts_named = recipe.model.experts or []
    is_experts = len(experts_named) == 1 and run.absolute().name == experts_named[0]
    return recipe.model_copy(update={"output": run.absolute().parent if is_experts else run})


def trained_of(recipe: Recipe, family: Family) -> list[Trained]:
    """Every transformer that a finished run has trained, in the order in which they denoise.

    Raises:
        UserError: the run is not finished, or its weights are not those that were verified.
    """
    found = []
    for each in recipes_of_experts(recipe, list(family.experts)):
        own = family.of_expert(each.model.experts[0]) if each.model.experts else family
        found.append(Trained(each, own, _forms(each, own), _clips(each), _heldout(each.run_folder)))
    return found


def samples_of(trained: list[Trained]) -> tuple[list[FinalSample], Path | None]:
    """The samples after the last step, in the order of prompts, and their contact sheet. Of two experts, those made with both."""
    for each in reversed(trained):  # the last that was trained
        folder = samples_folder(each.recipe, ended_at(each.recipe))
        if not (folder / SHEET).is_file():
            continue
        found = [
            FinalSample(prompt.text, seed, strength, file)
            for index, prompt in enumerate(validation_prompts(each.recipe.validation, each.recipe.data.sample_shape))
            for seed in prompt.seeds
            for strength in (prompt.strengths if _is_told(each.recipe, prompt) else [None])
            for name in [sample_name(index, seed, strength)]
            for file in sorted(folder.glob(f"{name}.*"))
            if file.stem == name
        ]
        return found, folder / SHEET
    return [], None


def _is_told(recipe: Recipe, prompt: Prompt) -> bool:
    return recipe.train.method == "lora" and prompt.strengths != [1.0]


def _forms(recipe: Recipe, family: Family) -> list[Form]:
    """Raises UserError unless every form that was noted when it was verified is there, file by file in its size."""
    steps = ended_at(recipe)
    step, forms = noted_results(recipe, family)
    if step != steps:
        at = "it has no results" if step is None else f"its results are of step {step}"
        cure = "train it to its end with the same command, which exports and verifies the weights"
        raise UserError(
            f"this run is not finished: {at}, and the recipe has {counted(steps, 'step')}", cure, str(recipe.run_folder)
        )
    own = exporter_of(recipe.train.method).folder(family)
    exporters = {e.folder(family): e for e in reversed(EXPORTERS.values()) if e.method == recipe.train.method}
    found = []
    for name, noted in sorted(forms.items(), key=lambda form: form[0] != own):
        folder, sizes = recipe.run_folder / name, dict(noted["files"])
        files = [folder / file for file in sizes] or [*folder.glob("*.safetensors"), *folder.glob("*.json")]
        for file in files:
            if not file.is_file() or file.stat().st_size != sizes.get(file.name, file.stat().st_size):
                raise UserError("this file is not as it was when the weights were verified", _AGAIN, str(file))
        if not files:
            raise UserError("there are no exported weights in it", _AGAIN, str(folder))
        found.append(Form(exporters.get(name, exporter_of(recipe.train.method)), folder, sorted(files)))
    return found


def _clips(recipe: Recipe) -> int | None:
    file = checkpoints_folder(recipe) / f"step_{ended_at(recipe):08d}" / "trainer.json"
    listed = read_note(file).get(CLIP_LIST)
    return len(listed) // DIGITS if isinstance(listed, str) else None


def _heldout(run: Path) -> list[tuple[int, float, float]]:
    metrics = run / METRICS_FILE
    rows = read_metrics(metrics) if metrics.is_file() else []
    found = {row["step"]: (row["heldout_loss"], row["heldout_zero_loss"]) for row in rows if "heldout_loss" in row}
    return [(step, *losses) for step, losses in sorted(found.items())]
