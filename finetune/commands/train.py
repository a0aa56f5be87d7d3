"""Train a recipe, or resume its training where the newest checkpoint left it."""

from __future__ import annotations

import argparse

from finetune.commands.common import add_recipe_arguments, with_runtime
from finetune.recipe import load_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_recipe_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    recipe = load_recipe(arguments.recipe, arguments.set)
    from finetune.training.run import train

    return with_runtime(recipe, lambda runtime: train(recipe, runtime))
