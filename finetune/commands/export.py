"""Export the weights of a checkpoint as files that diffusers loads."""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.commands.common import add_recipe_arguments, step_or_best, with_runtime
from finetune.recipe import Recipe, load_recipe
from finetune.recipe.experts import recipes_of_experts
from finetune.runtime.errors import UserError
from finetune.runtime.logging import say

if TYPE_CHECKING:
    from finetune.engine.weights.checkpoint import Checkpoints
    from finetune.engine.weights.exporters.exporter import Exporter
    from finetune.models.family import Family
    from finetune.runtime.distributed import Runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_recipe_arguments(parser)
    parser.add_argument(
        "--step", type=step_or_best, help='which checkpoint, or "best" by held-out loss; the newest if not given'
    )
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
        exporter = exporter_of(recipe.train.method, arguments.format)
        found = [(each, open_checkpoints(each, runtime)) for each in recipes]
        steps = [sound_checkpoint(checkpoints, arguments.step) for _, checkpoints in found]
        for (each, checkpoints), step in zip(found, steps, strict=True):
            if step is None:  # before anything is written
                cure = "train first" if len(recipes) == 1 else "train it, or set model.experts to the one that is there"
                raise UserError("there is no checkpoint yet", cure, str(checkpoints.folder))
            family, out = opened, arguments.out
            if each.model.experts:
                family = opened.of_expert(each.model.experts[0])
            if len(recipes) > 1:  # as training has it
                out = out / each.run_folder.name / exporter.folder(family)
            export_one(each, family, checkpoints, step, out, exporter, runtime)
            gc.collect()  # one's weights, before another's
            runtime.device.empty_cache()
        return 0

    def export_one(
        recipe: Recipe,
        family: Family,
        checkpoints: Checkpoints,
        step: int,
        out: Path,
        exporter: Exporter,
        runtime: Runtime,
    ) -> None:
        state = build_state(recipe, runtime, family, family.transformer_weights())
        # The weights alone: moments would need memory, and the ranks that they were saved by.
        checkpoints.load(step, state.parts[:1])
        with writing(out):
            write_weights(state, exporter, out)
        say(f"exported step {step} to {out}")

    return with_runtime(recipe, body)
