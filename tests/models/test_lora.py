"""The adapter: which layers get one, how large it is, and what it starts from."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from finetune.engine.weights.loading import whole_transformer
from finetune.models.adapters import lora
from finetune.models.folder import ModelFolder
from finetune.models.ltx import LTXVideo
from finetune.recipe.schema import Lora
from finetune.runtime.errors import UserError


@pytest.fixture(scope="module")
def family(tiny_ltx: Path) -> LTXVideo:
    return LTXVideo(ModelFolder(tiny_ltx))


def adapted(family: LTXVideo, settings: Lora | None = None, seed: int = 0) -> dict[str, LoraLayer]:
    """The layers that got an adapter in a fresh transformer, by name."""
    transformer = whole_transformer(family, torch.float32)
    lora.add(transformer, family, settings or Lora(rank=4, alpha=8), seed)
    return {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}


def weights(layers: dict[str, LoraLayer]) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": getattr(layer, part)[lora.ADAPTER].weight.detach()
        for name, layer in layers.items()
        for part in ("lora_A", "lora_B")
    }


# Where


def test_the_default_targets_are_all_attention_projections_of_all_blocks(family: LTXVideo) -> None:
    expected = {
        f"transformer_blocks.{block}.{attention}.{projection}"
        for block in range(2)
        for attention in ("attn1", "attn2")
        for projection in ("to_q", "to_k", "to_v", "to_out.0")
    }
    assert set(adapted(family)) == expected


@pytest.mark.parametrize(
    "target, per_block",
    [
        ("to_q", {"attn1.to_q", "attn2.to_q"}),
        ("attn1.to_q", {"attn1.to_q"}),
        ("to_out.0", {"attn1.to_out.0", "attn2.to_out.0"}),
        ("ff.net.0.proj", {"ff.net.0.proj"}),
    ],
)
def test_a_target_is_the_end_of_a_layers_name(family: LTXVideo, target: str, per_block: set[str]) -> None:
    layers = adapted(family, Lora(rank=4, alpha=4, targets=[target]))
    assert set(layers) == {f"transformer_blocks.{block}.{name}" for block in range(2) for name in per_block}


def test_layers_outside_the_blocks_get_no_adapter(family: LTXVideo) -> None:
    """peft itself reads the pattern, on a model whose text refiner has blocks and projections of the same names."""

    def block() -> nn.ModuleDict:
        return nn.ModuleDict({"attn": nn.ModuleDict({"to_q": nn.Linear(2, 2), "not_to_q": nn.Linear(2, 2)})})

    model = nn.ModuleDict(
        {
            "to_q": nn.Linear(2, 2),
            "context_embedder": nn.ModuleDict({"transformer_blocks": nn.ModuleList([block()])}),
            "other_transformer_blocks": nn.ModuleList([block()]),
            "transformer_blocks": nn.ModuleList([block(), block()]),
        }
    )
    inject_adapter_in_model(LoraConfig(target_modules=lora.target_pattern(family, ["to_q"])), model)
    found = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert found == {"transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"}


@pytest.mark.parametrize("target", ["to_qq", "o_q", "proj_in", "transformer_blocks", "to_.", "norm_q"])
def test_a_target_that_matches_nothing_is_an_error_that_lists_the_layers(family: LTXVideo, target: str) -> None:
    with pytest.raises(UserError, match=r"lora\.targets") as error:
        adapted(family, Lora(targets=["to_q", target]))
    assert repr(target) in str(error.value)
    for name in ("attn1.to_q", "attn2.to_out.0", "ff.net.2"):
        assert re.search(rf"\b{re.escape(name)}\b", str(error.value))


# What


@pytest.mark.parametrize("rank, alpha", [(4, 4.0), (4, 8.0), (3, 1.0)])
def test_rank_and_alpha_are_the_recipes(family: LTXVideo, rank: int, alpha: float) -> None:
    layers = adapted(family, Lora(rank=rank, alpha=alpha))
    assert {tuple(layer.lora_A[lora.ADAPTER].weight.shape) for layer in layers.values()} == {(rank, 64)}
    assert {layer.scaling[lora.ADAPTER] for layer in layers.values()} == {alpha / rank}


def test_only_the_adapter_is_trained(family: LTXVideo) -> None:
    transformer = whole_transformer(family, torch.float32).requires_grad_(False)
    lora.add(transformer, family, Lora(rank=4, alpha=4), seed=0)
    trained = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in transformer.named_parameters() if ".lora_" in name}


def test_dropout_is_the_recipes(family: LTXVideo) -> None:
    layers = adapted(family, Lora(rank=4, dropout=0.25))
    assert {layer.lora_dropout[lora.ADAPTER].p for layer in layers.values()} == {0.25}


# Where from


def test_the_same_seed_gives_the_same_adapter(family: LTXVideo) -> None:
    torch.manual_seed(1)
    first = weights(adapted(family, seed=7))
    torch.manual_seed(2)
    second = weights(adapted(family, seed=7))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_another_adapter(family: LTXVideo) -> None:
    first, second = weights(adapted(family, seed=7)), weights(adapted(family, seed=8))
    assert not any(torch.equal(first[name], second[name]) for name in first if name.endswith("lora_A"))


def test_adding_an_adapter_leaves_the_random_state_alone(family: LTXVideo) -> None:
    transformer = whole_transformer(family, torch.float32)
    before = torch.get_rng_state()
    lora.add(transformer, family, Lora(rank=4), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_untrained_adapter_changes_nothing(family: LTXVideo) -> None:
    layers = adapted(family)
    assert not any(value.any() for name, value in weights(layers).items() if name.endswith("lora_B"))
    assert all(value.any() for name, value in weights(layers).items() if name.endswith("lora_A"))
