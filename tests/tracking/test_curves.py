"""What a chart shows of a metric: every peak, no outlier that flattens the rest, round numbers at its axes."""

import math
import statistics

import numpy as np
import pytest

from finetune.tracking.curves import points_of, running_median, shown_range, smoothed, thinned, ticks

NOISY = [(step, math.sin(step / 50) + (step * 7919 % 101) / 200) for step in range(1, 3001)]


def test_values_that_are_not_finite_are_told_apart_and_the_last_of_a_step_counts() -> None:
    rows = [{"step": 2, "loss": float("nan")}, {"step": 1, "loss": 3}, {"step": 1, "loss": 2.0}, {"step": 3, "lr": 1}]
    rows.append({"step": 4, "loss": "text"})
    assert points_of(rows, "loss") == ([(1, 2.0)], [2])


def test_a_thinned_curve_keeps_both_ends_and_every_peak() -> None:
    spiked = [*NOISY[:1234], (1235, 99.0), *NOISY[1235:]]
    thin = thinned(spiked, 400)
    assert len(thin) <= 401
    assert thin == sorted(thin)
    assert (1235, 99.0) in thin
    assert thin[-1] == spiked[-1]
    assert min(value for _, value in thin) == min(value for _, value in spiked)


def test_means_and_medians_are_those_of_the_last_values() -> None:
    values = [value for _, value in NOISY]
    mean, window = smoothed(NOISY)
    median, same = running_median(NOISY)
    assert window == same == 100
    for place in (0, 50, 99, 100, 2999):
        recent = values[max(0, place - window + 1) : place + 1]
        assert mean[place][1] == pytest.approx(np.mean(recent), abs=1e-9)
        assert median[place][1] == pytest.approx(statistics.median_high(recent))


def test_one_outlier_of_single_steps_does_not_flatten_the_picture() -> None:
    low, high = shown_range([[*NOISY, (3001, 1e6)]], [])
    assert -1.2 < low < high < 2
    assert shown_range([], [[(1, 5.0)]]) == pytest.approx((4.5, 5.5))
    assert shown_range([], []) == (0, 1)


@pytest.mark.parametrize("low, high", [(0, 1), (1.2345, 1.2399), (-3, 8000), (1e-6, 9e-5), (0, 6000)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 12
    assert low - 1e-9 <= found[0] < found[-1] <= high + 1e-9
    assert all(float(f"{value:.3g}") == value or high - low < 0.01 for value in found)
