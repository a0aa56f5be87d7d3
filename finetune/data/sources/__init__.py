"""Kinds of datasets: how each is recognised, and how its clips are read. A new kind is one file here and one line in `SOURCES`."""

from finetune.data.sources import side_cars, tables, text_columns
from finetune.data.sources.source import Source

SOURCES: dict[str, Source] = {  # in the order in which a folder is looked through
    "csv": tables.source(".csv", tables.read_csv),
    "jsonl": tables.source(".jsonl", tables.read_jsonl),
    "json": tables.source(".json", tables.read_json),
    "text columns": text_columns.SOURCE,
    "side-cars": side_cars.SOURCE,
}
