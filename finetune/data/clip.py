"""A clip as a dataset names it: a video or image file, its captions, and what else a manifest says of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune.runtime.paths import NoSuchHome, expanded

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".gif", ".wmv", ".flv", ".m2ts", ".mts"}
    | {".3gp", ".3g2", ".ogv", ".mxf", ".vob", ".f4v", ".asf", ".m2v", ".qt", ".divx", ".dv", ".rm", ".rmvb"}
)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".avif"})
MEDIA_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES

AGAIN = "copy or export it again, or remove it"  # the cure of a damaged file


@dataclass(frozen=True)
class Clip:
    """A video, or an image as a clip of one frame, and its captions.

    Attributes:
        captions: one or more.
        where: line or file that the captions come from, for messages.
        columns: the manifest's values besides video and caption, by column; empty cells are left out.
        folder: folder that paths in `columns` are relative to.
    """

    path: Path
    captions: tuple[str, ...]
    where: str
    columns: Mapping[str, str] = field(default_factory=dict)
    folder: Path = Path()

    @property
    def caption(self) -> str:
        """The first caption."""
        return self.captions[0]

    @property
    def is_image(self) -> bool:
        """Whether the file is an image, by its suffix."""
        return self.path.suffix.lower() in IMAGE_SUFFIXES

    def file(self, column: str) -> Path:
        """The path of the file that a column names."""
        return located(self.folder, self.columns[column])


def located(folder: Path, written: str) -> Path:
    """The file that a manifest in `folder` names. A "~" is a home folder, or part of the name where there is no such user."""
    try:
        return folder / expanded(written)
    except NoSuchHome:
        return folder / written
