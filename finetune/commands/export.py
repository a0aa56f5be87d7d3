"""Export the weights of a checkpoint as files that diffusers loads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.commands.common import add_recipe_arguments, with_runtime
from finetune.recipe import Recipe, load_recipe
from finetune.recipe.experts import recipes_of_experts
from finetune.runtime.errors import UserError
from finetune.runtime.logging import say

if TYPE_CHECKING:
    from finetune.models.family import Family
    from finetune.runtime.distributed import Runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_recipe_arguments(parser)
    parser.add_argument("--step", type=int, help="which checkpoint; the newest if not given")
    parser.add_argument("--format", help="another form than the run's own, such as diffusers_lora")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    recipe = load_recipe(arguments.recipe, arguments.set)
    from finetune.checks.model import open_family
    from finetune.checks.output import check_same_run
    from finetune.engine.weights.exporters import exporter_of
    from finetune.runtime.files import writing
    from finetune.training.job import build_state, open_checkpoints, sound_checkpoint, write_weights

    def body(runtime: Runtime) -> int:
        with runtime.together():
            opened = open_family(recipe)
            recipes = recipes_of_experts(recipe, list(opened.experts))
            for each in recipes:
                check_same_run(each)
        for each in recipes:
            family = opened if each.model.experts is None else opened.of_expert(each.model.experts[0])
            export_one(
                each, family, arguments.out if len(recipes) == 1 else arguments.out / each.run_folder.name, runtime
            )
        return 0

    def export_one(recipe: Recipe, family: Family, out: Path, runtime: Runtime) -> None:
        exporter = exporter_of(recipe.train.method, arguments.format)
        checkpoints = open_checkpoints(recipe, runtime)
        step = sound_checkpoint(checkpoints, arguments.step)
        if step is None:
            raise UserError("there is no checkpoint yet", "train first", str(checkpoints.folder))
        state = build_state(recipe, runtime, family, family.transformer_weights())
        # The weights alone: moments would need memory, and the ranks that they were saved by.
        checkpoints.load(step, state.parts[:1])
        with writing(out):
            write_weights(state, exporter, out)
        say(f"exported step {step} to {out}")

    return with_runtime(recipe, body)
