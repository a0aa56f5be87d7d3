"""The command line. Errors that a user can mend end here, printed without a traceback, with exit status 2."""

import argparse
import gc
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from finetune.runtime.errors import LostPeer, UserError
from finetune.runtime.files import MAKE_ROOM, no_room
from finetune.runtime.logging import print_error, quiet_libraries

USAGE = """\
torchrun ... -m finetune --recipe R [--resume-step N] [--cpu]   train, or resume (encodes the dataset first if it must)
python -m finetune check    --recipe R       recipe, model folder and clips: every problem at once
python -m finetune plan     --recipe R [--gpus N] [--gpu NAME] [--device-memory 24GiB] [--fit] ...   peak memory, without a GPU
torchrun ... -m finetune prepare --recipe R  encode clips and captions into the cache
python -m finetune sample   --recipe R [--adapter DIR [--compare]] [--prompt TEXT [--shape FxHxW] [--image FILE] ...]
python -m finetune export   --recipe R [--step N] | --from FILE [--family F --model M] [--format NAME ...] --out DIR
python -m finetune push     --run DIR --repo OWNER/NAME [--public] [--offline-folder OUT] ...   a finished run to the Hub
python -m finetune cache    size|verify|prune [--dir CACHE] [--recipe R ...] ...   what takes room in a cache, and what is damaged
python -m finetune import   FILE ... [--out mine.toml]   a recipe from another trainer's settings
python -m finetune compare  OUTPUT ...        runs by their held-out losses, and both experts of a run
python -m finetune plot     --run DIR        loss curve of a run, as loss.png in it
python -m finetune demo     --out DIR        a tiny random pipeline and real clips to try things on
python -m finetune schema                    JSON Schema of recipes, for editors
python -m finetune families                  model families
"""

LOST = 1  # exit status if another process is lost
COMMANDS = (
    "train",
    "check",
    "plan",
    "prepare",
    "sample",
    "export",
    "push",
    "cache",
    "import",
    "compare",
    "plot",
    "demo",
    "schema",
    "families",
)
MODULES = {"import": "import_recipe"}  # a word of Python cannot be a module's name


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit status."""
    quiet_libraries()
    is_train = bool(arguments) and arguments[0].startswith("--") and arguments[0] != "--help"
    gc.disable()  # garbage collection during imports costs a fifth of start-up and frees nothing
    try:
        name = _parse_command(["train"] if is_train else arguments[:1])
        command = importlib.import_module(
            f"finetune.commands.{MODULES.get(name, name)}"
        )  # the others' imports are not needed
        parser = _Parser(prog=f"python -m finetune {name}", description=command.__doc__)
        command.add_arguments(parser)
        status = command.run(parser.parse_args(arguments if is_train else arguments[1:]))
        sys.stdout.flush()
        return status
    except UserError as error:
        print_error(error)
        return LOST if isinstance(error, LostPeer) else 2
    except OSError as error:  # what is printed names no file
        if not (shortage := no_room(error)):
            raise
        print_error(UserError(shortage, f"{MAKE_ROOM}, then run the same command", error.filename or "standard output"))
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        gc.enable()


class _Parser(argparse.ArgumentParser):
    """Its errors are the user's, as those of a recipe are."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"{self.prog} --help lists what it takes")


def _parse_command(arguments: Sequence[str]) -> str:
    parser = _Parser("python -m finetune", usage=USAGE)
    parser.add_argument("command", choices=COMMANDS)
    return parser.parse_args(arguments).command
