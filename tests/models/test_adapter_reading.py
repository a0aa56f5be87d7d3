"""Adapters of other trainers are read as what peft would add to our transformer, whatever their layers are called."""

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from finetune.models import family_class
from finetune.models.adapters.reading import ReadAdapter, read_adapter
from finetune.models.family import Family
from finetune.models.folder import ModelFolder

RANK, ALPHA = 3, 7.5


@pytest.fixture(scope="module")
def opened(tiny_model: Callable[..., Path]) -> Callable[[str], Family]:
    return lambda name: family_class(name)(ModelFolder(tiny_model(name)))


def matrices(family: Family, *endings: str) -> dict[str, Tensor]:
    """Random lora_A and lora_B of the layers of blocks whose names end like this, by "layer.lora_A.weight"."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, module in family.empty_transformer().named_modules():
        if name.startswith(family.block_lists) and name.endswith(endings):
            out, width = module.weight.shape
            found[f"{name}.lora_A.weight"] = torch.randn(RANK, width, generator=generator)
            found[f"{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator)
    return found


def deltas(adapter: ReadAdapter) -> dict[str, Tensor]:
    return {name: each.scale * (each.lora_B @ each.lora_A) for name, each in adapter.layers.items()}


def expected(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    names = {name.partition(".lora_")[0] for name in tensors}
    return {name: scale * (tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]) for name in names}


def check(path: Path, family: Family, tensors: dict[str, Tensor], scale: float) -> None:
    found, wanted = deltas(read_adapter(path, family)), expected(tensors, scale)
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        assert torch.equal(found[name], delta), name


def loaded_deltas(family: Family, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What peft adds to the weights of the transformer once diffusers has loaded these tensors."""
    transformer = getattr(diffusers, family.transformer_class).from_config(family.transformer_config)
    transformer.load_lora_adapter(dict(tensors), adapter_name="read")
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}
    return {name: module.get_delta_weight("read").detach() for name, module in layers.items()}


# By diffusers' names


@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model.", "base_model.model.transformer."])
def test_layers_by_diffusers_names(opened: Callable[[str], Family], tmp_path: Path, prefix: str) -> None:
    family = opened("ltx")
    tensors = matrices(family, "to_q", "to_out.0", "net.2")
    save_file({prefix + name: value for name, value in tensors.items()}, tmp_path / "a.safetensors")
    check(tmp_path / "a.safetensors", family, tensors, 1.0)
