"""Train a recipe, or resume its training where the newest checkpoint left it."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from finetune.commands.common import add_recipe_arguments, number_of_gpus, with_runtime
from finetune.recipe import Recipe, load_recipe
from finetune.runtime.errors import UserError

if TYPE_CHECKING:
    from finetune.runtime.distributed import Runtime

EXAMPLES = """\
finetune train mine.toml
finetune train mine.toml --gpus 4 --set optimizer.lr=2e-4
torchrun --nproc_per_node 4 -m finetune --recipe mine.toml       the same
finetune train mine.toml --resume-step 400                       go back to the checkpoint of step 400
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_recipe_arguments(parser)
    parser.add_argument(
        "--gpus",
        type=number_of_gpus,
        metavar="N",
        help="start N processes, one for each GPU of this machine; with --cpu, N of them on the CPU",
    )
    parser.add_argument("--cpu", action="store_true", help="train on the CPU, whatever the model's size")
    parser.add_argument("--resume-step", type=int, metavar="N", help="go back to the checkpoint of step N")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    recipe = load_recipe(arguments.recipe, arguments.set)
    if arguments.gpus is not None:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            raise UserError("torchrun has started the processes already", "leave --gpus out", "--gpus")
        if arguments.gpus > 1:
            return _train_on_several(arguments)
    return with_runtime(recipe, lambda runtime: _train(recipe, runtime, arguments), on_cpu=arguments.cpu)


def _train_on_several(arguments: argparse.Namespace) -> int:
    """Start a process for each GPU of this machine, as torchrun does; returns the exit status of the first that fails."""
    from finetune.runtime.launch import launch

    given = ["--recipe", arguments.recipe, *(f"--set={override}" for override in arguments.set)]
    given += ["--cpu"] if arguments.cpu else []
    given += ["--resume-step", str(arguments.resume_step)] if arguments.resume_step is not None else []
    given += [f"--{name}" for name in ("quiet", "verbose") if getattr(arguments, name)]
    return launch(arguments.gpus, given, on_cpu=arguments.cpu)


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
