"""What the engine promises holds for every family: spread, interrupted or exported, it is the same training."""

import re
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from closeness import assert_close_to_scale
from every_family import Model, every_transformer, every_transformer_with, few_families
from exports import export_weights, load_adapter
from families_worker import METHODS
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from finetune.engine.precision import DTYPES
from finetune.engine.step import StepResult
from finetune.models import family_class
from finetune.models.folder import ModelFolder
from finetune.models.mochi import MaskedAttention
from finetune.training.job import Job

BuildJob = Callable[..., Job]
Figures = Callable[[Model, int], dict[str, dict[str, list[float]]]]
TOLERANCE = 1e-5  # in float32, relative to each figure, a mean or root of squares, in which nothing cancels

every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def make_job(build_job: BuildJob, family_recipe: Callable[..., Path], tmp_path: Path) -> BuildJob:
    """A training of a family by a method: `make_job(("ltx", "0.9.7"), "lora")`; its output is the test's own."""

    def make(model: Model, method: str, *overrides: str) -> Job:
        output = f"output={tmp_path / 'run'}"
        return build_job(output, *METHODS[method], *overrides, recipe_file=family_recipe(*model))

    return make


def run(job: Job, first: int, last: int) -> list[StepResult]:
    """Steps first .. last - 1, as the trainer makes them."""
    batches = iter(job.batches(first))
    return [job.step(step, [next(batches) for _ in range(job.split.accumulation)]) for step in range(first, last)]


# Spread


@few_families
@every_method
@pytest.mark.parametrize("figure", ["loss", "grad_norm"])
def test_two_processes_make_the_steps_of_one(families_parity: Figures, model: Model, method: str, figure: str) -> None:
    alone, spread = (families_parity(model, processes)[method][figure] for processes in (1, 2))
    assert len(alone) == 5
    assert spread == pytest.approx(alone, rel=TOLERANCE)


@few_families
@every_method
def test_two_processes_measure_the_heldout_loss_of_one(families_parity: Figures, model: Model, method: str) -> None:
    """Three evaluations each: with two processes, one of them makes a call that is not counted."""
    alone, spread = (families_parity(model, processes)[method] for processes in (1, 2))
    assert len(alone["heldout"]) == 2
    assert alone["heldout"][0] != alone["heldout"][1]
    for figure in ("heldout", "heldout_zero"):
        assert spread[figure] == pytest.approx(alone[figure], rel=TOLERANCE)


# Interrupted


def state_of(job: Job) -> dict[str, Tensor]:
    """Every trained weight and every tensor of the optimizer."""
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    state = dict(get_model_state_dict(job.state.transformer, options=options))
    moments = get_optimizer_state_dict(job.state.transformer, job.state.optimizer, options=options)["state"]
    return state | {f"{name}.{key}": value for name, entry in moments.items() for key, value in entry.items()}


@every_transformer_with("method", ["lora"], ["full"])
def test_going_on_from_a_checkpoint_is_the_same_as_not_having_stopped(
    make_job: BuildJob, model: Model, method: str
) -> None:
    """Bit for bit, with dropout in the adapter, momentum and a moving learning rate."""
    dropout = ["lora.dropout=0.2"] if method == "lora" else []
    straight, first, second = (make_job(model, method, *dropout) for _ in range(3))
    expected = run(straight, 0, 4)
    before = run(first, 0, 2)
    first.save(2)
    assert second.resume() == 2
    assert before + run(second, 2, 4) == expected
    ours, theirs = state_of(second), state_of(straight)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


# Exported


@torch.no_grad()
def prediction(job: Job, transformer: nn.Module, step: int = 7) -> Tensor:
    """The transformer's output for a batch that was not trained on."""
    return job.state.family.predict(transformer.eval(), job.micro_batches()[step].inputs)["video"]


