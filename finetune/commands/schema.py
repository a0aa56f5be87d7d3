"""Print the JSON Schema of recipes, for editors."""

import argparse
import json
from typing import Any

from finetune.models import FAMILIES
from finetune.recipe import Recipe
from finetune.recipe.values import FAMILY_ALIASES
from finetune.runtime.logging import tell

ID = "recipe.schema.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command takes no arguments."""


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    tell(json.dumps(recipe_schema(), indent=1))
    return 0


def recipe_schema() -> dict[str, Any]:
    """The schema of recipes, with what editors are to offer besides: the families, and prompts as one string."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": ID, **Recipe.model_json_schema()}
    tables = schema["$defs"]
    family = tables["Model"]["properties"]["family"]
    del family["type"]
    family["anyOf"] = [
        {"enum": list(FAMILIES), "description": "A family of this project: `finetune families` tells more of each."},
        {"enum": list(FAMILY_ALIASES), "description": "What other trainers call one of them."},
        {"type": "string", "pattern": r"^[\w.]+:\w+$", "description": 'One of your own, as "package.module:Class".'},
    ]
    prompts = tables["Validation"]["properties"]["prompts"]
    tables_of_prompts = {"type": prompts.pop("type"), "items": prompts.pop("items")}
    text = {"type": "string", "description": 'As one string, "prompt@@@49x512x768:::another prompt".'}
    prompts["anyOf"] = [tables_of_prompts, text]
    return schema
