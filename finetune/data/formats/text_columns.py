"""A folder with a text file of videos and one of captions: line n of one belongs to line n of the other."""

from collections.abc import Sequence
from pathlib import Path

from finetune.data.clip import MEDIA_SUFFIXES, Clip, located
from finetune.data.formats.format import (
    Columns,
    DatasetFormat,
    Manifest,
    caption_fault,
    merge_rows,
    read_text,
    text_fault,
)
from finetune.runtime.errors import Problem, UserError
from finetune.runtime.units import counted

_LOOKED_AT = 20  # lines of a file that may be a list of videos
_LARGEST = 64 * 2**20  # bytes of such a file


def _locate(path: Path, columns: Columns) -> Path | None:
    if not path.is_dir():
        return None
    video = _stem(columns.video)
    return next((file for file in _existing(path, (video, f"{video}s")) if not _is_side_car(file)), None)


def _stem(column: str) -> str:
    """The name of a column's text file, less the .txt that some write with it."""
    return column.removesuffix(".txt")


def _existing(folder: Path, stems: Sequence[str]) -> list[Path]:
    return [file for stem in stems if _is_file(file := folder / f"{stem}.txt")]


def _is_side_car(file: Path) -> bool:
    """Whether a text file is the caption of the clip of its name: video.txt beside video.mp4, unless it lists files."""
    has_clip = any(
        other.stem == file.stem and other.suffix.lower() in MEDIA_SUFFIXES for other in file.parent.iterdir()
    )
    return has_clip and not lists_files(file)


def lists_files(file: Path) -> bool:
    """Whether one of a text file's first lines names a file that exists."""
    try:
        lines = read_text(file, _LARGEST).split("\n")[:_LOOKED_AT]
    except UserError:
        return False
    return any(line.strip() and _is_file(located(file.parent, line.strip())) for line in lines)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long for a name
        return False


def _read(videos_file: Path, columns: Columns) -> Manifest:
    folder, caption = videos_file.parent, _stem(columns.caption)
    captions_file = next(iter(_existing(folder, (caption, f"{caption}s", "prompts"))), None)
    if captions_file is None:
        raise UserError(
            "there is no text file of captions beside it",
            "add prompts.txt with one caption a line, or set data.caption_column to its name",
            str(videos_file),
        )
    videos, captions = _lines(videos_file), _lines(captions_file)
    if len(videos) != len(captions):
        raise UserError(
            f"{counted(len(captions), 'caption')} for {counted(len(videos), 'video')}",
            "give both files the same number of lines; line n of one belongs to line n of the other",
            f"{captions_file} and {videos_file.name}",
        )
    clips, problems = [], []
    for number, (video, text) in enumerate(zip(videos, captions, strict=True), start=1):
        fault, file = text_fault(video), videos_file
        if not fault:
            fault, file = caption_fault(text), captions_file
        if fault:
            problems.append(Problem(fault[0], f"{file}, line {number} ({Path(video).name})", fault[1]))
        else:
            clips.append(Clip(located(folder, video), (text,), f"{videos_file.name} line {number}"))
    merged = merge_rows(clips)
    files = {videos_file, captions_file, *(located(folder, video) for video in videos)}
    return Manifest(merged.clips, (*problems, *merged.problems), merged.unused, frozenset(files))


def _lines(path: Path) -> list[str]:
    lines = read_text(path).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    blank = [
        Problem("empty line", f"{path}, line {n}", "fill it in") for n, line in enumerate(lines, 1) if not line.strip()
    ]
    if blank:
        raise UserError.of(blank)
    return [line.strip() for line in lines]


FORMAT = DatasetFormat(_locate, _read)
