"""The charts of a run: curves as paths of an SVG that the page stretches, with ticks and marks as shares of its sides."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.tracking.curves import Points, points_of, running_median, shown_range, smoothed, thinned, ticks

WIDTH, HEIGHT = 1000, 300  # units of the view box, stretched to what there is room for
_QUARTERS = ("least noise", "less noise", "more noise", "most noise")
_DIGITS = 6  # of the values that are shown on hovering


@dataclass(frozen=True)
class Curve:
    """A curve of a chart.

    Attributes:
        colour: its place in the palette, from 0.
        kind: "line", "faint" for single steps behind a mean, "dots" for measurements, or "dashed".
        gaps: steps at which the value was not finite.
    """

    name: str
    points: Points
    colour: int = 0
    kind: str = "line"
    gaps: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Mark:
    """A vertical line at a step at which the run was started again."""

    step: int
    text: str
    is_change: bool


@dataclass(frozen=True)
class RunChart:
    """One chart, with a title and what is to be known of it in a line."""

    title: str
    curves: list[Curve]
    note: str = ""

    def drawn(self, marks: Sequence[Mark]) -> dict[str, Any]:
        """What the template shows: lengths are shares of the chart's sides in per cent, paths are in the view box."""
        steps = [step for curve in self.curves for step in (*(at for at, _ in curve.points), *curve.gaps)]
        first, last = min(steps), max(steps)
        faint = [curve.points for curve in self.curves if curve.kind == "faint"]
        low, high = shown_range(faint, [curve.points for curve in self.curves if curve.kind not in ("faint", "dashed")])
        room = high - low
        for value in (curve.points[-1][1] for curve in self.curves if curve.kind == "dashed"):
            if low - room <= value <= high + room:  # else it would flatten the others
                low, high = min(low, value - room / 20), max(high, value + room / 20)
        notes, curves = [self.note] if self.note else [], []
        for curve in self.curves:
            if curve.kind == "dashed":
                value = curve.points[-1][1]
                if not low <= value <= high:
                    notes.append(f"{curve.name}: {value:.4g}, {'above' if value > high else 'below'} the picture")
                    continue
            curves.append(curve)

        def x(step: float) -> float:
            return (step - first) / (last - first) if last > first else 0.5

        def y(value: float) -> float:
            return 1 - (min(max(value, low), high) - low) / (high - low)

        if cut := sum(not low <= value <= high for points in faint for _, value in points):
            notes.append(f"{cut} single step{'s lie' if cut > 1 else ' lies'} outside of the picture")
        if gaps := sorted({step for curve in curves for step in curve.gaps}):
            notes.append(f"not finite at {_few(gaps)}")
        shown = [(curve, thinned(curve.points)) for curve in curves]
        return {
            "title": self.title,
            "notes": notes,
            "curves": [
                {
                    "name": curve.name,
                    "class": f"c{curve.colour} {curve.kind}",
                    "path": _path([(WIDTH * x(step), HEIGHT * y(value)) for step, value in points]),
                    "dots": [(100 * x(step), 100 * y(value)) for step, value in points]
                    if curve.kind == "dots" or len(points) == 1
                    else [],
                    "last": _number(curve.points[-1][1]) if curve.points else "not finite",
                }
                for curve, points in shown
            ],
            "gaps": [100 * x(step) for step in _some(gaps, 200)],
            "marks": [
                {"at": 100 * x(mark.step), "text": mark.text, "is_change": mark.is_change}
                for mark in marks
                if first <= mark.step <= last
            ],
            "x_ticks": [
                (100 * x(step), f"{step:,.0f}") for step in ticks(first, last, 6) or [first] if step == int(step)
            ],
            "y_ticks": [(100 * y(value), _number(value)) for value in ticks(low, high, 4)],
            "data": json.dumps(
                {
                    "first": first,
                    "last": last,
                    "low": low,
                    "high": high,
                    "curves": [
                        {"name": curve.name, "colour": curve.colour, "points": [[s, _short(v)] for s, v in points]}
                        for curve, points in shown
                    ],
                },
                separators=(",", ":"),
            ),
        }


