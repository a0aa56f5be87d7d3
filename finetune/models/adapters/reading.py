"""Reads adapters of this and of other trainers, as low-rank matrices by the names of our transformer's layers.

A file may name layers as diffusers does, or as the model's own repository (`original_layers` of the family), with any of the
prefixes that trainers write: none, "transformer.", "diffusion_model." (ComfyUI, diffusion-pipe), "lora_unet_" with underscores for
dots (kohya's scripts, musubi-tuner), "base_model.model." (peft).
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from finetune.models.adapters.places import PEFT_SETTINGS, find_adapter
from finetune.models.family import Family
from finetune.models.original_names import Rows, rows_of
from finetune.runtime.errors import UserError

_METADATA = "lora_adapter_metadata"  # diffusers' key of peft's settings, as JSON
_PREFIXES = ("base_model.model.", "transformer_2.", "transformer.", "diffusion_model.", "model.diffusion_model.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
_DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
_PARTS = {  # the ends of tensors' names
    "lora_A": r"\.(lora_A(\.\w+)?|lora_down|lora\.down|lora_linear_layer\.down)\.weight|[._]lora\.down\.weight",
    "lora_B": r"\.(lora_B(\.\w+)?|lora_up|lora\.up|lora_linear_layer\.up)\.weight|[._]lora\.up\.weight",
    "alpha": r"\.alpha",
}
_OTHER_KINDS = {  # other ends, and what they are of
    "DoRA": r"dora_scale|lora_magnitude_vector",
    "LoKr": r"lokr_\w+",
    "LoHa": r"hada_\w+",
    "OFT": r"oft_\w+|oft_blocks",
    "GLoRA": r"[ab][12]\.weight",
    "Tucker-decomposed LoRA": r"lora_mid\.weight",
    "LoRA with biases": r"lora_B(\.\w+)?\.bias|diff_b|b_norm",
    "whole differences of weights": r"\.diff|w_norm|set_weight",
}


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a layer's weight: `scale` x lora_B @ lora_A.

    Attributes:
        lora_A: (rank, in), as in the file.
        lora_B: (out, rank), as in the file: nothing is folded into it.
        scale: alpha / rank; alpha / sqrt(rank) of rsLoRA.
    """

    lora_A: Tensor
    lora_B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def delta(self, start: int = 0, stop: int | None = None) -> Tensor:
        """What it adds to rows `start` to `stop` - 1 of the weight, float32 (rows, in)."""
        return self.scale * (self.lora_B[start:stop].float() @ self.lora_A.float())


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter's layers by their names in our transformer, such as "transformer_blocks.0.attn1.to_q".

    peft calls the tensors `{layer}.lora_A.{adapter}.weight` and `{layer}.lora_B.{adapter}.weight`.

    Attributes:
        file: where it was read.
        metadata: the texts in the file's header.
    """

    file: Path
    layers: dict[str, LowRank]
    metadata: dict[str, str]


def read_adapter(path: str | Path, family: Family) -> ReadAdapter:
    """Read a LoRA whole, into host memory; tensors keep their dtypes.

    Fused layers are split: the parts of lora_B's rows have lora_A in common.

    Args:
        path: a safetensors file; a folder with one, of peft or of a run of ours; or "owner/name" or "owner/name/file" on the Hub.
        family: opened on the component that the adapter is for.
    Raises:
        UserError: there is no such file, it cannot be read, it has other things than a LoRA, or it is not of this model.
    """
    file, settings = find_adapter(path, family)
    tensors, metadata = _read(file)
    if settings is None:
        settings = _settings_of(metadata, file)
    elif settings.get("lora_alpha") is None:
        what, cure = (
            f"there is no lora_alpha in {PEFT_SETTINGS}, which says how strong it is",
            "put back what peft wrote",
        )
        raise UserError(what, cure, str(file.parent))
    if settings.get("use_dora"):
        raise _other_kind("DoRA", file)
    if (expert := metadata.get("expert")) and family.expert and expert != f"{family.expert}_noise":
        cure = f"give the file of the expert {family.expert!r}, or set model.experts to the other one"
        raise UserError(f"this adapter is of the expert {expert!r}, not of {family.expert!r}", cure, str(file))
    shapes = _shapes(family.empty_transformer())
    names = _Names(family, shapes)
    merged: dict[str, _Parts] = defaultdict(_Parts)
    for layer, parts in _by_layer(tensors, file).items():
        targets = names.of(layer)
        if targets is None:
            raise _unknown(layer, family, names, tensors, file)
        lora_A, lora_B = _matrices(layer, parts, file)
        try:
            scale = _scale(layer, parts, lora_A.shape[0], targets, settings)
        except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError, re.error) as error:
            what = f"the alpha of {layer} cannot be read ({error})"
            raise UserError(what, "export the adapter again", str(file)) from None
        if not math.isfinite(scale):
            raise UserError(f"the alpha of {layer} is {scale}", "export the adapter again", str(file))
        sizes = [_height(each, shapes) for each in targets]
        fits = (sum(sizes), *shapes[targets[0].layer][1:])
        if (lora_B.shape[0], lora_A.shape[1]) != fits:
            has, wants = ("x".join(map(str, each)) for each in ((lora_B.shape[0], lora_A.shape[1]), fits))
            raise UserError(
                f"the adapter of {layer} is for a layer of {has}, and that of {family.title} in model.path is {wants}",
                "use an adapter of this very model: variants of a family differ in size",
                str(file),
            )
        for target, rows in zip(targets, lora_B.split(sizes), strict=True):
            merged[target.layer].add(target, lora_A, rows, scale, layer, file)
    if not merged:
        raise UserError("there is no LoRA in this file", "give a file with lora_A and lora_B matrices", str(file))
    return ReadAdapter(file, {name: parts.whole(name, file) for name, parts in merged.items()}, metadata)


def _shapes(transformer: nn.Module) -> dict[str, torch.Size]:
    """The shape of each layer's weight, by the layer's name."""
    weights = {name: tensor.shape for name, tensor in transformer.named_parameters() if name.endswith(".weight")}
    return {name.removesuffix(".weight"): shape for name, shape in weights.items()}


# Names


class _Names:
    """From the names in a file to layers of ours. Dots and underscores are alike, as kohya's names have only underscores."""

    def __init__(self, family: Family, layers: Collection[str]) -> None:
        self._spellings = family.original_spellings
        self._known: dict[str, tuple[Rows, ...]] = {_flat(name): (Rows(name),) for name in layers}
        indices = sorted({int(found) for name in layers for found in re.findall(r"\.(\d+)\.", name)})
        for original, ours in family.original_layers.items():
            for index in indices if "{}" in original else [0]:
                targets = tuple(rows_of(each.replace("{}", str(index))) for each in ours)
                if all(each.layer in layers for each in targets):
                    self._known.setdefault(_flat(original.replace("{}", str(index))), targets)

    def of(self, layer: str) -> tuple[Rows, ...] | None:
        """The layers of ours that a layer of a file is; None if it is none."""
        return next((found for name in self._candidates(layer) if (found := self._known.get(name))), None)

    def _candidates(self, layer: str) -> Iterator[str]:
        names = [layer]
        names += [layer.removeprefix(prefix) for prefix in (*_PREFIXES, *_FLAT_PREFIXES) if layer.startswith(prefix)]
        if layer.startswith(_PREFIXES[0]):  # peft around a whole pipeline's component
            names += [inner.removeprefix("transformer.") for inner in names[1:] if inner.startswith("transformer.")]
        for name in map(_flat, names):
            yield name
            spelled = name
            for theirs, ours in self._spellings.items():
                spelled = spelled.replace(theirs, ours)
            yield spelled


