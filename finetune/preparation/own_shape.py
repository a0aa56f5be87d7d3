"""The shape that stands for `data.area` where the clips have no part: in plans, and for samples that name no shape."""

from finetune.data.bucket_budget import own_shape
from finetune.models.family import Family
from finetune.recipe import Bucket, Recipe
from finetune.recipe.bucket import Area
from finetune.recipe.data import Data
from finetune.recipe.shapes import with_stated_buckets
from finetune.runtime.logging import say


def legal_shape(data: Data, family: Family) -> Area | None:
    """The shape nearest to `data.area` that the model takes, of no more pixels; None if it takes none of so few.

    Lengths of `data.frames` that it takes in no shape are passed over here.
    """
    assert data.area is not None
    nearest = family.nearest_bucket(Bucket(max(data.frames), *data.area))
    near = Area(*nearest[1:])
    lengths = [length for length in data.frames if family.bucket_problem(Bucket(length, *near)) is None]
    return own_shape(data.area, lengths or [nearest.frames], lambda bucket: family.bucket_problem(bucket) is None, near)


def near_shape(data: Data, family: Family) -> Area:
    """The shape whose sides are nearest to those of `data.area`, each by itself, of perhaps more pixels."""
    assert data.area is not None
    return Area(*family.nearest_bucket(Bucket(max(data.frames), *data.area))[1:])


def with_own_shape(recipe: Recipe, family: Family, is_said: bool = True) -> Recipe:
    """The recipe with its buckets, or with those of the legal shape of its `data.area`, in each of its lengths.

    Args:
        family: opened with the recipe, which `open_family` has found a legal shape for.
        is_said: say which shape is taken where it is another one than the area.
    """
    data = recipe.data
    if data.area is None or data.buckets:
        return with_stated_buckets(recipe)
    shape = legal_shape(data, family) or near_shape(data, family)
    if is_said and shape != data.area:
        say(f"data.area = {data.area} is no shape of {family.title}; the nearest of no more pixels is taken: {shape}")
    return with_stated_buckets(recipe, shape)
