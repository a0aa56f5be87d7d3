"""Predict peak memory and time of a training, without a GPU; or, with --fit, search the fastest settings that fit."""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.commands.common import add_recipe_arguments, number_of_gpus
from finetune.planning import DOES_NOT_FIT
from finetune.planning.gpus import Hardware
from finetune.recipe import Bucket, Recipe, load_recipe, write_recipe
from finetune.recipe.shapes import with_buckets
from finetune.runtime.errors import UserError
from finetune.runtime.gpus import CONTEXT, GPUS
from finetune.runtime.logging import say, tell
from finetune.runtime.signals import end_with_parent
from finetune.runtime.units import parse_bytes

if TYPE_CHECKING:
    from finetune.models.family import Family


EXAMPLES = """\
finetune plan mine.toml --gpu 4090
finetune plan mine.toml --gpus 8 --device-memory 79GiB --plot memory.png
finetune plan mine.toml --gpu 3090 --fit --write fits.toml     the fastest settings that fit
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add_recipe_arguments(parser)
    parser.add_argument("--gpus", type=number_of_gpus, metavar="N", help="for a training on N GPUs; 1 if not given")
    parser.add_argument(
        "--gpus-per-node", type=number_of_gpus, default=8, metavar="N", help="GPUs of each node; 8 if not given"
    )
    parser.add_argument(
        "--gpu",
        type=_gpu_name,
        choices=GPUS,
        metavar="NAME",
        help="the kind of GPU: for its memory, if --device-memory is not given, and for a step's time (else an A100's): "
        + ", ".join(GPUS),
    )
    parser.add_argument(
        "--device-memory",
        type=_bytes,
        metavar="24GiB",
        help="what torch can have of each GPU: about half a GiB less than it has",
    )
    parser.add_argument("--host-memory", type=_bytes, metavar="64GiB", help="host memory that each node has to spare")
    parser.add_argument("--fit", action="store_true", help="search the fastest settings that fit")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="with --fit: write the recipe that fits into this file"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw what lives on a GPU when, into this file")
    parser.add_argument(
        "--all-buckets", action="store_true", help="plan each of the recipe's buckets, and not only the largest"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON, in bytes")
    parser.add_argument("--end-with-parent", action="store_true", help=argparse.SUPPRESS)  # beside a training


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status, `DOES_NOT_FIT` where the memory given is too small."""
    if arguments.end_with_parent:
        end_with_parent()
    recipe, gpus = load_recipe(arguments.recipe, arguments.set), arguments.gpus or 1
    _check_options(arguments, gpus)
    from finetune.checks.model import open_family
    from finetune.checks.settings import attention_problems, check_gpu, check_recipe
    from finetune.preparation.own_shape import with_own_shape

    gpu = GPUS.get(arguments.gpu)
    problems = check_recipe(recipe, gpus)
    if gpu:
        problems += check_gpu(recipe, gpu.name, gpu.has_float8)
        problems += attention_problems(recipe, gpu.name, gpu.capability)
    if problems:
        raise UserError.of(problems)
    gc.freeze()  # later collections look through what is simulated alone
    gc.enable()
    family = open_family(recipe, with_weights=False, only_plans=True)
    capacity = arguments.device_memory or (gpu.memory - CONTEXT if gpu else None)
    hardware = Hardware(gpus, arguments.gpus_per_node, capacity, arguments.host_memory, gpu or GPUS["A100"])
    planned = with_own_shape(recipe, family)
    if arguments.fit:
        return _fit(planned, recipe.data.buckets, family, hardware, arguments)
    return _plan(planned, family, hardware, arguments)


def _check_options(arguments: argparse.Namespace, gpus: int) -> None:
    """Raise UserError for options that contradict each other."""
    from finetune.planning.timeline import check_plot

    if arguments.write and not arguments.fit:
        raise UserError("there is nothing to write", "give --fit too", "--write")
    if arguments.plot:
        check_plot(arguments.plot)
    if gpus > arguments.gpus_per_node and gpus % arguments.gpus_per_node:
        raise UserError(
            f"{gpus} GPUs are not nodes of {arguments.gpus_per_node}", "give how many a node has", "--gpus-per-node"
        )
    if not arguments.fit:
        return
    if arguments.device_memory is None and arguments.gpu is None:
        raise UserError("how much memory a GPU has is not said", "give --device-memory 24GiB, or --gpu NAME", "--fit")
    if unused := [name for name in ("plot", "all_buckets") if getattr(arguments, name)]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise UserError("--fit does not take these", "plan the recipe that it writes with them", options)
    if arguments.write and not arguments.write.absolute().parent.is_dir():
        raise UserError("no such folder", "make it first", str(arguments.write.absolute().parent))


def _plan(recipe: Recipe, family: Family, hardware: Hardware, arguments: argparse.Namespace) -> int:
    from finetune.engine.precision import DTYPES
    from finetune.planning.simulate import cache_bytes, largest, simulate_all

    buckets = recipe.data.buckets if arguments.all_buckets else [largest(family, recipe.data.buckets)]
    plan = simulate_all(recipe, family, buckets, hardware, arguments.plot)
    clip, caption = (size / 2**20 for size in cache_bytes(family, buckets[0], DTYPES[recipe.train.precision]))
    if arguments.plot and not arguments.json:
        plan.notes.append(f"drawn: {arguments.plot}")
    if other := family.of_other_expert():
        plan.notes.append(
            f"this is the {family.expert}-noise expert's training; the {other.expert}-noise one takes as much, by itself"
        )
    plan.notes.append(f"cache: {clip:.1f} MiB for each clip of {buckets[0]}, {caption:.2f} MiB for each caption")
    tell(json.dumps(plan.as_json(), indent=1) if arguments.json else "\n".join(plan.lines()))
    return 0 if plan.fits is not False else DOES_NOT_FIT


def _fit(recipe: Recipe, given: list[Bucket], family: Family, hardware: Hardware, arguments: argparse.Namespace) -> int:
    """Search settings; the recipe that is written has the buckets that were given, and not those planned for data.area."""
    from finetune.planning.search import fit
    from finetune.runtime.files import atomic

    found = fit(recipe, family, hardware, say)
    told = "is not written"
    if arguments.write and found.fits:
        with atomic(arguments.write) as partial:
            write_recipe(
                with_buckets(found.recipe, given), partial, "Found by plan --fit, with every default spelled out."
            )
        told = "is written"
    if arguments.json:
        tell(json.dumps(found.as_json(), indent=1))
        return 0 if found.fits else DOES_NOT_FIT
    tell("\n".join(found.lines()))
    if arguments.write:
        tell(f"\n{arguments.write} {told}")
    return 0 if found.fits else DOES_NOT_FIT


def _gpu_name(text: str) -> str:
    """The name as `GPUS` has it: "h100", "4090" and "rtx4090" are known, too."""
    known = {_plain(name): name for name in GPUS}
    return known.get(_plain(text), text)


def _plain(name: str) -> str:
    return name.upper().replace(" ", "").removeprefix("RTX")


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; write 24GiB, or 24GB") from None
