"""Every family learns: one clip is soon known by heart, measured on noise that training never draws."""

from collections.abc import Callable
from pathlib import Path

import pytest
from every_family import Model, every_model, few_families

from finetune.engine.heldout import HeldOut, heldout_loss
from finetune.training.job import Job

Overfit = Callable[[Model, int, list[str]], tuple[HeldOut, HeldOut]]
FULL = ["train.method=full", "optimizer.lr=3e-3"]
LORA = ["lora.rank=16", "lora.alpha=16", "optimizer.lr=1e-2"]


@pytest.fixture
def overfit(build_job: Callable[..., Job], tiny_model: Callable[..., Path], few_clips: Path, tmp_path: Path) -> Overfit:
    """The loss at four noise levels before and after training on one clip, seen twice a step."""
    clip = few_clips / "small.mp4"
    (tmp_path / "clips.csv").write_text(f"video,caption\n{clip},{clip.with_suffix('.txt').read_text()}")
    settings = [
        f"data.path={tmp_path / 'clips.csv'}",
        "train.global_batch_size=2",
        "train.micro_batch_size=2",
        "objective.stratified=true",
        "memory.activation_checkpointing=none",
    ]

    def train(model: Model, steps: int, method: list[str]) -> tuple[HeldOut, HeldOut]:
        family, bucket = model[0], "13x64x96" if model[0] == "mochi" else "17x64x96"
        where = [f"model.family={family}", f"model.path={tiny_model(*model)}", f"data.buckets={bucket}"]
        job = build_job(*settings, *where, *method, f"train.steps={steps}")
        before = measure(job)
        for step, batch in enumerate(job.batches(0)):
            job.step(step, [batch])
        return before, measure(job)

    return train


def measure(job: Job) -> HeldOut:
    return heldout_loss(job.state, job.objective, job.prepared.train, job.prepared.cache, quantiles=4)


@few_families
def test_the_loss_on_a_clip_is_halved_in_sixty_steps(overfit: Overfit, model: Model) -> None:
    before, after = overfit(model, 60, FULL)
    assert after.loss < 0.5 * before.loss


@pytest.mark.full
@every_model
def test_two_hundred_steps_learn_a_clip_by_heart(overfit: Overfit, model: Model) -> None:
    before, after = overfit(model, 200, FULL)
    assert after.loss < 0.25 * min(before.loss, before.zero_loss)


@pytest.mark.full
@every_model
def test_an_adapter_learns_a_clip(overfit: Overfit, model: Model) -> None:
    """Less: most of what a random model lacks is in layers that stay frozen, Mochi's output and its closed gates first."""
    before, after = overfit(model, 200, LORA)
    assert after.loss < 0.9 * before.loss
