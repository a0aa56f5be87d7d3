"""What a form of exported weights has to say, and the gathering of sharded weights that all forms begin with."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from finetune.engine.weights.exporters.trained_lora import LENGTHS, TrainedLora, scales_of
from finetune.engine.weights.loading import plain_name
from finetune.models.adapters import ADAPTER, is_adapters
from finetune.models.family import Family
from finetune.models.weights import Weights
from finetune.recipe.table import Table
from finetune.runtime.distributed import Runtime
from finetune.runtime.files import give_usual_mode


@dataclass(frozen=True)
class Details:
    """What exported files have besides the trained weights.

    Attributes:
        precision: in which the weights are written, "float32", "bf16", "float16" or "float8"; as trained if None.
        facts: of what the weights are, for the metadata of safetensors files.
        base: opens the base weights that a LoRA was trained on, with frozen adapters in them; the family's own if None.
    """

    precision: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    base: Callable[[], Weights] | None = None


Convert = Callable[[TrainedLora, Family, Path, Details], None]


@dataclass(frozen=True)
class Exporter:
    """A form in which trained weights are written for other tools.

    Attributes:
        method: the `train.method` whose weights it writes.
        folder: the name of its folder in the run's output, of a family.
        write: given (transformer, family, folder, runtime, details), writes and verifies. All ranks take part; raises UserError
            if what was written differs from what was trained.
        usage: given (base, dtype, parts), the lines of Python that make `pipe` of the base model, as arguments of the pipeline's
            `from_pretrained`, and of each (family, folder) of the parts, weights in `dtype`; none if no line is known.
        title: what it writes of a family, as the end of a run says it.
        is_small: whether each checkpoint has it, too, so that it can be used before the run's end.
        format: the name by which `export.formats` asks for it.
        precisions: those that it can be written in.
        problem: why a family's weights cannot be written so, with a cure; None if they can.
        refused: the same of weights that were trained with these settings, see `Recipe.adapter`; None where they are not known.
        convert: writes and verifies a LoRA that lies in memory, given (lora, family, folder, details); None for forms of other
            weights.
    """

    method: str
    folder: Callable[[Family], str]
    write: Callable[[nn.Module, Family, Path, Runtime, Details], None]
    usage: Callable[[str, str, Sequence[tuple[Family, Path]]], list[str]] = lambda base, dtype, parts: []
    title: Callable[[Family], str] = lambda family: "adapter"
    is_small: bool = True
    format: str = "diffusers"
    precisions: tuple[str, ...] = ("float32", "bf16", "float16")
    problem: Callable[[Family], tuple[str, str] | None] = lambda family: None
    refused: Callable[[Table | None], tuple[str, str] | None] = lambda settings: None
    convert: Convert | None = None


def tidy(files: Iterable[Path]) -> None:
    """Give exported files the permissions that new files get, and the metadata of safetensors files a fixed order.

    safetensors writes metadata in an order that varies from save to save: the same weights would be other bytes each time.

    Args:
        files: those that were exported. A user may export into a folder with files of their own, which stay as they are.
    """
    for file in files:
        give_usual_mode(file)
        if file.suffix == ".safetensors":
            _sort_metadata(file)


def _sort_metadata(file: Path) -> None:
    """In place, since sorted it is as long. The format: 8 bytes of the header's length, the header as JSON, tensors."""
    with file.open("rb+") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        metadata = header.pop("__metadata__", {})
        ordered = {"__metadata__": dict(sorted(metadata.items())), **header} if metadata else header
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise ValueError(f"{file}: the sorted header is longer than the one that was written")
        opened.seek(8)
        opened.write(text.ljust(length))


def gathered(transformer: nn.Module, trained_only: bool) -> dict[str, Tensor]:
    """The weights whole, in rank 0's host memory. All ranks take part."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    whole: Any = get_model_state_dict(
        transformer, options=options
    )  # of tensors alone: transformers have no other state
    return whole


def gathered_lora(transformer: nn.Module) -> TrainedLora:
    """The LoRA that is trained, its tensors whole in rank 0's host memory. All ranks take part."""
    whole = gathered(transformer, trained_only=True)
    # A persistent buffer (CogVideoX-I2V's learned positions) is no part of the adapter.
    tensors = {peft_name(name): value for name, value in whole.items() if is_adapters(name)}
    scales = {plain_name(name): scale for name, scale in scales_of(transformer, ADAPTER).items()}
    config: LoraConfig = cast(Any, transformer).peft_config[ADAPTER]
    return TrainedLora(tensors, scales, config)


def peft_name(name: str) -> str:
    """A parameter's name in peft's files: without the adapter's; the lengths of DoRA, a module's, are named as the tensor."""
    return name.replace(f".{ADAPTER}.", ".").replace(f"{LENGTHS}.weight", LENGTHS)


def lora_writer(convert: Convert) -> Callable[[nn.Module, Family, Path, Runtime, Details], None]:
    """An `Exporter.write` that gathers the LoRA and has rank 0 write it."""

    def write(transformer: nn.Module, family: Family, folder: Path, runtime: Runtime, details: Details) -> None:
        lora = gathered_lora(transformer)
        with runtime.together():
            if runtime.is_main:
                convert(lora, family, folder, details)

    return write


def expert_facts(family: Family) -> dict[str, str]:
    """For the metadata, which expert a file is for, since the names of its tensors are the same for all."""
    if family.expert is None:
        return {}
    low, high = family.experts[family.expert].noise_range
    return {
        "expert": f"{family.expert}_noise",
        "component": family.trained_component,
        "denoises": f"sigma {low:g} to {high:g}",
    }
