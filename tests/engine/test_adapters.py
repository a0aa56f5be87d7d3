"""Adapters are a registry: a new one is a file, a table of settings and a line, and trains like LoRA."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from finetune.checks.model import open_family
from finetune.checks.settings import check_recipe
from finetune.engine.step import StepResult
from finetune.engine.weights import exporters
from finetune.engine.weights.exporters import EXPORTERS
from finetune.engine.weights.exporters.exporter import Details, Exporter, gathered
from finetune.models.adapters import ADAPTER, ADAPTERS, Adapter
from finetune.models.family import Family
from finetune.preparation.encode import prepare
from finetune.recipe import Recipe, load_recipe, recipe_values
from finetune.recipe.schema import Train
from finetune.recipe.table import Table
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.training.job import Job, build
from finetune.training.output import Results
from finetune.training.usage import say_usage


class Scales(Table):
    """Settings of an adapter that scales what linear layers give."""

    target: str = "to_q"
    start: float = 1.0


class TrainWithScales(Train):
    method: Literal["lora", "full", "scales"] = "scales"


class RecipeWithScales(Recipe):
    train: TrainWithScales
    scales: Scales = Scales()


class Scaled(nn.Module):
    """A linear layer whose outputs are scaled one by one."""

    def __init__(self, linear: nn.Linear, start: float) -> None:
        super().__init__()
        self.base_layer = linear
        self.scale = nn.ParameterDict({ADAPTER: torch.full((linear.out_features,), start)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) * self.scale[ADAPTER].to(x.dtype)


def targets(transformer: nn.Module, settings: Scales) -> list[str]:
    return [name for name, _ in transformer.named_modules() if name.endswith(f".{settings.target}")]


def check(transformer: nn.Module, family: Family, settings: Scales) -> None:
    if not targets(transformer, settings):
        raise UserError(f"there is no layer {settings.target!r}", "name another", "scales.target")


def add(transformer: nn.Module, family: Family, settings: Scales, seed: int) -> None:
    for name in targets(transformer, settings):
        parent, _, last = name.rpartition(".")
        setattr(
            transformer.get_submodule(parent),
            last,
            Scaled(getattr(transformer.get_submodule(parent), last), settings.start),
        )


def write(transformer: nn.Module, family: Family, folder: Path, runtime: Runtime, details: Details) -> None:
    whole = gathered(transformer, trained_only=True)
    folder.mkdir(parents=True)
    save_file(whole, folder / "scales.safetensors")


@pytest.fixture
def make_job(monkeypatch: pytest.MonkeyPatch, recipe_file: Path, runtime: Runtime) -> Callable[..., Job]:
    monkeypatch.setitem(ADAPTERS, "scales", Adapter(check, add))
    own = {"scales": Exporter("scales", lambda family: "scales", write)}
    monkeypatch.setattr(exporters, "EXPORTERS", EXPORTERS | own)

    def make(**scales: object) -> Job:
        recipe = recipe_of(recipe_file, **scales)
        family = open_family(recipe)
        return build(recipe, runtime, family, prepare(recipe, family, runtime))

    return make


def recipe_of(recipe_file: Path, **scales: object) -> RecipeWithScales:
    values = recipe_values(load_recipe(recipe_file, ["lora.rank=64", "lora.alpha=64", "optimizer.lr=1e-2"]))
    values["train"]["method"] = "scales"
    return RecipeWithScales.model_validate({**values, "scales": scales})


def train(job: Job, first: int, last: int) -> list[StepResult]:
    count = job.split.accumulation
    share = lambda step: [job.micro_batches()[step * count + index] for index in range(count)]  # noqa: E731
    return [job.step(step, share(step)) for step in range(first, last)]


def scales_of(job: Job) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in gathered(job.state.transformer, trained_only=True).items()}


def test_a_new_adapter_is_what_is_trained(make_job: Callable[..., Job]) -> None:
    """At scales of one it changes nothing, so that the first loss is the base model's."""
    job, halved = make_job(), make_job(start=0.5)
    before = scales_of(job)
    assert len(before) == 4  # two attentions of two blocks
    assert {float(value) for scale in before.values() for value in scale} == {1.0}
    losses = [step.loss for step in train(job, 0, 3)]
    assert losses[0] != train(halved, 0, 1)[0].loss
    assert all(not torch.equal(scale, before[name]) for name, scale in scales_of(job).items())
    assert all(
        name.split(".")[-1] == ADAPTER for name, p in job.state.transformer.named_parameters() if p.requires_grad
    )


def test_a_new_adapter_resumes_and_each_checkpoint_has_its_export(make_job: Callable[..., Job]) -> None:
    straight = make_job()
    expected = train(straight, 0, 3)
    broken = make_job()
    train(broken, 0, 2)
    saved = broken.save(2)
    assert load_file(saved / "scales" / "scales.safetensors").keys() == scales_of(broken).keys()
    resumed = make_job()
    assert resumed.resume() == 2
    assert train(resumed, 2, 3) == expected[2:]
    ours, theirs = scales_of(resumed), scales_of(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_new_adapter_is_exported_under_its_name(
    make_job: Callable[..., Job], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    job = make_job()
    train(job, 0, 1)
    folder = Results(job).export()
    assert folder == (tmp_path / "run" / "scales").absolute()
    written, trained = load_file(folder / "scales.safetensors"), scales_of(job)
    assert all(torch.equal(written[name], scale) for name, scale in trained.items())
    say_usage(job, folder)
    said = capsys.readouterr().err
    assert f"The adapter lies in {folder}" in said
    assert "diffusers" not in said


def test_a_new_adapters_settings_are_checked_against_the_model(make_job: Callable[..., Job], recipe_file: Path) -> None:
    with pytest.raises(UserError, match="there is no layer 'to_x'"):
        open_family(recipe_of(recipe_file, target="to_x"))


def test_the_table_of_an_adapter_that_is_not_trained_has_no_effect(
    make_job: Callable[..., Job], recipe_file: Path
) -> None:
    recipe = recipe_of(recipe_file)
    assert check_recipe(recipe, 1) == []
    values = recipe_values(recipe)
    (problem,) = check_recipe(RecipeWithScales.model_validate({**values, "lora": {"rank": 4}}), 1)
    assert problem.where == "lora"
    assert problem.what == '[lora] has no effect with method = "scales"'
    lora = {**values, "train": {**values["train"], "method": "lora"}, "scales": {"start": 2.0}}
    (problem,) = check_recipe(RecipeWithScales.model_validate(lora), 1)
    assert problem.cure == 'remove the table, or set train.method = "scales"'
