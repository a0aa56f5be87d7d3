"""Batches of images and of videos in one step: the loss is the mean of both, and both are trained on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from every_family import title

from finetune.data.loader import Sample
from finetune.data.synthetic import scene
from finetune.models.batch import Batch
from finetune.models.family import Family
from finetune.recipe import Bucket
from finetune.recipe.schema import ObjectiveSettings, Vae
from finetune.training.job import Job

FIRST = ("wan_i2v", "2.2-5B")
OTHERS = [
    ("ltx", "0.9.0"),
    ("ltx_i2v", "0.9.7"),
    ("hunyuan", None),
    ("hunyuan15", None),
    ("cogvideox", "1.5-5B"),
    ("mochi", None),
]
MODELS = [
    pytest.param(FIRST, id=title(FIRST)),
    *(pytest.param(model, id=title(model), marks=pytest.mark.full) for model in OTHERS),
]


def batch_of(family: Family, job: Job, bucket: Bucket, seed: int) -> Batch:
    """A batch of two samples of a bucket, with the captions of the job's clips."""
    encode = family.video_encoder(torch.device("cpu"), torch.float32, Vae())
    samples = []
    for index, item in enumerate(job.prepared.train[:2]):
        text = job.prepared.cache.read("text", item.keys["text"])
        moments = encode(scene(index, *bucket)[0])
        generator = torch.Generator().manual_seed(seed + index)
        samples.append(Sample({"video": moments, "text": text}, bucket, 25.0, generator))
    return family.batch(samples, family.training_objective(ObjectiveSettings()))


@pytest.mark.parametrize("model", MODELS)
def test_the_loss_of_a_step_is_the_mean_of_its_image_batch_and_its_video_batch(
    build_job: Callable[..., Job], family_recipe: Callable[..., Path], tmp_path: Path, model: tuple[str, str | None]
) -> None:
    job = build_job(f"output={tmp_path / 'run'}", "train.micro_batch_size=1", recipe_file=family_recipe(*model))
    family, frames = job.state.family, 13 if model[0] == "mochi" else 17
    batches = [batch_of(family, job, Bucket(1, 64, 96), 1), batch_of(family, job, Bucket(frames, 64, 96), 5)]
    with torch.no_grad():
        alone = [batch.losses(family.predict(job.state.transformer, batch.inputs))["video"].mean() for batch in batches]
    result = job.step(0, batches)
    assert result.updated
    assert alone[0] > 0 < alone[1]
    assert result.loss == pytest.approx(float(sum(alone) / 2), rel=1e-5)
    assert result.grad_norm > 0
