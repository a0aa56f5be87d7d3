"""The commands. Errors that a user can mend end here, printed without a traceback, with exit status 2."""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError

from finetune.planning.gpus import CONTEXT, GPUS, Hardware
from finetune.recipe import Recipe, load_recipe, write_recipe
from finetune.recipe.schema import Prompt
from finetune.runtime.errors import LostPeer, UserError
from finetune.runtime.logging import console, quiet_libraries, say

USAGE = """\
torchrun ... -m finetune --recipe R          train, or resume (encodes the dataset first if it must)
python -m finetune check    --recipe R       recipe, model folder and clips: every problem at once
python -m finetune plan     --recipe R [--gpus N] [--gpu NAME] [--device-memory 24GiB] [--fit] ...   peak memory, without a GPU
torchrun ... -m finetune prepare --recipe R  encode clips and captions into the cache
python -m finetune sample   --recipe R [--adapter DIR [--compare]] [--prompt TEXT [--shape FxHxW] [--image FILE] ...]
python -m finetune export   --recipe R [--step N] --out DIR
python -m finetune plot     --run DIR        loss curve of a run, as loss.png in it
python -m finetune demo     --out DIR        a tiny random pipeline and real clips to try things on
python -m finetune schema                    JSON Schema of recipes, for editors
python -m finetune families                  model families
"""

_LET_RANK_0_SPEAK = 1.0  # seconds; torchrun ends all processes of a node as soon as one has ended


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit status."""
    quiet_libraries()
    is_train = bool(arguments) and arguments[0].startswith("--") and arguments[0] != "--help"
    gc.disable()  # what the commands import stays: to look through it for garbage is a fifth of the time it takes
    try:
        parsed = _parser().parse_args(["train", *arguments] if is_train else arguments)
        return _COMMANDS[parsed.command](parsed)
    except UserError as error:
        _print_error(error)
        return 1 if isinstance(error, LostPeer) else 2
    except KeyboardInterrupt:
        return 130
    finally:
        gc.enable()


class _Parser(argparse.ArgumentParser):
    """Its errors are the user's, as those of a recipe are."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"{self.prog} --help lists what it takes")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("python -m finetune", usage=USAGE)
    commands = parser.add_subparsers(dest="command", required=True, prog=parser.prog)
    for name in ("train", "check", "plan", "prepare", "sample", "export"):
        command = commands.add_parser(name)
        command.add_argument("--recipe", required=True, help="a TOML recipe")
        command.add_argument("--set", action="append", default=[], metavar="table.key=value", help="override one key")
        if name == "sample":
            command.add_argument("--adapter", type=Path, help="folder of an exported LoRA or transformer")
            command.add_argument("--compare", action="store_true", help="the base model too, with the same seeds")
            command.add_argument("--prompt", action="append", help="text; the recipe's validation.prompts if not given")
            command.add_argument("--image", help="condition image of --prompt, for image-to-video")
            command.add_argument("--shape", help="frames x height x width of --prompt")
            command.add_argument("--steps", type=int, help="denoising steps of --prompt")
            command.add_argument("--seed", type=int, help="seed of --prompt")
            command.add_argument("--out", type=Path, help="folder; OUTPUT/generated if not given")
        if name in ("check", "plan"):
            command.add_argument("--gpus", type=_positive, metavar="N", help="for a training on N GPUs; 1 if not given")
        if name == "plan":
            command.add_argument("--gpus-per-node", type=_positive, default=8, metavar="N", help="8 if not given")
            command.add_argument(
                "--gpu",
                type=_gpu_name,
                choices=GPUS,
                help="which one: for its memory if that is not given, and for an estimate of a step's time (A100)",
            )
            command.add_argument(
                "--device-memory",
                type=_bytes,
                metavar="24GiB",
                help="what torch can have of each GPU: about half a GiB less than it has",
            )
            command.add_argument("--host-memory", type=_bytes, metavar="64GiB", help="what each node has to spare")
            command.add_argument("--fit", action="store_true", help="search the fastest settings that fit")
            command.add_argument("--write", type=Path, metavar="FILE", help="with --fit: the recipe that fits")
            command.add_argument("--plot", type=Path, metavar="PNG", help="a picture of what lives on a GPU when")
            command.add_argument("--all-buckets", action="store_true", help="not only the largest")
            command.add_argument("--json", action="store_true", help="all figures, in bytes")
        if name == "export":
            command.add_argument("--step", type=int, help="which checkpoint; the newest if not given")
            command.add_argument("--out", type=Path, required=True)
    plot = commands.add_parser("plot")
    plot.add_argument("--run", type=Path, required=True)
    demo = commands.add_parser("demo")
    demo.add_argument("--out", type=Path, required=True)
    demo.add_argument("--family", default="ltx")
    demo.add_argument("--variant", help="which checkpoint of the family; see `families`")
    commands.add_parser("schema")
    commands.add_parser("families")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GPUs")
    return int(text)


