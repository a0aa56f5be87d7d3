"""Draws the written table as a chart: published against reproduced figures, and ours beside the published ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.runtime.files import atomic
from finetune.tracking.drawing import BLUE, GREEN, LINE, ORANGE, PURPLE, RED, SOFT, drawing

CAPACITY = 80.0  # GiB of the published GPU
COLUMNS = ("before training", "before validation", "after validation", "after testing")
_SHOWN = tuple(
    f"{model} {method}, adamw, batch {size}"
    for model in ("2b", "5b")
    for method in ("LoRA r64", "full")
    for size in (1, 4)
)
_MISPRINT = (30.08, 16.40)  # see introduction.md: 2b's figure in a row of 5b


@dataclass(frozen=True)
class TableRow:
    """A row of the table, in GiB. None is a run out of memory, or a figure that is not there.

    Attributes:
        published: the four columns.
        reproduced: the same; empty where a row is not reproduced.
    """

    name: str
    published: tuple[float | None, ...]
    reproduced: tuple[float, ...]
    ours: float
    savers: float


def read_table(text: str) -> list[TableRow]:
    """The rows of the table in a report, see `table.markdown`."""
    rows, head = [], ["row", *COLUMNS]
    lines = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    start = next(place for place, cells in enumerate(lines) if cells[: len(head)] == head)
    for cells in lines[start + 2 :]:
        if len(cells) < len(head) + 3:
            break
        pairs = [[part.strip() for part in cell.split("/")] for cell in cells[1:5]]
        published = tuple(None if pair[0] == "OOM" else float(pair[0]) for pair in pairs)
        reproduced = tuple(float(pair[1]) for pair in pairs if len(pair) > 1)
        rows.append(TableRow(cells[0], published, reproduced, float(cells[6]), float(cells[7])))
    return rows


def draw(rows: Sequence[TableRow], file: Path) -> None:
    """Write the chart as a PNG. Raises UserError without matplotlib."""
    with drawing("benchmarks.memory") as pyplot:
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11.5, 5.2), layout="constrained", width_ratios=(1, 1.05))
        _scatter(left, rows)
        _ours(right, [row for row in rows if row.name in _SHOWN] or list(rows)[:8])
        with atomic(file) as partial:
            figure.savefig(partial, format="png")


def _scatter(axes: Any, rows: Sequence[TableRow]) -> None:
    top, total = CAPACITY, 0
    axes.fill_between(
        [0, top], [0, 0.95 * top], [0, 1.05 * top], color=LINE, alpha=0.6, linewidth=0, label="within 5 %"
    )
    axes.plot([0, top], [0, top], color=SOFT, linewidth=1)
    for place, (column, colour, marker) in enumerate(zip(COLUMNS, (GREEN, BLUE, ORANGE, PURPLE), "sodv", strict=True)):
        points = [
            (published, reproduced)
            for row in rows
            if row.reproduced
            for published, reproduced in [(row.published[place], row.reproduced[place])]
            if published is not None and (reproduced, published) != _MISPRINT
        ]
        total += len(points)
        if points:
            axes.scatter(
                *zip(*points, strict=True), s=20, marker=marker, color=colour, alpha=0.8, linewidth=0, label=column
            )
    axes.set(
        xlabel="published, measured on an A100 (GiB)",
        ylabel="reproduced, simulated on a CPU (GiB)",
        title=f"Peak memory of CogVideoX: {total} published figures",
        xlim=(0, top),
        ylim=(0, top),
        aspect="equal",
    )
    axes.legend(loc="upper left")


def _ours(axes: Any, rows: Sequence[TableRow]) -> None:
    """Three dots in a line for each row: published, ours, ours with memory savers."""
    for place, row in enumerate(rows):
        published = row.published[1]
        needed = row.reproduced[1] if row.reproduced else CAPACITY
        shown = needed if published is None else published
        axes.plot([row.savers, shown], [place, place], color=LINE, linewidth=3, zorder=1)
        face = "none" if published is None else ORANGE
        axes.scatter(
            shown,
            place,
            s=44,
            color=ORANGE,
            facecolor=face,
            zorder=2,
            label="" if place else "published, before validation",
        )
        axes.scatter(row.ours, place, s=44, color=BLUE, zorder=3, label="" if place else "ours")
        axes.scatter(row.savers, place, s=44, color=GREEN, zorder=3, label="" if place else "ours, with savers")
        if published is None:
            axes.annotate(
                "out of memory",
                (shown, place),
                xytext=(0, 7),
                textcoords="offset points",
                ha="right",
                color=SOFT,
                fontsize=8,
            )
    axes.axvline(CAPACITY, color=RED, linestyle="--", linewidth=1.2, label="an A100's 80 GB")
    axes.set_yticks(range(len(rows)), [row.name.replace(", adamw", "") for row in rows])
    axes.set(xlabel="GiB reserved up to the end of training", title="Ours for the same work (AdamW)", xlim=(0, None))
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=2)
