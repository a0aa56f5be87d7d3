"""Weights are read by the slice: exactly diffusers' own, on any layout, and no rank holds more than its part."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from every_family import Model, every_model, every_transformer, few
from peft import LoraConfig
from processes import figures_of
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.engine.gradients import local
from finetune.engine.parallel import parallelize
from finetune.engine.savers.lowbit import LowBitLinear, dequantize
from finetune.engine.weights.loading import load_weights, whole_transformer
from finetune.models import family_class
from finetune.models.adapters import lora
from finetune.models.family import Family
from finetune.models.folder import ModelFolder
from finetune.recipe.schema import Lora, Memory, Train
from finetune.runtime.distributed import Runtime

DTYPES = [torch.float32, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def open_model(tiny_model: Callable[..., Path]) -> Callable[[Model], Family]:
    return lambda model: family_class(model[0])(ModelFolder(tiny_model(*model)))


def pretrained(family: Family, dtype: torch.dtype) -> nn.Module:
    cls = getattr(diffusers, family.transformer_class)
    return cls.from_pretrained(family.folder.path, subfolder="transformer", dtype=dtype)


def tensors(transformer: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, also those that are not saved."""
    return dict(transformer.named_parameters()) | dict(transformer.named_buffers())


@every_model
@every_dtype
def test_a_transformer_is_the_one_diffusers_loads(
    open_model: Callable[[Model], Family], model: Model, dtype: torch.dtype
) -> None:
    family = open_model(model)
    ours, theirs = tensors(whole_transformer(family, dtype)), tensors(pretrained(family, dtype))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@every_model
def test_a_transformer_without_weights_has_none(open_model: Callable[[Model], Family], model: Model) -> None:
    transformer = open_model(model).build_transformer(torch.bfloat16)
    assert all(parameter.is_meta for parameter in transformer.parameters())
    assert not any(buffer.is_meta for buffer in transformer.buffers())


@every_transformer
@every_dtype
def test_an_adapter_begins_as_pefts_own(
    open_model: Callable[[Model], Family], runtime: Runtime, model: Model, dtype: torch.dtype
) -> None:
    """Though it is drawn before there are weights."""
    family = open_model(model)
    transformer = family.build_transformer(dtype).requires_grad_(False)
    lora.add(transformer, family, Lora(rank=4), seed=3)
    theirs = pretrained(family, dtype).requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        from finetune.runtime import seeds

        torch.manual_seed(seeds.derive(3, "lora"))
        pattern = lora.target_pattern(family, [])
        theirs.add_adapter(LoraConfig(r=4, lora_alpha=64, target_modules=pattern), lora.ADAPTER)
    expected = {name: parameter for name, parameter in theirs.named_parameters() if ".lora_" in name}
    found = {name: parameter for name, parameter in transformer.named_parameters() if ".lora_" in name}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], parameter) for name, parameter in expected.items())
    assert all(p.is_meta for name, p in transformer.named_parameters() if ".lora_" not in name)


@pytest.mark.parametrize("memory", [Memory(), Memory(layout="replicate"), Memory(low_bit="int8")], ids=str)
def test_nothing_is_left_uninitialised(
    open_model: Callable[[Model], Family], runtime: Runtime, monkeypatch: pytest.MonkeyPatch, memory: Memory
) -> None:
    """torch fills new memory with NaN here, so what is not written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        family = open_model(("cogvideox", None))
        transformer = family.build_transformer(torch.float32)
        transformer = parallelize(transformer, family, Train(precision="float32"), Lora(rank=4), memory, runtime)
        load_weights(transformer, family.transformer_weights(), torch.device("cpu"))
    finally:
        torch.use_deterministic_algorithms(False)
    low = {name: module for name, module in transformer.named_modules() if isinstance(module, LowBitLinear)}
    bits = {f"{name}.{part}" for name in low for part in ("weight", "weight_scale")}  # as numbers they may be NaN
    found = {name: local(tensor) for name, tensor in tensors(transformer).items() if name not in bits}
    for name, module in low.items():
        codes, scale = local(module.weight), local(module.weight_scale)
        found[name] = dequantize(codes, scale, module.kind, torch.float32)
    assert bool(low) == (memory.low_bit != "none")
    for name, tensor in found.items():
        assert tensor.float().isfinite().all(), name


def test_sharded_files_are_read_as_one(tiny_ltx: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_ltx, tmp_path / "model")
    folder = tmp_path / "model" / "transformer"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    pretrained(family_class("ltx")(ModelFolder(tiny_ltx)), torch.float32).save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    ours = tensors(whole_transformer(family_class("ltx")(ModelFolder(tmp_path / "model")), torch.float32))
    theirs = tensors(pretrained(family_class("ltx")(ModelFolder(tiny_ltx)), torch.float32))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


# Memory

LARGE = 300e6  # parameters


@pytest.fixture(scope="module")
def large_model(tiny_ltx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline whose transformer has 300 million parameters, in bf16."""
    folder = tmp_path_factory.mktemp("large") / "model"
    shutil.copytree(tiny_ltx, folder)
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    config |= {"num_attention_heads": 32, "attention_head_dim": 32, "cross_attention_dim": 1024, "num_layers": 17}
    file.write_text(json.dumps(config))
    shapes = family_class("ltx")(ModelFolder(folder)).empty_transformer().state_dict()
    assert sum(tensor.numel() for tensor in shapes.values()) == pytest.approx(LARGE, rel=0.1)
    weights = {name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in shapes.items()}
    save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("processes", few([2, 1]))
def test_a_rank_holds_its_shard_and_little_else_while_it_loads(
    large_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """Anonymous memory: what is mapped from files is not counted, since it can be dropped at any time."""
    monkeypatch.setenv(
        "MALLOC_MMAP_THRESHOLD_", "65536"
    )  # what is freed goes back at once, and is not found free again
    figures = figures_of("loading_worker.py", processes, tmp_path, [large_model])
    assert figures.keys() == {"lora", "full", "int8"}
    for name, ranks in figures.items():
        assert len(ranks) == processes
        for rank in ranks:
            assert rank["shard"] == pytest.approx(figures[name][0]["shard"], rel=0.01)
            assert 0.95 * rank["shard"] < rank["growth"] <= 1.2 * rank["shard"], (name, rank)
