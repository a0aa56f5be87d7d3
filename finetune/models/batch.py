"""The batch of one forward pass: its inputs, its loss terms, and its transfer from a loader worker to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node, tree_leaves, tree_map_only

from finetune.models.element_error import SQUARED, ElementError

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Term:
    """One term of the loss: a target, the weight of each sample, and the elements that count.

    Attributes:
        target: float32, in the shape of the model's output of the same name.
        weight: loss weight of each sample, float32 (B,).
        counted: weight of each element in its sample's mean, float32 in [0, 1], broadcastable to `target`: 0 for what is given to
            the model or masked. None counts all.
        error: what is made of the difference of each element.
    """

    target: Tensor
    weight: Tensor
    counted: Tensor | None = None
    error: ElementError = SQUARED

    def losses(self, prediction: Tensor) -> Tensor:
        """Weighted mean error of each sample, in which its elements count as `counted` says: float32 (B,).

        Args:
            prediction: in the shape of `target`, of any floating-point dtype.
        """
        errors = self.error(prediction.float(), self.target)
        if self.counted is None:
            return self.weight * errors.flatten(1).mean(1)
        counted = self.counted.expand_as(errors).flatten(1)
        total = counted.sum(1)
        # A sample of which nothing counts, such as a single given frame, has loss 0.
        return self.weight * (errors.flatten(1) * counted).sum(1) / torch.where(total > 0, total, 1.0)


@dataclass(frozen=True)
class Batch:
    """The inputs of one forward pass and the terms of its loss.

    Attributes:
        inputs: the transformer's keyword arguments; tensors have the batch first, in the dtype the model expects.
        terms: loss terms by name; `Family.predict` returns an output under each of these names. All batches of a run have
            the same names in the same order; a term that a sample lacks has weight 0.
        unguided: of a training with guidance in its target, the inputs that differ without captions; else None.
        guidance: and the scale of each sample, float32 (B,).
        quarters: of each sample, the quarter of the noise levels that its own lies in, see `quarters_of`: int64 (B,). None if the
            family does not say; then no losses are told apart by noise level.
    """

    inputs: dict[str, Any]
    terms: dict[str, Term]
    unguided: dict[str, Any] | None = None
    guidance: Tensor | None = None
    quarters: Tensor | None = None

    @property
    def only(self) -> Term:
        """The only loss term of this batch. Raises ValueError if there are several."""
        (term,) = self.terms.values()
        return term

    def losses(self, predictions: Mapping[str, Tensor]) -> Tensors:
        """Losses of each sample by term, float32 (B,) each, in the order of `terms`."""
        return {name: term.losses(predictions[name]) for name, term in self.terms.items()}

    def guided(self, predictions: Mapping[str, Tensor]) -> Batch:
        """The batch with guidance folded into its targets, p + s (target - p), for predictions p by term without captions.

        After classifier-free guidance (Ho & Salimans 2022), as ai-toolkit's `do_guidance_loss` has it.
        """
        assert self.guidance is not None
        terms = {}
        for name, term in self.terms.items():
            base, scale = predictions[name].float(), self.guidance.view(-1, *[1] * (term.target.ndim - 1))
            terms[name] = replace(term, target=base + scale * (term.target - base))
        return replace(self, terms=terms, unguided=None, guidance=None)

    def is_finite(self, place: int) -> bool:
        """Whether all numbers of one of the batch's samples are, on the CPU."""
        size = len(next(iter(self.terms.values())).target)
        parts = [part for part in tree_leaves((self.inputs, self.terms, self.unguided)) if isinstance(part, Tensor)]
        samples = [part[place] for part in parts if part.is_floating_point() and part.dim() and len(part) == size]
        return all(bool(torch.isfinite(sample).all()) for sample in samples)

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device. The copies overlap with computation if the batch is in page-locked memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory, for asynchronous transfer. torch's data loader calls this method."""
        return self._map(Tensor.pin_memory)

    def contiguous(self) -> Batch:
        """Make every tensor contiguous, because the memory layout of a tensor decides the last bits of a sum over it."""
        return self._map(Tensor.contiguous)

    def __reduce__(self) -> tuple:
        """Pickle tensors by value.

        torch's default shares each tensor through a file descriptor and shared memory. That costs the receiver half a
        millisecond per tensor, and containers have little shared memory.
        """
        return _unpickle, tree_map_only(Tensor, _Bytes.of, self._parts)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(*tree_map_only(Tensor, function, self._parts))

    @property
    def _parts(self) -> tuple:
        return self.inputs, self.terms, self.unguided, self.guidance, self.quarters


def _term(parts: Iterable[Any], error: Any) -> Term:
    target, weight, counted = parts
    return Term(target, weight, counted, error)


register_pytree_node(
    Term,
    lambda term: ([term.target, term.weight, term.counted], term.error),
    _term,
    serialized_type_name="finetune.models.batch.Term",
)


@dataclass(frozen=True)
class _Bytes:
    """The bytes of a contiguous CPU tensor with its dtype and shape, since numpy has no bfloat16."""

    data: np.ndarray
    dtype: torch.dtype
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Tensor) -> _Bytes:
        return cls(tensor.flatten().view(torch.uint8).numpy(), tensor.dtype, tensor.shape)

    def tensor(self) -> Tensor:
        # Cloned, because pickled bytes need not be aligned, and torch aligns its own memory.
        return torch.from_numpy(self.data).clone().view(self.dtype).view(self.shape)


def _unpickle(*parts: Any) -> Batch:
    return Batch(*tree_map_only(_Bytes, _Bytes.tensor, parts))