def _gpu_name(text: str) -> str:
    """The name as `GPUS` has it: "h100", "4090" and "rtx4090" are known, too."""
    known = {_plain(name): name for name in GPUS}
    return known.get(_plain(text), text)


def _plain(name: str) -> str:
    return name.upper().replace(" ", "").removeprefix("RTX")


def _bytes(text: str) -> int:
    from finetune.planning.report import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; write 24GiB, or 24GB") from None


def _print_error(error: UserError) -> None:
    """Every rank ends with the error; one process a node prints it, and torchrun's closing summary repeats it."""
    if summary := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(summary).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        console.print(f"error: {error}", markup=False, style="red")
    else:
        time.sleep(_LET_RANK_0_SPEAK)


def _with_runtime(recipe: Recipe, body) -> int:
    from finetune.runtime import distributed
    from finetune.runtime.device import use_expandable_segments

    if recipe.memory.expandable_segments:
        use_expandable_segments()
    gc.freeze()  # nor do the loop's collections look through it
    gc.enable()
    runtime = distributed.start(recipe.distributed.timeout_seconds)
    try:
        return body(runtime)
    except RuntimeError as error:
        if any(
            sign in str(error) for sign in ("Connection closed by peer", "Connection reset", "Timed out", "timed out")
        ):
            raise LostPeer(
                f"rank {runtime.rank} lost the others ({str(error).splitlines()[0]})",
                "see the first error above; the same command resumes from the newest checkpoint",
            ) from error
        raise
    finally:
        if sys.exc_info()[0] is None:
            distributed.stop()


def _train(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.recipe, arguments.set)
    from finetune.training.run import train

    return _with_runtime(recipe, lambda runtime: train(recipe, runtime))


def _check(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.recipe, arguments.set)
    from finetune.checks.everything import check_all

    def body(runtime) -> int:
        gpus = arguments.gpus or runtime.world_size
        if problems := check_all(recipe, runtime, gpus):
            raise UserError.of(problems)
        say(f"nothing wrong found, for training on {gpus} GPU{'s' if gpus > 1 else ''}")
        return 0

    return _with_runtime(recipe, body)


def _plan(arguments: argparse.Namespace) -> int:
    recipe, gpus = load_recipe(arguments.recipe, arguments.set), arguments.gpus or 1
    from finetune.checks.model import open_family
    from finetune.checks.settings import check_gpu, check_recipe
    from finetune.engine.precision import DTYPES
    from finetune.planning.simulate import cache_bytes, largest, simulate_all
    from finetune.planning.timeline import check_plot

    if arguments.write and not arguments.fit:
        raise UserError("there is nothing to write", "give --fit too", "--write")
    if arguments.plot:
        check_plot(arguments.plot)
    if gpus > arguments.gpus_per_node and gpus % arguments.gpus_per_node:
        raise UserError(
            f"{gpus} GPUs are not nodes of {arguments.gpus_per_node}", "give how many a node has", "--gpus-per-node"
        )
    gpu = GPUS.get(arguments.gpu)
    if problems := check_recipe(recipe, gpus) + (check_gpu(recipe, gpu.name, gpu.has_float8) if gpu else []):
        raise UserError.of(problems)
    gc.freeze()  # collections look through what is simulated alone
    gc.enable()
    family = open_family(recipe, with_weights=False)
    capacity = arguments.device_memory or (gpu.memory - CONTEXT if gpu else None)
    hardware = Hardware(gpus, arguments.gpus_per_node, capacity, arguments.host_memory, gpu or GPUS["A100"])
    buckets = recipe.data.buckets if arguments.all_buckets else [largest(family, recipe.data.buckets)]
    if arguments.fit:
        return _fit(recipe, family, hardware, arguments)
    plan = simulate_all(recipe, family, buckets, hardware, arguments.plot)
    clip, caption = (size / 2**20 for size in cache_bytes(family, buckets[0], DTYPES[recipe.train.precision]))
    if arguments.plot and not arguments.json:
        plan.notes.append(f"drawn: {arguments.plot}")
    plan.notes.append(f"cache: {clip:.1f} MiB for each clip of {buckets[0]}, {caption:.2f} MiB for each caption")
    print(json.dumps(plan.as_json(), indent=1) if arguments.json else "\n".join(plan.lines()))
    return 0 if plan.fits is not False else 3


