"""Lines of Python by which a user's pipeline gets the frozen adapters that a LoRA was trained on top of."""

import math
from collections.abc import Mapping

import diffusers
from peft.tuners.lora import LoraLayer
from torch import Tensor

from finetune.engine.weights.exporters.diffusers_lora import PREFIX
from finetune.models.adapters.places import find_adapter
from finetune.models.adapters.reading import LowRank, read_adapter
from finetune.models.family import Family
from finetune.recipe.schema import Lora
from finetune.recipe.table import Table
from finetune.runtime.errors import UserError


def frozen_lines(settings: Table | None, family: Family) -> list[str]:
    """Lines for `pipe`, in which the trained LoRA is already; none if there are no frozen adapters.

    Where diffusers cannot load one by itself, or the model has two transformers, a comment says what is to be loaded.
    """
    frozen = settings.frozen if isinstance(settings, Lora) else []
    if not frozen:
        return []
    cls = getattr(diffusers, family.pipeline_class)
    if family.expert is not None or not all(_is_read_alike(each.path, family, cls) for each in frozen):
        return [
            f"# it was trained on top of {each.path} at strength {each.strength:g}: load that, too" for each in frozen
        ]
    names, lines = [f"frozen_{index}" for index in range(1, len(frozen) + 1)], []
    for name, each in zip(names, frozen, strict=True):
        file, _ = find_adapter(each.path, family)
        lines.append(f'pipe.load_lora_weights("{file.parent}", weight_name="{file.name}", adapter_name="{name}")')
    weights = [1.0, *(each.strength for each in frozen)]
    listed = ", ".join(f'"{name}"' for name in ("default_0", *names))
    return [*lines, f"pipe.set_adapters([{listed}], {weights})  # the trained one, and what it was trained on top of"]


def _is_read_alike(path: str, family: Family, cls: type[diffusers.DiffusionPipeline]) -> bool:
    """Whether a pipeline loads an adapter as it was read here: the same layers, in the same strength."""
    if not hasattr(cls, "load_lora_weights"):
        return False
    try:
        read = read_adapter(path, family)
        loaded, metadata = cls.lora_state_dict(read.file.parent, weight_name=read.file.name, return_lora_metadata=True)
        skeleton = family.empty_transformer()
        cls.load_lora_into_transformer(loaded, transformer=skeleton, metadata=metadata, low_cpu_mem_usage=True)
    except (UserError, ValueError, KeyError, TypeError, RuntimeError, OSError):
        return False
    scales = {name: module.scaling for name, module in skeleton.named_modules() if isinstance(module, LoraLayer)}
    return scales.keys() == read.layers.keys() and all(
        _is_alike(loaded, scales[name], name, layer) for name, layer in read.layers.items()
    )


def _is_alike(loaded: Mapping[str, Tensor], scales: Mapping[str, float], name: str, read: LowRank) -> bool:
    """By the product of the matrices' norms and the scale, which is the same wherever a loader folds alpha in."""
    (scale,) = scales.values()
    lora_A, lora_B = (loaded[f"{PREFIX}{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
    found, expected = (
        float(a.float().norm() * b.float().norm()) for a, b in ((lora_A, lora_B), (read.lora_A, read.lora_B))
    )
    return math.isclose(found * scale, expected * read.scale, rel_tol=1e-2)
