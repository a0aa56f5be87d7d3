"""The quantiles of a distribution that is given as a table: the exact inverse of its cumulative distribution function."""

from collections.abc import Sequence

import torch
from torch import Tensor


def table_quantiles(u: Tensor, table: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    """The noise levels below which a share u of the distribution lies: float32 in the shape of u.

    Args:
        u: float32 in (0, 1).
        table: weights of equal bins of [0, 1], each uniform; or points (sigma, density) with a density that is linear in between.
    """
    start, width, left, right = _pieces(table)
    mass = width * (left + right) / 2
    ends = mass.cumsum(0)
    place = u.double() * ends[-1]
    # `right`: where pieces without mass begin, the first one behind them that has some. At the end, the last one that has some.
    last = int(torch.nonzero(mass).max())
    index = torch.searchsorted(ends, place, right=True).clamp(max=last)
    within = (place - (ends - mass)[index]).clamp(min=0)
    # The root x of left x + slope x^2 / 2 = within, in the form that is exact for any slope, 0 included.
    slope = (right - left) / width
    root = (left[index] ** 2 + 2 * slope[index] * within).clamp(min=0).sqrt()
    total = left[index] + root
    inner = torch.where(total > 0, 2 * within / torch.where(total > 0, total, 1.0), 0.0)
    return (start[index] + torch.minimum(inner, width[index])).float()


def _pieces(table: Sequence[float] | Sequence[Sequence[float]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(start, width, density at the start, density at the end) of each piece, ascending: float64 (n,) each."""
    values = torch.tensor(table, dtype=torch.float64)
    if values.ndim == 1:
        edges = torch.linspace(0, 1, len(values) + 1, dtype=torch.float64)
        return edges[:-1], edges.diff(), values, values
    sigma, density = values.unbind(1)
    return sigma[:-1], sigma.diff(), density[:-1], density[1:]
