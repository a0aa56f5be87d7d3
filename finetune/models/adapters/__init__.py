"""Adapters: small trained weights beside frozen ones, a file each; or some of the model's own weights.

A new adapter is a file here and a line in `ADAPTERS`, under the `train.method` that trains it. Its settings are the recipe's
table of the same name, and an exporter (`finetune/engine/weights/exporters/`) writes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers import ModelMixin
from torch import nn

from finetune.models.adapters import lora, partial
from finetune.models.family import Family

ADAPTER = lora.ADAPTER


@dataclass(frozen=True)
class Adapter:
    """One kind of adapter.

    Attributes:
        check: (transformer, family, settings); raises UserError for settings that this model cannot have. The transformer
            is on the meta device.
        add: (transformer, family, settings, seed); adds the adapter in place, or has parameters of the model require gradients.
            The transformer's own parameters are frozen and on the meta device; the adapter's are made on the CPU, whole, from
            the seed alone, and require gradients. `ADAPTER` is a part of their names, between dots, as peft has it: that is
            how they are told from pretrained ones.
        rate: (settings, a parameter's name); how many times optimizer.lr its learning rate is.
    """

    check: Callable[[nn.Module, Family, Any], None]
    add: Callable[[ModelMixin, Family, Any, int], None]
    rate: Callable[[Any, str], float] = lambda settings, name: 1.0


ADAPTERS: dict[str, Adapter] = {
    "lora": Adapter(lora.check, lora.add, lora.rate),
    "partial": Adapter(partial.check, partial.add),
}


def is_adapters(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return ADAPTER in name.split(".")
