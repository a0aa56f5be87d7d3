"""The command line. Errors that a user can mend end here, printed without a traceback, with exit status 2."""

import gc
import importlib
import os
import sys
from collections.abc import Sequence

from finetune import __version__
from finetune.commands.parsing import COMMANDS, PROGRAM, parser_of
from finetune.runtime.errors import LostPeer, UserError
from finetune.runtime.files import MAKE_ROOM, no_room
from finetune.runtime.logging import be_quiet, be_verbose, is_reader_there, print_error, quiet_libraries

LOST = 1  # exit status if another process is lost
CLOSED_PIPE = 141  # what a shell says of a program that writes to `head` once that has ended: 128 + SIGPIPE

EXAMPLES = """\
finetune new ltx_lora mine.toml --data clips
finetune check mine.toml
finetune plan mine.toml --gpu 4090
finetune train mine.toml --gpus 2
torchrun --nproc_per_node 8 -m finetune --recipe mine.toml     on 8 GPUs"""


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit status."""
    quiet_libraries()
    gc.disable()  # garbage collection during imports costs a fifth of start-up and frees nothing
    try:
        name, rest = _split(arguments)
        if name is None:
            return _overview(rest)
        command, parser = parser_of(name)
        parsed = parser.parse_args(rest)
        if parsed.quiet:
            be_quiet()
        if parsed.verbose:
            be_verbose()
        status = command.run(parsed)
        sys.stdout.flush()
        return status
    except UserError as error:
        print_error(error)
        return LOST if isinstance(error, LostPeer) else 2
    except BrokenPipeError:
        if is_reader_there():
            raise
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - nothing is left that could be flushed
        return CLOSED_PIPE
    except OSError as error:  # what is printed names no file
        if not (shortage := no_room(error)):
            raise
        print_error(UserError(shortage, f"{MAKE_ROOM}, then run the same command", error.filename or "standard output"))
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        gc.enable()


def _split(arguments: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    """A command's name and its arguments. Without a name it is training, as `torchrun -m finetune --recipe R` has it."""
    first = arguments[0] if arguments else "--help"
    if first in COMMANDS:
        return first, arguments[1:]
    if first in ("--help", "-h", "--version", "help"):
        return None, arguments or ["--help"]
    if first.startswith("-"):
        return "train", arguments
    near = importlib.import_module("difflib").get_close_matches(first, COMMANDS, 1)
    cure = f"did you mean {PROGRAM} {near[0]}?" if near else f"{PROGRAM} --help lists the commands"
    if first.endswith(".toml"):
        cure = f"to train this recipe: {PROGRAM} train {first}"
    raise UserError(f"{first!r} is no command", cure)


def _overview(arguments: Sequence[str]) -> int:
    if arguments[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    width = max(map(len, COMMANDS))
    lines = [
        "LoRA and full finetuning of video diffusion transformers",
        "",
        f"usage: {PROGRAM} COMMAND ...        {PROGRAM} COMMAND --help tells more of each",
        "",
        *(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()),
        "",
        "Examples:",
        *(f"  {line}" for line in EXAMPLES.splitlines()),
    ]
    print("\n".join(lines))
    return 0
