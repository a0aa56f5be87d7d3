"""Pieces of clips: which frames of a clip lie in one of them."""

import pytest

from finetune.data.buckets import BucketFit
from finetune.data.windows import Windows
from finetune.recipe import Bucket


@pytest.mark.parametrize(
    "starts, spans, unused",
    [
        ((0,), [(0, 5)], 15),
        ((15,), [(15, 5)], 15),
        ((0, 3, 5, 9), [(0, 14)], 6),  # overlapping, touching
        ((0, 6, 14), [(0, 5), (6, 5), (14, 5)], 5),
        ((), [], 20),
    ],
)
def test_overlapping_and_touching_windows_are_one_span(
    starts: tuple[int, ...], spans: list[tuple[int, int]], unused: int
) -> None:
    windows = Windows(starts)
    assert windows.spans(5) == spans
    frames = {frame for start in starts for frame in range(start, start + 5)}
    assert frames == {frame for first, count in spans for frame in range(first, first + count)}
    fit = BucketFit(Bucket(5, 64, 96), 24.0, 20, 0.0, 1.0)
    assert windows.unused(fit) == unused
