"""Activation checkpointing: recompute blocks in the backward pass (Chen et al. 2016)."""

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper


def checkpoint_blocks(lists: list[nn.ModuleList], mode: str) -> None:
    """Wrap each block in place. Parameter names in `state_dict` stay as they were."""
    if mode == "none":
        return
    for blocks in lists:
        for index, block in enumerate(blocks):
            blocks[index] = checkpoint_wrapper(block, CheckpointImpl.NO_REENTRANT, preserve_rng_state=True)
