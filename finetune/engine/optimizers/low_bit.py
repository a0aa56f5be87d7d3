"""AdamW with moments in 8 bits, 4 bits or float8: torchao's, with what this project needs changed."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from finetune.engine.optimizers.saved_state import load_as_saved
from finetune.recipe.optimizers import Adam, AdamW, LowBitAdamW, Moments, Optimizer

_HOST_SECONDS = 1.9e-3  # about this long for one parameter's update in torchao 0.18


def build(parameters: Mapping[str, nn.Parameter], settings: LowBitAdamW, weights: str) -> torch.optim.Optimizer:
    """See `finetune.engine.optimizers.build_optimizer`."""
    import torchao.optim

    cls = {
        "adamw_8bit": torchao.optim.AdamW8bit,
        "adamw_4bit": torchao.optim.AdamW4bit,
        "adamw_fp8": torchao.optim.AdamWFp8,
    }[settings.name]
    trained, rounded = list(parameters.values()), weights == "bf16"
    return adapted(cls, on_cpu(trained, settings))(trained, **adam_arguments(settings), bf16_stochastic_round=rounded)


def host_seconds(settings: Optimizer, weights: str, parameters: int) -> float:
    """Host time in seconds that torchao's optimizers add to a step, which call a compiled update for each parameter. 0 for others.

    Args:
        weights: dtype of the parameters, "float32" or "bf16".
        parameters: how many tensors are trained.
    """
    is_torchao = isinstance(settings, LowBitAdamW) or (isinstance(settings, AdamW) and weights == "bf16")
    return _HOST_SECONDS * parameters if is_torchao else 0.0


def adam_arguments(settings: Moments) -> dict[str, Any]:
    """What every optimizer with Adam's moments is called with."""
    return {
        "lr": settings.lr,
        "betas": tuple(settings.betas),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }


def on_cpu(parameters: Sequence[nn.Parameter], settings: Adam) -> bool:
    """Whether updates are made on the CPU."""
    return settings.offload != "none" or parameters[0].device.type == "cpu"


def adapted(cls: Any, on_cpu: bool) -> Any:
    """torchao's optimizer class with three changes: see the methods."""

    class Adapted(cls):
        def _new_buffer(self, p: torch.Tensor, signed: bool) -> torch.Tensor:
            """Moments of bf16 weights as of float32 ones: torchao computes in float32, and DTensors do not mix dtypes."""
            return super()._new_buffer(torch.empty_like(p, dtype=torch.float32), signed)

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Moments stay in float32: torch casts them to the dtype of their weights."""
            load_as_saved(self, state_dict)

        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            """On a CPU without compiling, which takes half a minute there and wants a C++ compiler."""
            with torch.compiler.set_stance("force_eager") if on_cpu else nullcontext():
                return super().step(closure)

    return Adapted
