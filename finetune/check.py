"""Everything about a recipe that can be wrong, found before a weight is read: recipe against itself, model and clips."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

from finetune.data.cache import Cache
from finetune.models import FAMILIES, family_class, lora
from finetune.models.family import Family
from finetune.models.folder import ModelFolder, resolve
from finetune.recipe import Bucket, Recipe, load_recipe
from finetune.recipe.load import differences
from finetune.recipe.schema import Lora
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import Problem, UserError
from finetune.survey import survey


def check_all(recipe: Recipe, runtime: Runtime) -> list[Problem]:
    """Everything that is wrong with recipe, output folder, model folder and clips. Collective."""
    problems = check_recipe(recipe, runtime.world_size)
    cache = Cache(recipe.data.cache)
    datasets = [path for path in (recipe.data.path, recipe.validation.heldout) if path]
    parts: list[Callable[[], object]] = [lambda: check_output(recipe), lambda: open_family(recipe)]
    parts += [partial(survey, recipe.data, path, cache, runtime) for path in datasets]
    for part in parts:
        try:
            part()
        except UserError as error:
            problems += error.problems
    return problems


def check_recipe(recipe: Recipe, world_size: int) -> list[Problem]:
    """Combinations of settings that cannot work on `world_size` ranks."""
    return [*_batch_problems(recipe, world_size), *_setting_problems(recipe)]


def _batch_problems(recipe: Recipe, world_size: int) -> Iterator[Problem]:
    train = recipe.train
    share = world_size * train.micro_batch_size
    if train.global_batch_size % share:
        nearest = max(1, round(train.global_batch_size / share)) * share
        yield Problem(
            f"a global batch of {train.global_batch_size} cannot be split over {world_size} rank(s) taking "
            f"{train.micro_batch_size} at a time",
            "train.global_batch_size",
            f"set train.global_batch_size = {nearest}",
        )


def _setting_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.schedule.name == "constant" and recipe.schedule.warmup_steps:
        yield Problem(
            '"constant" has no warm-up', "schedule.warmup_steps", 'set schedule.name = "constant_with_warmup"'
        )
    if recipe.schedule.warmup_steps > recipe.train.steps:
        yield Problem(
            f"{recipe.schedule.warmup_steps} warm-up steps, but only {recipe.train.steps} steps in all",
            "schedule.warmup_steps",
            f"set it to at most {recipe.train.steps}",
        )
    if recipe.train.method == "full" and recipe.lora != Lora():
        yield Problem(
            '[lora] has no effect with method = "full"', "lora", 'remove the table, or set train.method = "lora"'
        )
    for key, effective, cure in _needs(recipe):
        table, _, name = key.partition(".")
        default = type(getattr(recipe, table)).model_fields[name].default
        if getattr(getattr(recipe, table), name) != default and not effective:
            yield Problem("this key has no effect here", key, f"remove it, or {cure}")
    for package in recipe.tracking.trackers:
        if find_spec(package) is None:
            yield Problem(f"{package} is not installed", "tracking.trackers", f'pip install "finetune[{package}]"')


def _needs(recipe: Recipe) -> Iterator[tuple[str, bool, str]]:
    """(key, whether it has an effect, what it needs) of keys that depend on another."""
    sampling, schedule = recipe.objective.sigma_sampling, recipe.schedule.name
    for key in ("objective.logit_mean", "objective.logit_std"):
        yield key, sampling == "logit_normal", 'set objective.sigma_sampling = "logit_normal"'
    yield "objective.mode_scale", sampling == "mode", 'set objective.sigma_sampling = "mode"'
    yield "schedule.cycles", schedule == "cosine_with_restarts", 'set schedule.name = "cosine_with_restarts"'
    yield "schedule.power", schedule == "polynomial", 'set schedule.name = "polynomial"'
    for key in ("validation.every", "validation.sigmas"):
        yield key, recipe.validation.heldout is not None, "set validation.heldout to a dataset"
    yield "tracking.project", "wandb" in recipe.tracking.trackers, 'add "wandb" to tracking.trackers'


def open_family(recipe: Recipe) -> Family:
    """Find the model, check its files by their headers, and the recipe's buckets and targets against it.

    Raises:
        UserError: every problem of model folder and buckets at once.
    """
    cls = family_class(recipe.model.family)
    folder = ModelFolder(resolve(recipe.model.path, recipe.model.revision, cls.components))
    if folder.pipeline_class != cls.pipeline_class:
        fitting = [name for name in FAMILIES if family_class(name).pipeline_class == folder.pipeline_class]
        cure = f'set model.family = "{fitting[0]}"' if fitting else f"families are: {', '.join(FAMILIES)}"
        what = f"this is a {folder.pipeline_class}, and family {recipe.model.family!r} trains a {cls.pipeline_class}"
        raise UserError(what, cure, str(folder.path))
    problems = folder.problems(cls.components)
    if problems:
        raise UserError.of(problems, f"{folder.path}: {len(problems)} problems with the model:")
    family = cls(folder)
    shapes: list[tuple[str, Bucket]] = [("data.buckets", bucket) for bucket in recipe.data.buckets]
    shapes += [("validation.prompts", prompt.shape) for prompt in recipe.validation.prompts if prompt.shape]
    wrong = [Problem(f"{shape}: {text}", key) for key, shape in shapes if (text := family.bucket_problem(shape))]
    if wrong:
        raise UserError.of(wrong)
    if recipe.lora.targets:
        lora.check_targets(family.empty_transformer(), family, recipe.lora.targets)
    return family


def check_output(recipe: Recipe) -> None:
    """Refuse a folder that holds another training, and a disk without room.

    Raises:
        UserError: names the keys that differ.
    """
    saved = recipe.output / "recipe.toml"
    if saved.exists():
        changed = differences(recipe, load_recipe(saved))
        if changed:
            raise UserError(
                "this folder holds a run of another recipe: " + "; ".join(changed[:6]),
                "set `output` to a new folder, or put the keys back to resume",
                str(recipe.output),
            )
    folder = recipe.output
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError("this is a file, and the run needs a folder", "set `output` to a folder", str(folder))
    if shutil.disk_usage(folder).free < 2**20:
        raise UserError("the disk is full", "free some space, or set `output` to another disk", str(recipe.output))
