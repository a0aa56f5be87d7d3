"""The optimizer of a recipe's [optimizer]."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from finetune.engine.gradients import global_norm, local, replicas
from finetune.recipe.schema import Optimizer


def build_optimizer(
    parameters: Sequence[nn.Parameter], settings: Optimizer, weights: str = "float32"
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the trained parameters, collected after sharding.

    Moments in fewer bits and bf16 weights, rounded stochastically, are torchao's.

    Args:
        weights: dtype of the parameters, "float32" or "bf16".
    """
    shared = {
        "lr": settings.lr,
        "betas": tuple(settings.betas),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    on_cpu = parameters[0].device.type == "cpu"
    if settings.name == "adamw" and weights == "float32":
        # On a CPU foreach is a loop; the fused kernel uses all cores. On GPUs foreach is torch's own choice.
        kernel = {"fused": True} if on_cpu else {"foreach": True}
        return torch.optim.AdamW(parameters, **shared, **kernel)
    import torchao.optim
    from torchao.optim.adam import _AdamW

    cls = {
        "adamw": _AdamW,
        "adamw_8bit": torchao.optim.AdamW8bit,
        "adamw_4bit": torchao.optim.AdamW4bit,
        "adamw_fp8": torchao.optim.AdamWFp8,
    }[settings.name]
    return _adapted(cls, on_cpu)(parameters, **shared, bf16_stochastic_round=weights == "bf16")


def _adapted(cls: type[torch.optim.Optimizer], on_cpu: bool) -> type[torch.optim.Optimizer]:
    """torchao's optimizer with three changes: see its methods."""

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


class InBackward:
    """Updates each parameter as soon as its gradient is whole, and drops the gradient (Lv et al. 2023, LOMO; FSDP2 calls a
    sharded parameter's hooks after its reduction).

    There is one optimizer, with its schedule and its checkpoints as ever: for the time of an update, a parameter is its
    only one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.norms: list[Tensor] = []  # of this step's gradients, on this rank
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._update, group))

    def _update(self, group: dict[str, Any], parameter: nn.Parameter) -> None:
        norm = torch.linalg.vector_norm(local(parameter.grad), dtype=torch.float32)
        self.norms.append(norm / replicas(parameter) ** 0.5)
        whole, group["params"] = group["params"], [parameter]
        try:
            self.optimizer.step()
        finally:
            group["params"] = whole
        parameter.grad = None

    def norm(self, world_size: int) -> Tensor:
        """Global L2 norm of the gradients since it was last asked for, over all ranks."""
        norms, self.norms = self.norms, []
        return global_norm(torch.stack(norms), world_size)
