"""AdamW (Loshchilov & Hutter 2019), with moments in float32: torch's, and torchao's for weights in bf16."""

from collections.abc import Mapping

import torch
from torch import nn

from finetune.engine.optimizers.low_bit import adam_arguments, adapted, on_cpu
from finetune.recipe.optimizers import AdamW


def build(parameters: Mapping[str, nn.Parameter], settings: AdamW, weights: str) -> torch.optim.Optimizer:
    """See `finetune.engine.optimizers.build_optimizer`."""
    trained = list(parameters.values())
    if weights == "float32":
        # One kernel for all parameters, without temporaries; on a CPU it uses all cores, where foreach is a loop.
        return torch.optim.AdamW(trained, **adam_arguments(settings), fused=True)
    from torchao.optim.adam import _AdamW

    return adapted(_AdamW, on_cpu(trained, settings))(trained, **adam_arguments(settings), bf16_stochastic_round=True)
