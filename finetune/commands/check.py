"""Check recipe, model folder and clips, and name every problem at once."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from finetune.commands.common import add_recipe_arguments, folder_named, number_of_gpus, with_runtime
from finetune.recipe import load_recipe
from finetune.runtime.errors import UserError
from finetune.runtime.logging import say

if TYPE_CHECKING:
    from finetune.runtime.distributed import Runtime

EXAMPLES = """\
finetune check mine.toml
finetune check mine.toml --gpus 8 --report check
finetune check mine.toml --no-weights        before the model is downloaded
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_recipe_arguments(parser)
    parser.add_argument("--gpus", type=number_of_gpus, metavar="N", help="for a training on N GPUs; 1 if not given")
    parser.add_argument(
        "--report",
        type=folder_named,
        metavar="DIR",
        help="write a page into this folder that shows what becomes of every clip",
    )
    parser.add_argument(
        "--no-weights", action="store_true", help="the model's weights need not be there; its configs and tokenizers do"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    recipe = load_recipe(arguments.recipe, arguments.set)
    from finetune.checks.everything import check_all
    from finetune.training.identity import check_begun_run

    def body(runtime: Runtime) -> int:
        gpus = arguments.gpus or runtime.world_size
        if problems := check_all(recipe, runtime, gpus, arguments.report, with_weights=not arguments.no_weights):
            raise UserError.of(problems)
        if not arguments.no_weights:
            check_begun_run(recipe, runtime)
        unseen = (
            "; this machine has none, so what the GPU itself can do was not looked at" if runtime.device.is_cpu else ""
        )
        unseen += "; weights were not looked at" if arguments.no_weights else ""
        say(f"nothing wrong found, for training on {gpus} GPU{'s' if gpus > 1 else ''}{unseen}", is_result=True)
        return 0

    return with_runtime(recipe, body)
