"""Print the JSON Schema of recipes, for editors."""

import argparse
import json

from finetune.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command takes no arguments."""


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    print(json.dumps(Recipe.model_json_schema(), indent=1))
    return 0
