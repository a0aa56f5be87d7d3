"""Frozen blocks that live in host memory and visit the device one after the other, for one card or one a replica.

FSDP2's offload does not overlap its copies on one device. Here a block's frozen weights are one page-locked piece of host
memory, and two pieces of device memory take turns: while a block computes, the next one is copied on a stream of its
own; in the backward pass, the one before it. A block's parameters are views of one of the two for good, so whatever
autograd, a checkpoint or a compiled graph has kept of them is right again when the block is back.
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

_ALIGNMENT = 256  # bytes, as CUDA's allocations have it


@dataclass(eq=False)
class _Slot:
    """Device memory that streamed blocks share, and which of them is in it or on its way."""

    memory: Tensor  # uint8
    holds: int | None = None
    arrived: Arrival = None


class Streamer:
    """Brings blocks to the device in the order in which they are called, one ahead."""

    def __init__(self, device: Device, sizes: list[int]) -> None:
        """`sizes`: bytes of each streamed block."""
        places = range(min(2, len(sizes)))
        self.slots = [_Slot(torch.empty(max(sizes), dtype=torch.uint8, device=device.torch_device)) for _ in places]
        self.hosts = [device.pinned(size) for size in sizes]
        self.copies = device.copies()

    def slot(self, index: int) -> _Slot:
        """Where a block goes, always."""
        return self.slots[index % len(self.slots)]

    def bring(self, index: int, onward: int) -> None:
        """Have a block on the device for what is queued next, and start the copy of its neighbour.

        Args:
            onward: 1 in a forward pass, -1 in a backward pass.
        """
        self._copy(index)
        self.copies.wait(self.slot(index).arrived)
        following = index + onward
        if following == len(self.hosts) and not torch.is_grad_enabled():
            following = 0  # the next forward pass; a backward pass would begin where this one ended
        if 0 <= following < len(self.hosts) and self.slot(following) is not self.slot(index):
            self._copy(following)

    def _copy(self, index: int) -> None:
        slot, host = self.slot(index), self.hosts[index]
        if slot.holds != index:
            slot.holds = index
            slot.arrived = self.copies.start(slot.memory[: len(host)], host)


class Streamed(ActivationWrapper):
    """A block whose frozen weights are brought to the device before it is computed, forward and backward.

    The wrapper is outside of checkpointing and compilation, and leaves no trace in names of `state_dict`.
    """

    def __init__(self, block: nn.Module, streamer: Streamer, index: int) -> None:
        super().__init__(block)
        self.streamer, self.index = streamer, index
        self.homes_of: dict[nn.Parameter, Tensor] = {}

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        self.streamer.bring(self.index, 1)
        outputs = self._checkpoint_wrapped_module(*arguments, **keywords)
        leaves, form = tree_flatten(outputs)
        tensors = iter(_BackwardBegins.apply(self.streamer, self.index, *filter(torch.is_tensor, leaves)))
        return tree_unflatten([next(tensors) if torch.is_tensor(leaf) else leaf for leaf in leaves], form)

    def homes(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """(parameter, the host memory that it is copied from); write weights there."""
        yield from self.homes_of.items()


class _BackwardBegins(torch.autograd.Function):
    """The block's outputs as they are; their gradients are where its backward pass begins."""

    @staticmethod
    def forward(context: Any, streamer: Streamer, index: int, *outputs: Tensor) -> tuple[Tensor, ...]:
        context.streamer, context.index = streamer, index
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        context.streamer.bring(context.index, -1)
        return None, None, *gradients


def stream_blocks(lists: list[nn.ModuleList], resident: int, device: Device) -> None:
    """Make the frozen parameters of blocks, on meta, visitors of the device; in place.

    Args:
        resident: number of blocks that stay on the device, spread evenly, so that copies have more time.
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
            old = module._parameters[name]
            # `.data`: writing to the slot must not count as changing what autograd has kept of its views.
            view = streamer.slot(index).memory[begin:end].view(old.dtype).view(old.shape).data
            module._parameters[name] = nn.Parameter(view, requires_grad=False)
            home = streamer.hosts[index][begin:end].view(old.dtype).view(old.shape)
            streamed.homes_of[module._parameters[name]] = home
        blocks[place] = streamed


def _layout(block: nn.Module) -> tuple[list[tuple[nn.Module, str, int, int]], int]:
    """((owner, name, first byte, byte after the last) of each frozen parameter, bytes in all)."""
    found, end = [], 0
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                begin = math.ceil(end / _ALIGNMENT) * _ALIGNMENT
                end = begin + parameter.nbytes
                found.append((module, name, begin, end))
    return found, end
