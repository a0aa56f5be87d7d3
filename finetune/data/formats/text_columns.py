"""A folder with a text file of videos and one of captions: line n of one belongs to line n of the other."""

from collections.abc import Sequence
from pathlib import Path

from finetune.data.clip import Clip
from finetune.data.formats.format import Columns, DatasetFormat, read_text
from finetune.runtime.errors import Problem, UserError


def _locate(path: Path, columns: Columns) -> Path | None:
    return _first_file(path, (f"{columns.video}.txt", f"{columns.video}s.txt")) if path.is_dir() else None


def _first_file(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read(videos_file: Path, columns: Columns) -> list[Clip]:
    folder, caption = videos_file.parent, columns.caption
    captions_file = _first_file(folder, (f"{caption}.txt", f"{caption}s.txt", "prompts.txt"))
    if captions_file is None:
        raise UserError(
            "there is no text file of captions beside it",
            "add prompts.txt with one caption a line, or set data.caption_column to its name",
            str(videos_file),
        )
    videos, captions = _lines(videos_file), _lines(captions_file)
    if len(videos) != len(captions):
        raise UserError(
            f"{len(captions)} captions for {len(videos)} videos",
            "give both files the same number of lines; line n of one belongs to line n of the other",
            f"{captions_file} and {videos_file.name}",
        )
    return [
        Clip(folder / video, caption, f"{videos_file.name} line {number}")
        for number, (video, caption) in enumerate(zip(videos, captions, strict=True), start=1)
    ]


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
