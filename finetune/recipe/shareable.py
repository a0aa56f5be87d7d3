"""A recipe as it may be given to others: it trains the same, and says nothing of this machine and where data lies."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w

from finetune.recipe.load import recipe_values
from finetune.recipe.schema import Recipe

# Places, by key; of a list of tables, in each of them. What others have to fill in stands in their place.
_PLACES = {
    ("output",): "runs/run",
    ("data", "path"): "path/to/clips",
    ("data", "sources", "path"): "path/to/clips",
    ("data", "cache"): "cache",
    ("validation", "heldout"): "path/to/held-out/clips",
    ("validation", "prompts", "image"): "path/to/first_frame.png",
    ("validation", "prompts", "last_image"): "path/to/last_frame.png",
}
# The same, of values that are left as they are if they name a repository on the Hub.
_PLACES_OR_IDS = {
    ("model", "path"): "path/to/the/base/model",
    ("lora", "start_from"): "path/to/an/adapter",
    ("lora", "frozen", "path"): "path/to/an/adapter",
}
_LEFT_OUT = (("validation", "prompts_file"), ("tracking",))
_ON_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/.+)?")


def write_shareable(recipe: Recipe, path: Path, base: str | None = None) -> list[str]:
    """Write a recipe without paths, image addresses and trackers as TOML that `load_recipe` reads back.

    Args:
        base: what is written as model.path; the recipe's own if None, or a placeholder if that is not on the Hub.
    Returns:
        the keys that are not as they were.
    """
    values = recipe_values(recipe)
    named = {} if base is None else {("model", "path"): base}
    changed = [".".join(key) for key, instead in _PLACES.items() if _replace(values, key, instead)]
    changed += [".".join(key) for key in _LEFT_OUT if _remove(values, key)]
    for key, instead in (_PLACES_OR_IDS | named).items():
        is_wanted = _always if key in named else _is_here
        if _replace(values, key, instead, is_wanted):
            changed.append(".".join(key))
    heading = f"# The recipe of this training. Left out, or to be filled in: {', '.join(changed)}.\n\n"
    path.write_text(heading + tomli_w.dumps(values), encoding="utf-8")
    return changed


def is_on_hub(place: str) -> bool:
    """Whether a model or an adapter is one on the Hub, "owner/name" or a file in it, and no file or folder of this machine."""
    return bool(_ON_HUB.fullmatch(place)) and not Path(place).exists()


def _is_here(place: str) -> bool:
    return not is_on_hub(place)


def _always(place: str) -> bool:
    return True


def _replace(values: Any, key: tuple[str, ...], instead: str, is_wanted: Callable[[str], bool] = _always) -> bool:
    """Put a text in the place of a value, of every table of a list, if it is wanted; returns whether there was another one."""
    if isinstance(values, list):
        return sum(_replace(each, key, instead, is_wanted) for each in values) > 0
    if not isinstance(values, dict) or key[0] not in values:
        return False
    if len(key) > 1:
        return _replace(values[key[0]], key[1:], instead, is_wanted)
    was = values[key[0]]
    if was == instead or not is_wanted(was):
        return False
    values[key[0]] = instead
    return True


def _remove(values: dict[str, Any], key: tuple[str, ...]) -> bool:
    for part in key[:-1]:
        values = values.get(part, {})
    return values.pop(key[-1], None) is not None
