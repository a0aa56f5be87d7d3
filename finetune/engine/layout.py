"""Where the weights lie: sharded over ranks, replicated, or both (Rajbhandari et al. 2020; Zhao et al. 2023)."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from finetune.recipe.rules import streams
from finetune.recipe.schema import Memory
from finetune.runtime.distributed import Runtime

_ROOM = 0.4  # share of a device that weights, gradients and optimizer state may take; the rest is for activations


@dataclass(frozen=True)
class Layout:
    """How a transformer is spread.

    Attributes:
        shard_size: data ranks that hold one copy between them; None for all.
        gathered_until_backward: whether a block's weights stay whole between its forward and backward pass.
        frozen_replicated: whether frozen weights are whole on every rank, outside of FSDP.
        offload: where offloaded weights are: "none", "sharded" (FSDP's), "streamed" (frozen blocks in turns).
        why: the reason, for the log.
    """

    shard_size: int | None
    gathered_until_backward: bool
    frozen_replicated: bool
    offload: Literal["none", "sharded", "streamed"]
    why: str


def choose_layout(memory: Memory, method: str, transformer: nn.Module, runtime: Runtime) -> Layout:
    """The recipe's layout, or with "auto" the one that needs least communication and fits.

    Args:
        transformer: with its adapter; what requires gradients is trained.
    """
    name: str = memory.layout
    why = "as memory.layout says"
    if streams(memory, method, runtime.data.size):
        return Layout(None, False, True, "streamed", _streaming(memory))
    if name == "auto":
        name, why = ("shard", "weights are offloaded") if memory.offload else _automatic(transformer, runtime)
    offload: Literal["sharded", "none"] = "sharded" if memory.offload else "none"
    if name == "replicate" and method == "full":
        return Layout(1, False, False, offload, f"replicate: {why}")  # groups of one, gradients reduced between them
    size = (memory.shard_size or runtime.local_data_size) if name == "hybrid" else None
    return Layout(size, name == "zero2", name == "replicate", offload, f"{name}: {why}")


def _streaming(memory: Memory) -> str:
    stay = f", {memory.resident_blocks} of them stay on the device" if memory.resident_blocks else ""
    return f"replicate: frozen blocks are streamed from host memory{stay}"


def _automatic(transformer: nn.Module, runtime: Runtime) -> tuple[str, str]:
    """(layout, reason). Trained weights take 16 bytes each (weight, gradient, two moments, all float32)."""
    ranks, on_host = runtime.data.size, runtime.local_data_size
    if ranks == 1:
        return "shard", "one process"
    if runtime.device.total_memory is None:
        return "shard", "how much memory a device has is not known"
    state = sum(p.numel() * 16 if p.requires_grad else p.nbytes for p in transformer.parameters())
    room = _ROOM * runtime.device.total_memory
    have = f"{state / 2**30:.1f} GiB of weights and state"
    if state <= room:
        return "replicate", f"{have} fit on every device"
    if ranks // on_host > 1 and state <= room * on_host:
        return "hybrid", f"{have} fit on the devices of a host; hosts exchange gradients only"
    return "shard", f"{have} over {ranks} devices"
