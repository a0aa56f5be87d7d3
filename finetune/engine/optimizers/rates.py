"""Learning rates of their own for some parameters, with any optimizer: its groups are split after it was built."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


def scale_rates(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], factor: Callable[[str], float]) -> None:
    """Multiply the learning rates of parameters by a factor of each, in place, before a schedule is built.

    Each group is split by factor; a part keeps all else that its group says. The parts with factor 1 come first, since the
    first group's rate is the one that is reported. Without other factors nothing is changed.
    """
    factors = {parameter: factor(name) for name, parameter in parameters.items()}
    if set(factors.values()) <= {1.0}:
        return
    split = [part for group in optimizer.param_groups for part in _parts(group, factors)]
    optimizer.param_groups[:] = [group for _, group in sorted(split, key=lambda part: part[0] != 1)]


def _parts(group: dict[str, Any], factors: Mapping[nn.Parameter, float]) -> list[tuple[float, dict[str, Any]]]:
    """(factor, group) of a group's parameters with each factor."""
    found: dict[float, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        found.setdefault(factors[parameter], []).append(parameter)
    return [(each, {**group, "params": some, "lr": _times(group["lr"], each)}) for each, some in found.items()]


def _times(rate: float | Tensor, factor: float) -> float | Tensor:
    """A new number or tensor: torchao's optimizers have a group's rate in a tensor, which the schedule fills."""
    return rate * factor