def charts_of(rows: Sequence[Mapping[str, Any]]) -> list[RunChart]:
    """The charts of a run's metrics: those of which there are any figures."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    found = [
        _with_mean(rows, "loss", "Training loss"),
        RunChart("Held-out loss", _heldout(rows), "on clips that are not trained on, with the same noise each time"),
        RunChart("Held-out loss by noise level", _quarters(rows, "heldout_loss_sigma", "dots"), "quarters of sigma"),
        RunChart("Training loss by noise level", _quarters(rows, "loss_sigma", "line"), "quarters of sigma"),
        RunChart("Held-out loss by term", _terms(rows, names, "heldout_loss/", "dots")),
        RunChart("Training loss by term", _terms(rows, names, "loss/", "line"), "running means"),
        RunChart("Learning rate", [_curve(rows, "lr", "learning rate")]),
        _with_median(rows, "grad_norm", "Gradient norm", "before clipping"),
        _with_median(rows, "seconds_per_step", "Seconds per step"),
    ]
    if "mfu" in names:
        found.append(_with_median(rows, "mfu", "Model FLOPs utilisation"))
    kept = [RunChart(each.title, [c for c in each.curves if c.points or c.gaps], each.note) for each in found]
    return [each for each in kept if each.curves]


def _with_mean(rows: Sequence[Mapping[str, Any]], name: str, title: str, note: str = "") -> RunChart:
    points, gaps = points_of(rows, name)
    mean, window = smoothed(points)
    return RunChart(title, _over(points, gaps, mean, f"mean of {window}"), note)


def _with_median(rows: Sequence[Mapping[str, Any]], name: str, title: str, note: str = "") -> RunChart:
    """The same of a figure with outliers, such as the seconds of a step that waits for something."""
    points, gaps = points_of(rows, name)
    median, window = running_median(points)
    return RunChart(title, _over(points, gaps, median, f"median of {window}"), note)


def _over(points: Points, gaps: list[int], clear: Points, name: str) -> list[Curve]:
    """A curve of every step, and a smooth one over it where it is another."""
    if clear == points:
        return [Curve("each step", points, 0, "line", gaps)]
    return [Curve("each step", points, 0, "faint", gaps), Curve(name, clear, 0)]


def _curve(rows: Sequence[Mapping[str, Any]], name: str, title: str, colour: int = 0, kind: str = "line") -> Curve:
    points, gaps = points_of(rows, name)
    return Curve(title, points, colour, kind, gaps)


def _heldout(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    return [
        _curve(rows, "heldout_loss", "held out", 1, "dots"),
        _curve(rows, "heldout_loss_outside", "outside of the trained noise levels", 3, "dots"),
        _curve(rows, "heldout_zero_loss", "predicting zero", 5, "dashed"),
    ]


def _quarters(rows: Sequence[Mapping[str, Any]], name: str, kind: str) -> list[Curve]:
    return [_curve(rows, f"{name}/q{place + 1}", title, place, kind) for place, title in enumerate(_QUARTERS)]


def _terms(rows: Sequence[Mapping[str, Any]], names: Sequence[str], prefix: str, kind: str) -> list[Curve]:
    """A curve for each term; those of every step smoothed."""
    found = []
    for place, name in enumerate(name for name in names if name.startswith(prefix)):
        points, gaps = points_of(rows, name)
        shown = smoothed(points)[0] if kind == "line" else points
        found.append(Curve(name.removeprefix(prefix), shown, place % 5, kind, gaps))
    return found


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) if points else ""


def _number(value: float) -> str:
    """A value at an axis or in a legend: few digits, no more zeros than it needs."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4g}"


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else 0.0


def _few(steps: Sequence[int]) -> str:
    named = ", ".join(f"{step:,}" for step in steps[:5])
    return f"step{'s' if len(steps) > 1 else ''} {named}" + (f" and {len(steps) - 5} more" if len(steps) > 5 else "")


def _some(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many, evenly chosen, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(place * (len(values) - 1) / (most - 1))] for place in range(most)]
