"""Export the weights of a checkpoint as files that other tools load, or convert the LoRA of another trainer to them."""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.commands.common import add_recipe_arguments, folder_named, step_or_best, with_runtime
from finetune.recipe import Recipe, load_recipe
from finetune.recipe.experts import recipes_of_experts
from finetune.recipe.schema import Model
from finetune.runtime.errors import UserError
from finetune.runtime.logging import say

if TYPE_CHECKING:
    from finetune.engine.weights.checkpoint import Checkpoints
    from finetune.engine.weights.exporters.exporter import Exporter
    from finetune.models.family import Family
    from finetune.recipe.table import Table
    from finetune.runtime.distributed import Runtime


EXAMPLES = """\
finetune export mine.toml --out lora
finetune export mine.toml --step best --format comfyui merged --precision bf16 --out exported
finetune export --from other.safetensors --family ltx --model Lightricks/LTX-Video --format comfyui --out converted
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_recipe_arguments(parser, is_required=False)
    parser.add_argument(
        "--step", type=step_or_best, help='which checkpoint, or "best" by held-out loss; the newest if not given'
    )
    parser.add_argument("--from", dest="source", metavar="FILE", help="convert this LoRA instead, of whatever trainer")
    parser.add_argument("--family", help="with --from and without a recipe: the model family")
    parser.add_argument(
        "--model", help="with --from and without a recipe: the base model, a folder or an id on the Hub"
    )
    parser.add_argument(
        "--expert",
        choices=("high", "low"),
        help="with --from and without a recipe: which of two transformers the LoRA is of",
    )
    parser.add_argument(
        "--format",
        nargs="+",
        default=[],
        metavar="NAME",
        help="diffusers (if not given), comfyui, peft, merged; several are written into sub-folders",
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bf16", "float16", "float8"),
        help="of the files' values: as trained if not given; float8 is for merged alone",
    )
    parser.add_argument("--out", type=folder_named, required=True, help="folder to write to")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if arguments.source is not None:
        return _convert(arguments)
    if arguments.recipe is None:
        raise UserError("there is nothing to export", "give --recipe R, or --from FILE to convert a LoRA", "export")
    if unused := [name for name in ("family", "model", "expert") if getattr(arguments, name) is not None]:
        raise UserError("this is about --from, which is not given", "give --from FILE, or remove it", f"--{unused[0]}")
    recipe = load_recipe(arguments.recipe, arguments.set)
    from finetune.checks.model import open_family
    from finetune.checks.output import check_same_run
    from finetune.models.adapters.given import with_frozen
    from finetune.runtime.files import writing
    from finetune.training.identity import GIVEN
    from finetune.training.job import build_state, details_of, open_checkpoints, sound_checkpoint, write_weights

    def body(runtime: Runtime) -> int:
        with runtime.together():
            opened = open_family(recipe, trains=False)
            recipes = recipes_of_experts(recipe, list(opened.experts))
            for each in recipes:
                check_same_run(each)
            exporters = _exporters(recipe.train.method, arguments, opened, recipe.adapter)
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
                out = out / each.run_folder.name
            is_one = len(recipes) == 1 and len(exporters) == 1
            folders = [(exporter, out if is_one else out / exporter.folder(family)) for exporter in exporters]
            export_one(each, family, checkpoints, step, folders, runtime)
            gc.collect()  # one's weights, before another's
            runtime.device.empty_cache()
        return 0

    def export_one(
        recipe: Recipe,
        family: Family,
        checkpoints: Checkpoints,
        step: int,
        folders: list[tuple[Exporter, Path]],
        runtime: Runtime,
    ) -> None:
        with runtime.together():
            weights = with_frozen(family.transformer_weights(), recipe.adapter, family)
        state = build_state(recipe, runtime, family, weights)
        # Not the others: moments would need memory, and the ranks that they were saved by.
        checkpoints.load(step, [part for part in state.parts if part.is_evaluated])
        adapters = checkpoints.facts(step).get(GIVEN)
        for exporter, out in folders:
            with writing(out):
                details = details_of(recipe, family, step, adapters, arguments.precision)
                write_weights(state, exporter, out, details)
            say(f"exported step {step} to {out}")

    return with_runtime(recipe, body)


def _exporters(
    method: str, arguments: argparse.Namespace, family: Family, settings: Table | None = None
) -> list[Exporter]:
    """The forms that are asked for. Raises UserError, before anything is written, if there is one that cannot be.

    Args:
        settings: of what was trained, if they are known.
    """
    from finetune.engine.weights.exporters import export_problems, exporter_of, unknown_forms

    names = list(dict.fromkeys(arguments.format))
    found = [exporter_of(method, name) for name in names] or [exporter_of(method)]
    formats = [exporter.format for exporter in found]
    problems = list(export_problems(method, formats, arguments.precision, settings))
    if problems := [*problems, *unknown_forms(method, formats, family)]:
        raise UserError.of(problems)
    return found


def _convert(arguments: argparse.Namespace) -> int:
    """Write a LoRA that lies in a file in other forms."""
    from finetune.checks.model import find_family
    from finetune.engine.weights.exporters.exporter import Details
    from finetune.engine.weights.exporters.trained_lora import lora_of
    from finetune.models.adapters.reading import read_adapter
    from finetune.runtime.files import writing
    from finetune.training.facts import facts_of_converted

    if arguments.step is not None:
        raise UserError("a file has no steps", "give --from alone", "--step")
    model = _model(arguments)
    family = find_family(model, with_weights=any(name.startswith("merged") for name in arguments.format))
    if family.experts:
        if not model.experts or len(model.experts) > 1:
            cure = "give --expert high or --expert low, or set model.experts to it"
            raise UserError("the model has two transformers, and a LoRA is of one", cure, "--from")
        family = family.of_expert(model.experts[0])
    elif model.experts:
        cure = "remove it, or give the model of two that the LoRA is for"
        raise UserError(f"{family.title} in {model.path} has one transformer, and no experts", cure, "--expert")
    exporters = _exporters("lora", arguments, family)
    if not all(exporter.convert for exporter in exporters):
        raise UserError("this form is written of a run alone", "give --recipe without --from", "--format")
    read = read_adapter(arguments.source, family)
    details = Details(arguments.precision, facts_of_converted(model, family, read.metadata))
    for exporter in exporters:
        out = arguments.out if len(exporters) == 1 else arguments.out / exporter.folder(family)
        assert exporter.convert is not None
        with writing(out):
            exporter.convert(lora_of(read), family, out, details)
        say(f"converted {read.file} to {out}")
    return 0


def _model(arguments: argparse.Namespace) -> Model:
    """The base model that a recipe or the options name."""
    if arguments.recipe is not None:
        model = load_recipe(arguments.recipe, arguments.set).model
        return model if arguments.expert is None else model.model_copy(update={"experts": [arguments.expert]})
    if arguments.family is None or arguments.model is None:
        cure = "give --family and --model, or a --recipe that has them"
        raise UserError("the LoRA's base model is not named", cure, "--from")
    experts = None if arguments.expert is None else [arguments.expert]
    return Model(family=arguments.family, path=arguments.model, experts=experts)
