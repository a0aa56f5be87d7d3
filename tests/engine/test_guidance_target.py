"""Guidance in the target: the frozen base's prediction without a caption is that of diffusers' model, however it is held."""

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from every_family import Model
from torch import Tensor

from finetune.models import text_mask
from finetune.models.batch import Batch
from finetune.models.folder import ModelFolder
from finetune.training.job import Job

BuildJob = Callable[..., Job]
SCALE = 4.0
GUIDED = [f"objective.guidance_target={SCALE}"]
LORA = ["lora.rank=4", "lora.alpha=8", "optimizer.lr=1e-2"]
MODELS: list[Model] = [("ltx", None), ("cogvideox", "5b"), ("hunyuan", None), ("wan", "2.1")]


def overrides(model: Model) -> list[str]:
    """HunyuanVideo is told the scale, too."""
    return [*LORA, *GUIDED, *([f"objective.guidance={SCALE}"] if model[0] == "hunyuan" else [])]


def trained(job: Job, steps: int = 2) -> Job:
    """Until the adapter says something: at first its output is 0."""
    for step in range(steps):
        job.step(step, [job.micro_batches()[step]])
    return job


def base_prediction(job: Job, batch: Batch) -> Tensor:
    """diffusers' own transformer, read from the folder, for the same samples without captions."""
    family = job.state.family
    folder = ModelFolder(family.folder.path)
    transformer = getattr(diffusers, family.transformer_class).from_pretrained(folder.path / "transformer").eval()
    inputs = batch.inputs | batch.unguided
    inputs.pop(text_mask.MARK, None)
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model[0])
def test_the_target_is_guided_away_from_the_base_without_a_caption(
    build_job: BuildJob, family_recipe: Callable[..., Path], model: Model
) -> None:
    job = trained(build_job(*overrides(model), "data.caption_dropout=0", recipe_file=family_recipe(*model)))
    batch = job.micro_batches()[2]
    base, target = base_prediction(job, batch), batch.only.target
    expected = base + SCALE * (target - base)
    guided = job.state.base.guided(job.state.family, batch).only.target
    torch.testing.assert_close(guided, expected, rtol=0, atol=1e-5 * float(expected.square().mean().sqrt()))
    with torch.no_grad():
        prediction = job.state.family.predict(job.state.transformer, batch.inputs)["video"]
    loss = job.step(2, [batch]).loss
    assert loss == pytest.approx(float(torch.nn.functional.mse_loss(prediction, expected)), rel=1e-5)
