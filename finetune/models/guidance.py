"""Guidance in the target of the loss: what a batch has for it beside its own inputs.

The prediction of the frozen base without a caption is made in the step, on the device (`finetune/engine/frozen_base.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.models.batch import Tensors
from finetune.models.sample import SampleLike


def blanks(samples: Sequence[SampleLike]) -> list[Tensors]:
    """What is encoded of no caption, for each sample. Raises ValueError if a sample was read without it."""
    found = [sample.blank for sample in samples if sample.blank is not None]
    if len(found) < len(samples):
        raise ValueError("objective.guidance_target needs the blank text of each sample")
    return found


def scales(samples: Sequence[SampleLike], blanks: Sequence[Tensors], scale: float) -> Tensor:
    """The scale of each sample, float32 (B,): 1, which leaves the target as it is, for one that is trained without its caption."""
    pairs = zip(samples, blanks, strict=True)
    return torch.tensor([1.0 if _are_equal(sample.text, blank) else scale for sample, blank in pairs])


def differing(inputs: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that are unlike those of the same name, so that the rest need not be copied to the device twice."""
    return {name: value for name, value in inputs.items() if not _is_same(value, others[name])}


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return all(map(_is_same, one, other))
    return type(one) is type(other) and not isinstance(one, Tensor) and one == other


def _are_equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
