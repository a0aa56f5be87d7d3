"""Kinds of datasets: how each is recognised, and how its clips are read. A new kind is one file here and one line in `FORMATS`."""

from finetune.data.formats import side_cars, tables, text_columns
from finetune.data.formats.format import DatasetFormat

FORMATS: dict[str, DatasetFormat] = {  # in the order in which a folder is looked through
    "csv": tables.table_format(".csv", tables.read_csv),
    "jsonl": tables.table_format(".jsonl", tables.read_jsonl),
    "json": tables.table_format(".json", tables.read_json),
    "text columns": text_columns.FORMAT,
    "side-cars": side_cars.FORMAT,
}
