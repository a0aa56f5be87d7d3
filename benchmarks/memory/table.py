"""Writes the figures as tables."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.memory.chart import CAPACITY, COLUMNS
from benchmarks.memory.published import Row

GIB = 2**30


@dataclass(frozen=True)
class Line:
    """A published row and its simulations. `reproduced` is None for DeepSpeed's rows, which are not reproduced."""

    row: Row
    resident: dict[str, float]
    savers: dict[str, float]
    reproduced: dict[str, float] | None = None

    @property
    def columns(self) -> tuple[float, ...] | None:
        """The four reproduced columns in GiB, as running maxima like the published ones."""
        if self.reproduced is None:
            return None
        loaded, training, validation, testing = (
            self.reproduced[name] / GIB for name in ("loaded", "training", "validation", "testing")
        )
        return loaded, max(loaded, training), max(loaded, training, validation), testing

    @property
    def is_masked(self) -> bool:
        """Whether the published training peak is only that of loading, which was higher."""
        before, training = self.row.published[:2]
        return training is not None and training <= before + 0.002

    @property
    def is_misprint(self) -> bool:
        """Whether this is the row of 5b that prints 2b's 16.396 GiB for loading. Its neighbours have 30.06 for the same models."""
        return self.row.model == "cogvideox-5b" and self.row.published[0] == 16.396

    def error(self, column: int) -> float | None:
        """Relative error of a reproduced figure against the published one; None if one of them is missing or a misprint."""
        published = self.row.published[column]
        if self.columns is None or published is None or (column == 0 and self.is_misprint):
            return None
        return self.columns[column] / published - 1


def markdown(lines: Iterable[Line]) -> str:
    """A table with a line per row: published / reproduced for the four columns, training alone, ours, and the saving."""
    head = ["row", *COLUMNS, "training alone", "ours", "with savers", "saved"]
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        cells = [_name(line.row)]
        for column in range(4):
            mine = "" if line.columns is None else f" / {line.columns[column]:.2f}"
            cells.append(_published(line.row.published[column]) + mine)
        cells.append("" if line.reproduced is None else f"{line.reproduced['training'] / GIB:.2f}")
        ours, savers = line.resident["reserved"] / GIB, line.savers["reserved"] / GIB
        cells += [f"{ours:.2f}", f"{savers:.2f}", _saved(line, ours, savers)]
        table.append("| " + " | ".join(cells) + " |")
    return "\n".join(table)


def errors(lines: Iterable[Line]) -> str:
    """A table of median and worst errors by group and column. Masked rows are counted apart."""
    groups: dict[str, Callable[[Line], bool]] = {
        "AdamW": lambda line: line.row.optimizer == "adamw" and line.row.checkpointing,
        "AdamW, no checkpointing": lambda line: line.row.optimizer == "adamw" and not line.row.checkpointing,
        "8-bit": lambda line: line.row.optimizer == "adamw_8bit_bnb",
        "CPU offload": lambda line: line.row.optimizer == "adamw_cpu_offload",
    }
    table = ["| group | column | rows | median | worst |", "|---|---|---|---|---|"]
    for name, belongs in groups.items():
        mine = [line for line in lines if belongs(line)]
        for column, title in enumerate(COLUMNS):
            for masked in (False, True) if column == 1 else (None,):
                group = [line for line in mine if masked is None or line.is_masked == masked]
                kind = {None: "", False: ", unmasked", True: ", masked"}[masked]
                table += _summary(f"{name} | {title}{kind}", group, column)
    for line in lines:
        if line.columns is not None and line.row.published[1] is None:
            needed = line.reproduced["training"] / GIB
            table.append(f"\n{_name(line.row)} ran out of {CAPACITY:.0f} GiB: {needed:.1f} GiB are needed.")
    return "\n".join(table)


def _summary(title: str, lines: Iterable[Line], column: int) -> list[str]:
    found = [(error, line) for line in lines if (error := line.error(column)) is not None]
    if not found:
        return []
    worst, line = max(found, key=lambda pair: abs(pair[0]))
    median = statistics.median(abs(error) for error, _ in found)
    return [f"| {title} | {len(found)} | {median:.2%} | {worst:+.2%} ({_name(line.row)}) |"]


def _name(row: Row) -> str:
    method = f"LoRA r{row.rank}" if row.rank else {"lora": "LoRA", "full": "full"}[row.method]
    plain = "" if row.checkpointing else ", no checkpointing"
    return f"{row.model.removeprefix('cogvideox-')} {method}, {row.optimizer}, batch {row.batch_size}{plain}"


def _published(value: float | None) -> str:
    return "OOM" if value is None else f"{value:.2f}"


def _saved(line: Line, ours: float, savers: float) -> str:
    published = line.row.published[1]
    return "" if published is None else f"{1 - ours / published:.0%} / {1 - savers / published:.0%}"
