"""A distribution of noise levels that a recipe writes down as a table: weights of equal bins, or a density between points."""

import math
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

_WEIGHT = {"type": "number", "minimum": 0}
_POINT = {"type": "array", "items": _WEIGHT, "minItems": 2, "maxItems": 2}


def _checked(value: Any) -> Any:
    """The table with all numbers as floats. Raises ValueError for what is no distribution on [0, 1]."""
    if value is None or not isinstance(value, list):
        return value
    if len(value) < 2:
        raise ValueError("a table has two entries or more: weights of bins, or [sigma, density]")
    if all(isinstance(each, list) for each in value):
        return _points(value)
    return _weights(value, "weights of bins")


def _points(value: list) -> list[list[float]]:
    for place, point in enumerate(value, start=1):
        if len(point) != 2:
            raise ValueError(f"entry {place} should be [sigma, density], two numbers")
    sigmas = _numbers([point[0] for point in value], "sigmas")
    densities = _weights([point[1] for point in value], "densities")
    if not 0 <= sigmas[0] < sigmas[-1] <= 1:
        raise ValueError("its sigmas should go from 0 or more to 1 or less")
    for before, after in pairwise(sigmas):
        if before >= after:
            raise ValueError(f"its sigmas should rise, and {after:g} comes after {before:g}")
    return [list(point) for point in zip(sigmas, densities, strict=True)]


def _weights(values: list, name: str) -> list[float]:
    numbers = _numbers(values, name)
    if min(numbers) < 0:
        raise ValueError(f"its {name} should not be negative, and {min(numbers):g} is")
    if not 0 < sum(numbers) < math.inf:
        raise ValueError(f"its {name} are all 0" if not any(numbers) else f"its {name} are too large to be summed")
    return numbers


def _numbers(values: list, name: str) -> list[float]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"its {name} should be numbers, and {value!r} is none")
    return [float(value) for value in values]


SigmaTable = Annotated[
    list[float] | list[list[float]],
    BeforeValidator(_checked),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "array", "items": _WEIGHT, "minItems": 2},
                {"type": "array", "items": _POINT, "minItems": 2},
            ]
        }
    ),
]
"""Weights of equal bins of [0, 1], or points [sigma, density] with sigma ascending; all floats."""
