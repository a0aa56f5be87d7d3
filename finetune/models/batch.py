"""What one forward pass takes, and how it travels from a loader process to the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node, tree_map_only

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Term:
    """One term of the loss: what the model should have answered, and how much of it counts.

    Attributes:
        target: float32, shaped like the model's output of the same name.
        weight: loss weight per sample, float32 (B,).
        counted: which elements of the target the loss counts, float32 0 or 1, broadcastable to it; None counts all.
    """

    target: Tensor
    weight: Tensor
    counted: Tensor | None = None

    def losses(self, prediction: Tensor) -> Tensor:
        """Weighted mean squared error per sample over what is counted, float32 (B,)."""
        errors = (prediction.float() - self.target).square()
        if self.counted is None:
            return self.weight * errors.flatten(1).mean(1)
        counted = self.counted.expand_as(errors).flatten(1)
        return self.weight * (errors.flatten(1) * counted).sum(1) / counted.sum(1).clamp(min=1)


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes.

    Attributes:
        inputs: the transformer's keyword arguments; tensors have the batch first, in the dtype the model expects.
        terms: the terms of the loss by name; `Family.predict` answers with the same names.
    """

    inputs: dict[str, Any]
    terms: dict[str, Term]

    @property
    def only(self) -> Term:
        """The term of a batch that has one. Raises ValueError if it has several."""
        (term,) = self.terms.values()
        return term

    def losses(self, predictions: Mapping[str, Tensor]) -> Tensors:
        """Loss per sample of each term, float32 (B,) each, in the order of `terms`."""
        return {name: term.losses(predictions[name]) for name, term in self.terms.items()}

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; copies overlap with computation if its memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The loader's hook: page-locked copies, for asynchronous transfer."""
        return self._map(Tensor.pin_memory)

    def contiguous(self) -> Batch:
        """Every tensor laid out in order: how a tensor lies in memory decides the last bits of a sum over it."""
        return self._map(Tensor.contiguous)

    def __reduce__(self) -> tuple:
        """Sent to another process by value: torch's own way takes a file descriptor and shared memory for each tensor,
        which costs the receiver half a millisecond and of which containers have little.
        """
        return _unpickle, tree_map_only(Tensor, _Bytes.of, (self.inputs, self.terms))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(*tree_map_only(Tensor, function, (self.inputs, self.terms)))


register_pytree_node(
    Term,
    lambda term: ([term.target, term.weight, term.counted], None),
    lambda parts, _: Term(*parts),
    serialized_type_name="finetune.models.batch.Term",
)


@dataclass(frozen=True)
class _Bytes:
    """A contiguous CPU tensor as numpy carries it (numpy has no bfloat16)."""

    data: np.ndarray
    dtype: torch.dtype
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Tensor) -> _Bytes:
        return cls(tensor.flatten().view(torch.uint8).numpy(), tensor.dtype, tensor.shape)

    def tensor(self) -> Tensor:
        return torch.from_numpy(self.data).clone().view(self.dtype).view(self.shape)  # torch aligns its own memory


def _unpickle(*parts: Any) -> Batch:
    return Batch(*tree_map_only(_Bytes, _Bytes.tensor, parts))
