"""AdamW with moments in 8 bits, 4 bits or float8: torchao's, with what this project needs changed."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import nn

from finetune.recipe.optimizers import Adam, LowBitAdamW


def build(parameters: Mapping[str, nn.Parameter], settings: LowBitAdamW, weights: str) -> torch.optim.Optimizer:
    """See `finetune.engine.optimizers.build_optimizer`."""
    import torchao.optim

    cls = {
        "adamw_8bit": torchao.optim.AdamW8bit,
        "adamw_4bit": torchao.optim.AdamW4bit,
        "adamw_fp8": torchao.optim.AdamWFp8,
    }[settings.name]
    trained, rounded = list(parameters.values()), weights == "bf16"
    return adapted(cls, on_cpu(trained))(trained, **adam_arguments(settings), bf16_stochastic_round=rounded)


def adam_arguments(settings: Adam) -> dict[str, Any]:
    """What every AdamW is called with."""
    return {
        "lr": settings.lr,
        "betas": tuple(settings.betas),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }


def on_cpu(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether updates are made on the CPU."""
    return parameters[0].device.type == "cpu"


def adapted(cls: Any, on_cpu: bool) -> Any:
    """torchao's optimizer class with three changes: see the methods."""

    class Adapted(cls):
        def _new_buffer(self, p: torch.Tensor, signed: bool) -> torch.Tensor:
            """Moments of bf16 weights as of float32 ones: torchao computes in float32, and DTensors do not mix dtypes."""
            return super()._new_buffer(torch.empty_like(p, dtype=torch.float32), signed)

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """As it was saved: torch casts moments to the dtype of their weights."""
            super().load_state_dict(state_dict)
            saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
            own = chain.from_iterable(group["params"] for group in self.param_groups)
            for name, parameter in zip(saved, own, strict=True):
                if name in state_dict["state"]:
                    self.state[parameter] = dict(state_dict["state"][name])

        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            """On a CPU without compiling, which takes half a minute there and wants a C++ compiler."""
            with torch.compiler.set_stance("force_eager") if on_cpu else nullcontext():
                return super().step(closure)

    return Adapted
