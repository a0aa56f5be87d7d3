"""A model folder whose weights are not read: components of the right shapes, in host memory that is fake."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.models.folder import ModelFolder
from finetune.planning.accelerator import Accelerator


class WeightlessFolder(ModelFolder):
    """Gives text encoders and VAEs made of their configs alone, within an accelerator."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        super().__init__(path)
        self._accelerator = accelerator

    def load(self, component: str, cls: type, dtype: torch.dtype) -> nn.Module:
        with torch.device("meta"):
            if hasattr(cls, "config_class") and cls.config_class is not None:  # transformers
                module = cls(cls.config_class.from_pretrained(self.path / component))
            else:
                module = cls.from_config(self.config(component))
        category = "VAE" if component == "vae" else "text encoder"

        def on_host(tensor: Tensor) -> Tensor:
            wanted = dtype if tensor.is_floating_point() else tensor.dtype
            return torch.empty_like(tensor.to(wanted), device="cpu")

        _replace(module, on_host)
        module._apply = partial(
            _replace, module
        )  # what `.to` calls; torch's own does not know fake tensors that come and go
        self._accelerator.name((*module.parameters(), *module.buffers()), category)
        return module.eval()


def _replace(module: nn.Module, change: Callable[[Tensor], Tensor], *_: Any) -> nn.Module:
    """Put changed parameters and buffers in the place of old ones; what is tied stays so."""
    made: dict[Tensor, Tensor] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter not in made:
                made[parameter] = nn.Parameter(change(parameter.detach()), requires_grad=False)
            owner._parameters[name] = made[parameter]
        for name, buffer in owner.named_buffers(recurse=False):
            owner._buffers[name] = change(buffer)
    return module
