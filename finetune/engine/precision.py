"""Which dtype lives where: frozen weights in compute precision, trained weights as the recipe says, reductions float32."""

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from finetune.recipe.schema import Train

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


def storage_dtype(train: Train) -> torch.dtype:
    """How the transformer's weights are loaded: as `train.weights` if they are trained, in compute precision if frozen."""
    return DTYPES[train.weights if train.method == "full" else train.precision]


def cast_trained_weights(model: nn.Module, weights: str) -> None:
    """Cast the parameters that are trained, in place, to "float32" or "bf16"."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPES[weights])


def policy(precision: str) -> MixedPrecisionPolicy:
    """FSDP2's casts. Inputs are left alone: float timesteps and RoPE tables must not become bf16."""
    return MixedPrecisionPolicy(param_dtype=DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False)
