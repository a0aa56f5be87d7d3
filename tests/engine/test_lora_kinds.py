"""rsLoRA, LoRA+, DoRA, and ranks by layer: each is what peft trains, and what diffusers loads of it is what was trained."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import pytest
import torch
from closeness import assert_close_to_scale
from every_family import Model
from exports import export_weights, load_adapter
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from finetune.checks.model import open_family
from finetune.engine.weights.exporters.diffusers_lora import LORA_FILE
from finetune.engine.weights.exporters.exporter import gathered_lora
from finetune.engine.weights.loading import plain_name
from finetune.models.adapters import ADAPTER
from finetune.recipe import load_recipe
from finetune.runtime.errors import UserError
from finetune.training.job import Job

BuildJob = Callable[..., Job]
KINDS = {
    "rslora": ["lora.rslora=true"],
    "plus": ["lora.plus_ratio=16"],
    "dora": ["lora.dora=true"],
    "dora, rslora, plus": ["lora.dora=true", "lora.rslora=true", "lora.plus_ratio=4"],
    "ranks": ['lora.ranks={"to_q" = 8, "to_v" = 2}', 'lora.alphas={"to_v" = 3.0}'],
    "ranks, rslora": ['lora.ranks={"to_q" = 8}', "lora.rslora=true"],
}
FAMILIES = [("ltx", "0.9.0"), ("cogvideox", "2b"), ("hunyuan", None), ("wan", "2.1")]

OPTIMIZERS = [
    "optimizer.name=adamw",
    "optimizer.name=adamw_8bit",
    "optimizer.offload=state_and_gradients",
    "train.weights=bf16",
]
OFTEN = ("dora, rslora, plus", "ranks, rslora")


def _over(values: Sequence, often: Sequence) -> list:
    """Cases of which some are in the default suite."""
    marks = [() if each in often else (pytest.mark.full,) for each in values]
    names = [each if isinstance(each, str) else each[0] for each in values]
    return [pytest.param(each, marks=mark, id=name) for each, mark, name in zip(values, marks, names, strict=True)]


every_kind = pytest.mark.parametrize("kind", _over(list(KINDS), OFTEN))
every_model = pytest.mark.parametrize("model", _over(FAMILIES, FAMILIES[:1]))


@pytest.fixture
def make_job(build_job: BuildJob, family_recipe: Callable[..., Path], tmp_path: Path) -> BuildJob:
    def make(model: Model, kind: str, *overrides: str) -> Job:
        settings = [f"output={tmp_path / 'run'}", "lora.rank=4", "lora.alpha=8", *KINDS[kind], *overrides]
        return build_job(*settings, recipe_file=family_recipe(*model))

    return make


def step(job: Job, number: int) -> float:
    return job.step(number, [job.micro_batches()[number]]).loss


def adapter(job: Job) -> dict[str, Tensor]:
    """The trained tensors, by their names without wrappers."""
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    state = get_model_state_dict(job.state.transformer, options=options)
    return {plain_name(name): value for name, value in state.items() if ADAPTER in name.split(".")}


def pipeline_of(job: Job, dtype: torch.dtype = torch.float32) -> diffusers.DiffusionPipeline:
    family = job.state.family
    return getattr(diffusers, family.pipeline_class).from_pretrained(family.folder.path, dtype=dtype)


@torch.no_grad()
def prediction(job: Job, transformer: nn.Module) -> Tensor:
    return job.state.family.predict(transformer.eval(), job.micro_batches()[3].inputs)["video"]


# Training


@every_model
@every_kind
def test_the_training_is_that_of_peft_on_a_plain_model(make_job: BuildJob, model: Model, kind: str) -> None:
    """peft's own layers in diffusers' model, torch's AdamW, the same batches."""
    job = make_job(model, kind, "schedule.name=constant", "schedule.warmup_steps=0", "optimizer.lr=1e-3")
    theirs = pipeline_of(job).transformer.requires_grad_(False)
    settings = job.recipe.lora
    theirs.add_adapter(
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=sorted({name.rpartition(".lora_")[0] for name in adapter(job)}),
            rank_pattern={"to_q": 8, "to_v": 2} if kind == "ranks" else dict(settings.ranks),
            alpha_pattern={"to_v": 3} if kind == "ranks" else {},
            use_rslora="rslora" in kind,
            use_dora="dora" in kind,
        ),
        ADAPTER,
    )
    own = {name: parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    for name, value in adapter(job).items():
        if "lora_A" in name:
            own[name].data.copy_(value)
    assert all(torch.equal(own[name], value) or "magnitude" in name for name, value in adapter(job).items())
    rate, ratio = job.recipe.optimizer.lr, settings.plus_ratio
    second = [parameter for name, parameter in own.items() if "lora_B" in name]
    others = [parameter for name, parameter in own.items() if "lora_B" not in name]
    groups = [{"params": others}, {"params": second, "lr": rate * ratio}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-2)
    for number in range(4):
        batch = job.micro_batches()[number]
        loss = sum(each.mean() for each in batch.losses(job.state.family.predict(theirs, batch.inputs)).values())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(own.values(), job.state.max_grad_norm)
        ours = job.step(number, [batch])
        assert ours.loss == pytest.approx(loss.item(), rel=1e-5)
        assert ours.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()


def test_lengths_are_those_of_the_base_weights_rows_at_the_start(make_job: BuildJob) -> None:
    """In the model's own bits, so that nothing changes before the first step."""
    job = make_job(FAMILIES[0], "dora")
    base = pipeline_of(job).transformer
    lengths = {name: value for name, value in adapter(job).items() if "magnitude" in name}
    assert len(lengths) == 16
    for name, value in lengths.items():
        weight = base.get_submodule(name.partition(".lora_")[0]).weight
        assert torch.allclose(value, weight.norm(dim=1), rtol=1e-6, atol=0)
    assert torch.equal(prediction(job, base), prediction(job, job.state.transformer))


def rates(job: Job) -> dict[str, float]:
    """How many times the first group's rate those of the adapter's parts are."""
    groups = job.state.optimizer.param_groups
    of = {parameter: float(group["lr"]) / float(groups[0]["lr"]) for group in groups for parameter in group["params"]}
    named = job.state.transformer.named_parameters()
    return {part: round(of[each], 5) for name, each in named for part in name.split(".") if part.startswith("lora_")}


@pytest.mark.parametrize("optimizer", _over(OPTIMIZERS, ["optimizer.name=adamw_8bit"]))
def test_second_matrices_have_a_multiple_of_the_rate_in_every_optimizer(
    make_job: BuildJob, optimizer: list[str]
) -> None:
    """The schedule moves both, also after a resume, which is bit for bit."""
    straight, first, second = (
        make_job(FAMILIES[0], "dora, rslora, plus", "schedule.warmup_steps=0", optimizer) for _ in range(3)
    )
    expected = []
    for number in range(4):
        expected.append(straight.step(number, [straight.micro_batches()[number]]))
        assert rates(straight) == {"lora_A": 1, "lora_B": 4, "lora_magnitude_vector": 1}
    before = [first.step(number, [first.micro_batches()[number]]) for number in range(2)]
    first.save(2)
    assert second.resume() == 2
    after = [second.step(number, [second.micro_batches()[number]]) for number in range(2, 4)]
    assert before + after == expected
    ours, theirs = adapter(second), adapter(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("layout", ["shard", "replicate"])
def test_lengths_follow_the_base_in_bf16(make_job: BuildJob, layout: str) -> None:
    """Compute precision rounds lengths and norms alike, so that an untrained adapter changes nothing there either."""
    settings = ["train.precision=bf16", f"memory.layout={layout}"]
    plain, adapted = (make_job(FAMILIES[0], kind, *settings) for kind in ("rslora", "dora"))
    assert step(plain, 0) == step(adapted, 0)


def test_rows_of_zeros_are_refused_by_name(build_job: BuildJob, tiny_ltx: Path, tmp_path: Path) -> None:
    model, layer = tmp_path / "model", "transformer_blocks.0.attn1.to_q"
    shutil.copytree(tiny_ltx, model)
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[f"{layer}.weight"][3] = 0
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"{layer} has rows of zeros"):
        build_job("lora.dora=true", f"model.path={model}")


# Exported


@every_model
@every_kind
def test_diffusers_loads_what_was_trained(make_job: BuildJob, tmp_path: Path, model: Model, kind: str) -> None:
    job = make_job(model, kind, "schedule.warmup_steps=0")
    untrained = prediction(job, job.state.transformer)
    for number in range(2):
        step(job, number)
    export_weights(job.state, "lora", tmp_path / "lora")
    pipeline = pipeline_of(job)
    load_adapter(pipeline, tmp_path / "lora")
    loaded = {name: value for name, value in pipeline.transformer.named_parameters() if ".lora_" in name}
    trained, scales = adapter(job), gathered_lora(job.state.transformer).scales
    assert len(loaded) == len(trained) == len(load_file(tmp_path / "lora" / LORA_FILE))
    for name, value in trained.items():
        (theirs,) = (each for other, each in loaded.items() if other.replace("default_0", ADAPTER) == name)
        factor = scales[plain_name(name.partition(".lora_")[0])] if ".lora_B." in name else 1
        assert torch.equal(theirs, value * factor), name
    ours, theirs = prediction(job, job.state.transformer), prediction(job, pipeline.transformer)
    assert_close_to_scale(ours, theirs)
    # DoRA measures rows by sums of its own; and what is multiplied by no power of two is rounded once more.
    is_exact = all(math.log2(scale).is_integer() for scale in scales.values())
    assert "dora" in kind or not is_exact or torch.equal(ours, theirs)
    assert not torch.equal(ours, untrained)


@pytest.mark.full
def test_lengths_are_measured_in_bf16_as_well_as_peft_does(make_job: BuildJob, tmp_path: Path) -> None:
    """peft rounds the sum W + BA before it measures its rows, ours does not: what they predict differs by the rounding of bf16."""
    job = make_job(FAMILIES[0], "dora", "schedule.warmup_steps=0", "train.precision=bf16")
    for number in range(2):
        step(job, number)
    export_weights(job.state, "lora", tmp_path / "lora")
    pipeline = pipeline_of(job, torch.bfloat16)
    load_adapter(pipeline, tmp_path / "lora")
    ours, theirs = prediction(job, job.state.transformer), prediction(job, pipeline.transformer)
    assert_close_to_scale(ours, theirs, 2**-7)


@pytest.mark.parametrize("base", _over(["int8", "float8", "nf4"], ["nf4"]))
def test_lengths_are_those_of_the_rounded_weights(make_job: BuildJob, base: str) -> None:
    """Else the untrained adapter would undo a part of the rounding."""
    plain, adapted = (
        make_job(FAMILIES[0], kind, f"memory.low_bit={base}", "lora.targets=to_q,ff.net.2")
        for kind in ("rslora", "dora")
    )
    assert step(plain, 0) == step(adapted, 0)


# Ranks


def test_a_layer_has_the_rank_and_alpha_of_the_longest_name_that_fits(make_job: BuildJob) -> None:
    ranks = '{"to_q" = 2, "attn1.to_q" = 3, "transformer_blocks.1.attn1.to_q" = 5}'
    job = make_job(FAMILIES[0], "rslora", f"lora.ranks={ranks}", 'lora.alphas={"attn2.to_q" = 1.0}')
    found = {
        plain_name(name): (module.r[ADAPTER], module.lora_alpha[ADAPTER], module.scaling[ADAPTER])
        for name, module in job.state.transformer.named_modules()
        if isinstance(module, LoraLayer) and name.endswith("to_q")
    }
    assert found == {
        "transformer_blocks.0.attn1.to_q": (3, 8, 8 / math.sqrt(3)),
        "transformer_blocks.1.attn1.to_q": (5, 8, 8 / math.sqrt(5)),
        "transformer_blocks.0.attn2.to_q": (2, 1.0, 1 / math.sqrt(2)),
        "transformer_blocks.1.attn2.to_q": (2, 1.0, 1 / math.sqrt(2)),
    }


@pytest.mark.parametrize("key", ["ranks", "alphas"])
def test_a_name_that_no_adapted_layer_ends_with_is_refused(recipe_file: Path, key: str) -> None:
    recipe = load_recipe(recipe_file, [f'lora.{key}={{"ff.net.2" = 2}}'])
    with pytest.raises(UserError, match=rf"(?s)lora.{key}: 'ff.net.2' names no layer.*attn1.to_q"):
        open_family(recipe)
