"""Which pieces of clips something counts of, by their masks: found by decoding each mask once, and remembered with the file."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import av
import numpy as np

from finetune.data import decode
from finetune.data.buckets import BucketFit
from finetune.data.cache import Cache
from finetune.data.column_files import is_image
from finetune.data.masks import decode_mask
from finetune.data.sources import SourceFile
from finetune.data.windows import Windows
from finetune.models import loss_mask
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.logging import listed
from finetune.runtime.progress import ProgressLine

_VERSION = f"{decode.DECODER} {av.__version__}"  # another decoder may see other levels
_FACT = "white"  # in the facts of a mask's file


def last_white_frames(
    masks: Sequence[Sequence[SourceFile]], cache: Cache, runtime: Runtime
) -> list[list[int] | UserError]:
    """For each clip, the last frame of each of its pieces in which its mask is not black; -1 if it is black in all of them.

    Ranks share the work. Collective.

    Args:
        masks: of each clip, the mask's file for each piece.
    Returns:
        numbers of frames, counted from the start of the piece; or why a clip's mask cannot be decoded.
    """
    if not masks:
        return []
    runtime.doing("reading masks")
    mine = masks[runtime.rank :: runtime.world_size]
    with runtime.together():
        is_new = not all(_is_known(files, cache) for files in mine)
    with runtime.together(), ProgressLine("reading masks", len(mine), enabled=runtime.is_main and is_new) as line:
        found: list[list[int] | UserError] = []
        for files in mine:
            found.append(_of_clip(files, cache))
            line.update(len(found), "")
        cache.files.save()
    whole: list[list[int] | UserError] = [[] for _ in masks]
    for rank, share in enumerate(runtime.gather(found)):
        whole[rank :: runtime.world_size] = share
    return whole


def white_windows(mask: SourceFile, last_white: Sequence[int], given: int, windows: Windows, fit: BucketFit) -> Windows:
    """The windows of a clip without those that nothing of would count.

    Args:
        last_white: for each window, as `last_white_frames` returns it.
        given: frames at the start of a window that do not count, since the model is given them.
    Raises:
        UserError: none is left.
    """
    left = tuple(start for start, last in zip(windows.starts, last_white, strict=True) if last >= given)
    if left:
        return replace(windows, starts=left)
    named, where = f"its mask {mask.path} is", str(mask.clip)
    place = "" if is_image(mask.path) else f" from {seconds_of(windows, fit)}"
    if max(last_white) >= 0:
        frames = "frame" if given == 1 else f"{given} frames"
        of = " of a window" if len(windows.starts) > 1 else ""
        what = f"white only in the first {frames}{of}{place}, which the model is given"
        cure = "paint white what counts in later frames"
    else:
        what, cure = f"black{place}", "paint white what counts"
        if fit.trimmed > 0 and place:
            cure += ", or take another part of the clip by data.window"
    raise UserError(f"{named} {what}, so nothing of the clip would count", cure, where)


def seconds_of(windows: Windows, fit: BucketFit) -> str:
    """Where windows lie in the clip: "0.00 to 0.68 s"; those that overlap or touch are joined."""
    spans = windows.spans(fit.bucket.frames)
    return listed([f"{first / fit.fps:.2f} to {(first + count) / fit.fps:.2f} s" for first, count in spans])


def _known(path: Path, cache: Cache) -> dict[str, int]:
    """The last white frame of the pieces of a mask that are known. Raises OSError if there is no such file."""
    known = (cache.files.get(path) or {}).get(_FACT)
    return known["pieces"] if isinstance(known, dict) and known.get("version") == _VERSION else {}


def _is_known(files: Sequence[SourceFile], cache: Cache) -> bool:
    try:
        pieces = _known(files[0].path, cache)
    except OSError:
        return False
    return all(_key(file) in pieces for file in files)


def _of_clip(files: Sequence[SourceFile], cache: Cache) -> list[int] | UserError:
    path = files[0].path
    try:
        state, pieces = cache.files.state(path), _known(path, cache)
        new: dict[str, int] = {}
        for file in files:
            if (key := _key(file)) not in pieces:
                new[key] = _last_white(file)
        if new:
            pieces = pieces | new
            cache.files.put(path, state, **{_FACT: {"version": _VERSION, "pieces": pieces}})
        return [pieces[_key(file)] for file in files]
    except UserError as error:
        return error
    except OSError as error:
        reason = error.strerror or str(error)
        return UserError(f"cannot be read ({reason})", "mend its permissions or the disk, or remove it", str(path))


def _key(file: SourceFile) -> str:
    """What decides, besides the file, how a piece of a mask looks."""
    return str(file.bucket) if is_image(file.path) else f"{file.bucket} {file.fps:g} fps from {file.start:.6f} s"


def _last_white(file: SourceFile) -> int:
    white = (decode_mask(file) > 255 * loss_mask.DARK).any((1, 2))  # bool (F,), or (1,) of an image
    frames = np.flatnonzero(np.broadcast_to(white, file.bucket.frames))
    return int(frames[-1]) if len(frames) else -1
