"""Generate videos with the base model or with exported weights, or with both to compare them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from finetune.commands.common import add_recipe_arguments, finite, folder_named, step_or_best, with_runtime
from finetune.recipe import Recipe, load_recipe
from finetune.recipe.schema import GENERATED
from finetune.recipe.validation import Prompt
from finetune.runtime.errors import UserError
from finetune.runtime.files import fresh_folder
from finetune.runtime.logging import say

if TYPE_CHECKING:
    from finetune.runtime.distributed import Runtime

# Options that describe --prompt.
_OF_PROMPT = ("shape", "negative", "steps", "guidance", "seed", "count", "fps", "image", "last_image")

EXAMPLES = """\
finetune sample mine.toml --adapter runs/mine --compare
finetune sample mine.toml --adapter runs/mine --prompt "a red ball" --negative "blurry" --count 4 --strength 0.5 1
finetune sample mine.toml --step best
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_recipe_arguments(parser)
    parser.add_argument(
        "--adapter",
        nargs="+",
        metavar="DIR[=STRENGTH]",
        help="folder of a run, of an exported LoRA or of all weights; several LoRAs are applied together",
    )
    parser.add_argument(
        "--strength", type=finite, nargs="+", help="of the LoRAs, a video with each; the prompts' own if not given"
    )
    parser.add_argument(
        "--step", type=step_or_best, help='the LoRA in the checkpoint of this step, or of the "best" by held-out loss'
    )
    parser.add_argument("--compare", action="store_true", help="the base model too, with the same seeds")
    parser.add_argument("--prompt", action="append", help="text; the recipe's validation.prompts if not given")
    parser.add_argument("--image", help="condition image of --prompt, for image-to-video")
    parser.add_argument(
        "--last-image", help="the image that the video of --prompt ends with, where the model takes one"
    )
    parser.add_argument("--shape", help="frames x height x width of --prompt")
    parser.add_argument("--negative", metavar="TEXT", help="negative prompt of --prompt")
    parser.add_argument("--steps", type=int, help="denoising steps of --prompt")
    parser.add_argument("--guidance", type=finite, help="guidance scale of --prompt; the pipeline's if not given")
    parser.add_argument("--seed", type=int, help="seed of --prompt")
    parser.add_argument("--count", type=int, help="videos of each --prompt, with seeds one after the other")
    parser.add_argument("--fps", type=finite, help="frame rate of the videos of --prompt")
    parser.add_argument(
        "--out",
        type=folder_named,
        help="folder; OUTPUT/generated if not given. Nothing is overwritten: see what it says",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    recipe = _with_prompts(load_recipe(arguments.recipe, arguments.set), arguments)
    adapters = [_adapter(text) for text in arguments.adapter or []]
    if adapters and arguments.step is not None:
        raise UserError("--adapter and --step both name what to generate with", "give one of them", "--step")
    is_trained = bool(adapters) or arguments.step is not None
    if arguments.strength and not is_trained:
        raise UserError("there is no LoRA to apply", "give --adapter, the folder that training named", "--strength")
    if arguments.compare and not is_trained:
        raise UserError(
            "there is nothing to compare with", "give --adapter, the folder that training named", "--compare"
        )
    if arguments.compare and arguments.strength and not any(arguments.strength):
        raise UserError("at strength 0 there is only the base model", "give another strength, too", "--strength")
    if not (recipe.validation.prompts or recipe.validation.prompts_file):
        raise UserError("nothing to generate", "give --prompt, or add [[validation.prompts]] to the recipe", "sample")
    from finetune.checks.model import open_family
    from finetune.preparation.own_shape import with_own_shape
    from finetune.training.exported_videos import adapter_of, sample
    from finetune.training.output import RESULTS

    def body(runtime: Runtime) -> int:
        if runtime.world_size > 1:
            raise UserError("sample runs in one process", "start it with finetune sample")
        out = fresh_folder(arguments.out or recipe.output / GENERATED)
        family = open_family(recipe, trains=False)
        if arguments.step is not None:
            adapters.append((adapter_of(recipe, family, runtime, arguments.step), 1.0))
        if not is_trained and (recipe.output / RESULTS).is_file():
            say(f"these are of the base model; --adapter {recipe.output} applies what was trained there")
        sample(with_own_shape(recipe, family), family, runtime, out, adapters, arguments.compare, arguments.strength)
        return 0

    return with_runtime(recipe, body)


def _adapter(text: str) -> tuple[Path, float]:
    """A folder and its strength, from DIR or DIR=STRENGTH."""
    path, equals, strength = text.rpartition("=")
    try:
        if not equals or Path(text).exists():
            return folder_named(text), 1.0
        return folder_named(path), finite(strength)
    except argparse.ArgumentTypeError as error:
        raise UserError(str(error), "write DIR, or DIR=0.8", f"--adapter {text!r}") from None


def _with_prompts(recipe: Recipe, arguments: argparse.Namespace) -> Recipe:
    """The recipe with the prompts of the command line in the place of its own, if there are any."""
    given = {name: getattr(arguments, name) for name in _OF_PROMPT if getattr(arguments, name) is not None}
    if not arguments.prompt:
        if given:
            unused = " ".join(f"--{name}" for name in given)
            raise UserError("this is about --prompt, which is not given", "give --prompt, or remove it", unused)
        return recipe
    try:
        prompts = [Prompt(text=text, **given) for text in arguments.prompt]
    except ValidationError as error:
        first = error.errors()[0]
        name = first["loc"][0]
        what = f"{given.get(str(name))!r} is refused: {first['msg'].removeprefix('Value error, ')}"
        raise UserError(what, "finetune sample --help lists what it takes", f"--{name}") from None
    validation = recipe.validation.model_copy(update={"prompts": prompts, "prompts_file": None})
    return recipe.model_copy(update={"validation": validation})
