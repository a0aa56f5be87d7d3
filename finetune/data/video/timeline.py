"""The times of a stream's frames: whether their rate is constant, and whether some are missing."""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

_JITTER = 1.25e-3  # seconds: as far as phones and cameras write a time from where it should be
_SHARE = 0.45  # of a frame: times that are further off belong to another frame
_ROUNDED = 0.4999  # of a tick: with half a tick, a frame that is left out would pass for rounding
_HOLE = 0.25  # seconds: a single gap of this length in a clip of constant rate is a hole in the file
_REORDERED = 8  # frames: how far apart the gaps are that one hole leaves


@dataclass(frozen=True)
class Timeline:
    """Times of a stream's frames.

    Attributes:
        ticks: presentation times, strictly ascending: int64 (frames,).
        tick: seconds of a tick.
        rate: frames a second if the rate is constant, else None.
        duration: seconds from the first frame until the last one ends.
        first: time of the first frame in ticks; at a constant rate, where it should be by the times of all.
    """

    ticks: np.ndarray
    tick: Fraction
    rate: Fraction | None
    duration: float
    first: float


def timeline(ticks: np.ndarray, tick: Fraction, last: int, announced: Iterable[Fraction | None]) -> Timeline:
    """Find the rate of frames.

    Args:
        ticks: presentation times, strictly ascending: int64 (frames,).
        last: duration of the last frame in ticks; 0 if it is not known.
        announced: rates that the file names; the first that the times agree with is taken.
    """
    known = [rate for rate in announced if rate]
    if len(ticks) == 1:
        seconds = last * tick or 1 / (known or [Fraction(25)])[0]
        return Timeline(ticks, tick, 1 / Fraction(seconds), float(seconds), float(ticks[0]))
    rate = constant_rate(ticks, tick, known)
    if rate:
        off = _off(ticks, tick, rate)
        first = round(float(ticks[0] + (off.max() + off.min()) / 2 / tick), 3)
        return Timeline(ticks, tick, rate, float(len(ticks) / rate), first)
    span = int(ticks[-1] - ticks[0])
    end = last or round(span / (len(ticks) - 1))
    return Timeline(ticks, tick, None, float((span + end) * tick), float(ticks[0]))


def constant_rate(ticks: np.ndarray, tick: Fraction, announced: Iterable[Fraction]) -> Fraction | None:
    """The rate at which all times lie where they should, but for rounding and jitter; None if there is none.

    A time may be off by a tick, to which the container rounds, and by a millisecond; and by less than half a frame.
    """
    order = np.arange(len(ticks)) - (len(ticks) - 1) / 2
    slope = float(order @ (ticks - ticks[0])) / float(order @ order)  # least squares: ticks from frame to frame
    fitted = 1 / (Fraction(slope).limit_denominator(10**6) * tick)
    usual = [Fraction(round(fitted)), Fraction(round(fitted * Fraction(1001, 1000)) * 1000, 1001)]
    near = [rate for rate in sorted(usual, key=lambda rate: abs(rate - fitted)) if rate]
    for rate in [*announced, *near, fitted]:
        if abs(rate / fitted - 1) * (len(ticks) - 1) > 1:
            continue
        off = _off(ticks, tick, rate)
        # Rounding alone puts times almost half a tick off, which may be more than a share of a very short frame.
        share = max(_SHARE / float(rate), _ROUNDED * float(tick))
        if (off.max() - off.min()) / 2 <= min(_JITTER + float(tick), share):
            return rate
    return None


def _off(ticks: np.ndarray, tick: Fraction, rate: Fraction) -> np.ndarray:
    """By how many seconds each time is later than at a constant rate from the first: float64 (frames,)."""
    return (ticks - ticks[0]) * float(tick) - np.arange(len(ticks)) / float(rate)


def hole(found: Timeline, is_broadcast: bool) -> tuple[float, float] | None:
    """Seconds between which frames are missing in a clip that is otherwise of constant rate; None if there is no such place.

    Clips whose rate really varies have many gaps, and dropped frames leave short ones. A single long gap is a hole; in the
    formats of broadcasting, which know no variable rate, a short one is too.
    """
    steps = np.diff(found.ticks)
    if found.rate or len(steps) < 8:
        return None
    usual = float(np.median(steps))
    wide = np.flatnonzero(steps > 1.5 * usual)
    # Frames are stored out of order, so that a hole takes frames from among those that stay.
    if not len(wide) or wide[-1] - wide[0] > _REORDERED:
        return None
    tick = float(found.tick)
    regular = np.abs(np.delete(steps, wide) - usual).max() * tick <= 2 * (_JITTER + tick)
    missing = float(steps[wide].sum()) - len(wide) * usual
    at_end = wide[-1] >= len(steps) - _REORDERED  # of a file that is cut, even a single frame is a sign
    broadcast = (0.5 if at_end else 1.5) * usual
    if not regular or missing < (broadcast if is_broadcast else max(3 * usual, _HOLE / tick)):
        return None
    begin, end = (float((found.ticks[index] - found.ticks[0]) * found.tick) for index in (wide[0], wide[-1] + 1))
    return begin, end
