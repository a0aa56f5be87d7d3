"""Which dtype lives where: frozen weights in compute precision, trained weights float32, reductions float32."""

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


def storage_dtype(method: str, precision: str) -> torch.dtype:
    """How the transformer's weights are loaded: float32 masters if they are trained, compute precision if frozen."""
    return torch.float32 if method == "full" else DTYPES[precision]


def trained_weights_to_float32(model: nn.Module) -> None:
    """Cast the parameters that are trained, in place."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def policy(precision: str) -> MixedPrecisionPolicy:
    """FSDP2's casts. Inputs are left alone: float timesteps and RoPE tables must not become bf16."""
    return MixedPrecisionPolicy(param_dtype=DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False)
