"""The cost of a step: its FLOPs and the bytes that it moves, and how long a GPU takes for them at its peak rates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry

from finetune.planning.kernels import KIND, UNINITIALISED, attention_flops
from finetune.runtime.gpus import HOST_MEMORY_RATE, Gpu

_INTO = {torch.ops.aten.copy_.default}
_COPIES = {*_INTO, torch.ops.aten._to_copy.default}
_NO_TRAFFIC = UNINITIALISED | {torch.ops.aten._unsafe_view.default, torch.ops.aten.detach.default}


@dataclass
class Cost:
    """What was computed and copied.

    Attributes:
        operations: number of operations on the device, by (FLOPs, bytes read and written, whether in float32).
        to_device, to_host: bytes copied from and to the host.
        peer_bytes: bytes of collectives.
        host_bytes: bytes that the CPU reads and writes for updates in host memory.
    """

    operations: Counter[tuple[int, int, bool]]
    to_device: int = 0
    to_host: int = 0
    peer_bytes: int = 0
    host_bytes: int = 0

    @classmethod
    def none(cls) -> Cost:
        """The cost of nothing, to be added to."""
        return cls(Counter())

    def add(self, function: Any, arguments: tuple, keywords: dict, tensors: Sequence[Tensor], result: Any) -> None:
        """Count an operation that touched the device. Allocations and views are not counted.

        Args:
            tensors: all inputs of the operation.
        """
        if function.namespace == "c10d":
            self.peer_bytes += max((tensor.nbytes for tensor in tensors), default=0)
            return
        if function.is_view or function in _NO_TRAFFIC or _has_no_result(function):
            return
        found = result if isinstance(result, (list, tuple)) else [result]
        outputs = [each for each in found if isinstance(each, Tensor)]
        places = {_is_fake_device(tensor) for tensor in (*tensors, *outputs)}
        if len(places) > 1 and function in _COPIES:
            size = (outputs or tensors)[0].nbytes
            if _is_fake_device(tensors[-1] if function in _INTO else tensors[0]):
                self.to_host += size
            else:
                self.to_device += size
            return
        counts = flop_registry.get(function._overloadpacket)
        flops = counts(*arguments, **keywords, out_val=result) if counts else attention_flops(function, arguments)
        size = sum(tensor.nbytes for tensor in (*tensors, *outputs))
        self.operations[flops, size, bool(outputs) and outputs[0].dtype is torch.float32] += 1

    def add_on_host(self, function: Any, tensors: Sequence[Tensor], result: Any) -> None:
        """Count an operation on weights, gradients or moments in host memory."""
        if function.is_view or function in _NO_TRAFFIC:
            return
        made = [result] if isinstance(result, Tensor) and not function._schema.is_mutable else []
        touched = sum(tensor.nbytes for tensor in (*tensors, *made))
        self.host_bytes += (
            2 * touched if function._schema.is_mutable else touched
        )  # what is updated is read and written

    @property
    def flops(self) -> int:
        """FLOPs of all operations."""
        return sum(flops * count for (flops, *_), count in self.operations.items())

    def seconds(self, gpu: Gpu, overlaps: bool = True) -> float:
        """Time by the roofline model (Williams et al. 2009): each operation runs at the GPU's peak rate of computing or of its
        memory, whichever takes longer. Collectives run beside the operations, updates in host memory after them.

        Args:
            overlaps: whether copies from and to the host run beside the operations, too, or after them.
        """
        computing = sum(
            count * max(flops / (gpu.float32_flops if float32 else gpu.flops), size / gpu.memory_rate)
            for (flops, size, float32), count in self.operations.items()
        )
        copying = max(self.to_device, self.to_host) / gpu.host_rate
        on_gpu = max(max(computing, copying) if overlaps else computing + copying, self.peer_bytes / gpu.peer_rate)
        return on_gpu + self.host_bytes / HOST_MEMORY_RATE

    def repeated(self, one: Cost, times: int) -> Cost:
        """The cost of a step of `times` micro-batches, extrapolated from a step of two (self) and a step of one."""
        operations = Counter(self.operations)
        more = times - 2

        def extended(two: int, first: int) -> int:
            return two + more * (two - first)

        for key in {*self.operations, *one.operations}:
            operations[key] = max(0, extended(self.operations[key], one.operations[key]))
        return Cost(
            operations,
            extended(self.to_device, one.to_device),
            extended(self.to_host, one.to_host),
            extended(self.peer_bytes, one.peer_bytes),
            extended(self.host_bytes, one.host_bytes),
        )


def _has_no_result(function: Any) -> bool:
    """As FSDP2's notes to the allocator (`fsdp::record_grad_output_stream`), which are no kernels."""
    return not function._schema.returns and not function._schema.is_mutable


def _is_fake_device(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == KIND
