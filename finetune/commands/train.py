"""Train a recipe, or resume its training where the newest checkpoint left it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from finetune.commands.common import add_recipe_arguments, with_runtime
from finetune.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from finetune.runtime.distributed import Runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_recipe_arguments(parser)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU, whatever the model's size")
    parser.add_argument("--resume-step", type=int, metavar="N", help="go back to the checkpoint of step N")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    recipe = load_recipe(arguments.recipe, arguments.set)
    return with_runtime(recipe, lambda runtime: _train(recipe, runtime, arguments), on_cpu=arguments.cpu)


def _train(recipe: Recipe, runtime: Runtime, arguments: argparse.Namespace) -> int:
    """Train with a memory plan made beside it, if the recipe wants one and the device knows its memory."""
    from finetune.runtime.distributed import restarts
    from finetune.training.memory import StartPlan, start_no_plan
    from finetune.training.run import train

    start_plan: StartPlan = start_no_plan
    if recipe.memory.plan and runtime.device.total_memory is not None:
        from finetune.planning.forecast import Forecast

        start_plan = Forecast
    # torchrun starts the same command again after a failure, which must not go back a second time.
    resume_step = None if restarts() else arguments.resume_step
    return train(recipe, runtime, start_plan, resume_step, any_size_on_cpu=arguments.cpu)
