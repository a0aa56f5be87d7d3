"""A LoRA as the folder that `PeftModel.from_pretrained` loads, with alpha as it was trained, verified by loading it back."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors.torch import save_file

from finetune.engine.weights.exporters.exporter import Details, Exporter, expert_facts, lora_writer, peft_name, tidy
from finetune.engine.weights.exporters.trained_lora import TrainedLora, plain, scales_of
from finetune.models.adapters.places import PEFT_FILE, PEFT_SETTINGS
from finetune.models.building import replace_tensors
from finetune.models.family import Family
from finetune.runtime.errors import UserError
from finetune.runtime.files import atomic

PREFIX = "base_model.model."


def write_peft(lora: TrainedLora, family: Family, folder: Path, details: Details) -> None:
    """Write the two files of the folder.

    Raises:
        UserError: what peft loads differs from what was trained.
    """
    tensors = lora.cast(details.precision)
    facts = details.facts
    base = {
        "base_model_name_or_path": facts.get("base_model"),
        "revision": facts.get("base_revision"),
        "inference_mode": True,
    }
    config: dict[str, Any] = {**plain(lora.config), **base}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / PEFT_SETTINGS) as partial:
        partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    with atomic(folder / PEFT_FILE) as partial:
        named = {PREFIX + name: tensor for name, tensor in tensors.items()}
        save_file(named, partial, {"format": "pt", **lora.facts(), **details.facts, **expert_facts(family)})
    tidy([folder / PEFT_SETTINGS, folder / PEFT_FILE])
    # peft moves an adapter to its layer's device, so that on meta it would be lost.
    transformer = replace_tensors(family.empty_transformer(), lambda tensor: torch.zeros(()).expand(tensor.shape))
    loaded = PeftModel.from_pretrained(cast(Any, transformer), folder, autocast_adapter_dtype=False)
    found = {peft_name(name): value for name, value in loaded.state_dict().items()}
    wrong = [name for name, tensor in tensors.items() if not _is(found.get(PREFIX + name), tensor)]
    scales = {name.removeprefix(PREFIX): scale for name, scale in scales_of(loaded, "default").items()}
    wrong += sorted(name for name in scales.keys() | lora.scales.keys() if scales.get(name) != lora.scales.get(name))
    if wrong:
        raise UserError(
            f"the exported adapter differs from the trained one: {', '.join(wrong[:3])}",
            "report this with the version of peft; the checkpoint itself is intact",
            str(folder),
        )


def _is(found: torch.Tensor | None, expected: torch.Tensor) -> bool:
    return found is not None and torch.equal(found, expected)


EXPORTER = Exporter(
    "lora",
    lambda _: "peft",
    lora_writer(write_peft),
    title=lambda _: "LoRA for peft (PeftModel.from_pretrained)",
    is_small=False,
    format="peft",
    convert=write_peft,
)
