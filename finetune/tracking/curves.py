"""Curves of metrics: smoothed, thinned for a picture, and the range that shows them."""

import math
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import Any

Points = list[tuple[int, float]]


def points_of(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[Points, list[int]]:
    """((step, value) of a metric in the order of steps, the steps at which it is not finite). Of several of a step, the last."""
    found = {row["step"]: row[name] for row in rows if isinstance(row.get(name), (int, float))}
    finite = [(step, float(value)) for step, value in sorted(found.items()) if math.isfinite(value)]
    return finite, sorted(step for step, value in found.items() if not math.isfinite(value))


def smoothed(points: Points) -> tuple[Points, int]:
    """(running mean over a thirtieth of the points, how many points that is)."""
    window = max(1, len(points) // 30)
    mean, total = [], 0.0
    for place, (step, value) in enumerate(points):
        total += value
        if place >= window:
            total -= points[place - window][1]
        mean.append((step, total / min(place + 1, window)))
    return mean, window


def running_median(points: Points) -> tuple[Points, int]:
    """The same with the median, which single outliers do not move."""
    window = max(1, len(points) // 30)
    ordered: list[float] = []
    found = []
    for place, (step, value) in enumerate(points):
        insort(ordered, value)
        if place >= window:
            del ordered[bisect_left(ordered, points[place - window][1])]
        found.append((step, ordered[len(ordered) // 2]))
    return found, window


def thinned(points: Points, most: int = 600) -> Points:
    """At most about `most` points: of each piece of the curve its least and its largest value, so that no peak is lost."""
    if len(points) <= most:
        return points
    size = 2 * len(points) / most
    kept = []
    for place in range(most // 2):
        piece = points[round(place * size) : round((place + 1) * size)]
        if piece:
            ends = {min(piece, key=lambda point: point[1]), max(piece, key=lambda point: point[1])}
            kept += sorted(ends)
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def shown_range(faint: Sequence[Points], clear: Sequence[Points]) -> tuple[float, float]:
    """The least and largest value that a picture shows: all of `clear`, and of `faint` all but the outermost hundredths."""
    values = [value for points in clear for _, value in points]
    for points in faint:
        ordered = sorted(value for _, value in points)
        if ordered:
            values += [ordered[round(share * (len(ordered) - 1))] for share in (0.01, 0.99)]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(high) / 10 or 1.0
    else:
        room = (high - low) * 0.06
    return (0.0 if 0 <= low < room else low - room), high + room


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two values: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return []
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]
