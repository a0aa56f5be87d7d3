"""One console per run: only rank 0 prints, and libraries are quiet."""

import json
import logging
import os
import select
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar, TextIO

from rich.console import Console

from finetune.runtime.errors import LostPeer, UserError, harmless, one_line

console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

_LET_THE_OTHER_SPEAK = 1.0  # seconds
LOG_FILE = "log.txt"  # in a run's folder: what its rank 0 said, with times
_WARNING = "warning:"
ALL_PROBLEMS = "finetune_problems.txt"  # in the folder where the command was started

LIBRARIES = (
    "diffusers",
    "transformers",
    "peft",
    "torchao",
    "torchdata",
    "huggingface_hub",
    "libav",
    "PIL",
    "matplotlib",
    "wandb",
    "torch.distributed",
    "torch.utils._pytree",
)

HARMLESS = (
    "'set_vital' is deprecated",  # torchdata 0.11 on torch 2.13
    "In CPU autocast, but the target dtype is not supported",  # Mochi uses this to turn autocast off
    "FSDP2-wrapped module .* returned a view tensor",  # nothing modifies a transformer's output in place here
)


def quiet_libraries() -> None:
    """Raise the libraries' log level to errors and turn off their progress bars, which show more than fits a line or a log file.

    `finetune.runtime.download` shows the Hub's downloads in their place. Call before importing them.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message=message)


def be_quiet() -> None:
    """Say no more how work goes on; errors, warnings and what a command was asked for are still printed."""
    _Told.is_quiet = True


def is_quiet() -> bool:
    """Whether `be_quiet` was called."""
    return _Told.is_quiet


def be_verbose() -> None:
    """Let libraries say what they do."""
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.INFO)
    os.environ.update(TRANSFORMERS_VERBOSITY="info", DIFFUSERS_VERBOSITY="info")
    warnings.resetwarnings()


def is_reader_there() -> bool:
    """Whether what is printed on standard output is still read."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


@contextmanager
def quietly() -> Iterator[None]:
    """Print nothing inside the block."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


class _Told:
    """What of a process's lines is printed, and where they are kept."""

    is_quiet = False
    log: TextIO | None = None
    early: ClassVar[deque[str]] = deque(maxlen=1000)  # lines from before there was a log


def say(message: str, is_result: bool = False) -> None:
    """Print one line on rank 0; other ranks stay silent. With --quiet, warnings and results alone are printed."""
    if not is_main():
        return
    if _Told.is_quiet and not is_result and not message.startswith(_WARNING):
        _keep(harmless(message))
    else:
        _show(message)


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Keep what is said inside the block, and errors of `print_error`, in a file, too: each line with the time.

    Call it on rank 0 alone. A file that cannot be written ends nothing: it is said, once.
    """
    before = _Told.log
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _Told.log = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        _Told.log.writelines(_Told.early)
        _Told.early.clear()
    except OSError as error:
        _show(f"{_WARNING} {path} is not written: {error.strerror or error}")
    try:
        yield
    except UserError as error:
        _keep(f"error: {error}")
        raise
    except BaseException as error:
        _keep(f"ended by {type(error).__name__}: {error}")
        raise
    finally:
        if _Told.log is not before and _Told.log is not None:
            with suppress(OSError):
                _Told.log.close()
        _Told.log = before


def _keep(line: str) -> None:
    timed = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n"
    if _Told.log is None:
        _Told.early.append(timed)
        return
    with suppress(OSError, ValueError):
        _Told.log.write(timed)


def is_main() -> bool:
    """Whether this process is the run's rank 0, or alone."""
    return (
        int(os.environ.get("RANK", 0)) == 0 or "WORLD_SIZE" not in os.environ
    )  # RANK alone is left from something else


def listed(names: Sequence[object], most: int | None = 3) -> str:
    """Names of files for one line, whatever is in them: "a.mp4, b.mp4, c.mp4 and 2 more". `most` are named; None names all."""
    shown = ", ".join(one_line(str(name)) for name in names[:most])
    return shown if most is None or len(names) <= most else f"{shown} and {len(names) - most} more"


def shortened(name: str, most: int = 28) -> str:
    """A name for a progress line, with "…" in its middle if it is longer than that."""
    half = (most - 1) // 2
    shown = one_line(name)
    return shown if len(shown) <= most else f"{shown[:half]}…{shown[-half:]}"


def tell(text: str) -> None:
    """Print what a command was asked for on standard output; what a terminal would obey, or cannot show, is spelled out."""
    encoding = sys.stdout.encoding
    print(harmless(text).encode(encoding, "backslashreplace").decode(encoding))


def _show(message: str, style: str | None = None) -> None:
    """Print a line; what a terminal would obey, or cannot show, is spelled out.

    A log that cannot be written, on a full disk say, ends no training.
    """
    shown = harmless(message).encode(console.encoding, "backslashreplace").decode(console.encoding)
    _keep(shown)
    with suppress(OSError):
        console.print(shown, markup=False, style=style)


def print_error(error: UserError) -> None:
    """Print an error on one process of each node, and leave it for torchrun's closing summary. Every rank ends with it.

    Where its text does not name every problem, rank 0 writes all of them into a file, and says where.
    Other processes wait a moment, since torchrun ends all of a node as soon as one has ended.
    """
    if summary := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": str(error), "timestamp": str(int(time.time()))}
        with suppress(OSError):  # a full disk may be what the error is about
            Path(summary).write_text(json.dumps({"message": {"message": str(error), "extraInfo": extra}}))
    is_speaker = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if isinstance(error, LostPeer) and error.is_main_lost:  # rank 1 may be on the same node
        is_speaker = is_speaker or int(os.environ.get("RANK", 0)) == 1
    if is_speaker:
        _show(f"error: {error}", style="red")
        if error.is_short and is_main():
            _show(_written_out(error), style="red")
    else:
        time.sleep(_LET_THE_OTHER_SPEAK)


def _written_out(error: UserError) -> str:
    """Write every problem of an error into a file; returns where they are, or why they are not there."""
    path = Path(ALL_PROBLEMS)
    lines = [f"{problem}\n" for problem in error.problems]
    try:
        path = path.absolute()
        path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    except OSError as failure:
        why = failure.strerror or failure
        return f"all {len(lines)}, one by one, could not be written to {path} ({why}); check --report DIR lists clips"
    return f"all {len(lines)}, one by one: {path}"
