"""Print the JSON Schema of recipes, for editors; or their keys as tables, for people."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from finetune.recipe import Recipe
from finetune.recipe.choices import FAMILY_TITLES
from finetune.recipe.values import FAMILY_ALIASES
from finetune.runtime.logging import tell

ID = "recipe.schema.json"


EXAMPLES = """\
finetune schema > recipe.schema.json
finetune schema --markdown
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--markdown", action="store_true", help="every key with its default, as tables in Markdown")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    tell("\n".join(key_tables()) if arguments.markdown else json.dumps(recipe_schema(), indent=1))
    return 0


def key_tables() -> Iterator[str]:
    """Lines of Markdown: of each table of a recipe its keys, their defaults, and what they are for."""
    schema = Recipe.model_json_schema()
    tables = schema["$defs"]
    yield from _rows("(top)", {"output": schema["properties"]["output"]})
    for name, entry in schema["properties"].items():
        if name == "output":
            continue
        kinds = entry.get("anyOf", [entry])
        keys: dict[str, Any] = {}
        for kind in kinds:
            found = tables[kind["$ref"].rpartition("/")[2]] if "$ref" in kind else kind
            keys |= {key: value for key, value in found["properties"].items() if key not in keys}
        yield from _rows(f"[{name}]", keys)
        for table, title in (("DataSource", "[[data.sources]]"), ("Prompt", "[[validation.prompts]]")):
            if title.startswith(f"[[{name}."):
                yield from _rows(title, tables[table]["properties"])


def _rows(title: str, keys: dict[str, Any]) -> Iterator[str]:
    yield from (f"#### `{title}`", "", "| key | default | |", "|---|---|---|")
    for key, entry in keys.items():
        default = json.dumps(entry["default"]) if entry.get("default") is not None else ""
        if "default" not in entry:
            default = "needed"
        meaning = " ".join(entry.get("description", "").split()).replace("|", "\\|")
        if values := _explained(entry):
            told = "; ".join(f"`{word}`: {means}" for word, means in values.items())
            meaning += f" {told}.".replace("|", "\\|")
        free = " *" if entry.get("free on resume") else ""
        yield f"| `{key}`{free} | {f'`{default}`' if default not in ('', 'needed') else default} | {meaning} |"
    yield ""


def _explained(entry: dict[str, Any]) -> dict[str, str]:
    """What each word means that a key, or an item of its list, may be; see `finetune.recipe.choices`."""
    if "enumDescriptions" in entry:
        return dict(zip(entry.get("enum", [entry.get("const")]), entry["enumDescriptions"], strict=True))
    inner = [*entry.get("anyOf", []), entry.get("items", {})]
    return next((found for each in inner if each and (found := _explained(each))), {})


def recipe_schema() -> dict[str, Any]:
    """The schema of recipes, with what editors are to offer besides: the families, and prompts as one string."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": ID, **Recipe.model_json_schema()}
    tables = schema["$defs"]
    family = tables["Model"]["properties"]["family"]
    del family["type"]
    others = {name: f"another name of {here}" for name, here in FAMILY_ALIASES.items()}
    family["anyOf"] = [
        {**_enum(FAMILY_TITLES), "description": "A family of this project: `finetune families` tells more of each."},
        {**_enum(others), "description": "What other trainers call one of them."},
        {"type": "string", "pattern": r"^[\w.]+:\w+$", "description": 'One of your own, as "package.module:Class".'},
    ]
    prompts = tables["Validation"]["properties"]["prompts"]
    tables_of_prompts = {"type": prompts.pop("type"), "items": prompts.pop("items")}
    text = {"type": "string", "description": 'As one string, "prompt@@@49x512x768:::another prompt".'}
    prompts["anyOf"] = [tables_of_prompts, text]
    return schema


def _enum(meanings: dict[str, str]) -> dict[str, Any]:
    """The words that a key may be, each with what it means, as `Means` has them."""
    told = list(meanings.values())
    return {"enum": list(meanings), "enumDescriptions": told, "x-taplo": {"docs": {"enumValues": told}}}
