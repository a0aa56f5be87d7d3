"""A recipe whose training shapes are found for its clips, once they are known."""

from collections.abc import Sequence

from finetune.recipe.bucket import Bucket
from finetune.recipe.schema import Recipe


def with_buckets(recipe: Recipe, buckets: Sequence[Bucket]) -> Recipe:
    """The recipe with these training shapes."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"buckets": list(buckets)})})


def with_stated_buckets(recipe: Recipe) -> Recipe:
    """The recipe as far as it is known without its clips: with `Data.stated_buckets`."""
    return with_buckets(recipe, recipe.data.stated_buckets)
