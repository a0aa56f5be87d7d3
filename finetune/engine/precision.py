"""Dtypes: frozen weights in compute precision, trained weights as the recipe says, reductions in float32. What diffusers keeps in
float32 is stored and computed in it.
"""

import re

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from finetune.models.building import stays_float32
from finetune.recipe.schema import Train
from finetune.runtime.device import Device

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


def storage_dtype(train: Train) -> torch.dtype:
    """The dtype in which the transformer is loaded: `train.weights` if it is trained, else compute precision."""
    return DTYPES[train.weights if train.method == "full" else train.precision]


def cast_trained_weights(model: nn.Module, weights: str) -> None:
    """Cast the trained parameters in place to `weights`, "float32" or "bf16", but for those that stay in float32."""
    stays = stays_float32(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32 if stays(name) else DTYPES[weights])


def compute_in_float8(lists: list[nn.ModuleList], high_precision: str, device: Device) -> None:
    """Make the blocks' linear layers multiply in float8 e4m3 (gradients in e5m2), in place. Weights keep their dtype.

    Args:
        high_precision: regular expression of layers that are left alone, searched in their names within a block.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(linear: nn.Linear, name: str) -> bool:
        sides_fit = linear.in_features % 16 == 0 and linear.out_features % 16 == 0  # the kernels require it
        return sides_fit and re.search(high_precision, name) is None

    # Pad the inner dimension: weight gradients sum over tokens, whose number need not be a multiple of 16.
    config = Float8LinearConfig(emulate=not device.has_float8, pad_inner_dim=True)
    for blocks in lists:
        for block in blocks:
            convert_to_float8_training(block, module_filter_fn=fits, config=config)


def policy(precision: str) -> MixedPrecisionPolicy:
    """FSDP2's mixed precision. Inputs are not cast, because float timesteps and RoPE tables must not become bf16."""
    return MixedPrecisionPolicy(param_dtype=DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False)
