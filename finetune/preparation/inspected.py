"""What inspection finds of a dataset: its clips with their buckets and pieces, and why others cannot be used."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from finetune.data import decode
from finetune.data.buckets import BucketFit
from finetune.data.clip import Clip
from finetune.data.column_files import MASK
from finetune.data.sources import Piece, SourceFile, file_source
from finetune.data.windows import Windows
from finetune.preparation.mask_facts import seconds_of
from finetune.runtime.errors import Problem


class InspectedClip(NamedTuple):
    """A clip that can be trained on, with the hash of its file, its size and duration, its bucket, and its pieces.

    `files` has the hash of each further file that the manifest names for it, by column; `pictures` the size and length of those
    that are masks, control or reference videos or images; `source` is the number of its dataset; `black` are the windows
    that are left out because nothing of them would count by the clip's mask.
    """

    clip: Clip
    hash: str
    info: decode.VideoInfo
    fit: BucketFit
    files: Mapping[str, str]
    pictures: Mapping[str, decode.VideoInfo]
    windows: Windows = Windows((0,))
    source: int = 0
    black: Windows = Windows(())

    @property
    def masks(self) -> list[SourceFile]:
        """The file of its mask for each of its windows."""
        found, info = self.files[MASK], self.pictures[MASK]
        pieces = [Piece(self.fit.bucket, self.fit.fps, start) for start in self.windows.starts]
        return [file_source(MASK, self.clip, found, info, piece, "black").read() for piece in pieces]

    @property
    def samples(self) -> int:
        """How many samples it is in an epoch that takes every clip once."""
        return 1 if self.windows.take_turns else len(self.windows.starts)

    @property
    def unused(self) -> int:
        """Frames that are in none of its pieces."""
        return self.windows.unused(self.fit)

    @property
    def black_seconds(self) -> str:
        """Where the windows lie that are left out for its mask; empty if there is none."""
        return seconds_of(self.black, self.fit)

    @property
    def resampled(self) -> decode.Resampling:
        """Frames that are shown again and left out, over all of its pieces."""
        if self.clip.is_image:
            return decode.Resampling(0, 0)
        count, fps = self.fit.bucket.frames, self.fit.fps
        each = [self.info.resampled(fps, count, start / fps) for start in self.windows.starts]
        return decode.Resampling(*map(sum, zip(*each, strict=True)))


@dataclass(frozen=True)
class Inspection:
    """What was found of a dataset.

    Attributes:
        path: its folder or manifest.
        clips: those that can be trained on.
        problems: why others cannot.
        unused: files of the dataset's folder that are no clips, each with the reason.
        unreadable: why nothing of it can be read, which no policy skips.
    """

    path: Path
    clips: list[InspectedClip] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unused: list[Problem] = field(default_factory=list)
    unreadable: list[Problem] = field(default_factory=list)


def paths_by_content(clips: Iterable[InspectedClip]) -> dict[str, list[Path]]:
    """The different paths of clips that are the same file, byte for byte, by the file's hash."""
    same: dict[str, list[Path]] = defaultdict(list)
    for entry in clips:
        if entry.clip.path not in same[entry.hash]:
            same[entry.hash].append(entry.clip.path)
    return same
