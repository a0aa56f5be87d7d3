"""A recipe whose training shapes are found for its clips, once they are known."""

from collections.abc import Sequence

from finetune.recipe.bucket import Area, Bucket
from finetune.recipe.schema import Recipe


def with_buckets(recipe: Recipe, buckets: Sequence[Bucket]) -> Recipe:
    """The recipe with these training shapes."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"buckets": list(buckets)})})


def with_stated_buckets(recipe: Recipe, shape: Area | None = None) -> Recipe:
    """The recipe as far as it is known without its clips: with `Data.stated_buckets`.

    Args:
        shape: what the model takes in the place of `data.area`, if that is no shape of its own.
    """
    stated = recipe.data.stated_buckets
    if shape is not None and not recipe.data.buckets:
        stated = [Bucket(bucket.frames, *shape) for bucket in stated]
    return with_buckets(recipe, stated)
