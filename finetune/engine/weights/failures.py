"""What a checkpoint that cannot be written or read means for the user."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from finetune.runtime.errors import UserError
from finetune.runtime.files import disk_error, is_full

FAILURE = (Exception, CheckpointException)  # DCP's own is a BaseException


def not_written(error: BaseException, step: int, folder: Path, steps: Sequence[int]) -> BaseException:
    """The error to raise for a checkpoint that could not be written; the same one if it is not about files.

    Args:
        folder: of all checkpoints.
        steps: of those that are complete, ascending.
    """
    if isinstance(error, UserError):
        return error
    cause = error if isinstance(error, OSError) else RuntimeError(reason(error))
    safe = f"step {steps[-1]} is safe" if steps else "no earlier checkpoint exists"
    if is_full(cause):
        free = shutil.disk_usage(folder).free / 2**20
        return UserError(
            f"the disk is full ({free:.0f} MiB free): the checkpoint of step {step} was not written; {safe}",
            "free some space or lower checkpoint.keep_last, then run the same command: it goes on from there",
            str(folder),
        )
    if disk_error(cause, folder) or isinstance(error, CheckpointException):
        return UserError(
            f"the checkpoint of step {step} was not written ({reason(error)}); {safe}",
            "check the disk and the folder's permissions, then run the same command: it goes on from there",
            str(folder),
        )
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
        what = f"moments in few bits, saved by {processes} process(es), cannot be divided for {ranks}"
        cure = f"resume it with {processes}"
    return UserError(what, cure, str(folder))


def reason(error: BaseException) -> str:
    """The text of an error and of what DCP wrapped in it."""
    failures = getattr(error, "failures", None)
    if failures:
        return "; ".join(sorted({str(failure[0]) for failure in failures.values()}))
    return str(error) or type(error).__name__
