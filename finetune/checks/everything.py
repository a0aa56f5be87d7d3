"""All checks of a recipe at once: settings, output folder, model folder, clips and condition images."""

from collections.abc import Callable
from functools import partial

from finetune.checks.model import open_family
from finetune.checks.output import check_output
from finetune.checks.settings import check_device, check_recipe
from finetune.data.cache import Cache
from finetune.data.images import load_image, missing_image
from finetune.preparation.inspect import inspect_clips, split_heldout
from finetune.recipe import Recipe
from finetune.recipe.prompts import validation_prompts
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import Problem, UserError


def check_all(recipe: Recipe, runtime: Runtime, gpus: int) -> list[Problem]:
    """Everything that is wrong with recipe, output folder, model folder and clips, for training on `gpus`. Collective."""
    problems = check_recipe(recipe, gpus) + check_device(recipe, runtime.device)
    cache = Cache(recipe.data.cache)
    datasets = [path for path in (recipe.data.path, recipe.validation.heldout) if path]
    parts: list[Callable[[], object]] = [lambda: check_output(recipe), lambda: open_family(recipe)]
    parts += [partial(inspect_clips, recipe.data, path, cache, runtime) for path in datasets[1:]]
    parts += [lambda: split_heldout(inspect_clips(recipe.data, recipe.data.path, cache, runtime), recipe)]
    parts += [partial(_load_images, recipe)]
    for part in parts:
        try:
            part()
        except UserError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    return problems


def _load_images(recipe: Recipe) -> None:
    """Read every condition image, wherever it is; missing files are `family_problems`' business."""
    problems: list[Problem] = []
    for prompt in validation_prompts(recipe.validation, recipe.data.buckets[0]):
        try:
            if prompt.image and not missing_image(prompt.image):
                load_image(prompt.image, *prompt.shape[1:])
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError.of(problems)
