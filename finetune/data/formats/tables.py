"""Tables with a row for each clip: metadata.csv, .jsonl, .json, .tsv or .parquet in a folder, or such a file by any name.

Paths in them are relative to the file.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from finetune.data.clip import Clip
from finetune.data.formats.format import Columns, DatasetFormat, Manifest, distinct_captions, merge_rows, text_fault
from finetune.data.formats.rows import TableRows, other_columns
from finetune.recipe.schema import Data
from finetune.runtime.errors import Problem, UserError
from finetune.runtime.paths import NoSuchHome, expanded

_HUB = "file_name"  # the Hub's name for the column of files
_USUAL = {
    "video": (_HUB, "path", "video_path", "file", "filename", "file_path", "media_path"),
    "caption": ("prompt", "text", "captions", "description", "short_caption", "long_caption"),
}
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_DEFAULT_VIDEO = Data.model_fields["video_column"].default


def table_format(suffix: str, read_table: Callable[[Path], TableRows]) -> DatasetFormat:
    """Tables of one format.

    Args:
        read_table: reads a file of that suffix; raises UserError if it is not valid.
    """

    def locate(path: Path, _: Columns) -> Path | None:
        if path.is_dir():
            path = path / f"metadata{suffix}"
        return path if path.suffix.lower() == suffix and path.is_file() else None

    return DatasetFormat(locate, lambda path, columns: _manifest(path, read_table(path), columns), suffix)


def only_table(path: Path, formats: Iterable[DatasetFormat], columns: Columns) -> Path | None:
    """The table of a folder, or of a path that is one; None if there is none. Raises UserError if there are several."""
    found = [table for each in formats if (table := each.locate(path, columns))]
    if len(found) > 1:
        cure = f"name the one that is meant in data.path, such as {found[0]}; or remove the others"
        raise UserError(f"there are {len(found)} tables: {', '.join(table.name for table in found)}", cure, str(path))
    return next(iter(found), None)


def _manifest(path: Path, table: TableRows, named: Columns) -> Manifest:
    """The clips of a table's rows. Raises UserError for columns that no row has."""
    columns = dict.fromkeys(str(name) for _, row in table.rows if isinstance(row, dict) for name in row)
    named = _existing(path, columns, table.unread, named)
    clips: list[Clip] = []
    problems: list[Problem] = []
    files = {path}
    for where, row in table.rows:
        if isinstance(row, Problem):
            problems.append(row)
        elif not isinstance(row, dict):
            cure = f'write {{"{named.video}": ..., "{named.caption}": ...}}'
            problems.append(Problem("not an object with named columns", where, cure))
        else:
            try:
                clips.append(_clip(path.parent, where, row, named, files))
            except UserError as error:
                problems += error.problems
    merged = merge_rows(clips)
    unread = [
        Problem(f"the column {name!r} cannot be read: {reason}", str(path), "write it as text to use it")
        for name, reason in table.unread.items()
    ]
    if table.of_bytes:
        what = f"columns of bytes are not read: {', '.join(map(repr, table.of_bytes))}"
        unread.append(Problem(what, str(path), "save what they hold as files, and name these in a column, to use it"))
    return Manifest(merged.clips, (*problems, *merged.problems), (*merged.unused, *unread), frozenset(files))


def _existing(path: Path, columns: Mapping[str, None], unread: Mapping[str, str], named: Columns) -> Columns:
    """The columns to read. Raises UserError if there is none of a name, or if it cannot be read."""
    if not columns and not unread:
        return named
    if named.video not in columns and named.video == _DEFAULT_VIDEO and _HUB in columns:
        named = replace(named, video=_HUB)
    problems = []
    for kind, column in (("video", named.video), ("caption", named.caption)):
        if column in unread:
            problems.append(
                Problem(f"the column {column!r} cannot be read: {unread[column]}", str(path), "write it as text")
            )
        elif column not in columns:
            problems.append(
                Problem(f"there is no column {column!r}", str(path), _cure_of_no_column(path, kind, column, columns))
            )
    if problems:
        raise UserError.of(problems)
    return named


def _cure_of_no_column(path: Path, kind: str, column: str, columns: Mapping[str, None]) -> str:
    names = [name for name in columns if name]
    near = next((name for name in _USUAL[kind] if name in names), None)
    near = near or next(iter(difflib.get_close_matches(column, names, n=1, cutoff=0.4)), None)
    if len(names) == 1 and any(separator in names[0] for separator in ";\t"):
        return f"separate the fields by commas, or by tabs in a .tsv file (the head line is {names[0]!r})"
    cure = f'set data.{kind}_column = "{near}"' if near else f"set data.{kind}_column"
    binary = "; columns of bytes are not read: save videos as files" if path.suffix.lower() == ".parquet" else ""
    return f"{cure} (columns: {', '.join(names)}{binary})"


def _clip(folder: Path, where: str, row: Mapping[str, object], named: Columns, files: set[Path]) -> Clip:
    """The clip of a row. Adds the files that it names to `files`. Raises UserError for what is wrong with it."""
    path = _path(folder, where, row, named.video)
    files.add(path)
    shown = f"{where} ({path.name})"
    captions = _captions(shown, row, named.caption)
    clip = Clip(path, captions, where, _columns(shown, row, (named.video, named.caption)), folder)
    files |= {clip.file(column) for column in clip.columns}
    return clip


def _path(folder: Path, where: str, row: Mapping[str, object], column: str) -> Path:
    value = row.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        what = f"the column {column!r} is empty" if column in row else f"there is no column {column!r}"
        raise UserError(what, f"fill it in (columns: {', '.join(map(str, row))})", where)
    if not isinstance(value, str):
        raise UserError(f"the column {column!r} is not text: {str(value)[:40]}", "write the path of a file", where)
    if fault := text_fault(value):
        raise UserError(f"the column {column!r} {fault[0]}", fault[1], where)
    if _ADDRESS.match(value.strip()):
        raise UserError("an address, not a file", "download the video, and write the path of its file", where)
    try:
        return folder / expanded(value.strip())
    except NoSuchHome as error:
        raise UserError(error.what, error.cure, where) from None


def _captions(where: str, row: Mapping[str, object], column: str) -> tuple[str, ...]:
    if column not in row:
        raise UserError(f"there is no column {column!r}", f"fill it in (columns: {', '.join(map(str, row))})", where)
    value = row[column]
    return distinct_captions(value if isinstance(value, list) else [value], where, f"the column {column!r}")


def _columns(where: str, row: Mapping[str, object], named: Sequence[str]) -> dict[str, str]:
    try:
        columns = other_columns(row, named)
    except UserError as error:
        raise UserError.of([replace(problem, where=where) for problem in error.problems]) from None
    for name, value in columns.items():
        if fault := text_fault(name + value):
            raise UserError(f"the column {name!r} {fault[0]}", fault[1], where)
    return columns
