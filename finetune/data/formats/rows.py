"""Reads the rows of a table: CSV, TSV, JSON, JSON Lines and Parquet. A row that cannot be read is a problem in its place."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from finetune.data.clip import MEDIA_SUFFIXES
from finetune.data.formats.format import read_text, text_fault
from finetune.recipe.text import load_json
from finetune.runtime.errors import Problem, UserError

if TYPE_CHECKING:
    import pyarrow

Rows = list[tuple[str, object]]
"""(where it is, the row) for each entry of a table; a `Problem` in the place of a row that cannot be read."""


@dataclass(frozen=True)
class TableRows:
    """What a table holds.

    Attributes:
        rows: its entries.
        unread: columns that the rows lack since their values cannot be read, each with the reason.
        of_bytes: columns that they lack since they hold bytes, such as the videos themselves.
    """

    rows: Rows
    unread: Mapping[str, str] = field(default_factory=dict)
    of_bytes: Sequence[str] = ()


_LONGEST_FIELD = 16 * 2**20  # characters; csv's own limit is 128 KiB, and captions that long get a message of their own


def read_csv(path: Path) -> TableRows:
    """Rows of a CSV file with a head line."""
    return _read_separated(path, ",", "a comma")


def read_tsv(path: Path) -> TableRows:
    """Rows of a file of tab-separated values with a head line."""
    return _read_separated(path, "\t", "a tab")


def _read_separated(path: Path, separator: str, name: str) -> TableRows:
    # Where a space follows each comma, a quote after it opens a field, too. After a tab and a space, it is text.
    is_csv = separator == ","
    reader = csv.reader(io.StringIO(read_text(path)), strict=True, delimiter=separator, skipinitialspace=is_csv)
    rows: Rows = []
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        head = next(reader, [])
        _check_head(path, head)
        first = reader.line_num + 1
        for fields in reader:
            where, opens = f"{path.name}, line {reader.line_num}", f"{path.name}, line {first}"
            if _has_swallowed_rows(fields, separator):
                rows.append((opens, _swallowed(opens, reader.line_num)))
            elif len(fields) == len(head):
                rows.append((where, dict(zip(head, fields, strict=True))))
            elif fields:  # not an empty line
                rows.append((where, _wrong_count(where, fields, head, name)))
            first = reader.line_num + 1
    except csv.Error as error:
        cure = "close every quote that is opened, and double the quotes inside of a field"
        raise UserError(
            f"not valid {path.suffix[1:].upper()}: {error}", cure, f"{path}, line {reader.line_num}"
        ) from None
    finally:
        csv.field_size_limit(limit)
    return TableRows(rows)


def _check_head(path: Path, head: Sequence[str]) -> None:
    where = f"{path}, line 1"
    if fault := text_fault("".join(head)):
        raise UserError(f"the head line {fault[0]}", fault[1], where)
    _refuse_repeated(head, where)


def _refuse_repeated(columns: Sequence[str], where: str) -> None:
    if twice := next((name for name in columns if name and columns.count(name) > 1), None):
        raise UserError(f"the column {twice!r} is there twice", "give each column a name of its own", where)


def _has_swallowed_rows(fields: Sequence[str], separator: str) -> bool:
    """Whether a field holds other rows, since a quote that is part of a caption has opened it, and that of another has closed it.

    Captions may have several lines, with separators in them. Taken for rows are those of which a line has as many separators as its
    part of a row would have, and the name of a video or an image between them.
    """
    after = len(fields) - 1  # separators of a whole row
    for before, text in enumerate(fields):
        lines = text.split("\n")
        if len(lines) > 1 and separator in text:
            expected = [after - before, *[after] * (len(lines) - 2), before]
            for line, count in zip(lines, expected, strict=True):
                if count and line.count(separator) == count and any(map(_names_media, line.split(separator))):
                    return True
    return False


def _names_media(text: str) -> bool:
    return PurePath(text.strip()).suffix.lower() in MEDIA_SUFFIXES


def _swallowed(where: str, last: int) -> Problem:
    what = f"a quote opens a field here that is closed on line {last}, so that the rows in between would be part of it"
    return Problem(
        what, where, 'put captions with quotes in quotes, and double those inside of them: """Hi"", he says"'
    )