def exported(job: Job, folder: Path) -> nn.Module:
    """The transformer of the family's pipeline, loaded from disk with what the job exports.

    Its weights are copied: they lie in the mapped file wherever it has them, and the last bits of a product of one row
    (CogVideoX 1.5's `ofs`) depend on how its matrix is aligned in memory.
    """
    family, dtype = job.state.family, DTYPES[job.recipe.train.precision]
    pipeline_class = getattr(diffusers, family.pipeline_class)
    export_weights(job.state, job.recipe.train.method, folder)
    if job.recipe.train.method == "lora":
        pipeline = pipeline_class.from_pretrained(family.folder.path, dtype=dtype)
        load_adapter(pipeline, folder)
    else:
        transformer = getattr(diffusers, family.transformer_class).from_pretrained(folder, dtype=dtype)
        pipeline = pipeline_class.from_pretrained(family.folder.path, transformer=transformer, dtype=dtype)
    for parameter in pipeline.transformer.parameters():
        parameter.data = parameter.data.clone()
    return pipeline.transformer


@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=pytest.mark.full)])
@every_transformer
@every_method
def test_the_pipeline_predicts_exactly_what_the_trained_model_predicts(
    make_job: BuildJob, tmp_path: Path, model: Model, method: str, precision: str
) -> None:
    """In bf16 too. alpha is twice the rank. Where training has an attention or a forward pass of its own, which only rounds
    otherwise (see the next test, and tests/models/test_hunyuan15.py), both have it.
    """
    job = make_job(model, method, f"train.precision={precision}")
    untrained = prediction(job, job.state.transformer)
    run(job, 0, 2)
    transformer = exported(job, tmp_path / "weights")
    if model[0] == "mochi":
        for block in transformer.transformer_blocks:
            block.attn1.processor = MaskedAttention()
    if model[0].startswith("hunyuan15"):
        job.state.family.adapt_transformer(transformer)
    assert torch.equal(prediction(job, transformer), prediction(job, job.state.transformer))
    assert not torch.equal(prediction(job, transformer), untrained)


@every_method
def test_mochis_own_attention_predicts_what_the_trained_model_predicts(
    make_job: BuildJob, tmp_path: Path, method: str
) -> None:
    """Other sums in another order: diffusers' attention picks a sample's valid tokens, ours masks the others."""
    job = make_job(("mochi", None), method)
    run(job, 0, 2)
    theirs = prediction(job, exported(job, tmp_path / "weights"))
    assert_close_to_scale(prediction(job, job.state.transformer), theirs)


# Gradients


# Linear layers of the blocks in which an adapter changes nothing, since what they lead to is dropped.
_LAST_TEXT = {
    f"transformer_blocks.1.{name}"
    for name in ("attn.add_q_proj", "attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
}
WITHOUT_EFFECT = {
    # The last block returns video alone: what its text tokens look at is computed and thrown away.
    "mochi": {"transformer_blocks.1.attn1.add_q_proj"},
    "hunyuan15": _LAST_TEXT,
    "hunyuan15_i2v": _LAST_TEXT,
}


@every_transformer
def test_every_adapter_of_every_linear_layer_learns(
    make_job: BuildJob, tiny_model: Callable[..., Path], model: Model
) -> None:
    """After two steps (the first at rate 0), each B having moved away from zero, both its matrices have a gradient."""
    family = family_class(model[0])(ModelFolder(tiny_model(*model)))
    inside = {
        f"{blocks}.{name}"
        for blocks in family.block_lists
        for name, module in getattr(family.empty_transformer(), blocks).named_modules()
        if isinstance(module, nn.Linear)
    }
    targets = {re.sub(r"^\w+\.\d+\.", "", name) for name in inside}
    job = make_job(model, "lora", f"lora.targets={','.join(sorted(targets))}")
    run(job, 0, 2)
    learning: set[str] = set()
    job.state.optimizer.register_step_pre_hook(lambda *_: learning.update(with_gradient(job.state.transformer)))
    job.step(2, [job.micro_batches()[2]])
    expected = {
        f"{name}.{matrix}" for name in inside - WITHOUT_EFFECT.get(model[0], set()) for matrix in ("lora_A", "lora_B")
    }
    assert learning == expected


def with_gradient(transformer: nn.Module) -> set[str]:
    found = {name for name, p in transformer.named_parameters() if p.grad is not None and p.grad.full_tensor().any()}
    return {re.sub(r"_checkpoint_wrapped_module\.|\.default\.weight", "", name) for name in found}
