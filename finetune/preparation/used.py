"""Which items of a cache a recipe uses, found without encoding anything."""

from pathlib import Path

from finetune.data.cache import Cache
from finetune.models.family import Family
from finetune.preparation.encode import prepare
from finetune.preparation.former import Begun
from finetune.recipe import Recipe
from finetune.runtime.distributed import Runtime
from finetune.runtime.logging import quietly


class UsedItems(Cache):
    """A cache that says that it has every item, and notes the (kind, key) of those that it was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked: set[tuple[str, str]] = set()

    def has(self, kind: str, key: str) -> bool:
        self.asked.add((kind, key))
        return True

    def sweep(self) -> None:
        """Nothing is removed where it is only asked what is used."""


def used_keys(recipe: Recipe, family: Family, runtime: Runtime, folder: Path | None = None) -> set[tuple[str, str]]:
    """The (kind, key) of every item that a training of the recipe reads. Clips are inspected as for a training.

    It is what `prepare` asks a cache for, so it cannot differ from what a training uses. For one process.

    Args:
        folder: a cache in another place than the recipe's, for what it knows of files.
    Raises:
        UserError: there is something wrong with the clips: which items the recipe uses is then not known.
    """
    cache = UsedItems(folder or recipe.data.cache)
    former = set(prepare(recipe, family, runtime, cache).former.values())
    # It is also asked for items as an earlier version named them, which a run that began with them goes on with.
    return {(kind, key) for kind, key in cache.asked if key not in former or cache.path(kind, key).exists()}


def check_clips(recipe: Recipe, family: Family, begun: Begun, runtime: Runtime) -> None:
    """Raise UserError if a run cannot go on with the recipe's clips. Collective; nothing is encoded, and nothing said."""
    with quietly():
        prepare(recipe, family, runtime, UsedItems(recipe.data.cache), begun)
