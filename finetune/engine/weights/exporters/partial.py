"""Weights of which some were trained: the whole transformer as diffusers has it, or the difference as ComfyUI loads it."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.engine.weights.exporters import diffusers_transformer
from finetune.engine.weights.exporters.exporter import Details, Exporter, expert_facts, gathered, tidy
from finetune.engine.weights.exporters.trained_lora import EXPORTED
from finetune.models.family import Family
from finetune.models.original_names import PARTS_OF_NAMES, Rows, original_of
from finetune.models.weights import Weights
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.files import atomic

DIFFERENCE_FILE = "difference.safetensors"


def export_whole(transformer: nn.Module, family: Family, folder: Path, runtime: Runtime, details: Details) -> None:
    """Write all weights as a diffusers model folder: the trained ones exactly as trained, the others as they are in the base
    model's files, whatever they were held in while training. Verified by reading them back. All ranks take part.
    """
    trained = gathered(transformer, trained_only=True)
    with runtime.together():
        if runtime.is_main:
            base = family.transformer_weights()
            names = family.empty_transformer().state_dict()
            whole = {name: trained[name] if name in trained else _whole(base, name) for name in names}
            diffusers_transformer.write(family, whole, folder, details)


def export_difference(transformer: nn.Module, family: Family, folder: Path, runtime: Runtime, details: Details) -> None:
    """Write what training has added to each trained tensor, as ComfyUI's LoRA loader takes it. All ranks take part.

    It is computed in float32, and rounded if another precision is asked for.

    Raises:
        UserError: ComfyUI has no such model, or one whose tensors are fused in other ways.
    """
    trained = gathered(transformer, trained_only=True)
    with runtime.together():
        if runtime.is_main:
            base, dtype = family.transformer_weights(), EXPORTED[details.precision or "float32"]
            buffers = dict(family.empty_transformer().named_buffers())
            made = {
                difference_name(family, name): (value.float() - _whole(base, name).float()).to(dtype)
                for name, value in trained.items()
                if name not in buffers
            }
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / DIFFERENCE_FILE
            with atomic(file) as partial:
                save_file(made, partial, {"format": "pt", **details.facts, **expert_facts(family)})
            tidy([file])
            _verify(Weights([file]), made, file)


def difference_name(family: Family, name: str) -> str:
    """The name of a parameter's difference in ComfyUI: its LoRA loader adds `diff` to a weight and `diff_b` to a bias.

    Raises:
        UserError: the original names of this family's transformer are not known.
    """
    if refused := _problem(family):
        raise UserError(*refused, "--format")
    layer, _, kind = name.rpartition(".")
    if (found := original_of(layer, family.original_layers)) and found[1] == (Rows(layer),):
        name = f"{found[0]}.{kind}"
    else:
        if family.transformer_class == "WanTransformer3DModel" and name.endswith("scale_shift_table"):
            name = name.replace("scale_shift_table", "modulation" if name.startswith("blocks.") else "head.modulation")
        for theirs, original in PARTS_OF_NAMES[family.transformer_class]:
            name = name.replace(theirs, original)
    layer, _, kind = name.rpartition(".")
    ends = {"weight": f"{layer}.diff", "bias": f"{layer}.diff_b"}
    return "diffusion_model." + ends.get(kind, f"{name}.diff")


def _whole(weights: Weights, name: str) -> Tensor:
    shape = weights.shape(name)
    return weights.rows(name, 0, shape[0] if shape else 0)


def _verify(read: Weights, written: dict[str, Tensor], where: Path) -> None:
    wrong = sorted(read.names() ^ written.keys()) or [
        name for name, value in written.items() if not torch.equal(_whole(read, name), value)
    ]
    if wrong:
        raise UserError(f"the exported weights differ: {', '.join(wrong[:3])}", "check the disk", str(where))


def _problem(family: Family) -> tuple[str, str] | None:
    if family.transformer_class in PARTS_OF_NAMES:
        return None
    what = f"ComfyUI takes no differences by the names of {family.title}'s tensors"
    return what, 'use the whole transformer: "diffusers"'


def _component(family: Family) -> str:
    return family.trained_component


TRANSFORMER = Exporter("partial", _component, export_whole, diffusers_transformer.usage, _component, is_small=False)
DIFFERENCE = Exporter(
    "partial",
    lambda _: "difference",
    export_difference,
    title=lambda _: "difference",
    is_small=False,
    format="comfyui",
    problem=_problem,
)
