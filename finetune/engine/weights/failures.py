"""What a checkpoint that cannot be written or read means for the user."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from finetune.runtime.errors import UserError
from finetune.runtime.files import MAKE_ROOM, disk_error, no_room
from finetune.runtime.units import counted

FAILURE = (Exception, CheckpointException)  # DCP's own is a BaseException


def not_written(error: BaseException, step: int, folder: Path, steps: Sequence[int]) -> BaseException:
    """The error to raise for a checkpoint that could not be written, in words that are the same on all ranks.

    What is not about files is returned as it is.

    Args:
        folder: of all checkpoints.
        steps: of those that are complete, ascending.
    """
    if isinstance(error, UserError):
        return error
    what = f"the checkpoint of step {step} was not written"
    if not folder.parent.is_dir():
        there = "put it back, or set `output` to where it is now; then the same command goes on"
        return UserError(f"the run's folder is gone: {what}", there, str(folder.parent))
    text = RuntimeError(reason(error))
    safe = f"step {steps[-1]} is safe" if steps else "no earlier checkpoint exists"
    then = f"run the same command: it {'goes on from there' if steps else 'starts anew'}"
    if shortage := no_room(text):
        cure = f"{MAKE_ROOM}, or lower checkpoint.keep_last; then {then}"
        return UserError(f"{shortage}: {what}; {safe}", cure, str(folder))
    if disk_error(error if isinstance(error, OSError) else text, folder) or isinstance(error, CheckpointException):
        cure = f"check the disk and the folder's permissions, then {then}"
        return UserError(f"{what} ({reason(error)}); {safe}", cure, str(folder))
    return error


def not_read(
    error: BaseException, folder: Path, older: Sequence[int], ranks: int, saved_by: Callable[[], int]
) -> UserError:
    """The error for a checkpoint that could not be read.

    Args:
        folder: of this checkpoint.
        older: steps of the complete ones before it, ascending.
        saved_by: gives the number of processes that saved it.
    """
    then = f"the run then goes on from step {older[-1]}" if older else "the run then starts anew"
    what, cure = f"the checkpoint cannot be read ({reason(error)})", f"move this folder away; {then}"
    if "block_size" in str(error) + reason(error):  # torchao: a part that cuts through a block of moments
        processes = saved_by()
        what = f"moments in few bits, saved by {counted(processes, 'process')}, cannot be divided for {ranks}"
        cure = f"resume it with {processes}"
    return UserError(what, cure, str(folder))


def reason(error: BaseException) -> str:
    """The text of an error and of what DCP wrapped in it."""
    failures = getattr(error, "failures", None)
    if failures:
        return "; ".join(sorted({str(failure[0]) for failure in failures.values()}))
    return str(error) or type(error).__name__
