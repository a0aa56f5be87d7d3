"""Noise levels of a range alone, distributed as an objective distributes them there.

An objective maps u, uniform on (0, 1), to a noise level. The u whose levels lie in the range are a union of intervals. A uniform
u is mapped linearly and in order onto this union, so the density is the objective's own, conditioned on the range, and
stratified draws and fixed quantiles stay even. Nothing is known of the objective but `level`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from finetune.models.objective import LEAST_U, Objective
from finetune.recipe.schema import ObjectiveSettings
from finetune.runtime.errors import UserError

TIMESTEPS = 1000  # a noise level that is an integer is a timestep of so many
_GRID = 2**14  # cells of u; a range that is left and entered again within one of them is not noticed


@dataclass(frozen=True)
class _Intervals:
    """The u whose noise levels lie in a range, in ascending order.

    Attributes:
        start, width: of each interval, float64 (n,).
        first, last: the least and the largest u of each interval that float32 has, float32 (n,).
        first_level, last_level: their noise levels, (n,).
    """

    start: Tensor
    width: Tensor
    first: Tensor
    last: Tensor
    first_level: Tensor
    last_level: Tensor

    def __len__(self) -> int:
        return len(self.start)


@dataclass(frozen=True)
class Restricted:
    """An objective whose noise levels lie in a range, or outside of it; otherwise like `objective`.

    Attributes:
        sigma_range: sigma is at least the first and below the second, which 1 includes. Both are rounded to the precision
            of the levels, as in any comparison of torch. The sigma of an integer level is timestep / 1000.
        complement: the levels outside of the range instead.
    """

    objective: Objective
    sigma_range: tuple[float, float]
    complement: bool = False
    _known: dict[int, _Intervals] = field(default_factory=dict, init=False, repr=False, compare=False)  # by tokens

    @property
    def settings(self) -> ObjectiveSettings:
        return self.objective.settings

    @property
    def default_sampling(self) -> str:
        return self.objective.default_sampling

    def level(self, u: Tensor, tokens: int) -> Tensor:
        """See `Objective.level`; u are quantiles of the restricted distribution.

        Raises:
            UserError: there are no levels in the range.
        """
        intervals = self._intervals(tokens)
        if not len(intervals):
            raise UserError(self.why_empty(tokens), "move the range", "objective.sigma_range")
        ends = intervals.width.cumsum(0)
        place = u.double() * ends[-1]
        index = torch.searchsorted(ends, place, right=True).clamp(max=len(intervals) - 1)
        within, width = place - (ends - intervals.width)[index], intervals.width[index]
        inner = (intervals.start[index] + within).float().clamp(intervals.first[index], intervals.last[index])
        level = self.objective.level(inner, tokens)
        # Near an end, rounding errors of `level` may cross it.
        nearest = torch.where(within < width / 2, intervals.first_level[index], intervals.last_level[index])
        return torch.where(self.contains(level), level, nearest)

    def noised(self, x0: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        return self.objective.noised(x0, noise, level)

    def weight(self, level: Tensor) -> Tensor:
        return self.objective.weight(level)

    def contains(self, level: Tensor) -> Tensor:
        """Which noise levels are allowed: bool, in the shape of `level`."""
        return (_is_below(level, self.sigma_range[0]) | _is_past(level, self.sigma_range[1])) == self.complement

    def outside(self, *tokens: int) -> "Restricted | None":
        """The same objective in all other noise levels; None if there are none.

        Args:
            tokens: numbers of video tokens that it must have levels for; 1 if none is given.
        """
        other = replace(self, complement=not self.complement)
        return None if any(map(other.is_empty, tokens or (1,))) else other

    def is_empty(self, tokens: int) -> bool:
        """Whether the objective has no noise level here."""
        return not len(self._intervals(tokens))

    def why_empty(self, tokens: int) -> str:
        """What to tell where `is_empty`."""
        sigma = _sigma(self.objective.level(_grid(), tokens))
        where = "outside of" if self.complement else "in"
        there_are = f"{sigma.min().item():.4f} to {sigma.max().item():.4f}"
        return f"there is no noise level {where} {list(self.sigma_range)}: those that there are go from {there_are}"

    def _intervals(self, tokens: int) -> _Intervals:
        if tokens not in self._known:
            self._known[tokens] = self._find_intervals(tokens)
        return self._known[tokens]

    def _find_intervals(self, tokens: int) -> _Intervals:
        low, high = self.sigma_range
        u, level = _grid(), self.objective.level
        # Each limit by itself: the range may be narrower than a cell.
        crossings = [
            _crossings(lambda at: _is_below(level(at, tokens), low), u),
            _crossings(lambda at: _is_past(level(at, tokens), high), u),
        ]
        before, after = (torch.cat(side).sort().values for side in zip(*crossings, strict=True))
        first, last = torch.cat([u[:1], after]), torch.cat([before, u[-1:]])
        inner = (before.double() + after.double()) / 2
        edges = torch.cat([torch.zeros(1).double(), inner, torch.ones(1).double()])
        first_level, last_level = level(first, tokens), level(last, tokens)
        chosen = (first <= last) & self.contains(first_level) & self.contains(last_level)
        parts = (edges[:-1], edges.diff(), first, last, first_level, last_level)
        return _Intervals(*(part[chosen] for part in parts))


def restricted(objective: Objective, sigma_range: Sequence[float] | None) -> Objective:
    """The objective in a range of sigma, [low, high); itself if that is None or everything."""
    if sigma_range is None or tuple(sigma_range) == (0.0, 1.0):
        return objective
    low, high = sigma_range
    return Restricted(objective, (low, high))


def _grid() -> Tensor:
    """u from end to end, float32 (n,)."""
    return torch.linspace(LEAST_U, 1 - LEAST_U, _GRID + 1, dtype=torch.float64).float()


def _sigma(level: Tensor) -> Tensor:
    return level if level.is_floating_point() else level.double() / TIMESTEPS


def _is_below(level: Tensor, low: float) -> Tensor:
    return _sigma(level) < low


def _is_past(level: Tensor, high: float) -> Tensor:
    return _sigma(level) > high if high == 1 else _sigma(level) >= high


def _crossings(is_past: Callable[[Tensor], Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """The neighbours in float32 between which a condition changes, from changes on a grid by bisection: two of float32 (n,)."""
    values = is_past(u)
    (at,) = torch.nonzero(values[1:] != values[:-1], as_tuple=True)
    before, after, value = u[at], u[at + 1], values[at]
    while True:
        middle = ((before.double() + after.double()) / 2).float()
        if ((middle == before) | (middle == after)).all():
            return before, after
        is_before = is_past(middle) == value
        before, after = torch.where(is_before, middle, before), torch.where(is_before, after, middle)
