"""What a run leaves behind is what it trained: in every tensor, and in diffusers' own forward pass."""

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from average import Average
from diffusers import LTXPipeline, LTXVideoTransformer3DModel
from exports import export_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from finetune.engine.gradients import local
from finetune.engine.precision import DTYPES
from finetune.engine.weights.exporters.diffusers_lora import LORA_FILE, load_lora, verify_lora
from finetune.runtime.errors import UserError
from finetune.training.job import Job

BuildJob = Callable[..., Job]


def trained(build_job: BuildJob, *overrides: str, steps: int = 3) -> Job:
    """A job after a few steps at a learning rate that shows."""
    job = build_job("optimizer.lr=1e-2", *overrides)
    batches = job.micro_batches()
    for step in range(steps):
        first = step * job.split.accumulation
        job.step(step, [batches[first + index] for index in range(job.split.accumulation)])
    return job


def all_weights(job: Job) -> dict[str, Tensor]:
    return get_model_state_dict(job.state.transformer, options=StateDictOptions(full_state_dict=True))


@torch.no_grad()
def prediction(job: Job, transformer: torch.nn.Module) -> Tensor:
    """The transformer's output for a batch that was not trained on."""
    return job.state.family.predict(transformer.eval(), job.micro_batches()[17].inputs)["video"]


# Files


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_else_lies_in_the_folder_stays_as_it_is(build_job: BuildJob, tmp_path: Path, method: str) -> None:
    """A user may export into a folder of models, scripts and keys."""
    others = {"secret": 0o600, "run.sh": 0o755, "of_another_tool.safetensors": 0o640, "mine": 0o755}
    (tmp_path / "mine").mkdir()
    for name, mode in others.items():
        if name != "mine":
            (tmp_path / name).write_text("no safetensors")
        (tmp_path / name).chmod(mode)
    export_weights(trained(build_job, f"train.method={method}", steps=1).state, method, tmp_path)
    assert {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in others} == others


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_same_weights_are_the_same_bytes_with_the_usual_permissions(
    build_job: BuildJob, tmp_path: Path, method: str
) -> None:
    """safetensors alone gave six files for six saves, of mode 0600."""
    job = trained(build_job, f"train.method={method}", steps=1)
    before = os.umask(0o027)
    try:
        for number in range(6):
            export_weights(job.state, method, tmp_path / str(number))
    finally:
        os.umask(before)
    exported = [{file.name: file for file in (tmp_path / str(number)).iterdir()} for number in range(6)]
    for name, file in exported[0].items():
        assert {other[name].read_bytes() for other in exported} == {file.read_bytes()}
        assert stat.S_IMODE(file.stat().st_mode) == 0o640
    (weights,) = tmp_path.glob("0/*.safetensors")
    with weights.open("rb") as file:
        metadata = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    assert list(metadata) == sorted(metadata)


# LoRA


@pytest.mark.parametrize("rank, alpha", [(4, 4), (4, 8), (3, 1)])
def test_exported_lora_tensors_are_the_trained_ones(build_job: BuildJob, tmp_path: Path, rank: int, alpha: int) -> None:
    """With alpha over rank in the second matrix, where that is not 1."""
    job = trained(build_job, f"lora.rank={rank}", f"lora.alpha={alpha}")
    export_weights(job.state, job.recipe.train.method, tmp_path / "lora")
    exported = load_file(tmp_path / "lora" / LORA_FILE)
    adapter = {
        "transformer." + name.replace(".default.", "."): value * (alpha / rank if "lora_B" in name else 1)
        for name, value in all_weights(job).items()
        if ".lora_" in name
    }
    assert exported.keys() == adapter.keys()
    for name, value in adapter.items():
        assert exported[name].dtype == torch.float32
        assert torch.equal(exported[name], value), name


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("rank, alpha", [(4, 4), (4, 8), (3, 1)])
def test_the_pipeline_predicts_exactly_what_the_trained_model_predicts(
    build_job: BuildJob, tiny_ltx: Path, tmp_path: Path, precision: str, rank: int, alpha: int
) -> None:
    """In bf16 too: FSDP computes with the float32 adapter rounded to bf16, and a bf16 pipeline rounds it as it loads.

    A third of it is rounded before the matrices are multiplied, and not after: how far that goes depends on the CPU, and it is a
    small part of what the adapter does.
    """
    job = trained(build_job, f"train.precision={precision}", f"lora.rank={rank}", f"lora.alpha={alpha}")
    export_weights(job.state, job.recipe.train.method, tmp_path / "lora")
    pipeline = LTXPipeline.from_pretrained(tiny_ltx, dtype=DTYPES[precision])
    untrained = prediction(job, pipeline.transformer)
    pipeline.load_lora_weights(tmp_path / "lora")
    ours, theirs = prediction(job, job.state.transformer), prediction(job, pipeline.transformer)
    if alpha == 1:
        small = {"float32": 1e-4, "bf16": 0.25}[precision]  # the scale left out would be twice of all of it
        assert (ours - theirs).abs().max() <= small * (ours - untrained).abs().max()
    else:
        assert torch.equal(ours, theirs)
    assert not torch.equal(theirs, untrained)


