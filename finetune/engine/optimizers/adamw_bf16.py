"""AdamW with moments in bf16: torch's AdamW, lent float32 copies of one parameter's moments at a time."""

from collections.abc import Mapping

import torch
from torch import nn

from finetune.engine.optimizers.lent import Lender
from finetune.engine.optimizers.low_bit import adam_arguments
from finetune.recipe.optimizers import Bf16AdamW


def build(parameters: Mapping[str, nn.Parameter], settings: Bf16AdamW, weights: str) -> torch.optim.Optimizer:
    """See `finetune.engine.optimizers.build_optimizer`."""
    inner = torch.optim.AdamW(list(parameters.values()), **adam_arguments(settings), fused=True)
    return Lender(inner, state_dtype=torch.bfloat16)
