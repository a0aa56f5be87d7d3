"""Paired timing: variants take turns in one run, so that a busy machine slows all of them equally. Medians are compared."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def take_turns(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, run in the order A B C A B C ... A first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median over rounds of the ratio in each round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def median_difference(left: Sequence[float], right: Sequence[float]) -> float:
    """The median over rounds of the difference in each round."""
    return statistics.median(a - b for a, b in zip(left, right, strict=True))


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table with aligned columns."""
    cells = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        print("| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |")
