"""What a run's recipe sets that its defaults do not, and the shipped recipe for the same model does not."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import finetune
from finetune.recipe import Recipe, load_recipe
from finetune.recipe.load import flat_values
from finetune.recipe.schema import free_keys
from finetune.runtime.errors import UserError

_OWN = ("output", "data.path", "data.cache", "model.path", "tracking.name")  # of every run its own
_SHIPPED = Path(finetune.__file__).parent / "templates"


@dataclass(frozen=True)
class Compared:
    """A key of the recipe whose value is not the default, or not that of the template.

    `shipped` is None where there is no template, and a value may be "not set".
    """

    key: str
    value: str
    default: str
    shipped: str | None
    is_free: bool


def compared(recipe: Recipe) -> tuple[list[Compared], str]:
    """(every key that is not as by default or not as in the template, the template's name or nothing)."""
    values, plain = flat_values(recipe), flat_values(_plain(recipe))
    name, shipped = _template(recipe.model.path, recipe.model.family, recipe.train.method)
    free = free_keys()
    keys = [
        key
        for key in sorted(values.keys() | plain.keys() | shipped.keys(), key=_order(recipe))
        if values.get(key) != plain.get(key) or (name and values.get(key) != shipped.get(key))
    ]
    short = _sparse(recipe, values)
    found = [
        Compared(
            key,
            _text(short, key),
            _text(plain, key),
            _text(shipped, key) if name and key not in _OWN else None,
            key in free,
        )
        for key in keys
    ]
    return found, name


def _plain(recipe: Recipe) -> Recipe:
    """The recipe that names model, dataset and method, and nothing else; its tables are of the same kinds."""
    values: dict[str, Any] = {
        "model": {"family": recipe.model.family, "path": recipe.model.path},
        "data": {},
        "train": {"method": recipe.train.method},
    }
    named = recipe.optimizer.model_dump().get("name")
    if named:
        values["optimizer"] = {"name": named}
    return _constructed(values, recipe)


def _constructed(values: dict[str, Any], recipe: Recipe) -> Recipe:
    fields = {}
    for name, field in type(recipe).model_fields.items():
        table = getattr(recipe, name)
        if hasattr(table, "model_fields_set"):
            fields[name] = type(table).model_construct(**values.get(name, {}))
        else:
            fields[name] = field.get_default(call_default_factory=True)
    return type(recipe).model_construct(**fields)


@lru_cache
def _template(path: str, family: str, method: str) -> tuple[str, dict[str, Any]]:
    """(the shipped recipe for a checkpoint and a method, its values); ("", {}) if there is none."""
    for file in sorted(_SHIPPED.glob("*.toml")):
        try:
            if f'"{path}"' not in file.read_text(encoding="utf-8"):  # reading all of them takes half a second
                continue
            found = load_recipe(file)
        except (OSError, ValueError, UserError):
            continue
        if (found.model.path, found.model.family, found.train.method) == (path, family, method):
            return file.name, flat_values(found)
    return "", {}


def _order(recipe: Recipe) -> Any:
    """Keys in the order of the schema's tables."""
    places = {name: place for place, name in enumerate(type(recipe).model_fields)}
    return lambda key: (places.get(key.partition(".")[0], len(places)), key)


def _text(values: dict[str, Any], key: str) -> str:
    """A value as TOML has it; of a list of tables, one in a line, without what stands there by default or is empty."""
    if key not in values:
        return "not set"
    value = values[key]
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return "\n".join(
            _inline({name: inner for name, inner in each.items() if inner not in ("", None)}) for each in value
        )
    return json.dumps(value, ensure_ascii=False)


def _inline(table: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()) + "}"


def _sparse(recipe: Recipe, values: dict[str, Any]) -> dict[str, Any]:
    """The values, and of tables in a list only the keys that are not as by default."""
    dumped = recipe.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    found = dict(values)
    for key, value in values.items():
        table, _, name = key.partition(".")
        short = dumped.get(table, {}).get(name) if isinstance(dumped.get(table), dict) else None
        if isinstance(value, list) and isinstance(short, list) and len(short) == len(value):
            found[key] = short
    return found