def _fit(recipe: Recipe, family, hardware: Hardware, arguments: argparse.Namespace) -> int:
    from finetune.planning.search import fit
    from finetune.runtime.files import writing

    if hardware.capacity is None:
        raise UserError("how much memory a GPU has is not said", "give --device-memory 24GiB, or --gpu NAME", "--fit")
    if unused := [name for name in ("json", "plot", "all_buckets") if getattr(arguments, name)]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise UserError("--fit does not take these", "plan the recipe that it writes with them", options)
    if arguments.write and not arguments.write.absolute().parent.is_dir():
        raise UserError("no such folder", "make it first", str(arguments.write.absolute().parent))
    found = fit(recipe, family, hardware, say)
    print("\n".join(found.lines()))
    if arguments.write and found.fits:
        with writing(arguments.write):
            write_recipe(found.recipe, arguments.write, "Found by plan --fit, with every default spelled out.")
        print(f"\nwritten to {arguments.write}")
    elif arguments.write:
        print(f"\n{arguments.write} is not written")
    return 0 if found.fits else 3


def _prepare(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.recipe, arguments.set)
    from finetune.checks.model import open_family
    from finetune.preparation.encode import prepare

    def body(runtime) -> int:
        with runtime.together():
            family = open_family(recipe)
        prepared = prepare(recipe, family, runtime)
        say(f"{len(prepared.train)} clips to train on, {len(prepared.heldout)} held out, in {recipe.data.cache}")
        return 0

    return _with_runtime(recipe, body)


def _sample(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.recipe, arguments.set)
    if arguments.compare and not arguments.adapter:
        raise UserError(
            "there is nothing to compare with", "give --adapter, the folder that training named", "--compare"
        )
    if arguments.prompt:
        given = {name: getattr(arguments, name) for name in ("shape", "steps", "seed", "image")}
        given = {key: value for key, value in given.items() if value is not None}
        try:
            prompts = [Prompt(text=text, **given) for text in arguments.prompt]
        except ValidationError as error:
            raise UserError(error.errors()[0]["msg"], "", f"--{error.errors()[0]['loc'][0]}") from None
        validation = recipe.validation.model_copy(update={"prompts": prompts, "prompts_file": None})
        recipe = recipe.model_copy(update={"validation": validation})
    elif unused := [
        f"--{name}" for name in ("shape", "steps", "seed", "image") if getattr(arguments, name) is not None
    ]:
        raise UserError("this is about --prompt, which is not given", "give --prompt, or remove it", " ".join(unused))
    if not (recipe.validation.prompts or recipe.validation.prompts_file):
        raise UserError("nothing to generate", "give --prompt, or add [[validation.prompts]] to the recipe", "sample")
    from finetune.checks.model import open_family
    from finetune.commands.sample import sample

    def body(runtime) -> int:
        if runtime.world_size > 1:
            raise UserError("sample runs in one process", "start it with python -m finetune sample")
        out = arguments.out or recipe.output / "generated"
        sample(recipe, open_family(recipe), runtime, out, arguments.adapter, arguments.compare)
        return 0

    return _with_runtime(recipe, body)


def _export(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.recipe, arguments.set)
    from finetune.checks.model import open_family
    from finetune.checks.output import check_output
    from finetune.training.job import build_state, export_weights, open_checkpoints

    def body(runtime) -> int:
        with runtime.together():
            check_output(recipe)
            family = open_family(recipe)
        checkpoints = open_checkpoints(recipe, runtime)
        step = checkpoints.latest() if arguments.step is None else arguments.step
        if step is None or step not in checkpoints.steps():
            known = ", ".join(map(str, checkpoints.steps())) or "none"
            raise UserError(f"no checkpoint of step {step}", f"steps are: {known}", str(checkpoints.folder))
        state = build_state(recipe, runtime, family, family.transformer_weights())
        checkpoints.load(step, state.transformer, state.optimizer)
        export_weights(state, recipe.train.method, arguments.out)
        say(f"exported step {step} to {arguments.out}")
        return 0

    return _with_runtime(recipe, body)


def _plot(arguments: argparse.Namespace) -> int:
    from finetune.tracking.plot import plot_losses

    say(f"wrote {plot_losses(arguments.run)}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from finetune.commands.demo import make_demo

    make_demo(arguments.out, arguments.family, arguments.variant)
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    print(json.dumps(Recipe.model_json_schema(), indent=1))
    return 0


def _families(arguments: argparse.Namespace) -> int:
    from finetune.models import FAMILIES, family_class

    for name in FAMILIES:
        cls = family_class(name)
        print(f"{name:14} {(cls.__doc__ or '').strip()} {', '.join(cls.variants)}".rstrip())
    return 0


_COMMANDS = {
    "train": _train,
    "check": _check,
    "plan": _plan,
    "prepare": _prepare,
    "sample": _sample,
    "export": _export,
    "plot": _plot,
    "demo": _demo,
    "schema": _schema,
    "families": _families,
}
