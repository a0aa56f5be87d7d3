"""A LoRA in memory, whole, by peft's names, as all forms of it are written from."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from finetune.models.adapters.reading import ReadAdapter
from finetune.runtime.errors import UserError

DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # (rank, in) and (out, rank): the change of a weight is scale * up @ down
LENGTHS = ".lora_magnitude_vector"  # (out): what DoRA makes the rows of the changed weight as long as
EXPORTED = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class TrainedLora:
    """A LoRA as it was trained.

    Attributes:
        tensors: by peft's names without the adapter's: "LAYER.lora_A.weight" (rank, in) and "LAYER.lora_B.weight" (out, rank).
        scales: of each layer, what up @ down is multiplied by: alpha / rank as a rule.
        config: peft's, of which the scales follow.
    """

    tensors: Mapping[str, Tensor]
    scales: Mapping[str, float]
    config: LoraConfig

    @property
    def layers(self) -> list[str]:
        """The adapted layers, sorted."""
        return sorted(name.removesuffix(DOWN) for name in self.tensors if name.endswith(DOWN))

    def change(self, layer: str) -> Tensor:
        """What it adds to a layer's weight, float32 (out, in)."""
        return self.scales[layer] * (self.tensors[layer + UP].float() @ self.tensors[layer + DOWN].float())

    def cast(self, precision: str | None) -> dict[str, Tensor]:
        """The tensors in a precision, or as they are if None; each contiguous."""
        dtype = None if precision is None else EXPORTED[precision]
        return {name: rounded(name, tensor, dtype or tensor.dtype) for name, tensor in self.tensors.items()}

    def folded(self, precision: str | None) -> dict[str, Tensor]:
        """The tensors with each layer's scale in its up matrix, so that their strength is right where nothing else is read.

        It is computed in float32 and rounded once. Without a precision the tensors stay as they were trained if the scales can
        be folded in exactly, as powers of two can, and are float32 otherwise.
        """
        exact = {
            name: self.scales[name.removesuffix(UP)] * tensor.float() if name.endswith(UP) else tensor
            for name, tensor in self.tensors.items()
        }
        if precision is None:
            trained = {name: tensor.to(self.tensors[name].dtype) for name, tensor in exact.items()}
            if all(torch.equal(trained[name].float(), exact[name].float()) for name in exact):
                return {name: tensor.contiguous() for name, tensor in trained.items()}
        dtype = EXPORTED[precision or "float32"]
        return {name: rounded(name, tensor, dtype) for name, tensor in exact.items()}

    def folded_config(self) -> dict[str, Any]:
        """peft's config of the folded tensors as plain values: alpha is the rank, so that no reader scales a second time."""
        config = plain(self.config)
        if set(self.scales.values()) == {1.0}:
            return config
        patterns = dict(config.get("rank_pattern") or {})
        return {**config, "lora_alpha": config["r"], "alpha_pattern": patterns, "use_rslora": False}

    def only_low_rank(self, form: str) -> None:
        """Raise UserError if it has other tensors than low-rank matrices, such as a DoRA's magnitudes."""
        if others := sorted(name for name in self.tensors if not name.endswith((DOWN, UP))):
            raise UserError(
                f"{others[0]} is no low-rank matrix, and {form!r} has no place for it", 'use "diffusers"', form
            )

    def facts(self) -> dict[str, str]:
        """Rank, and the alpha that was trained with, for the metadata: under keys of our own, where no loader looks for a scale."""
        return {"trained_alpha": f"{self.config.lora_alpha:g}", "trained_rank": str(self.config.r)}


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a dtype, contiguous. Raises UserError for finite values that the dtype cannot hold, as float16 beyond 65504."""
    found = tensor.to(dtype).contiguous()
    if dtype != tensor.dtype and not found.isfinite().all() and tensor.isfinite().all():
        most, largest = tensor.abs().max().item(), torch.finfo(dtype).max
        what = f"{name} has values up to {most:.3g}, and {str(dtype).removeprefix('torch.')} ends at {largest:.3g}"
        raise UserError(what, 'take "bf16" or "float32"', "export.precision")
    return found


def plain(config: LoraConfig) -> dict[str, Any]:
    """A config as values for JSON, the same ones in each process: sets have no order."""
    return {
        name: sorted(value) if isinstance(value, set | frozenset) else value for name, value in config.to_dict().items()
    }


def config_of(tensors: Mapping[str, Tensor], scales: Mapping[str, float]) -> LoraConfig:
    """peft's config of tensors that came without one: each layer is named, with its rank and alpha where they differ."""
    ranks = {name.removesuffix(DOWN): len(tensor) for name, tensor in tensors.items() if name.endswith(DOWN)}
    alphas = {layer: scales[layer] * rank for layer, rank in ranks.items()}
    rank, alpha = _most(ranks.values()), _most(alphas.values())
    return LoraConfig(
        r=int(rank),
        lora_alpha=alpha,
        target_modules=sorted(ranks),
        rank_pattern={layer: each for layer, each in sorted(ranks.items()) if each != rank},
        alpha_pattern={layer: each for layer, each in sorted(alphas.items()) if each != alpha},
    )


def lora_of(adapter: ReadAdapter) -> TrainedLora:
    """A LoRA that was read from a file. Its tensors are copies: parts of a fused layer have matrices in common."""
    tensors = {layer + DOWN: each.lora_A.clone() for layer, each in adapter.layers.items()}
    tensors |= {layer + UP: each.lora_B.clone() for layer, each in adapter.layers.items()}
    scales = {layer: each.scale for layer, each in adapter.layers.items()}
    return TrainedLora(tensors, scales, config_of(tensors, scales))


def _most(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def scales_of(transformer: nn.Module, adapter: str) -> dict[str, float]:
    """The scale of each layer that peft has adapted, as it computes with it."""
    return {
        name: float(module.scaling[adapter])
        for name, module in transformer.named_modules()
        if adapter in getattr(module, "scaling", ())
    }
