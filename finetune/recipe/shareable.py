"""A recipe as it may be given to others: it trains the same, and says nothing of this machine and where data lies."""

from functools import partial
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
_LEFT_OUT = (("validation", "prompts_file"), ("tracking",))


def write_shareable(recipe: Recipe, path: Path, base: str | None = None) -> list[str]:
    """Write a recipe without paths, image addresses and trackers as TOML that `load_recipe` reads back.

    Args:
        base: what is written as model.path; the recipe's own if None, or a placeholder if that is a folder of this machine.
    Returns:
        the keys that are not as they were.
    """
    values = recipe_values(recipe)
    changed = [".".join(key) for key, instead in _PLACES.items() if _replace(values, key, instead)]
    changed += [".".join(key) for key in _LEFT_OUT if _remove(values, key)]
    named = base or ("path/to/the/base/model" if Path(recipe.model.path).expanduser().is_dir() else recipe.model.path)
    if named != values["model"]["path"]:
        values["model"]["path"] = named
        changed.append("model.path")
    heading = f"# The recipe of this training. Left out, or to be filled in: {', '.join(changed)}.\n\n"
    path.write_text(heading + tomli_w.dumps(values), encoding="utf-8")
    return changed


def _replace(values: Any, key: tuple[str, ...], instead: str) -> bool:
    """Put a text in the place of a value, of every table of a list; returns whether there was another one."""
    if isinstance(values, list):
        return any(list(map(partial(_replace, key=key, instead=instead), values)))  # all of them
    if not isinstance(values, dict) or key[0] not in values:
        return False
    if len(key) > 1:
        return _replace(values[key[0]], key[1:], instead)
    was, values[key[0]] = values[key[0]], instead
    return bool(was != instead)


def _remove(values: dict[str, Any], key: tuple[str, ...]) -> bool:
    for part in key[:-1]:
        values = values.get(part, {})
    return values.pop(key[-1], None) is not None
