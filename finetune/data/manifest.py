"""Finds the clips of a dataset with their captions: folders, text columns, CSV, JSON and JSON Lines."""

import csv
import difflib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune.runtime.errors import Problem, UserError

VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".gif"})
TABLE_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.json")


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

    def file(self, column: str) -> Path:
        """The path of the file that a column names."""
        return self.folder / Path(self.columns[column]).expanduser()


def read_manifest(path: Path, video_column: str, caption_column: str, id_token: str = "") -> list[Clip]:
    """Find the clips of a dataset, in an order that depends on names and lines only.

    Args:
        path: a folder of videos with side-car .txt captions, a folder with `<video_column>s.txt` and
            `<caption_column>s.txt` (prompts.txt for "caption", too), a folder with metadata.csv, .json or .jsonl, or
            such a file. Paths inside are relative to the file.
        id_token: text that is put in front of every caption, followed by a space.
    Raises:
        UserError: names every missing file, missing caption and caption without a video, or an empty dataset.
    """
    if not path.exists():
        raise UserError(
            "the dataset does not exist", "set data.path to a folder of videos or a manifest file", str(path)
        )
    if path.is_dir():
        clips = _read_folder(path, video_column, caption_column)
    else:
        clips = _read_table(path, video_column, caption_column)
    if not clips:
        raise UserError(
            "the dataset is empty",
            f"put videos ({' '.join(sorted(VIDEO_SUFFIXES))}) with .txt captions of the same name there",
            str(path),
        )
    missing = [
        Problem("no such video file", f"{clip.path} (from {clip.where})", "mend the path or remove the line")
        for clip in clips
        if not clip.path.is_file()
    ]
    if missing:
        raise UserError.of(missing, f"{path}: {len(missing)} of {len(clips)} videos are missing:")
    if id_token:
        clips = [replace(clip, caption=f"{id_token} {clip.caption}") for clip in clips]
    return clips


def _read_folder(folder: Path, video_column: str, caption_column: str) -> list[Clip]:
    for name in TABLE_NAMES:
        if (folder / name).is_file():
            return _read_table(folder / name, video_column, caption_column)
    videos_file = _first_file(folder, (f"{video_column}.txt", f"{video_column}s.txt"))
    captions_file = _first_file(folder, (f"{caption_column}.txt", f"{caption_column}s.txt", "prompts.txt"))
    if videos_file:
        return _read_columns(folder, videos_file, captions_file)
    return _read_side_cars(folder)


def _first_file(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_columns(folder: Path, videos_file: Path, captions_file: Path | None) -> list[Clip]:
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
    lines = _text(path).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    blank = [
        Problem("empty line", f"{path}, line {n}", "fill it in") for n, line in enumerate(lines, 1) if not line.strip()
    ]
    if blank:
        raise UserError.of(blank)
    return [line.strip() for line in lines]


def _read_side_cars(folder: Path) -> list[Clip]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
    captions = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    problems = []
    clips = []
    for video in videos:
        caption = captions.pop(video.with_suffix(""), None)
        if caption is None:
            problems.append(
                Problem("video without a caption", str(video), f"write {video.with_suffix('.txt').name} beside it")
            )
            continue
        text = " ".join(_text(caption).split())
        if text:
            clips.append(Clip(video, text, caption.name))
        else:
            problems.append(Problem("the caption is empty", str(caption), "write what the video shows"))
    for caption in captions.values():
        problems.append(
            Problem("caption without a video", str(caption), "add the video of the same name, or remove the text")
        )
    if problems:
        raise UserError.of(problems, f"{folder}: {len(problems)} of its files have no partner:")
    return clips


def _read_table(path: Path, video_column: str, caption_column: str) -> list[Clip]:
    rows = _rows(path)
    problems = []
    clips = []
    for where, row in rows:
        if not isinstance(row, dict):
            problems.append(
                Problem(
                    "not an object with named columns",
                    where,
                    f'write {{"{video_column}": ..., "{caption_column}": ...}}',
                )
            )
            continue
        values = []
        for key, column in (("data.video_column", video_column), ("data.caption_column", caption_column)):
            value = row.get(column)
            if isinstance(value, str) and value.strip():
                values.append(value.strip())
                continue
            what = f"the column {column!r} is empty" if column in row else f"there is no column {column!r}"
            near = difflib.get_close_matches(column, [name for name in row if name], n=1, cutoff=0.4)
            cure = (
                f'fill it in, or set {key} = "{near[0]}"' if near and near[0] != column else f"fill it in, or set {key}"
            )
            problems.append(Problem(what, where, f"{cure} (columns: {', '.join(map(str, row))})"))
        if len(values) == 2:
            columns = _other_columns(row, (video_column, caption_column))
            clips.append(Clip(path.parent / Path(values[0]).expanduser(), values[1], where, columns, path.parent))
    if problems:
        raise UserError.of(problems[:20], f"{path}: {len(problems)} problems, the first {min(20, len(problems))}:")
    return clips


def _other_columns(row: Mapping[object, object], named: Sequence[str]) -> dict[str, str]:
    """A row's other columns as text: strings are stripped, other values are written as JSON."""
    others = {name: value for name, value in row.items() if isinstance(name, str) and name not in named}
    texts = {name: value.strip() if isinstance(value, str) else json.dumps(value) for name, value in others.items()}
    return {name: text for name, text in texts.items() if text not in ("", "null")}


def _rows(path: Path) -> list[tuple[str, object]]:
    """(where it is, row) for each entry of a table file."""
    suffix = path.suffix.lower()
    text = _text(path)
    if suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text), strict=True)
        try:
            return [(f"{path.name}, line {reader.line_num}", row) for row in reader]
        except csv.Error as error:
            where = f"{path}, line {reader.reader.line_num}"
            raise UserError(f"not valid CSV: {error}", "close every quote that is opened", where) from None
    try:
        if suffix == ".jsonl":
            rows = []
            for number, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    rows.append((f"{path.name}, line {number}", json.loads(line)))
            return rows
        if suffix == ".json":
            entries = json.loads(text)
            if not isinstance(entries, list):
                raise UserError("not a list", 'write [{"video": ..., "caption": ...}, ...]', str(path))
            return [(f"{path.name}, entry {index + 1}", entry) for index, entry in enumerate(entries)]
    except json.JSONDecodeError as error:
        where = f"{path}, line {number if suffix == '.jsonl' else error.lineno}"
        raise UserError(f"not valid JSON: {error.msg}", "mend the line", where) from None
    raise UserError("not a manifest", "use a folder, .csv, .json or .jsonl", str(path))


def _text(path: Path) -> str:
    """A file's text, with "\\n" between lines. str.splitlines would also split at characters that captions may contain."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"cannot be read ({error})", "save it as UTF-8 text", str(path)) from None
