"""How strongly a trained adapter is applied."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from peft.tuners.lora import LoraLayer
from torch import nn

from finetune.models.adapters import ADAPTER
from finetune.models.adapters.switch import without_adapter


@contextmanager
def applied(transformers: Iterable[nn.Module], strength: float) -> Iterator[None]:
    """Inside, scale what the trained adapter adds, as diffusers' `set_adapters` does. Other adapters are left alone.

    At 0 it is switched off: DoRA's magnitudes would stay, and the model would not be the base.
    """
    layers = [
        module
        for transformer in transformers
        for module in transformer.modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.scaling
    ]
    if strength == 0:
        with without_adapter(layers):
            yield
        return
    trained = [layer.scaling[ADAPTER] for layer in layers]
    for layer, scaling in zip(layers, trained, strict=True):
        layer.scaling[ADAPTER] = scaling * strength
    try:
        yield
    finally:
        for layer, scaling in zip(layers, trained, strict=True):
            layer.scaling[ADAPTER] = scaling
