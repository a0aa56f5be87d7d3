"""A clip as a dataset names it: a video file, its caption, and what else a manifest says of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".gif"})


@dataclass(frozen=True)
class Clip:
    """A video file and its caption.

    Attributes:
        where: line or file that the pair comes from, for messages.
        columns: the manifest's values besides video and caption, by column; empty cells are left out.
        folder: folder that paths in `columns` are relative to.
    """

    path: Path
    caption: str
    where: str
    columns: Mapping[str, str] = field(default_factory=dict)
    folder: Path = Path()

    @property
    def captions(self) -> tuple[str, ...]:
        return (self.caption,)

    def file(self, column: str) -> Path:
        """The path of the file that a column names."""
        return self.folder / Path(self.columns[column]).expanduser()
