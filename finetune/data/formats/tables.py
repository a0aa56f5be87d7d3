"""Tables with a row for each clip: metadata.csv, .jsonl or .json in a folder, or such a file by any name.

Paths in them are relative to the file.
"""

import csv
import difflib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from finetune.data.clip import Clip
from finetune.data.formats.format import Columns, DatasetFormat, read_text
from finetune.runtime.errors import Problem, UserError

Rows = list[tuple[str, object]]
"""(where it is, the row) for each entry of a table."""


def table_format(suffix: str, read_rows: Callable[[Path], Rows]) -> DatasetFormat:
    """Tables of one format.

    Args:
        read_rows: reads a file of that suffix; raises UserError if it is not valid.
    """

    def locate(path: Path, _: Columns) -> Path | None:
        if path.is_dir():
            path = path / f"metadata{suffix}"
        return path if path.suffix.lower() == suffix and path.is_file() else None

    return DatasetFormat(locate, lambda path, columns: _clips(path, read_rows(path), columns), suffix)


def read_csv(path: Path) -> Rows:
    """Rows of a CSV file with a head line."""
    reader = csv.DictReader(io.StringIO(read_text(path)), strict=True)
    try:
        return [(f"{path.name}, line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        where = f"{path}, line {reader.reader.line_num}"
        raise UserError(f"not valid CSV: {error}", "close every quote that is opened", where) from None


def read_jsonl(path: Path) -> Rows:
    """Rows of a file with a JSON object on each line."""
    rows: Rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                rows.append((f"{path.name}, line {number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise _not_json(path, number, error) from None
    return rows


def read_json(path: Path) -> Rows:
    """Rows of a file with a JSON list."""
    try:
        entries = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise _not_json(path, error.lineno, error) from None
    if not isinstance(entries, list):
        raise UserError("not a list", 'write [{"video": ..., "caption": ...}, ...]', str(path))
    return [(f"{path.name}, entry {index + 1}", entry) for index, entry in enumerate(entries)]


def _not_json(path: Path, line: int, error: json.JSONDecodeError) -> UserError:
    return UserError(f"not valid JSON: {error.msg}", "mend the line", f"{path}, line {line}")


def _clips(path: Path, rows: Rows, named: Columns) -> list[Clip]:
    """The clips of a table's rows; raises UserError for columns that are missing or empty."""
    problems = []
    clips = []
    for where, row in rows:
        if not isinstance(row, dict):
            problems.append(
                Problem(
                    "not an object with named columns",
                    where,
                    f'write {{"{named.video}": ..., "{named.caption}": ...}}',
                )
            )
            continue
        values = []
        for key, column in (("data.video_column", named.video), ("data.caption_column", named.caption)):
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
            columns = _other_columns(row, (named.video, named.caption))
            clips.append(Clip(path.parent / Path(values[0]).expanduser(), values[1], where, columns, path.parent))
    if problems:
        raise UserError.of(problems[:20], f"{path}: {len(problems)} problems, the first {min(20, len(problems))}:")
    return clips


def _other_columns(row: Mapping[object, object], named: Sequence[str]) -> dict[str, str]:
    """A row's other columns as text: strings are stripped, other values are written as JSON."""
    others = {name: value for name, value in row.items() if isinstance(name, str) and name not in named}
    texts = {name: value.strip() if isinstance(value, str) else json.dumps(value) for name, value in others.items()}
    return {name: text for name, text in texts.items() if text not in ("", "null")}