def _wrong_count(where: str, fields: Sequence[str], head: Sequence[str], separator: str) -> Problem:
    what = f"{len(fields)} {'field' if len(fields) == 1 else 'fields'} for {len(head)} columns ({', '.join(head)})"
    if len(fields) < len(head):
        return Problem(what, where, "write all of them; an empty field is two separators in a row")
    return Problem(what, where, f'put the caption in quotes, "like this": {separator} separates fields')


def read_jsonl(path: Path) -> TableRows:
    """Rows of a file with a JSON object on each line."""
    rows: Rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path.name}, line {number}"
            try:
                rows.append((where, load_json(line)))
            except json.JSONDecodeError as error:
                rows.append((where, Problem(f"not valid JSON: {error.msg}", where, "mend the line")))
    return TableRows(rows)


def read_json(path: Path) -> TableRows:
    """Rows of a file with a JSON list."""
    try:
        entries = load_json(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON: {error.msg}", "mend the line", f"{path}, line {error.lineno}") from None
    if not isinstance(entries, list):
        raise UserError("not a list", 'write [{"video": ..., "caption": ...}, ...]', str(path))
    return TableRows([(f"{path.name}, entry {index + 1}", entry) for index, entry in enumerate(entries)])


def read_parquet(path: Path) -> TableRows:
    """Rows of a Parquet file. Columns of bytes, such as the videos themselves, are named and not read."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        cure = 'in the checkout: pip install -e ".[parquet]"; or save the table as .csv or .jsonl'
        raise UserError("pyarrow is not installed, which reads Parquet", cure, str(path)) from None
    try:
        with parquet.ParquetFile(path) as file:
            _refuse_repeated(file.schema_arrow.names, str(path))
            of_bytes = [field.name for field in file.schema_arrow if _has_bytes(field.type)]
            names = [name for name in file.schema_arrow.names if name not in of_bytes]
            table = file.read(columns=names)
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise UserError(
            f"not valid Parquet: {error}", "write it again, or save it as .csv or .jsonl", str(path)
        ) from None
    columns: dict[str, list[object]] = {}
    unread: dict[str, str] = {}
    for name in names:
        try:
            columns[name] = table.column(name).to_pylist()
        except (ValueError, ArithmeticError, LookupError, TypeError, pyarrow.ArrowException) as error:
            unread[name] = str(error).split(". ")[0]  # such as times that Python's own types cannot hold
    entries = [{name: values[row] for name, values in columns.items()} for row in range(table.num_rows)]
    rows: Rows = [(f"{path.name}, row {number}", entry) for number, entry in enumerate(entries, 1)]
    return TableRows(rows, unread, of_bytes)


def _has_bytes(kind: "pyarrow.DataType") -> bool:
    """Whether values of a type are bytes, or hold some: the Hub's videos are structs of bytes and a path."""
    from pyarrow import types

    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _has_bytes(kind.value_type)
    of_bytes = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return any(test(kind) for test in of_bytes) or any(
        _has_bytes(kind.field(number).type) for number in range(kind.num_fields)
    )


def other_columns(row: Mapping[str, object], named: Sequence[str]) -> dict[str, str]:
    """A row's other columns as text: strings are stripped, other values are written as JSON."""
    texts = dict(_texts((name, value) for name, value in row.items() if name not in named))
    return {name: text for name, text in texts.items() if text not in ("", "null")}


def _texts(values: Iterator[tuple[str, object]]) -> Iterator[tuple[str, str]]:
    for name, value in values:
        try:
            yield name, value.strip() if isinstance(value, str) else json.dumps(value, default=str)
        except RecursionError:
            raise UserError(f"the column {name!r} is nested too deeply", "make it flat") from None
