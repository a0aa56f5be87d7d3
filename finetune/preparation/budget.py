"""Finds the training shapes of a recipe that has `data.area` in the place of `data.buckets`."""

from collections.abc import Sequence

from finetune.data.bucket_budget import find_buckets
from finetune.data.cache import Cache
from finetune.data.decode import VideoInfo
from finetune.models.family import Family
from finetune.preparation.columns import further_columns
from finetune.preparation.encode import encoders_of
from finetune.preparation.inspect import inspect_dataset
from finetune.preparation.own_shape import near_shape, with_own_shape
from finetune.recipe import Recipe
from finetune.recipe.data import DataSource
from finetune.recipe.shapes import with_buckets
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import LostPeer, UserError
from finetune.runtime.logging import say


def with_found_buckets(recipe: Recipe, family: Family, runtime: Runtime, cache: Cache | None = None) -> Recipe:
    """The recipe with the buckets that its clips need; the same on every rank. Collective.

    What is wrong with the clips is left to `inspect_data`. Without one clip that is long enough, the recipe has its stated buckets.

    Args:
        recipe: one with `data.area` and without `data.buckets`, which `family` was opened with.
        cache: the run's, for what it knows of files, so that `inspect_data` need not look at them again; else that of the recipe.
    """
    data, named = recipe.data, recipe.validation.heldout
    assert data.area is not None  # see above
    runtime.doing("looking for the clips' buckets")
    stated = with_own_shape(recipe, family, is_said=False)
    columns = further_columns(encoders_of(family, recipe))
    cache = cache or Cache(data.cache)
    clips = [info for pair in data.used_datasets for info in _sizes(stated, *pair, cache, runtime, columns)]
    held = _sizes(stated, 0, DataSource(path=named), cache, runtime, columns) if named else []
    found = find_buckets(
        clips,
        held,
        data.area,
        data.frames,
        data.bucket_count,
        data.fps,
        lambda bucket: family.bucket_problem(bucket) is None,
        near_shape(data, family),
    )
    found = runtime.from_main(found)  # whatever the processors of the others make of logarithms
    if not found:
        return stated
    counts = ", ".join(f"{count} in {bucket}" for bucket, count in found.items())
    say(f"buckets found for data.area = {data.area}, with the clips that fit them best: {counts}")
    return with_buckets(recipe, list(found))


def _sizes(
    stated: Recipe, number: int, source: DataSource, cache: Cache, runtime: Runtime, columns: Sequence[str]
) -> list[tuple[VideoInfo, bool]]:
    """The usable clips of a dataset, and whether each is an image; none if it cannot be read. Collective."""
    try:
        found = inspect_dataset(stated, source, number, cache, runtime, columns)
    except LostPeer:
        raise
    except UserError:  # on every rank: `inspect_data` raises it again, with the problems of the other datasets
        return []
    return [(entry.info, entry.clip.is_image) for entry in found.clips]
