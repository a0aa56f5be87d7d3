"""The whole transformer with the LoRA in its weights, as a folder that diffusers loads. It is made shard by shard."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

import diffusers
import torch
from torch import Tensor, nn

from finetune.engine.weights.exporters import diffusers_transformer
from finetune.engine.weights.exporters.exporter import Details, Exporter, expert_facts, lora_writer, tidy
from finetune.engine.weights.exporters.shards import write_shards
from finetune.engine.weights.exporters.trained_lora import EXPORTED, LENGTHS, TrainedLora, rounded
from finetune.models.building import stays_float32
from finetune.models.family import Family
from finetune.models.weights import Weights
from finetune.runtime.errors import UserError


def write_merged(lora: TrainedLora, family: Family, folder: Path, details: Details) -> None:
    """Write config and weights: each sum is computed in float32, and rounded once, to the base's dtype if no other is asked for.

    With precision "float8", the matrices of the blocks' linear layers are in it (e4m3, without scales), and the rest in bf16.

    Raises:
        UserError: the base model lacks an adapted layer, or the files differ from what was to be written.
    """
    base = (details.base or family.transformer_weights)()
    skeleton = cast(diffusers.ModelMixin, family.empty_transformer())
    names = [name for name in skeleton.state_dict() if name in base.names()]
    if missing := sorted({f"{layer}.weight" for layer in lora.layers} - set(names)):
        cure = "set model.path to what the LoRA was trained on"
        raise UserError(f"the base model has no {missing[0]} to merge with", cure, "merged")
    dtype = _dtypes(skeleton, family, details.precision)
    sizes = {name: base.shape(name).numel() * (dtype(name) or base.dtype(name)).itemsize for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    skeleton.save_config(folder)
    tidy([folder / "config.json"])
    facts = {**lora.facts(), **details.facts, **expert_facts(family)}
    write_shards(folder, sizes, lambda name: merged(name, lora, base, dtype(name)), facts)


def merged(name: str, lora: TrainedLora, base: Weights, dtype: torch.dtype | None) -> Tensor:
    """A tensor of the base model with its share of the LoRA, in a dtype, or in the base's if None."""
    weight = base.rows(name, 0, (base.shape(name) or [0])[0])
    layer, _, what = name.rpartition(".")
    dtype = dtype or base.dtype(name)  # frozen adapters make the rows of some layers float32
    if what == "weight" and layer in lora.scales:
        weight = weight.float() + lora.change(layer)
        if (lengths := lora.tensors.get(layer + LENGTHS)) is not None:  # DoRA (Liu et al. 2024, equation 5)
            weight *= (lengths.float() / weight.norm(dim=1))[:, None]
    if dtype is torch.float8_e4m3fn:
        limit = torch.finfo(dtype).max  # beyond it, a cast gives NaN
        weight = weight.float().clamp(-limit, limit)
        return weight.to(dtype).contiguous()
    return rounded(name, weight, dtype) if weight.is_floating_point() else weight.contiguous()


def _dtypes(transformer: nn.Module, family: Family, precision: str | None) -> Callable[[str], torch.dtype | None]:
    """The dtype of each tensor, by its name; None for that of the base."""
    stays, quantised = stays_float32(transformer), set()
    parameters = dict(transformer.named_parameters()).keys()
    if precision == "float8":
        for blocks in family.block_lists:
            for name, module in transformer.get_submodule(blocks).named_modules(prefix=blocks):
                if isinstance(module, nn.Linear) and re.search(family.high_precision, name) is None:
                    quantised.add(f"{name}.weight")

    def dtype(name: str) -> torch.dtype | None:
        if precision is None or name not in parameters:  # a buffer, such as positions in float64
            return None
        if stays(name):
            return torch.float32
        if precision == "float8" and name not in quantised:
            return torch.bfloat16
        return EXPORTED[precision]

    return dtype


def _title(family: Family) -> str:
    return f"{family.trained_component} with the LoRA merged into it"


EXPORTER = Exporter(
    "lora",
    lambda _: "merged",
    lora_writer(write_merged),
    usage=diffusers_transformer.usage,
    title=_title,
    is_small=False,
    format="merged",
    precisions=("float32", "bf16", "float16", "float8"),
    convert=write_merged,
)
