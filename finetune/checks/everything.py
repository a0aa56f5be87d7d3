"""All checks of a recipe at once: settings, output folder, model folder, clips and condition images."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.checks.buckets import resolve_buckets
from finetune.checks.model import open_family
from finetune.checks.output import check_output
from finetune.checks.settings import check_device, check_recipe
from finetune.data.cache import Cache
from finetune.data.images import load_image, missing_image
from finetune.models.family import Family
from finetune.preparation.captions import CaptionCounter, captions_of, prompt_texts, say_cut_captions, say_prompt_notes
from finetune.preparation.columns import frames_without_loss, further_columns
from finetune.preparation.encode import encoders_of
from finetune.preparation.inspect import accept, inspect_datasets
from finetune.preparation.report import write_report
from finetune.recipe import Recipe
from finetune.recipe.experts import recipes_of_experts
from finetune.recipe.prompts import validation_prompts
from finetune.recipe.shapes import with_stated_buckets
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import LostPeer, Problem, UserError


def check_all(
    recipe: Recipe, runtime: Runtime, gpus: int, report: Path | None = None, with_weights: bool = True
) -> list[Problem]:
    """Everything that is wrong with recipe, output folder, model folder and clips. Collective.

    Args:
        with_weights: False if the model's weights need not be there: its configs and tokenizers do.
        gpus: how many the training is for; `runtime.context_size` of them share each sample.
        report: the folder for a page that shows what becomes of every clip, which is written whatever is wrong.
    """
    problems = check_recipe(recipe, gpus // runtime.context_size) + check_device(recipe, runtime.device)
    cache, unweighed = Cache(recipe.data.cache), None
    columns: list[str] = []
    recipes, family, counter, clips = [recipe], None, None, []
    with _collected(problems):
        with runtime.together():
            opened = open_family(recipe, with_weights)
        family = opened  # of every rank or of none: a rank without one would miss what the others do together
        recipes = recipes_of_experts(recipe, list(family.experts))
        with runtime.together():
            encoders = encoders_of(family, recipe)
            listed = further_columns(encoders), frames_without_loss(family, encoders)
        columns, unweighed = listed
    for each in recipes:
        with _collected(problems), runtime.together():
            check_output(each)
    recipe = _with_buckets(recipe, family, runtime, cache, problems)
    with _collected(problems):
        counter = CaptionCounter(family) if family else None
    with _collected(problems):
        inspected = inspect_datasets(recipe, cache, runtime, columns, unweighed)
        accepted: list[Problem] = []
        with _collected(accepted):
            found = accept(recipe, inspected, columns)
            clips = [*found.train, *found.heldout]
        problems += accepted
        if report:
            write_report(report, recipe, inspected, family, accepted, runtime, counter)
    with _collected(problems), runtime.together():
        if counter and runtime.is_main:
            prompts = validation_prompts(recipe.validation, recipe.data.sample_shape)
            say_cut_captions([*captions_of(clips), *prompt_texts(prompts)], counter)
            say_prompt_notes(recipe, prompts)
    with _collected(problems), runtime.together():
        _load_images(recipe)
    return problems


def _with_buckets(
    recipe: Recipe, family: Family | None, runtime: Runtime, cache: Cache, problems: list[Problem]
) -> Recipe:
    """The recipe with the buckets of its clips; of a model that cannot be opened, with those that it states. Collective."""
    with _collected(problems):
        if family is not None:
            return resolve_buckets(recipe, family, runtime, cache)
    return with_stated_buckets(recipe)


@contextmanager
def _collected(problems: list[Problem]) -> Iterator[None]:
    """Add what is wrong inside the block to `problems`, each once, and go on."""
    try:
        yield
    except LostPeer:
        raise  # it would wait for ever in the next block
    except UserError as error:
        problems += [problem for problem in error.problems if problem not in problems]


def _load_images(recipe: Recipe) -> None:
    """Read every condition image, wherever it is; missing files are `family_problems`' business."""
    problems: list[Problem] = []
    for prompt in validation_prompts(recipe.validation, recipe.data.sample_shape):
        try:
            for image in prompt.images:
                if not missing_image(image):
                    load_image(image)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError.of(problems)
