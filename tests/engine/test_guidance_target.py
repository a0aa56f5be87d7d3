"""Guidance in the target: the frozen base's prediction without a caption is that of diffusers' model, however it is held."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from checkpointing import assert_same_state, run
from every_family import Model
from torch import Tensor
from torch.nn.functional import mse_loss

from finetune.data.loader import read_sample
from finetune.models import text_mask
from finetune.models.batch import Batch
from finetune.models.folder import ModelFolder
from finetune.runtime import seeds
from finetune.runtime.errors import UserError
from finetune.training.job import Job

BuildJob = Callable[..., Job]
SCALE = 4.0
LTX: Model = ("ltx", None)
MODELS = [LTX, ("cogvideox", "5b"), ("hunyuan", None), ("wan", "2.1")]
MODELS += [pytest.param(("hunyuan_i2v", "token_replace"), marks=pytest.mark.full)]


@pytest.fixture
def make_job(build_job: BuildJob, family_recipe: Callable[..., Path], tmp_path: Path) -> BuildJob:
    """A training with guidance in its target, with captions unless it says otherwise; its output is the test's own."""

    def make(model: Model, *overrides: str) -> Job:
        lora = ["lora.rank=4", "lora.alpha=8", "optimizer.lr=1e-2", "data.caption_dropout=0"]
        told = (
            [f"objective.guidance={SCALE}"] if model[0].startswith("hunyuan") else []
        )  # the others have no such input
        settings = [f"output={tmp_path / 'run'}", *lora, f"objective.guidance_target={SCALE}", *told, *overrides]
        return build_job(*settings, recipe_file=family_recipe(*model))

    return make


def train(job: Job, steps: int = 2) -> list[float]:
    return [job.step(step, [job.micro_batches()[step]]).loss for step in range(steps)]


def diffusers_says(job: Job, inputs: Mapping[str, Any]) -> Tensor:
    """What diffusers' own transformer predicts, read from the folder, with no adapter."""
    family = job.state.family
    path = ModelFolder(family.folder.path).path / "transformer"
    transformer = getattr(diffusers, family.transformer_class).from_pretrained(path).eval()
    inputs = {name: value for name, value in inputs.items() if name != text_mask.MARK}
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


def predicted(job: Job, batch: Batch) -> Tensor:
    """What the transformer in training predicts."""
    with torch.no_grad():
        return job.state.family.predict(job.state.transformer, batch.inputs)["video"]


def guided(job: Job, batch: Batch) -> Tensor:
    return job.state.base.guided(job.state.family, batch).only.target


def mean_error(batch: Batch, prediction: Tensor, target: Tensor) -> float:
    counted = torch.ones_like(target) if batch.only.counted is None else batch.only.counted.expand_as(target)
    return float(mse_loss(prediction[counted == 1], target[counted == 1]))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model[0])
def test_the_target_is_guided_away_from_the_base_without_a_caption(make_job: BuildJob, model: Model) -> None:
    """After an adapter has learnt something, by diffusers' own transformer; and the loss is that of this target."""
    job = make_job(model)
    train(job)
    batch = job.micro_batches()[2]
    base, target = diffusers_says(job, batch.inputs | batch.unguided), batch.only.target
    expected = base + SCALE * (target - base)
    size = float(expected.square().mean().sqrt())
    torch.testing.assert_close(guided(job, batch), expected, rtol=0, atol=1e-5 * size)
    prediction = predicted(job, batch)
    assert not torch.allclose(prediction, diffusers_says(job, batch.inputs), atol=1e-4)
    assert job.step(2, [batch]).loss == pytest.approx(mean_error(batch, prediction, expected), rel=1e-5)


@pytest.mark.parametrize("model", [LTX, ("hunyuan", None)], ids=lambda model: model[0])
def test_only_what_differs_without_a_caption_is_there_twice(make_job: BuildJob, model: Model) -> None:
    batch = make_job(model).micro_batches()[0]
    text = {"encoder_hidden_states", "encoder_attention_mask", "pooled_projections", text_mask.MARK}
    assert "encoder_hidden_states" in batch.unguided
    assert batch.unguided.keys() <= text


def test_a_sample_without_its_caption_keeps_its_target(make_job: BuildJob) -> None:
    job = make_job(LTX, "data.caption_dropout=0.5", "train.global_batch_size=8", "train.micro_batch_size=8")
    batch = job.micro_batches()[0]
    blank = [
        torch.equal(*texts)
        for texts in zip(batch.inputs["encoder_hidden_states"], *[batch.unguided["encoder_hidden_states"]], strict=True)
    ]
    assert 0 < sum(blank) < 8
    assert batch.guidance.tolist() == [1.0 if is_blank else SCALE for is_blank in blank]
    for ours, target, is_blank in zip(guided(job, batch), batch.only.target, blank, strict=True):
        assert torch.allclose(ours, target, rtol=0, atol=1e-5) == is_blank