def _height(rows: Rows, shapes: Mapping[str, torch.Size]) -> int:
    return shapes[rows.layer][0] // rows.parts


def _flat(name: str) -> str:
    return name.replace(".", "_")


# Tensors


class _Parts:
    """What is read of one layer of ours: the whole, or parts of its rows."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], tuple[Tensor, Tensor, float]] = {}

    def add(self, target: Rows, lora_A: Tensor, lora_B: Tensor, scale: float, layer: str, file: Path) -> None:
        if (target.part, target.parts) in self.found or any(count != target.parts for _, count in self.found):
            raise UserError(f"{layer} is there twice, by two names", "export the adapter again", str(file))
        self.found[target.part, target.parts] = lora_A, lora_B, scale

    def whole(self, name: str, file: Path) -> LowRank:
        parts = [part for _, part in sorted(self.found.items())]
        (_, count) = next(iter(self.found))
        if len(parts) != count or any(a is not parts[0][0] or scale != parts[0][2] for a, _, scale in parts):
            raise UserError(f"parts of {name} are missing", "export the adapter again", str(file))
        lora_A, lora_B, scale = parts[0]
        return LowRank(lora_A, lora_B if count == 1 else torch.cat([b for _, b, _ in parts]), scale)


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"this adapter is damaged ({error})", "download it again", str(file)) from None


def _by_layer(tensors: Mapping[str, Tensor], file: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer, by "lora_A", "lora_B" and "alpha"."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        for part, ending in _PARTS.items():
            if match := re.search(rf"({ending})$", name):
                found[name[: match.start()]][part] = tensor
                break
        else:
            for kind, ending in _OTHER_KINDS.items():
                if re.search(rf"(^|[._])({ending})$", name) or re.search(rf"({ending})$", name):
                    raise _other_kind(kind, file, name)
            raise UserError(
                f"{name} is no tensor of a LoRA", "give the file of a LoRA, not of a model", str(file)
            ) from None
    return found


def _matrices(layer: str, parts: Mapping[str, Tensor], file: Path) -> tuple[Tensor, Tensor]:
    if missing := [part for part in ("lora_A", "lora_B") if part not in parts]:
        raise UserError(f"{layer} has no {missing[0]}", "export the adapter again", str(file))
    lora_A, lora_B = parts["lora_A"], parts["lora_B"]
    if lora_A.dim() > 2 or lora_B.dim() > 2:
        cure = "only adapters of linear layers can be read; train or export it without convolutions"
        raise UserError(f"{layer} is a convolution", cure, str(file))
    if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.shape[0] != lora_B.shape[1]:
        shapes = " and ".join("x".join(map(str, each.shape)) for each in (lora_A, lora_B))
        raise UserError(
            f"the matrices of {layer}, {shapes}, do not fit together", "export the adapter again", str(file)
        )
    if strange := {lora_A.dtype, lora_B.dtype} - _DTYPES:
        cure = "export it in float32, bfloat16 or float16"
        raise UserError(f"matrices of {layer} are {strange.pop()}", cure, str(file))
    if not lora_A.shape[0]:
        raise UserError(f"the matrices of {layer} are empty: their rank is 0", "export the adapter again", str(file))
    if not (lora_A.isfinite().all() and lora_B.isfinite().all()):
        raise UserError(f"{layer} has values that are not finite", "use an earlier state of this adapter", str(file))
    return lora_A, lora_B


def _scale(
    layer: str, parts: Mapping[str, Tensor], rank: int, targets: tuple[Rows, ...], settings: Mapping[str, Any]
) -> float:
    """alpha / rank by the file's own tensor, else by peft's settings, else 1: what every loader does that finds neither."""
    if "alpha" in parts:
        return float(parts["alpha"]) / rank
    alpha = settings.get("lora_alpha")
    if alpha is None:
        return 1.0
    names = [re.sub(r"^(base_model\.model\.)?(transformer\.)?", "", layer), *(each.layer for each in targets)]
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        # as peft reads it: the first pattern that is the end of a layer's name, from a dot on
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _settings_of(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    """peft's settings as diffusers writes them into a file's header, without the component's prefix."""
    if _METADATA not in metadata:
        return {}
    try:
        values = json.loads(metadata[_METADATA])
        return {re.sub(r"^transformer\.", "", name): value for name, value in values.items()}
    except (ValueError, AttributeError, RecursionError):
        what = f"the file's {_METADATA} cannot be read"
        raise UserError(what, "export the adapter again", str(file)) from None


# Errors


def _other_kind(kind: str, file: Path, name: str = "") -> UserError:
    found = f" ({name})" if name else ""
    cure = "convert or extract it to a plain LoRA with the tool that made it"
    return UserError(f"this file is {kind}, which cannot be read as a LoRA{found}", cure, str(file))


def _unknown(layer: str, family: Family, names: _Names, tensors: Mapping[str, Tensor], file: Path) -> UserError:
    layers = [re.sub(r"(\.lora_|\.alpha|\.lora\.).*$", "", name) for name in tensors]
    distinct = [name for name, _ in groupby(sorted(layers))]
    strange = [name for name in distinct if names.of(name) is None]
    if len(strange) == len(distinct):
        what = f"this adapter is of another model: {family.title} has no layer {layer}"
        return UserError(what, "give one that was trained on the model in model.path", str(file))
    shown = ", ".join(strange[:3])
    what = f"{len(strange)} of its {len(distinct)} layers are none of {family.title}: {shown}"
    if all(re.match(r"(lora_te|text_encoder|te\d?_)", name) for name in strange):
        return UserError(what, "text encoders are not trained here: export it for the transformer alone", str(file))
    return UserError(what, "give one that was trained on the model in model.path", str(file))