def test_a_file_of_an_earlier_version_has_its_strength(build_job: BuildJob, tiny_ltx: Path, tmp_path: Path) -> None:
    """They have the matrices as they were trained, and alpha in their metadata."""
    job = trained(build_job)
    adapter = {name: value for name, value in all_weights(job).items() if ".lora_" in name}
    LTXPipeline.save_lora_weights(
        tmp_path / "lora",
        transformer_lora_layers={name.replace(".default.", "."): value for name, value in adapter.items()},
        transformer_lora_adapter_metadata=job.state.transformer.peft_config["default"].to_dict(),
    )
    pipeline = LTXPipeline.from_pretrained(tiny_ltx)
    load_lora(pipeline, job.state.family, tmp_path / "lora")
    assert torch.equal(prediction(job, pipeline.transformer), prediction(job, job.state.transformer))


def test_an_adapter_on_other_layers_is_loaded_by_the_pipeline(
    build_job: BuildJob, tiny_ltx: Path, tmp_path: Path
) -> None:
    job = trained(build_job, "lora.targets=attn1.to_q,ff.net.0.proj,ff.net.2")
    export_weights(job.state, job.recipe.train.method, tmp_path / "lora")
    pipeline = LTXPipeline.from_pretrained(tiny_ltx)
    pipeline.load_lora_weights(tmp_path / "lora")
    assert torch.equal(prediction(job, pipeline.transformer), prediction(job, job.state.transformer))


def test_each_checkpoint_holds_the_adapter_as_diffusers_loads_it(build_job: BuildJob, tmp_path: Path) -> None:
    job = trained(build_job)
    export_weights(job.state, job.recipe.train.method, tmp_path / "lora")
    saved = job.save(3)
    ours, exported = (load_file(folder / "lora" / LORA_FILE) for folder in (saved, tmp_path))
    assert ours.keys() == exported.keys()
    assert all(torch.equal(ours[name], exported[name]) for name in exported)


# Verification


@pytest.fixture
def exported(build_job: BuildJob, tmp_path: Path) -> tuple[Job, Path, dict[str, Tensor]]:
    """A trained job, its exported folder and the trained tensors by peft's names."""
    job = trained(build_job, steps=1)
    export_weights(job.state, job.recipe.train.method, tmp_path / "lora")
    file = load_file(tmp_path / "lora" / LORA_FILE)
    return job, tmp_path / "lora", {name.removeprefix("transformer."): value for name, value in file.items()}


def tamper(folder: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    """Rewrite the exported file after `change(tensors, metadata)`."""
    with safe_open(folder / LORA_FILE, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / LORA_FILE)
    change(tensors, metadata)
    save_file(tensors, folder / LORA_FILE, metadata)


def test_a_faithful_file_passes_verification(exported: tuple[Job, Path, dict[str, Tensor]]) -> None:
    job, folder, layers = exported
    verify_lora(folder, layers, job.state.family)


def nudge(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    name = max(tensors)
    tensors[name][0, 0] = torch.nextafter(tensors[name][0, 0], torch.tensor(9.0))


def lose(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del tensors[max(tensors)]


def rename(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    name = max(tensors)
    tensors[name.replace("transformer_blocks.1", "transformer_blocks.9")] = tensors.pop(name)


def add(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    name = max(tensors)
    tensors[name.replace("to_v", "to_w")] = tensors[name].clone()


def change_alpha(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    (key,) = (key for key, value in metadata.items() if "lora_alpha" in value)
    assert '"transformer.lora_alpha": 4' in metadata[key]
    metadata[key] = metadata[key].replace('"transformer.lora_alpha": 4', '"transformer.lora_alpha": 8')


def drop_metadata(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    (key,) = (key for key, value in metadata.items() if "lora_alpha" in value)
    del metadata[key]


@pytest.mark.parametrize("change", [nudge, lose, rename, add, change_alpha])
def test_a_file_that_differs_in_anything_is_refused(
    exported: tuple[Job, Path, dict[str, Tensor]], change: Callable[[dict[str, Tensor], dict[str, str]], None]
) -> None:
    job, folder, layers = exported
    tamper(folder, change)
    with pytest.raises(UserError, match="differs from the trained one"):
        verify_lora(folder, layers, job.state.family)


def test_without_its_metadata_a_file_has_the_same_strength(
    exported: tuple[Job, Path, dict[str, Tensor]],
) -> None:
    """Other loaders do not read it."""
    job, folder, layers = exported
    assert job.recipe.lora.alpha != job.recipe.lora.rank
    tamper(folder, drop_metadata)
    verify_lora(folder, layers, job.state.family)


# All weights


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_an_exported_transformer_is_the_trained_one(build_job: BuildJob, tmp_path: Path, precision: str) -> None:
    job = trained(build_job, "train.method=full", f"train.precision={precision}")
    export_weights(job.state, job.recipe.train.method, tmp_path / "transformer")
    weights = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    expected = all_weights(job)
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], value), name


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_pipeline_predicts_exactly_with_an_exported_transformer(
    build_job: BuildJob, tiny_ltx: Path, tmp_path: Path, precision: str
) -> None:
    job = trained(build_job, "train.method=full", f"train.precision={precision}")
    export_weights(job.state, job.recipe.train.method, tmp_path / "transformer")
    dtype = DTYPES[precision]
    transformer = LTXVideoTransformer3DModel.from_pretrained(tmp_path / "transformer", dtype=dtype)
    pipeline = LTXPipeline.from_pretrained(tiny_ltx, transformer=transformer, dtype=dtype)
    assert torch.equal(prediction(job, pipeline.transformer), prediction(job, job.state.transformer))


def test_an_exported_transformer_keeps_the_config_of_the_original(
    build_job: BuildJob, tiny_ltx: Path, tmp_path: Path
) -> None:
    job = trained(build_job, "train.method=full", steps=1)
    export_weights(job.state, job.recipe.train.method, tmp_path / "transformer")
    shutil.copytree(tiny_ltx, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "transformer")
    (tmp_path / "transformer").rename(tmp_path / "model" / "transformer")
    original = LTXPipeline.from_pretrained(tiny_ltx).transformer.config
    exported = LTXPipeline.from_pretrained(tmp_path / "model").transformer.config
    assert {k: v for k, v in original.items() if k[0] != "_"} == {k: v for k, v in exported.items() if k[0] != "_"}


# What is evaluated


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_average_that_is_evaluated_is_what_is_exported(build_job: BuildJob, tmp_path: Path, method: str) -> None:
    job = build_job("optimizer.lr=1e-2", f"train.method={method}")
    average = Average(job.state.transformer)
    job.state.parts.append(average)
    batches = job.micro_batches()
    for step in range(2):
        job.step(step, [batches[2 * step + index] for index in range(job.split.accumulation)])
    export_weights(job.state, method, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    names = {
        name: "transformer." + name.replace(".default.", ".") if method == "lora" else name for name in average.values
    }
    exported = load_file(file)
    for name, value in average.values.items():
        scale = 2 if "lora_B" in name else 1  # alpha over rank
        assert torch.equal(exported[names[name]], local(value) * scale)
        assert not torch.equal(exported[names[name]], local(average.parameters[name].detach()) * scale)
