"""Stand-ins for a model's weights: right shapes and dtypes, no data, and no file is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.models.building import replace_tensors
from finetune.models.family import Family
from finetune.models.folder import ModelFolder
from finetune.models.weights import Weights
from finetune.planning.accelerator import Accelerator


class ZeroWeights(Weights):
    """Has the transformer's tensor shapes but no data: all values are zero."""

    have_values = False

    def __init__(self, family: Family) -> None:
        super().__init__([])
        self._shapes = {name: tensor.shape for name, tensor in family.empty_transformer().state_dict().items()}

    def names(self) -> set[str]:
        return set(self._shapes)

    def shape(self, name: str) -> torch.Size:
        return self._shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        shape = self._shapes[name]
        return torch.zeros(()).expand([stop - start, *shape[1:]] if shape else shape)


class WeightlessFolder(ModelFolder):
    """A `ModelFolder` whose text encoders and VAEs are built from their configs alone, on a simulated accelerator's host."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        super().__init__(path)
        self._accelerator = accelerator

    def load(self, component: str, cls: Any, dtype: torch.dtype) -> nn.Module:
        """A component in fake host memory; see `ModelFolder.load`."""
        with torch.device("meta"):
            if hasattr(cls, "config_class") and cls.config_class is not None:  # transformers
                module = cls(cls.config_class.from_pretrained(self.path / component))
            else:
                module = cls.from_config(self.config(component))
        category = "VAE" if component == "vae" else "text encoder"

        def on_host(tensor: Tensor) -> Tensor:
            wanted = dtype if tensor.is_floating_point() else tensor.dtype
            return torch.empty_like(tensor.to(wanted), device="cpu")

        replace_tensors(module, on_host)
        # `.to` calls `_apply`; torch's own cannot replace the data of fake tensors.
        module._apply = lambda change, *_: replace_tensors(module, change)
        self._accelerator.name((*module.parameters(), *module.buffers()), category)
        return module.eval()
