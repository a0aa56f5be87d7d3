"""What several commands share: the arguments that name a recipe, and the process group around their work."""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune.recipe import Recipe
from finetune.runtime.paths import NoSuchHome, expanded

if TYPE_CHECKING:  # torch is imported once the recipe is known to be sound
    from finetune.runtime.distributed import Runtime

# How gloo says it, and NCCL.
_LOST = (
    "Connection closed by peer",
    "Connection reset",
    "Timed out",
    "timed out",
    "Broken pipe",
    "Application timeout caused pair closure",  # a later call, after the one that has timed out
)
_LOST_NCCL = (
    "remote process exited",
    "ncclRemoteError",
    "NCCL communicator was aborted",
    "collective operation timeout",
)


def add_recipe_arguments(parser: argparse.ArgumentParser, is_required: bool = True) -> None:
    """Add the recipe, which may come first or after --recipe, and --set."""
    named = parser.add_mutually_exclusive_group(required=is_required)
    named.add_argument("recipe", nargs="?", default=argparse.SUPPRESS, metavar="RECIPE", help="a TOML recipe")
    named.add_argument("--recipe", help="the same, as torchrun's command lines have it")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="table.key=value",
        help="override one key of the recipe; may be given several times",
    )


def step_or_best(text: str) -> int | Literal["best"]:
    """An argument's value as a step, or as the best checkpoint's; raises argparse's error."""
    if text == "best":
        return "best"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text!r} is neither a step nor "best"')
    return int(text)


def folder_named(text: str) -> Path:
    """An argument's value as a folder, with "~" for the home folder; raises argparse's error for none."""
    if not text.strip():  # an unset variable of the shell, which would be the folder that the command is started in
        raise argparse.ArgumentTypeError('it is empty; write "." for the folder that you are in')
    try:
        return expanded(text)
    except NoSuchHome as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def finite(text: str) -> float:
    """An argument's value as a finite number; raises argparse's error."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def number_of_gpus(text: str) -> int:
    """An argument's value as a count of GPUs; raises argparse's error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GPUs")
    return int(text)


def with_runtime(recipe: Recipe, body: Callable[[Runtime], int], on_cpu: bool = False) -> int:
    """Join the process group, run `body` in it, and leave it; returns the exit status of `body`.

    Args:
        on_cpu: leave GPUs alone.
    Raises:
        LostPeer: another process of the run ended or stopped answering.
    """
    from finetune.runtime import distributed
    from finetune.runtime.device import use_expandable_segments
    from finetune.runtime.watch import lost_peer

    if recipe.memory.expandable_segments:
        use_expandable_segments()
    gc.freeze()  # later collections do not look through what imports have made
    gc.enable()
    runtime = distributed.start(recipe.distributed.timeout_seconds, on_cpu)
    try:
        status = body(runtime)
        if runtime.watch:
            runtime.watch.end()
        return status
    except RuntimeError as error:
        if any(sign in str(error) for sign in (*_LOST, *_LOST_NCCL)):
            raise lost_peer(
                runtime.watch,
                f"rank {runtime.rank} lost its peers",
                "see the first error above, if there is one; the same command resumes from the newest checkpoint",
                str(error).splitlines()[0],
            ) from error
        raise
    finally:
        if sys.exc_info()[0] is None:
            distributed.stop()
