"""A LoRA as diffusers' pipelines save and load it, verified by loading it back."""

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.engine.weights.exporters.exporter import Exporter, gathered, tidy
from finetune.models.adapters import ADAPTER, is_adapters
from finetune.models.adapters.lora import scaling_of
from finetune.models.adapters.places import LORA_FILE as LORA_FILE  # for those who import it from here
from finetune.models.adapters.places import lora_file
from finetune.models.family import Family
from finetune.recipe.schema import ExpertName
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.files import atomic

PREFIX = "transformer."  # of all names in the file: diffusers has one form, also for a component of another name


def export_lora(transformer: nn.Module, family: Family, folder: Path, runtime: Runtime) -> None:
    """Write the adapter as `folder/pytorch_lora_weights.safetensors`, with its rank and alpha, and verify it.

    The file of an expert says in its name and in its metadata which one it is for.

    All ranks take part; rank 0 writes. Tensors are exactly as trained.
    """
    whole = gathered(transformer, trained_only=True)
    with runtime.together():
        if runtime.is_main:
            # By peft's file names; a persistent buffer (CogVideoX-I2V's learned positions) is no part of the adapter.
            adapter = {name: value for name, value in whole.items() if is_adapters(name)}
            layers = {_peft_name(name): value for name, value in adapter.items()}
            config: LoraConfig = cast(Any, transformer).peft_config[ADAPTER]
            _mixin(family).save_lora_weights(
                folder,
                transformer_lora_layers=layers,
                transformer_lora_adapter_metadata=config.to_dict(),
                weight_name=lora_file(family),
            )
            if family.expert is not None:
                _say_expert(folder / lora_file(family), family, family.expert)
            tidy([folder / lora_file(family)])
            verify_lora(folder, layers, partial(scaling_of, config), family)


def _peft_name(name: str) -> str:
    """A parameter's name in peft's files: without the adapter's; the lengths of DoRA, a module's, are named as the tensor."""
    return name.replace(f".{ADAPTER}.", ".").replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")


def verify_lora(folder: Path, layers: dict[str, Tensor], scaling: Callable[[str], float], family: Family) -> None:
    """Load an exported adapter through the pipeline class into an empty transformer and compare all of it.

    Args:
        layers: the trained tensors by peft's names.
        scaling: what the product of each layer's matrices is multiplied by, by the layer's name.
    Raises:
        UserError: a tensor, a name or the scaling differs from what was trained.
    """
    pipeline, file = _mixin(family), lora_file(family)
    loaded, metadata = pipeline.lora_state_dict(folder, weight_name=file, return_lora_metadata=True)
    found = {name.removeprefix(PREFIX): value for name, value in loaded.items()}
    wrong = sorted(layers.keys() ^ found.keys()) or [
        n for n, value in layers.items() if not torch.equal(found[n], value)
    ]
    skeleton = family.empty_transformer()
    if family.expert is None:
        pipeline.load_lora_into_transformer(loaded, transformer=skeleton, metadata=metadata, low_cpu_mem_usage=True)
    else:  # by a whole pipeline, which has a switch for the second transformer
        both = dict.fromkeys((each.component for each in family.experts.values()), skeleton)
        load_lora(family.pipeline(**both), family, folder)
    adapted = {name: module for name, module in skeleton.named_modules() if isinstance(module, LoraLayer)}
    expected = {name.rpartition(".lora_")[0] for name in layers}
    wrong += sorted(adapted.keys() ^ expected)
    wrong += [name for name, module in adapted.items() if set(module.scaling.values()) != {scaling(name)}]
    if wrong:
        raise UserError(
            f"the exported adapter differs from the trained one: {', '.join(wrong[:3])}",
            "report this with the versions of diffusers and peft; the checkpoint itself is intact",
            str(folder / file),
        )


def load_lora(pipeline: diffusers.DiffusionPipeline, family: Family, folder: Path) -> None:
    """Load an exported adapter into the pipeline's component that was trained."""
    attrgetter(_loader(family))(pipeline)(folder, **_loading_arguments(family))


def usage(base: str, dtype: str, parts: Sequence[tuple[Family, Path]]) -> list[str]:
    """See `Exporter.usage`."""
    lines = [f"pipe = diffusers.{parts[0][0].pipeline_class}.from_pretrained({base})"]
    for family, folder in parts:
        arguments = "".join(f", {name}={value!r}" for name, value in _loading_arguments(family).items())
        lines.append(f'pipe.{_loader(family)}("{folder}"{arguments})'.replace("'", '"'))
    return lines


def _loading_arguments(family: Family) -> dict[str, Any]:
    """What the method that loads an adapter takes besides its folder."""
    arguments: dict[str, Any] = {"weight_name": lora_file(family)}
    if family.expert is not None:
        arguments["adapter_name"] = f"{family.expert}_noise"
        if family.trained_component == "transformer_2":
            arguments["load_into_transformer_2"] = True
    return arguments


def _say_expert(file: Path, family: Family, expert: ExpertName) -> None:
    """Add to a file's metadata which expert it is for, since the names of its tensors are the same for all."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    low, high = family.experts[expert].noise_range
    facts = {
        "expert": f"{expert}_noise",
        "component": family.trained_component,
        "denoises": f"sigma {low:g} to {high:g}",
    }
    with atomic(file) as partial:
        save_file(load_file(file), partial, {**metadata, **facts})


def _mixin(family: Family) -> Any:
    """The pipeline class by which adapters are written and read: the family's own, or another if that has no methods for it.

    These are methods of the class that know nothing of the model: the file has the same form.
    """
    pipeline = getattr(diffusers, family.pipeline_class)
    return pipeline if _loads_adapters(pipeline) else diffusers.HunyuanVideoPipeline


def _loads_adapters(pipeline: type[diffusers.DiffusionPipeline]) -> bool:
    return hasattr(pipeline, "load_lora_weights")


def _loader(family: Family) -> str:
    """The method of a pipeline that loads an adapter: its own, if it has one, and if that knows the component."""
    component = family.trained_component
    has_own = _loads_adapters(getattr(diffusers, family.pipeline_class))
    is_known = component == "transformer" or family.expert is not None
    return "load_lora_weights" if has_own and is_known else f"{component}.load_lora_adapter"


EXPORTER = Exporter("lora", lambda _: "lora", export_lora, usage, lambda _: "LoRA, verified by loading it back,")
