"""Writes a draft as the text of a recipe."""

from typing import Any

import tomli_w

from finetune.importers.draft import Draft
from finetune.recipe.optimizers import OPTIMIZERS
from finetune.recipe.schema import Recipe
from finetune.recipe.table import tables_of


def recipe_text(draft: Draft, sources: str) -> str:
    """The draft as TOML, its tables in the order of the schema, with comments where a value was changed.

    Args:
        sources: the names of the files it was made of.
    """
    tables: dict[str, dict[str, Any]] = {}
    for key in sorted(draft.values, key=_places().index):
        value = draft.values[key]
        table, _, name = key.rpartition(".")
        tables.setdefault(table, {})[name] = value
    lines = [f"# Made by `finetune import` from {' '.join(sources.split())} of {draft.trainer}.", ""]
    lines += _lines(draft, "", tables.pop("", {}))
    for table, values in tables.items():
        plain = {name: value for name, value in values.items() if not _is_tables(value)}
        if plain:
            lines += ["", f"[{table}]", *_lines(draft, table, plain)]
        for name, value in values.items():
            if _is_tables(value):
                for each in value:
                    lines += ["", f"[[{table}.{name}]]", *_lines(draft, f"{table}.{name}", each)]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _places() -> list[str]:
    """Every key of a recipe, in the order of the schema; those of any optimizer in that of its classes."""
    places = []
    for name, field in Recipe.model_fields.items():
        classes = list(dict.fromkeys(OPTIMIZERS.values())) if name == "optimizer" else tables_of(field)
        places += [f"{name}.{key}" for each in classes for key in each.model_fields] or [name]
    return places


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _lines(draft: Draft, table: str, values: dict[str, Any]) -> list[str]:
    lines = []
    for name, value in values.items():
        line = f"{name} = {_inline(value)}"
        comment = draft.comments.get(f"{table}.{name}" if table else name)
        lines.append(f"{line:33} # {' '.join(comment.split())}" if comment else line)
    return lines


def _inline(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{tomli_w.dumps({name: each}).strip()}" for name, each in value.items()) + "}"
    return tomli_w.dumps({"x": value}).strip().removeprefix("x = ")
