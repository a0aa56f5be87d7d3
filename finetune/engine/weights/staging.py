"""A copy of a run's state in host memory, which a checkpoint is written from while the training goes on."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

from finetune.runtime.device import Device

_ALIGNMENT = 64  # bytes between the beginnings of copies


class HostCopy:
    """Copies the states of a run, one after the other, into the same host memory, page-locked if the device wants it.

    DTensors, and torchao's moments in few bits, are copied by the plain tensors inside of them: torch's own stagers fail for the
    latter (torch 2.15, torchao 0.18).
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._memory = np.empty(0, np.uint8)
        self._used = 0

    def of(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state with its tensors on the CPU, complete when this returns. Valid until the next call."""
        size = staged_bytes(state)
        if size > len(self._memory):
            self._memory = np.empty(0, np.uint8)  # frees the old memory before the new is taken
            self._memory = self.device.pinned(size).numpy()
        self._used = 0
        copied = tree_map(self._copy, state)
        self.device.synchronize()
        return copied

    def _copy(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if is_traceable_wrapper_subclass(value):
            names, context = value.__tensor_flatten__()
            inner = {name: self._copy(getattr(value, name)) for name in names}
            return type(value).__tensor_unflatten__(inner, context, value.size(), value.stride())
        # By way of numpy each copy has a storage of its own; of a view, torch.save would write the whole storage.
        memory = torch.from_numpy(self._memory[self._used : self._used + value.nbytes])
        self._used += _size(value)
        return memory.view(value.dtype).view(value.shape).copy_(value.detach(), non_blocking=True)


def staged_bytes(state: Any) -> int:
    """The bytes of host memory that a copy of a state takes."""
    return sum(map(_size, tree_leaves(state)))


def _size(value: Any) -> int:
    if not isinstance(value, Tensor):
        return 0
    if is_traceable_wrapper_subclass(value):
        return sum(_size(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT
