"""Full training of some weights: only they change, whatever holds the others, and what is exported is what was trained."""

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from every_family import Model
from exports import export_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from finetune.checks.model import open_family
from finetune.engine.weights.exporters import exporter_of
from finetune.engine.weights.exporters.partial import DIFFERENCE_FILE
from finetune.engine.weights.loading import plain_name
from finetune.models.building import stays_float32
from finetune.recipe import load_recipe
from finetune.runtime.errors import UserError
from finetune.training.job import Job, write_weights

BuildJob = Callable[..., Job]
MODULES = "norm,proj_out,*.bias"
FAMILIES: list[Model] = [("ltx", "0.9.0"), ("cogvideox", "2b"), ("hunyuan", None), ("wan", "2.1")]
CONVERTERS = {
    "ltx": single_file_utils.convert_ltx_transformer_checkpoint_to_diffusers,
    "wan": single_file_utils.convert_wan_transformer_to_diffusers,
}
OWN_NAMES = {"ltx": "proj_in,time_embed", "wan": "patch_embedding,condition_embedder"}
# How frozen weights are held: by themselves, and with another trained part, in bf16.
BASES = {
    "as they are": [],
    "int8": ["memory.low_bit=int8"],
    "nf4": ["memory.low_bit=nf4"],
    "streamed": ["memory.offload=true"],
    "sharded": ["memory.layout=shard"],
}

every_base = pytest.mark.parametrize(
    "base", [pytest.param(base, marks=() if base in ("int8", "streamed") else (pytest.mark.full,)) for base in BASES]
)


def _marked(model: Model) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.full,) if model != FAMILIES[0] else ()


every_kind_of_model = pytest.mark.parametrize(
    "model", [pytest.param(model, marks=_marked(model), id=model[0]) for model in FAMILIES]
)


@pytest.fixture
def make_job(build_job: BuildJob, family_recipe: Callable[..., Path], tmp_path: Path) -> BuildJob:
    def make(model: Model, *overrides: str) -> Job:
        settings = [f"output={tmp_path / 'run'}", "train.method=partial", "schedule.warmup_steps=0"]
        modules = [] if any("partial.modules" in each for each in overrides) else [f"partial.modules={MODULES}"]
        return build_job(*settings, *modules, *overrides, recipe_file=family_recipe(*model))

    return make


def steps(job: Job, first: int, last: int) -> list[float]:
    return [job.step(number, [job.micro_batches()[number]]).loss for number in range(first, last)]


def trained(job: Job) -> dict[str, Tensor]:
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    state = get_model_state_dict(job.state.transformer, options=options)
    wanted = {plain_name(name) for name, each in job.state.transformer.named_parameters() if each.requires_grad}
    return {name: value.clone() for name, value in state.items() if name in wanted}


def base_of(job: Job) -> nn.Module:
    family = job.state.family
    cls = getattr(diffusers, family.transformer_class)
    return cls.from_pretrained(family.folder.path / "transformer", dtype=torch.float32)


@torch.no_grad()
def prediction(job: Job, transformer: nn.Module) -> Tensor:
    return job.state.family.predict(transformer.eval(), job.micro_batches()[3].inputs)["video"]


# Which


@pytest.mark.parametrize(
    "pattern, among, not_among",
    [
        (
            "norm",
            ["transformer_blocks.0.attn1.norm_q.weight", "transformer_blocks.1.attn2.norm_k.weight"],
            ["transformer_blocks.0.attn1.to_q.weight"],
        ),
        ("attn1.to_q", ["transformer_blocks.1.attn1.to_q.bias"], ["transformer_blocks.1.attn2.to_q.bias"]),
        ("transformer_blocks.1", ["transformer_blocks.1.ff.net.2.bias"], ["transformer_blocks.0.ff.net.2.bias"]),
        ("*.bias", ["proj_in.bias"], ["proj_in.weight"]),
    ],
)
def test_a_name_is_a_part_between_words_or_with_a_star_the_whole(
    make_job: BuildJob, pattern: str, among: list[str], not_among: list[str]
) -> None:
    job = make_job(FAMILIES[0], f"partial.modules={pattern}")
    names, everything = trained(job).keys(), dict(base_of(job).named_parameters())
    for name in among:
        assert name in names
    assert names
    assert names.isdisjoint(not_among)
    assert names <= everything.keys()


@pytest.mark.parametrize(
    "modules, what",
    [
        ("[]", "nothing is named"),
        ("nor", "'nor' names no weight"),
        ("norm,*.biass", "'*.biass' names no weight"),
        ('[""]', "'' has no letter"),
    ],
)
def test_a_name_that_nothing_has_is_refused(recipe_file: Path, modules: str, what: str) -> None:
    overrides = ["train.method=partial", f"partial.modules={modules}", "lora.rank=64", "lora.alpha=64"]
    with pytest.raises(UserError) as error:
        open_family(load_recipe(recipe_file, overrides))
    assert str(error.value).startswith(f"partial.modules: {what}")


# Trained


@every_kind_of_model
def test_the_training_is_that_of_a_plain_model(make_job: BuildJob, model: Model) -> None:
    """diffusers' model with the same parameters given to torch's AdamW, on the same batches."""
    job = make_job(model, "schedule.name=constant", "optimizer.lr=1e-3")
    theirs = base_of(job).requires_grad_(False)
    own = {name: theirs.get_parameter(name).requires_grad_(True) for name in trained(job)}
    optimizer = torch.optim.AdamW(own.values(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-2)
    for number in range(3):
        batch = job.micro_batches()[number]
        loss = sum(each.mean() for each in batch.losses(job.state.family.predict(theirs, batch.inputs)).values())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(own.values(), job.state.max_grad_norm)
        ours = job.step(number, [batch])
        assert (ours.loss, ours.grad_norm) == pytest.approx((loss.item(), norm.item()), rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()


@every_kind_of_model
@every_base
def test_trained_weights_are_float32_beside_frozen_ones_however_held(
    make_job: BuildJob, model: Model, base: str
) -> None:
    job = make_job(model, "train.precision=bf16", *BASES[base])
    before = trained(job)
    original = base_of(job)
    assert all(torch.equal(value, original.get_parameter(name)) for name, value in before.items())
    steps(job, 0, 2)
    after = trained(job)
    assert {value.dtype for value in after.values()} == {torch.float32}
    unchanged = [name for name in after if torch.equal(after[name], before[name])]
    assert not unchanged
    stays = stays_float32(job.state.transformer)
    frozen = {
        plain_name(name): each for name, each in job.state.transformer.named_parameters() if not each.requires_grad
    }
    assert {each.dtype for name, each in frozen.items() if not stays(name)} == {torch.bfloat16}


def test_going_on_from_a_checkpoint_is_the_same_as_not_having_stopped(make_job: BuildJob) -> None:
    straight, first, second = (make_job(FAMILIES[0], "train.precision=bf16") for _ in range(3))
    expected = steps(straight, 0, 4)
    before = steps(first, 0, 2)
    first.save(2)
    assert second.resume() == 2
    assert before + steps(second, 2, 4) == expected
    ours, theirs = trained(second), trained(straight)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# Exported


@every_kind_of_model
@every_base
def test_the_exported_transformer_is_the_base_with_the_trained_weights(
    make_job: BuildJob, tmp_path: Path, model: Model, base: str
) -> None:
    """Exactly, also where the frozen weights were held in fewer bits."""
    job = make_job(model, *BASES[base])
    steps(job, 0, 2)
    export_weights(job.state, "partial", tmp_path / "transformer")
    cls = getattr(diffusers, job.state.family.transformer_class)
    exported = cls.from_pretrained(tmp_path / "transformer", dtype=torch.float32)
    expected = {**base_of(job).state_dict(), **trained(job)}
    assert exported.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in exported.state_dict().items())
    if "low_bit" not in " ".join(BASES[base]):
        for parameter in exported.parameters():
            parameter.data = parameter.data.clone()  # out of the mapped file: see test_families.py
        assert torch.equal(prediction(job, exported), prediction(job, job.state.transformer))


@pytest.mark.parametrize("model", [model for model in FAMILIES if model[0] in CONVERTERS], ids=lambda model: model[0])
def test_the_difference_has_comfyuis_names_and_what_was_trained(
    make_job: BuildJob, tmp_path: Path, model: Model
) -> None:
    """diffusers' converter of original checkpoints, which ComfyUI loads as they are, gives back every name and shape."""
    job = make_job(model, f"partial.modules=norm,bias,scale_shift_table,to_q,{OWN_NAMES[model[0]]}")
    steps(job, 0, 2)
    write_weights(job.state, exporter_of("partial", "partial_difference"), tmp_path)
    written = load_file(tmp_path / DIFFERENCE_FILE)
    original = {}
    for name, value in written.items():
        layer, _, kind = name.removeprefix("diffusion_model.").rpartition(".")
        assert name.startswith("diffusion_model.")
        assert kind in ("diff", "diff_b")
        end = (
            ".bias"
            if kind == "diff_b"
            else ""
            if layer.rpartition(".")[2] in ("scale_shift_table", "modulation")
            else ".weight"
        )
        original[layer + end] = value
    converted = CONVERTERS[model[0]](dict(original))
    base, after = base_of(job).state_dict(), trained(job)
    assert converted.keys() == after.keys()
    for name, value in after.items():
        assert torch.equal(converted[name], value - base[name])
        assert converted[name].any()


def test_a_difference_that_comfyui_could_not_load_is_refused(make_job: BuildJob, tmp_path: Path) -> None:
    job = make_job(FAMILIES[1])
    with pytest.raises(UserError, match="ComfyUI takes no differences"):
        write_weights(job.state, exporter_of("partial", "partial_difference"), tmp_path)
