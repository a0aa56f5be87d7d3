"""Trainings that continue an adapter, and trainings on top of frozen ones, begin where the base with these loaded is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from given_adapters import loaded, write_adapter
from processes import figures_of
from safetensors.torch import load_file
from started_worker import WAYS
from torch import Tensor, nn

from finetune.checks.model import open_family
from finetune.engine.weights.exporters.exporter import gathered
from finetune.models.family import Family
from finetune.recipe import load_recipe
from finetune.training.job import Job, export_weights

BuildJob = Callable[..., Job]
MODELS = [("ltx", "0.9.0"), ("cogvideox", "2b"), ("hunyuan", None), ("wan", "2.1")]


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
    with_it, untouched = loaded(job.state.family, (adapter, 1.0)), loaded(job.state.family)
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
    with_them = loaded(job.state.family, (adapter, 0.8), (other, -0.5))
    torch.testing.assert_close(prediction(job, job.state.transformer), prediction(job, with_them), atol=2e-5, rtol=1e-5)
    assert first_loss(job) == pytest.approx(expected_loss(job, with_them), rel=1e-5)
    export_weights(job.state, "lora", tmp_path / "lora")
    exported = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    trained = gathered(job.state.transformer, trained_only=True)
    assert exported.keys() == {f"transformer.{name.replace('.default.', '.')}" for name in trained}


# Every way of holding the base, one process and two


@pytest.fixture(scope="session")
def started(
    tmp_path_factory: pytest.TempPathFactory, family_recipe: Callable[..., Path]
) -> Callable[[bool, int], dict[str, dict]]:
    """Figures of tests/engine/started_worker.py, of the first family or of the others, by a number of processes."""
    known: dict[tuple[bool, int], dict] = {}

    def get(is_first: bool, processes: int) -> dict[str, dict]:
        if (is_first, processes) not in known:
            recipes = [family_recipe(*model) for model in (MODELS[:1] if is_first else MODELS[1:])]
            folder = tmp_path_factory.mktemp("started")
            known[is_first, processes] = figures_of("started_worker.py", processes, folder, recipes)
        return known[is_first, processes]

    return get


@pytest.mark.parametrize("processes, way", [(1, "streamed"), *((2, way) for way in WAYS if way != "bf16")])
@pytest.mark.parametrize(
    "model", [pytest.param(each, marks=[pytest.mark.full] if each != MODELS[0] else []) for each in MODELS]
)
def test_weights_may_be_held_in_every_way(
    started: Callable[[bool, int], dict], family_recipe: Callable[..., Path], model: tuple, processes: int, way: str
) -> None:
    """In float32, as one process trains on whole weights; of few bits, as one process trains on the same."""
    is_first, name = model == MODELS[0], family_recipe(*model).stem
    found = started(is_first, processes)[name][way]
    expected = started(is_first, 1)[name][way if way in ("int8", "nf4") else "plain"]
    for figure in ("loss", "grad_norm", "heldout"):
        assert found[figure] == pytest.approx(expected[figure], rel=1e-5), figure


@pytest.mark.parametrize(
    "model", [pytest.param(each, marks=[pytest.mark.full] if each != MODELS[0] else []) for each in MODELS]
)
def test_the_first_losses_of_few_bits_and_of_bf16_are_near(
    started: Callable[[bool, int], dict], family_recipe: Callable[..., Path], model: tuple
) -> None:
    found = started(model == MODELS[0], 1)[family_recipe(*model).stem]
    for way, limit in {"bf16": 0.02, "int8": 0.02, "nf4": 0.2}.items():
        assert found[way]["heldout"][0] == pytest.approx(found["plain"]["heldout"][0], rel=limit), way
        assert found[way]["heldout"][0] != found["plain"]["heldout"][0]
