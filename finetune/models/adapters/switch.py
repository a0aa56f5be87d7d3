"""Switches the adapter that is trained off and on, which leaves the frozen base between."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from finetune.models.adapters.lora import ADAPTER


def adapted_layers(transformer: nn.Module) -> list[BaseTunerLayer]:
    """The layers that have an adapter, wherever they are wrapped."""
    return [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def without_adapter(layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    """Inside the block, layers compute without the adapter that is trained; frozen adapters beside it stay.

    peft's own switches, `set_adapter` and `enable_adapters`, also take `requires_grad` off the adapter's parameters. FSDP2 notes
    that at a parameter's first use and never asks again, so it would compute no gradients. Hence the attribute alone.
    """
    active = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [name for name in layer.active_adapters if name != ADAPTER]
    try:
        yield
    finally:
        for layer, names in zip(layers, active, strict=True):
            layer._active_adapter = names
