"""Which dtype lives where: frozen weights in compute precision, trained weights as the recipe says, reductions float32."""

import re

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from finetune.recipe.schema import Train
from finetune.runtime.device import Device

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


def storage_dtype(train: Train) -> torch.dtype:
    """How the transformer's weights are loaded: as `train.weights` if they are trained, in compute precision if frozen."""
    return DTYPES[train.weights if train.method == "full" else train.precision]


def cast_trained_weights(model: nn.Module, weights: str) -> None:
    """Cast the parameters that are trained, in place, to "float32" or "bf16"."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPES[weights])


def compute_in_float8(lists: list[nn.ModuleList], high_precision: str, device: Device) -> None:
    """Have the blocks' linear layers multiply in float8 e4m3 (gradients e5m2), in place; weights stay as they are.

    Args:
        high_precision: regular expression of layers that stay as they are, searched in names within a block.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(module: nn.Module, name: str) -> bool:
        sides_fit = module.in_features % 16 == 0 and module.out_features % 16 == 0  # what the kernels take
        return sides_fit and re.search(high_precision, name) is None

    # Padded, because tokens need not be a multiple of 16, and gradients of weights sum over them.
    config = Float8LinearConfig(emulate=not device.has_float8, pad_inner_dim=True)
    for blocks in lists:
        for block in blocks:
            convert_to_float8_training(block, module_filter_fn=fits, config=config)


def policy(precision: str) -> MixedPrecisionPolicy:
    """FSDP2's casts. Inputs are left alone: float timesteps and RoPE tables must not become bf16."""
    return MixedPrecisionPolicy(param_dtype=DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False)
