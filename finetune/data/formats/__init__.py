"""Kinds of datasets: how each is recognised, and how its clips are read. A new kind is one file here and one line in `FORMATS`."""

from finetune.data.formats import rows, side_cars, splits, tables, text_columns
from finetune.data.formats.format import DatasetFormat

_TABLES = {
    "csv": tables.table_format(".csv", rows.read_csv),
    "jsonl": tables.table_format(".jsonl", rows.read_jsonl),
    "json": tables.table_format(".json", rows.read_json),
    "tsv": tables.table_format(".tsv", rows.read_tsv),
    "parquet": tables.table_format(".parquet", rows.read_parquet),
}

FORMATS: dict[str, DatasetFormat] = {  # in the order in which a folder is looked through
    **_TABLES,
    "text columns": text_columns.FORMAT,
    "splits": splits.split_format(list(_TABLES.values())),
    "side-cars": side_cars.FORMAT,
}
