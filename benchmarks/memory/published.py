"""The published peak memory of finetuning CogVideoX on an A100 with 80 GB.

From the README of cogvideox-factory, now finetrainers
(github.com/a-r-r-o-w/finetrainers, October 2024 to January 2025): 49x480x720,
`torch.cuda.max_memory_reserved` in GiB at four moments.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COLUMNS = ("memory_before_training", "memory_before_validation", "memory_after_validation", "memory_after_testing")


@dataclass(frozen=True)
class Row:
    """One published row. Figures are in GiB, None where the run was out of memory."""

    method: str
    optimizer: str
    gpus: int
    batch_size: int
    model: str  # name of a folder in CONFIGS
    rank: int | None
    checkpointing: bool
    published: tuple[float | None, ...]

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> "Row":
        """A row from the fields of the CSV file, or from those of a `Row` that was written as JSON."""
        if "published" in fields:
            return cls(**fields)
        return cls(
            method=fields["method"],
            optimizer=fields["optimizer"],
            gpus=int(fields["gpus"]),
            batch_size=int(fields["batch_size"]),
            model=fields["model"].removeprefix("THUDM/").lower(),
            rank=int(fields["rank"]) if fields["rank"] else None,
            checkpointing=fields["gradient_checkpointing"] == "True",
            published=tuple(None if fields[name] == "OOM" else float(fields[name]) for name in COLUMNS),
        )


def rows() -> list[Row]:
    """All published rows, in the order of publication."""
    with (HERE / "published.csv").open() as file:
        return [Row.parse(fields) for fields in csv.DictReader(file)]
