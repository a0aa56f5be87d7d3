"""What a kind of dataset has to say, and the reading of text and captions that kinds share."""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.data.clip import Clip
from finetune.recipe.text import decoded
from finetune.runtime.errors import Problem, UserError

LONGEST_CAPTION = 50_000  # characters; text encoders read a few hundred words


@dataclass(frozen=True)
class Columns:
    """Names of the columns, or of the text files, that hold videos and captions.

    Attributes:
        leave_out: folders and files in the dataset's own that are not looked into.
    """

    video: str
    caption: str
    leave_out: frozenset[Path] = frozenset()


@dataclass(frozen=True)
class Manifest:
    """What a dataset holds.

    Attributes:
        clips: in an order that depends on names and lines only.
        problems: single clips and rows that cannot be used.
        unused: files and rows that are left out without harm, each with the reason as `what`.
        files: every file that was read, or that a clip or row names. Not all of them need to exist.
    """

    clips: tuple[Clip, ...] = ()
    problems: tuple[Problem, ...] = ()
    unused: tuple[Problem, ...] = ()
    files: frozenset[Path] = frozenset()


@dataclass(frozen=True)
class DatasetFormat:
    """A kind of dataset.

    Attributes:
        locate: given `data.path`, the file or folder that `read` takes; None if the dataset is of another kind.
        read: reads the clips; raises UserError only for what makes the whole dataset unusable.
        suffix: of its manifest files, for messages; None for kinds that are folders.
    """

    locate: Callable[[Path, Columns], Path | None]
    read: Callable[[Path, Columns], Manifest]
    suffix: str | None = None


def read_text(path: Path, most: int | None = None) -> str:
    """A file's text, with "\\n" between lines. str.splitlines would also split at characters that captions may contain.

    Bytes that are not UTF-8 become lone surrogates, which `text_fault` finds in the caption or path that has them.

    Args:
        most: refuse files of more bytes.
    Raises:
        UserError: the file cannot be read.
    """
    try:
        if most is not None and (size := path.stat().st_size) > most:
            raise UserError(f"the file has {size:,} bytes, too many for a caption", "shorten it", str(path))
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", "check its permissions", str(path)) from None
    try:
        return decoded(data, "surrogateescape")
    except ValueError as error:
        raise UserError(f"cannot be read ({error})", "save it as UTF-8 text", str(path)) from None


def text_fault(text: str) -> tuple[str, str] | None:
    """(what is wrong, cure) of text that cannot be encoded as UTF-8; None if it can."""
    if text.isascii():
        return None
    odd = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
    if odd is None:
        return None
    if "\udc80" <= odd <= "\udcff":
        return f"is not UTF-8 text (byte 0x{ord(odd) - 0xDC00:02x})", "save the file as UTF-8 text"
    return f"has half a character (\\u{ord(odd):04x})", "write the character itself, or both halves of its \\u escape"


def caption_fault(caption: object, subject: str = "the caption") -> tuple[str, str] | None:
    """(what is wrong, cure) of what a dataset has in a caption's place; None if it can be trained with."""
    if caption is None or (isinstance(caption, str) and not any(map(_is_visible, caption))):
        return f"{subject} is empty", "write what the video shows"
    if not isinstance(caption, str):
        return f"{subject} is not text: {str(caption)[:40]}", "write it as text, in quotes"
    if fault := text_fault(caption):
        return f"{subject} {fault[0]}", fault[1]
    if len(caption) > LONGEST_CAPTION:
        cure = "shorten it; text encoders read a few hundred words"
        return f"{subject} has {len(caption):,} characters; the most is {LONGEST_CAPTION:,}", cure
    return None


def distinct_captions(captions: Sequence[object], where: str, subject: str = "the caption") -> tuple[str, ...]:
    """Captions without the space around them, each once. Raises UserError for one that cannot be used, or if there is none."""
    for caption in captions or [None]:
        if fault := caption_fault(caption, subject):
            raise UserError(*fault, where)
    return tuple(dict.fromkeys(str(caption).strip() for caption in captions))


def _is_visible(character: str) -> bool:
    """Whether a character leaves a mark: no space, control or zero-width character."""
    return not character.isspace() and (character.isascii() or unicodedata.category(character) not in ("Cc", "Cf"))


def merge_rows(clips: Iterable[Clip]) -> Manifest:
    """One clip of the rows that name the same file, with the captions of all of them.

    Rows of a file that differ in another column are a problem; a row that is there twice is used once.
    """
    firsts: dict[str, Clip] = {}
    captions: dict[str, dict[str, None]] = {}  # of each file, in their order; a list would be searched for each row
    problems, unused = [], []
    for clip in clips:
        key = normalised(str(clip.path))
        first = firsts.setdefault(key, clip)
        known = captions.setdefault(key, {})
        if first.columns != clip.columns:
            names = first.columns.keys() | clip.columns.keys()
            differing = sorted(name for name in names if first.columns.get(name) != clip.columns.get(name))
            what = f"{first.where} has the same video with another {' and '.join(map(repr, differing))}"
            problems.append(
                Problem(what, f"{clip.where} ({clip.path.name})", "give both the same, or remove one of them")
            )
        elif first is clip or any(caption not in known for caption in clip.captions):
            known |= dict.fromkeys(clip.captions)
        else:
            unused.append(Problem("repeats an earlier row", clip.where, "remove it"))
    merged = (replace(clip, captions=tuple(captions[key])) for key, clip in firsts.items())
    return Manifest(tuple(merged), tuple(problems), tuple(unused))


def normalised(name: str) -> str:
    """A name as NFC, since file systems differ in how they write accents."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def name_order(path: Path) -> tuple[list[str], str]:
    """Sorts paths by their folders and names, whatever the file system."""
    return [normalised(part) for part in path.parts], str(path)