SAVERS = {
    "not recomputed": ["memory.activation_checkpointing=none"],
    "streamed": ["memory.offload=true"],
    "activations offloaded": ["memory.offload_activations=true"],
    "compiled": ["memory.compile=true"],
    "replicated": ["memory.layout=replicate"],
    "accumulated": ["train.micro_batch_size=1"],
    "int8": ["memory.low_bit=int8"],
    "nf4, streamed": ["memory.low_bit=nf4", "memory.offload=true"],
    "bf16": ["train.precision=bf16"],
}
ROUNDS = ("int8", "nf4, streamed", "bf16")


SHORT = ("streamed", "accumulated", "int8", "bf16")  # by default
CASES = [
    *(pytest.param(LTX, name, marks=[pytest.mark.full] * (name not in SHORT)) for name in SAVERS),
    *(pytest.param(("hunyuan", None), name, marks=pytest.mark.full) for name in ("compiled", "nf4, streamed")),
]


@pytest.mark.parametrize("model, name", CASES, ids=str)
def test_the_base_stays_what_it_is_however_it_is_held(make_job: BuildJob, model: Model, name: str) -> None:
    """Before its first step an adapter says nothing: what is predicted then with it is what is predicted later without it."""
    job = make_job(model, *SAVERS[name])
    batch = job.micro_batches()[4]
    without = predicted(job, replace(batch, inputs=batch.inputs | batch.unguided)).float()
    before = guided(job, batch)
    expected = without + SCALE * (batch.only.target - without)
    torch.testing.assert_close(before, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    losses = [result.loss for result in run(job, 0, 3)]
    assert torch.equal(guided(job, batch), before)
    assert not torch.equal(predicted(job, replace(batch, inputs=batch.inputs | batch.unguided)).float(), without)
    if name not in ROUNDS:
        assert losses == pytest.approx(train(make_job(model), 3), rel=1e-5)


@pytest.mark.full
def test_compiled_blocks_have_one_graph_more_for_the_base(make_job: BuildJob) -> None:
    """It is not compiled anew where the adapter is switched on and off."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    job, graphs = make_job(LTX, "memory.compile=true"), []
    for step in range(4):
        job.step(step, [job.micro_batches()[step]])
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] <= 4  # of the first block, whose input needs no gradient, and of the others
    assert graphs[1:] == graphs[:1] * 3


def test_the_base_draws_nothing_at_random_and_leaves_gradients_to_the_adapter(make_job: BuildJob) -> None:
    job = make_job(LTX, "lora.dropout=0.5")
    train(job)
    batch, state = job.micro_batches()[2], torch.get_rng_state()
    first = guided(job, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(guided(job, batch), first)  # no dropout in it
    assert not first.requires_grad
    assert all(parameter.requires_grad and parameter.grad is None for parameter in job.state.parameters)
    assert job.step(2, [batch]).grad_norm > 0


def test_held_out_losses_are_of_the_same_target(make_job: BuildJob, heldout: Path) -> None:
    job = make_job(LTX, f"validation.heldout={heldout}", "validation.heldout_clips=0", "validation.sigmas=2")
    losses, zeros = [], []
    for index, item in enumerate(job.prepared.heldout):
        for u in (0.25, 0.75):
            generator = seeds.generator(job.state.seed, "heldout", index)
            sample = read_sample(item, job.prepared.cache, generator, job.prepared.unconditional_key)
            batch = job.state.family.batch([sample], job.objective, torch.tensor([u]))
            base = diffusers_says(job, batch.inputs | batch.unguided)
            target = base + SCALE * (batch.only.target - base)
            losses.append(mean_error(batch, diffusers_says(job, batch.inputs), target))
            zeros.append(mean_error(batch, torch.zeros_like(target), target))
    figures = job.heldout_loss()
    assert figures.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert figures.zero_loss == pytest.approx(sum(zeros) / len(zeros), rel=1e-5)


def test_an_interrupted_training_goes_on_bit_for_bit(make_job: BuildJob) -> None:
    whole = make_job(LTX)
    results = run(whole, 0, 4, save_each=2)
    resumed = make_job(LTX)
    assert resumed.resume(2) == 2
    assert run(resumed, 2, 4) == results[2:]
    assert_same_state(resumed, whole)


def test_batches_of_a_family_that_loses_the_inputs_without_captions_are_refused(make_job: BuildJob) -> None:
    job = make_job(LTX)
    batch = replace(job.micro_batches()[0], unguided=None, guidance=None)
    with pytest.raises(UserError, match="have no inputs without captions"):
        job.step(0, [batch])
