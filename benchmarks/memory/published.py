"""The published peak memory of finetuning CogVideoX on an A100 of 80 GB.

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
    """One published row; figures in GiB, None where it ran out of memory."""

    method: str
    optimizer: str
    gpus: int
    batch_size: int
    model: str  # a folder of CONFIGS
    rank: int | None
    checkpointing: bool
    published: tuple[float | None, ...]

    @classmethod
    def parse(cls, fields: dict[str, Any]) -> "Row":
        """A row of the file, or of JSON made from a row."""
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
    """All of them, in the order of publication."""
    with (HERE / "published.csv").open() as file:
        return [Row.parse(fields) for fields in csv.DictReader(file)]
