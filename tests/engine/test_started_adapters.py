"""Trainings that continue an adapter, and trainings on top of frozen ones, begin where the base with these loaded is."""

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.checks.model import open_family
from finetune.engine.weights.exporters.exporter import gathered
from finetune.models.family import Family
from finetune.recipe import load_recipe
from finetune.training.job import Job, export_weights

BuildJob = Callable[..., Job]
ENDS = ("to_q", "to_k", "to_v", "to_out.0")


def write_adapter(path: Path, family: Family, rank: int = 4, seed: int = 1, ends: tuple[str, ...] = ENDS) -> Path:
    """A random adapter by diffusers' names, of some layers of the blocks."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in family.empty_transformer().named_modules():
        if isinstance(module, nn.Linear) and name.startswith(family.block_lists) and name.endswith(ends):
            out, width = module.weight.shape
            tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator) * 0.3
            tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.3
    save_file(tensors, path)
    return path


def loaded(job: Job, *adapters: tuple[Path, float]) -> nn.Module:
    """The base model with adapters as diffusers loads them."""
    family = job.state.family
    cls = getattr(diffusers, family.transformer_class)
    transformer = cls.from_pretrained(family.folder.path / family.trained_component)
    for index, (file, _) in enumerate(adapters):
        transformer.load_lora_adapter(load_file(file), adapter_name=f"a{index}")
    if adapters:
        transformer.set_adapters([f"a{index}" for index in range(len(adapters))], [weight for _, weight in adapters])
    return family.adapt_transformer(transformer).eval()


@torch.no_grad()
def prediction(job: Job, transformer: nn.Module) -> Tensor:
    return job.state.family.predict(transformer, job.micro_batches()[3].inputs)["video"]


def first_loss(job: Job) -> float:
    batches = job.micro_batches()
    return job.step(0, [batches[index] for index in range(job.split.accumulation)]).loss


def expected_loss(job: Job, transformer: nn.Module) -> float:
    batches, count = job.micro_batches(), job.split.accumulation
    total = torch.zeros(())
    with torch.no_grad():
        for batch in (batches[index] for index in range(count)):
            (losses,) = batch.losses(job.state.family.predict(transformer, batch.inputs)).values()
            total += losses.mean() / count
    return float(total)


@pytest.fixture
def family(recipe_file: Path) -> Family:
    return open_family(load_recipe(recipe_file))


@pytest.fixture
def adapter(family: Family, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter.safetensors", family)


@pytest.mark.parametrize("alpha", [4, 8, 3])
def test_a_continued_adapter_begins_with_the_loss_of_the_base_with_it_loaded(
    build_job: BuildJob, adapter: Path, alpha: int
) -> None:
    """The strength of the file is 1; alpha = 8 at rank 4 halves lora_B exactly, alpha = 3 rounds it."""
    job = build_job(f"lora.start_from={adapter}", f"lora.alpha={alpha}")
    with_it, untouched = loaded(job, (adapter, 1.0)), loaded(job)
    if alpha != 3:
        assert torch.equal(prediction(job, job.state.transformer), prediction(job, with_it))
    torch.testing.assert_close(prediction(job, job.state.transformer), prediction(job, with_it), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(prediction(job, with_it), prediction(job, untouched), atol=1e-2)
    assert first_loss(job) == pytest.approx(expected_loss(job, with_it), rel=1e-6)


def test_frozen_adapters_are_in_the_forward_pass_and_not_in_the_export(
    build_job: BuildJob, family: Family, adapter: Path, tmp_path: Path
) -> None:
    other = write_adapter(tmp_path / "other.safetensors", family, rank=2, seed=2, ends=("to_q", "net.2"))
    frozen = f'[{{path = "{adapter}", strength = 0.8}}, {{path = "{other}", strength = -0.5}}]'
    job = build_job(f"lora.frozen={frozen}")
    with_them = loaded(job, (adapter, 0.8), (other, -0.5))
    torch.testing.assert_close(prediction(job, job.state.transformer), prediction(job, with_them), atol=2e-5, rtol=1e-5)
    assert first_loss(job) == pytest.approx(expected_loss(job, with_them), rel=1e-5)
    export_weights(job.state, "lora", tmp_path / "lora")
    exported = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    trained = gathered(job.state.transformer, trained_only=True)
    assert exported.keys() == {f"transformer.{name.replace('.default.', '.')}" for name in trained}
