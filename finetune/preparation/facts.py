"""What has to be known of a dataset's files before they are used, remembered as long as a file does not change."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import av

from finetune.data import decode
from finetune.data.cache import Cache
from finetune.data.clip import Clip
from finetune.data.column_files import probe_picture
from finetune.data.decode import VideoInfo
from finetune.data.file_facts import content_hash
from finetune.data.images import IMAGE_DECODER, probe_image
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import Unreadable, UserError
from finetune.runtime.progress import PATIENCE, ProgressLine
from finetune.runtime.shared_work import shared_work

Use = Literal["video", "image", "picture", "file"]
"""What a file is for: a clip, an image to train on, a column's mask or control, or anything that an encoder reads itself."""

_TURNS, _MOST_AT_ONCE = 32, 32  # of each rank, where there are files enough; and files that it takes in one
_PROBES = {"video": decode.probe, "image": probe_image, "picture": probe_picture}
# Another decoder may accept a file, or refuse it.
_VERSION = hashlib.blake2b(f"{decode.DECODER} {IMAGE_DECODER} {av.__version__}".encode(), digest_size=4).hexdigest()


class FileTable:
    """The facts of many files, by path and use."""

    def __init__(self, found: Mapping[Path, dict | UserError]) -> None:
        self._found = found

    def hash(self, file: Path) -> str:
        """Hash of a file's content. Raises the UserError that its inspection has ended with."""
        return self._known(file)["hash"]

    def info(self, file: Path) -> VideoInfo:
        """A picture's size and length. Raises as `hash`."""
        info = VideoInfo.of(self._known(file))
        assert info is not None  # `facts_of` has seen to it
        return info

    def _known(self, file: Path) -> dict:
        found = self._found[file]
        if isinstance(found, UserError):
            raise found
        return found


def read_facts(uses: Mapping[Path, Use], cache: Cache, runtime: Runtime) -> FileTable:
    """Look at files, of which each rank takes the next few when it is free. Collective; returns the same on every rank.

    A rank's files may take longer to read than a collective waits.
    """
    files = sorted(uses)
    few = max(1, min(_MOST_AT_ONCE, len(files) // (_TURNS * runtime.world_size)))
    mine: dict[Path, dict | UserError] = {}
    runtime.doing("reading the dataset's files")
    line = ProgressLine("reading files", len(files), enabled=runtime.is_main, patience=PATIENCE)
    with line, shared_work(runtime, math.ceil(len(files) / few)) as shared:
        while (number := shared.take()) is not None:
            mine |= {file: facts_of(file, uses[file], cache) for file in files[number * few : (number + 1) * few]}
            done, _ = shared.done(failed=False)
            line.update(min(done * few, len(files)), "")
        cache.files.save()
    facts: dict[Path, dict | UserError] = {}
    for share in runtime.gather(mine):
        facts |= share
    return FileTable(facts)


def facts_of(file: Path, use: Use, cache: Cache) -> dict[str, Any] | UserError:
    """A file's hash, and the fields of `VideoInfo` unless its use is "file"; or what is wrong with it."""
    try:
        state = cache.files.state(file)
        known = cache.files.get(file)
        if known is None or "hash" not in known:
            known = cache.files.put(file, state, hash=content_hash(file))
        if use == "file" or (known.get("probed_by") == _VERSION and VideoInfo.of(known) is not None):
            return known
        if refused := cache.files.get_refusal(file, f"{use} {_VERSION}"):
            return UserError.of(refused)
        try:
            return cache.files.put(file, state, **asdict(_PROBES[use](file)), probed_by=_VERSION)
        except Unreadable as error:  # it may be read the next time
            return error
        except UserError as error:
            cache.files.put_refusal(file, f"{use} {_VERSION}", error.problems, state)
            return error
    except OSError as error:
        reason = error.strerror or str(error)
        return UserError(f"cannot be read ({reason})", "mend its permissions or the disk, or remove it", str(file))


def uses_of(clips: Sequence[Clip], columns: Sequence[str], pictures: Sequence[str]) -> dict[Path, Use]:
    """What the files of clips are for.

    Args:
        columns: columns whose files are read, of clips that have them.
        pictures: those among them that hold pictures.
    """
    uses: dict[Path, Use] = {}
    for column in columns:
        for clip in clips:
            if column in clip.columns:
                uses[clip.file(column)] = "picture" if column in pictures else "file"
    return uses | {clip.path: "image" if clip.is_image else "video" for clip in clips}
