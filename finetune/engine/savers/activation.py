"""What a block keeps for the backward pass: all, nothing (Chen et al. 2016), or what is chosen."""

import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from finetune.recipe.schema import Memory
from finetune.runtime.units import GIB

ATTENTION = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_attention_math",
}
"""Names of the operations that attention ends in. A device with an operation of its own adds its name."""

_MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


def checkpoint_blocks(lists: list[nn.ModuleList], memory: Memory) -> None:
    """Wrap blocks in place, as `memory.activation_checkpointing` says. Names in `state_dict` stay as they were."""
    mode = memory.activation_checkpointing
    if mode == "none":
        return
    total = sum(map(len, lists))
    options: dict[str, Any] = {}
    if mode == "selective":
        budget = math.inf if memory.keep_gib is None else memory.keep_gib * GIB / total
        options["context_fn"] = partial(_contexts, budget)
    wrap = partial(checkpoint_wrapper, checkpoint_fn=partial(_by_position, options))
    index = 0
    for blocks in lists:
        for place, block in enumerate(blocks):
            if mode != "every_n" or index % memory.checkpoint_every == 0:
                blocks[place] = wrap(block)
            index += 1


def _by_position(options: dict[str, Any], block: nn.Module, *arguments: Any, **keywords: Any) -> Any:
    """torch's checkpoint saves what it is given by position, where hooks see it, and keeps what has a name to itself."""
    names, count = list(keywords), len(arguments)

    def call(*everything: Any) -> Any:
        return block(*everything[:count], **dict(zip(names, everything[count:], strict=True)))

    return checkpoint(call, *arguments, *keywords.values(), use_reentrant=False, **options)


def _contexts(budget: float) -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(Keep(budget))


class Keep:
    """Keeps the outputs of attention and, while they fit the budget, of matrix products; the rest is recomputed.

    Both are chosen in the order in which a block computes them, so the forward pass and its repetition agree.
    """

    def __init__(self, budget: float) -> None:
        """`budget`: bytes that one block may keep."""
        self.left = {False: budget, True: budget}

    def __call__(self, context: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
        if operation.name() in ATTENTION:
            size = _bytes(arguments[0], arguments[0].numel())
        elif operation in _MATMULS:
            a, b = arguments[-2:] if operation is not torch.ops.aten.addmm.default else arguments[1:3]
            size = _bytes(a, a.numel() // a.shape[-1] * b.shape[-1])
        else:
            return CheckpointPolicy.PREFER_RECOMPUTE
        if size > self.left[context.is_recompute]:
            return CheckpointPolicy.PREFER_RECOMPUTE
        self.left[context.is_recompute] -= size
        return CheckpointPolicy.MUST_SAVE


def _bytes(like: torch.Tensor, numel: int) -> int:
    return numel * like.element_size()
