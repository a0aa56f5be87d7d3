"""The commands by name, and the parser of each one's arguments."""

import argparse
import importlib
import shutil
import textwrap
from typing import Any, NoReturn

from finetune.runtime.errors import UserError

PROGRAM = "finetune"

# What each module of finetune.commands is for.
COMMANDS = {
    "new": "write a recipe from one that comes with this program",
    "import": "a recipe from another trainer's settings",
    "check": "recipe, model folder and clips: every problem at once",
    "plan": "peak memory and time of a recipe, without a GPU",
    "train": "train, or resume; encodes the clips first if it must",
    "prepare": "encode clips and captions into the cache, and no more",
    "sample": "videos of a model, with and without what was trained",
    "export": "a checkpoint, or another trainer's LoRA, in a tool's form",
    "push": "a finished run to the Hugging Face Hub",
    "compare": "runs, and both experts of a run, by their held-out losses",
    "plot": "the loss curve of a run",
    "report": "a page of a run: curves, samples, dataset, settings",
    "cache": "what takes room in a cache, and what is damaged",
    "demo": "a small pipeline and clips to try things on",
    "families": "model families and their checkpoints",
    "schema": "JSON Schema of recipes, for editors",
    "completion": "words that a shell completes",
}
_MODULES = {"import": "import_recipe"}  # a word of Python cannot be a module's name


def parser_of(name: str) -> tuple[Any, argparse.ArgumentParser]:
    """A command's module, and the parser of its arguments. The other commands' imports are not needed."""
    command = importlib.import_module(f"finetune.commands.{_MODULES.get(name, name)}")
    examples = [line for line in getattr(command, "EXAMPLES", "").splitlines() if line]
    parser = Parser(
        prog=f"{PROGRAM} {name}",
        description=_filled(command.__doc__ or ""),
        epilog="\n".join(["Examples:", *(f"  {line}" for line in examples)]) if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    said = parser.add_mutually_exclusive_group()
    said.add_argument("--quiet", action="store_true", help="print warnings, errors and results only")
    said.add_argument("--verbose", action="store_true", help="print what the libraries say, too")
    return command, parser


def _filled(text: str) -> str:
    """Paragraphs in lines of the terminal's width; argparse would run them together, or leave them as they are."""
    width = min(shutil.get_terminal_size().columns, 100) - 2
    return "\n\n".join(textwrap.fill(" ".join(part.split()), width) for part in text.split("\n\n"))


class Parser(argparse.ArgumentParser):
    """Its errors are the user's, as those of a recipe are."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"{self.prog} --help lists what it takes")
