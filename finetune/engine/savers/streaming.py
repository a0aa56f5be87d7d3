"""Streams frozen blocks from host memory to the device, one after the other, where each rank holds all frozen weights.

FSDP2's offload does not overlap its copies with computation on a single device. Here a block's frozen weights are one
page-locked buffer in host memory, and blocks share two buffers on the device, the slots, in turn: while a block computes,
the next one (in the backward pass, the one before) is copied on a stream of its own. A block's parameters are always
views of the same slot. So whatever autograd, a checkpoint or a compiled graph has kept of them is valid again when the
block's weights are back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.utils._pytree import tree_flatten, tree_unflatten

from finetune.runtime.device import Arrival, Device

_ALIGNMENT = 256  # bytes, like CUDA's allocations


@dataclass(eq=False)
class _Slot:
    """A buffer on the device that streamed blocks share. `holds` is the block whose weights are or will be in it."""

    memory: Tensor  # uint8
    holds: int | None = None
    arrived: Arrival = None


class Streamer:
    """Copies blocks to the device in the order in which they are called, one block ahead."""

    def __init__(self, device: Device, sizes: list[int]) -> None:
        """`sizes`: bytes of each streamed block."""
        places = range(min(2, len(sizes)))
        self.slots = [_Slot(torch.empty(max(sizes), dtype=torch.uint8, device=device.torch_device)) for _ in places]
        self.hosts = [device.pinned(size) for size in sizes]
        self.copies = device.copies()

    def slot(self, index: int) -> _Slot:
        """The slot of a block, which is always the same."""
        return self.slots[index % len(self.slots)]

    def fetch(self, index: int, direction: int) -> None:
        """Make work that is queued from here on wait for a block's weights, and start the copy of the following block.

        Args:
            direction: 1 in a forward pass, -1 in a backward pass.
        """
        self._copy(index)
        self.copies.wait(self.slot(index).arrived)
        following = index + direction
        if following == len(self.hosts) and not torch.is_grad_enabled():
            following = 0  # the next forward pass begins there; a backward pass would begin with the last block
        if 0 <= following < len(self.hosts) and self.slot(following) is not self.slot(index):
            self._copy(following)

    def forget(self) -> None:
        """Take what the slots hold for lost. Work that is queued from here on waits for copies that are under way."""
        for slot in self.slots:
            self.copies.wait(slot.arrived)
            slot.holds = slot.arrived = None

    def _copy(self, index: int) -> None:
        slot, host = self.slot(index), self.hosts[index]
        if slot.holds != index:
            slot.holds = index
            slot.arrived = self.copies.start(slot.memory[: len(host)], host)


class Streamed(ActivationWrapper):
    """A block whose frozen weights are copied to the device before it is computed, forward and backward.

    The wrapper is outside of checkpointing and compilation, and does not show in the names of `state_dict`.
    """

    def __init__(self, block: nn.Module, streamer: Streamer, index: int) -> None:
        super().__init__(block)
        self.streamer, self.index = streamer, index
        self._host_copy_of: dict[nn.Parameter, Tensor] = {}

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        self.streamer.fetch(self.index, 1)
        outputs = self._checkpoint_wrapped_module(*arguments, **keywords)
        leaves, form = tree_flatten(outputs)
        tensors = iter(_FetchBeforeBackward.apply(self.streamer, self.index, *filter(torch.is_tensor, leaves)))
        return tree_unflatten([next(tensors) if torch.is_tensor(leaf) else leaf for leaf in leaves], form)

    def stream_parameter(self, module: nn.Module, name: str, begin: int, end: int) -> None:
        """Replace a parameter of the block by a view of the slot, bytes `begin` to `end` - 1, and note its host copy."""
        parameter = module.get_parameter(name)
        slot, host = self.streamer.slot(self.index).memory, self.streamer.hosts[self.index]
        # `.data`: copies into the slot must not change the version counter of views that autograd has saved.
        view = slot[begin:end].view(parameter.dtype).view(parameter.shape).data
        streamed = nn.Parameter(view, requires_grad=False)
        module._parameters[name] = streamed
        self._host_copy_of[streamed] = host[begin:end].view(parameter.dtype).view(parameter.shape)

    def host_copies(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """(parameter, the host memory that it is copied from) for each streamed parameter. Write weights there."""
        yield from self._host_copy_of.items()


class _FetchBeforeBackward(torch.autograd.Function):
    """Returns a block's outputs unchanged. Its backward is the first of the block, and fetches the block's weights."""

    @staticmethod
    def forward(context: Any, streamer: Streamer, index: int, *outputs: Tensor) -> tuple[Tensor, ...]:
        context.streamer, context.index = streamer, index
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        context.streamer.fetch(context.index, -1)
        return None, None, *gradients


def stream_blocks(lists: list[nn.ModuleList], resident: int, device: Device) -> None:
    """Stream the frozen parameters of blocks, in place. The parameters are on meta, and get memory here.

    Args:
        resident: number of blocks that stay on the device. They are spread evenly, which gives copies more time.
    """
    places = [(blocks, place) for blocks in lists for place in range(len(blocks))]
    count = len(places) - resident
    if count <= 0:
        return
    chosen = [places[index * len(places) // count] for index in range(count)]
    layouts = [_layout(blocks[place]) for blocks, place in chosen]
    streamer = Streamer(device, [size for _, size in layouts])
    for index, ((blocks, place), (frozen, _)) in enumerate(zip(chosen, layouts, strict=True)):
        streamed = Streamed(blocks[place], streamer, index)
        for module, name, begin, end in frozen:
            streamed.stream_parameter(module, name, begin, end)
        blocks[place] = streamed


def _layout(block: nn.Module) -> tuple[list[tuple[nn.Module, str, int, int]], int]:
    """((module, name, first byte, byte after the last) of each frozen parameter in a block's buffer, size of the buffer)."""
    found, end = [], 0
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                begin = math.ceil(end / _ALIGNMENT) * _ALIGNMENT
                end = begin + parameter.nbytes
                found.append((module, name, begin, end))
    return found, end
