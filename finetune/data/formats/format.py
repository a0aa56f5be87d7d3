"""What a kind of dataset has to say, and the reading of text files that kinds share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune.data.clip import Clip
from finetune.runtime.errors import UserError


@dataclass(frozen=True)
class Columns:
    """Names of the columns, or of the text files without .txt, that hold videos and captions."""

    video: str
    caption: str


@dataclass(frozen=True)
class DatasetFormat:
    """A kind of dataset.

    Attributes:
        locate: given `data.path`, the file or folder that `read` takes; None if the dataset is of another kind.
        read: reads the clips, in an order that depends on names and lines only; raises UserError for all that is wrong.
        suffix: of its manifest files, for messages; None for kinds that are folders.
    """

    locate: Callable[[Path, Columns], Path | None]
    read: Callable[[Path, Columns], list[Clip]]
    suffix: str | None = None


def read_text(path: Path) -> str:
    """A file's text, with "\\n" between lines. str.splitlines would also split at characters that captions may contain."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"cannot be read ({error})", "save it as UTF-8 text", str(path)) from None
