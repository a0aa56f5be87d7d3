"""The training shapes of a recipe with `data.area`: those of the run that it resumes, or else those that its clips need."""

from finetune.checks.output import has_checkpoints, read_saved
from finetune.data.cache import Cache
from finetune.models.family import Family
from finetune.preparation.budget import with_found_buckets
from finetune.recipe import RECIPE_FILE, Bucket, Recipe
from finetune.recipe.experts import recipes_of_experts
from finetune.recipe.shapes import with_buckets
from finetune.runtime.distributed import Runtime
from finetune.runtime.logging import say


def resolve_buckets(recipe: Recipe, family: Family, runtime: Runtime, cache: Cache | None = None) -> Recipe:
    """The recipe with `data.buckets`; the same on every rank. Collective.

    A run keeps the buckets that it began with, whatever clips have been added since.

    Args:
        cache: the run's, for what it knows of files; else that of the recipe.
    Raises:
        UserError: the run's own copy of its recipe is damaged.
    """
    data = recipe.data
    if data.area is None:
        return recipe
    if data.buckets:
        say(f"data.buckets are used as they are given, and none are looked for (data.area = {data.area})")
        return recipe
    with runtime.together():
        kept = _of_run(recipe, family) if runtime.is_main else []
    if kept := runtime.from_main(kept):
        say(f"buckets of the run that is resumed: {', '.join(map(str, kept))}")
        return with_buckets(recipe, kept)
    return with_found_buckets(recipe, family, runtime, cache)


def _of_run(recipe: Recipe, family: Family) -> list[Bucket]:
    """The buckets of the run in the output folder; none if there is no run to go on with, or it is another recipe's."""
    for each in recipes_of_experts(recipe, list(family.experts)):
        file = each.run_folder / RECIPE_FILE
        if file.is_file() and has_checkpoints(each):
            data = read_saved(file).data
            if (data.area, data.frames) == (recipe.data.area, recipe.data.frames):
                return data.buckets
    return []
