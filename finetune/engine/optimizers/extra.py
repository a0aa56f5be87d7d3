"""Optimizers of pytorch-optimizer, an extra: Lion, Prodigy and schedule-free AdamW."""

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from finetune.engine.gradients import local
from finetune.engine.optimizers.lent import Lender
from finetune.engine.optimizers.low_bit import adam_arguments
from finetune.recipe.optimizers import Lion, Optimizer, Prodigy, ScheduleFreeAdamW
from finetune.runtime.errors import Problem

_LIBRARY = "pytorch_optimizer"
_MANY = 2**28  # values; temporaries of all of them at once would count


def build_lion(parameters: Mapping[str, nn.Parameter], settings: Lion, weights: str) -> torch.optim.Optimizer:
    """See `finetune.engine.optimizers.build_optimizer`."""
    trained = list(parameters.values())
    lion = _library().Lion(
        trained,
        lr=settings.lr,
        betas=tuple(settings.betas),
        weight_decay=settings.weight_decay,
        foreach=_at_once(trained),
    )
    return _begun(lion if weights == "float32" else Lender(lion))


def build_prodigy(parameters: Mapping[str, nn.Parameter], settings: Prodigy, weights: str) -> torch.optim.Optimizer:
    """See `finetune.engine.optimizers.build_optimizer`."""
    trained = list(parameters.values())
    prodigy = _library().Prodigy(
        trained,
        **adam_arguments(settings),
        d0=settings.d0,
        d_coef=settings.d_coef,
        bias_correction=True,
        safeguard_warmup=True,
        foreach=False,  # as its sums are then taken in the same order on every device
    )
    for group in prodigy.param_groups:
        group["d_numerator"] = torch.zeros(1, device=local(trained[0]).device)
    return Lender(prodigy, whole=True, together=True)


def build_schedule_free(
    parameters: Mapping[str, nn.Parameter], settings: ScheduleFreeAdamW, weights: str
) -> torch.optim.Optimizer:
    """See `finetune.engine.optimizers.build_optimizer`."""
    trained = list(parameters.values())
    cls = _evaluated(_library().ScheduleFreeAdamW)
    return _begun(cls(trained, **adam_arguments(settings), foreach=_at_once(trained)))


def missing_library(settings: Optimizer) -> Problem | None:
    """Why an optimizer cannot be had here, if it is one of the library's."""
    if not isinstance(settings, (Lion, Prodigy, ScheduleFreeAdamW)) or importlib.util.find_spec(_LIBRARY):
        return None
    what = f"{settings.name} is of pytorch-optimizer, which is not installed"
    return Problem(what, "optimizer.name", 'in the checkout: pip install -e ".[optimizers]"')


def _library() -> ModuleType:
    """Imported when it is used: it takes a second."""
    return importlib.import_module(_LIBRARY)


def _at_once(parameters: list[nn.Parameter]) -> bool:
    """Whether a few kernels update all parameters: fast for an adapter's many small ones, with temporaries of their size."""
    return sum(parameter.numel() for parameter in parameters) < _MANY


def _begun(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Groups have from the beginning what a first step would add to them, so that a checkpoint finds where to load it."""
    for group in optimizer.param_groups:
        group["step"] = 0
    return optimizer


def _evaluated(cls: Any) -> Any:
    """A schedule-free class whose averaged weights can be swapped in, and out again without a rounding error."""

    class Evaluated(cls):
        @contextmanager
        def evaluating(self) -> Iterator[None]:
            """The averaged weights in place of those that are trained, which wait in host memory."""
            trained: list[Tensor] = [parameter for group in self.param_groups for parameter in group["params"]]
            kept = [local(parameter).detach().to("cpu", copy=True) for parameter in trained]
            self.eval()
            try:
                yield
            finally:
                with torch.no_grad():
                    for parameter, value in zip(trained, kept, strict=True):
                        local(parameter).copy_(value)
                for group in self.param_groups:
                    group["train_mode"] = True

    return Evaluated
