"""How weights are distributed: sharded over ranks, replicated, or both (Rajbhandari et al. 2020; Zhao et al. 2023)."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from finetune.recipe.rules import streams
from finetune.recipe.schema import Memory
from finetune.runtime.distributed import Runtime
from finetune.runtime.units import GIB

_STATE_SHARE = 0.4  # of device memory, for weights, gradients and optimizer state; the rest is for activations


@dataclass(frozen=True)
class Layout:
    """How a transformer's weights are distributed.

    Attributes:
        shard_size: number of data ranks that one copy is sharded over; None for all.
        gathered_until_backward: whether a block's weights stay whole between its forward and backward pass.
        frozen_replicated: whether every rank holds all frozen weights, outside of FSDP.
        offload: how weights are offloaded: "none", "sharded" (by FSDP), or "streamed" (whole frozen blocks, one after the other).
        why: the reason, for the log.
    """

    shard_size: int | None
    gathered_until_backward: bool
    frozen_replicated: bool
    offload: Literal["none", "sharded", "streamed"]
    why: str


def choose_layout(memory: Memory, method: str, transformer: nn.Module, runtime: Runtime) -> Layout:
    """The recipe's layout, or with "auto" the layout that fits with the least communication.

    Args:
        transformer: has its adapter already; the parameters that require gradients are trained.
    """
    name: str = memory.layout
    why = "as memory.layout says"
    if streams(memory, method, runtime.data.size):
        return Layout(None, False, True, "streamed", _streaming(memory))
    if name == "auto":
        name, why = ("shard", "weights are offloaded") if memory.offload else _automatic(transformer, method, runtime)
    offload: Literal["sharded", "none"] = "sharded" if memory.offload else "none"
    if name == "replicate" and method == "full":
        return Layout(1, False, False, offload, f"replicate: {why}")  # groups of one rank, which reduce gradients
    size = (memory.shard_size or runtime.local_data_size) if name == "hybrid" else None
    return Layout(size, name == "zero2", name == "replicate", offload, f"{name}: {why}")


def _streaming(memory: Memory) -> str:
    stay = f", {memory.resident_blocks} of them stay on the device" if memory.resident_blocks else ""
    return f"replicate: frozen blocks are streamed from host memory{stay}"


def _automatic(transformer: nn.Module, method: str, runtime: Runtime) -> tuple[str, str]:
    """(layout, reason). A trained parameter takes 16 bytes (weight, gradient and two moments, all float32)."""
    ranks, on_host = runtime.data.size, runtime.local_data_size
    if ranks == 1:  # FSDP copies each frozen block twice a step even to where it is
        return "shard" if method == "full" else "replicate", "one process"
    if runtime.device.total_memory is None:
        return "shard", "how much memory a device has is not known"
    state = sum(p.numel() * 16 if p.requires_grad else p.nbytes for p in transformer.parameters())
    room = _STATE_SHARE * runtime.device.total_memory
    have = f"{state / GIB:.1f} GiB of weights and state"
    if state <= room:
        return "replicate", f"{have} fit on every device"
    if ranks // on_host > 1 and state <= room * on_host:
        return "hybrid", f"{have} fit on the devices of a host; hosts exchange gradients only"
    return "shard", f"{have} over {ranks} devices"
