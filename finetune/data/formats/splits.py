"""A folder with train/ and test/ and a table in each, as the Hub's video folders have it. train/ is what is trained on."""

from collections.abc import Sequence
from pathlib import Path

from finetune.data.formats.format import Columns, DatasetFormat, Manifest
from finetune.data.formats.listing import is_media, list_files
from finetune.data.formats.tables import only_table
from finetune.runtime.errors import Problem

_TRAIN = "train"
_HELDOUT = ("test", "validation", "valid", "val", "dev", "eval")


def split_format(tables: Sequence[DatasetFormat]) -> DatasetFormat:
    """Folders of that kind, with tables of these formats."""

    def read(table: Path, columns: Columns) -> Manifest:
        train = table.parent
        found = next(each.read(table, columns) for each in tables if each.locate(train, columns) == table)
        files, unused = set(found.files), list(found.unused)
        for folder in sorted(train.parent / name for name in _HELDOUT if (train.parent / name).is_dir()):
            cure = f'to measure the held-out loss on it, set validation.heldout = "{folder}"'
            listed = list_files(folder, columns.leave_out)
            kept_apart = sorted([*listed.files, *listed.bad])
            unused += [*listed.problems, *listed.unused]
            unused += [Problem(f"in {folder.name}/, which is not trained on", str(file), cure) for file in kept_apart]
            files |= {*kept_apart, *(Path(problem.where) for problem in [*listed.problems, *listed.unused])}
        return Manifest(found.clips, found.problems, tuple(unused), frozenset(files))

    def locate(path: Path, columns: Columns) -> Path | None:
        train = path / _TRAIN
        if not train.is_dir():
            return None
        table = only_table(train, tables, columns)
        return None if table is None or _has_other_clips(path, columns) else table

    return DatasetFormat(locate, read)


def _has_other_clips(path: Path, columns: Columns) -> bool:
    """Whether there are clips outside of the splits; then the folder is one of side-cars."""
    splits = [path / name for name in (_TRAIN, *_HELDOUT)]
    others = (each for each in list_files(path, [*splits, *columns.leave_out]).files)
    return any(map(is_media, others))
