"""LoRAs in the forms of other tools: peft's folder, and the merged transformer; and a run that writes several of them."""

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from every_family import Model, every_transformer
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from random_loras import change, differ, opened, random_lora
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.engine.weights.exporters import comfyui, diffusers_lora, merged, peft_folder, shards
from finetune.engine.weights.exporters.exporter import Details
from finetune.engine.weights.exporters.trained_lora import TrainedLora
from finetune.models.family import Family
from finetune.runtime.errors import UserError
from finetune.training.job import Job
from finetune.training.output import RESULTS, Results
from finetune.training.usage import say_usage


def base(family: Family) -> nn.Module:
    """The transformer of the family's folder, as diffusers loads it."""
    cls = getattr(diffusers, family.transformer_class)
    return cls.from_pretrained(family.folder.path / family.trained_component)


def changes(transformer: nn.Module) -> dict[str, Tensor]:
    """What each layer's adapter adds to its weight, as peft computes it."""
    found = {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}
    return {name: module.get_delta_weight(*module.scaling).detach() for name, module in found.items()}


def worst(found: dict[str, Tensor], lora: TrainedLora) -> float:
    assert found.keys() == set(lora.layers)
    return max(differ(found[layer], change(lora, layer)) for layer in found)


# Strength


@every_transformer
def test_in_diffusers_the_strength_is_that_of_the_training(
    tiny_model: Callable[..., Path], tmp_path: Path, model: Model
) -> None:
    family = opened(model, tiny_model(*model))
    lora = random_lora(family, targets=".*(to_|ff|proj_out)")
    diffusers_lora.write_lora(lora, family, tmp_path, Details())
    (file,) = tmp_path.iterdir()
    transformer = base(family)
    transformer.load_lora_adapter(tmp_path, weight_name=file.name)
    assert worst(changes(transformer), lora) < 1e-6
    assert {
        scale for each in transformer.modules() if isinstance(each, LoraLayer) for scale in each.scaling.values()
    } == {1.0}


@every_transformer
def test_peft_loads_its_folder_as_it_was_trained(tiny_model: Callable[..., Path], tmp_path: Path, model: Model) -> None:
    family = opened(model, tiny_model(*model))
    lora = random_lora(family)
    peft_folder.write_peft(lora, family, tmp_path, Details(None, {"base_model": "owner/name"}))
    loaded = PeftModel.from_pretrained(base(family), tmp_path)
    assert worst({name.removeprefix("base_model.model."): each for name, each in changes(loaded).items()}, lora) < 1e-6
    config = loaded.peft_config["default"]
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (3, 2.0, "owner/name")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(tensors[f"base_model.model.{name}"], each) for name, each in lora.tensors.items())


# Merged


@every_transformer
def test_the_merged_transformer_is_the_base_and_the_lora(
    tiny_model: Callable[..., Path], tmp_path: Path, model: Model
) -> None:
    family = opened(model, tiny_model(*model))
    lora = random_lora(family)
    merged.write_merged(lora, family, tmp_path, Details("float32"))
    before = base(family).state_dict()
    after = getattr(diffusers, family.transformer_class).from_pretrained(tmp_path).state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        layer = name.removesuffix(".weight")
        if layer in lora.scales:
            assert differ(tensor, before[name].double() + change(lora, layer)) < 1e-6
        else:
            assert torch.equal(tensor, before[name])


def test_without_a_precision_it_is_in_that_of_the_base(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    family = opened(("hunyuan15", None), tiny_model("hunyuan15"))
    merged.write_merged(random_lora(family), family, tmp_path, Details())
    weights = family.transformer_weights()
    file = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert {name: tensor.dtype for name, tensor in file.items()} == {
        name: weights.dtype(name) for name in weights.names()
    }


@pytest.mark.parametrize("precision", ["bf16", "float16", "float8"])
def test_the_sum_is_rounded_once(tiny_ltx: Path, tmp_path: Path, precision: str) -> None:
    family = opened(("ltx", None), tiny_ltx)
    lora = random_lora(family)
    merged.write_merged(lora, family, tmp_path, Details(precision))
    before, after = base(family).state_dict(), load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    usual = torch.float16 if precision == "float16" else torch.bfloat16
    for name, tensor in after.items():
        layer = name.removesuffix(".weight")
        is_matrix = layer in lora.scales
        dtype = torch.float8_e4m3fn if precision == "float8" and is_matrix else usual
        assert tensor.dtype == dtype
        exact = before[name].double() + (change(lora, layer) if is_matrix else 0)
        step = exact.abs().clamp_min(torch.finfo(dtype).tiny) * torch.finfo(dtype).eps
        assert bool(((tensor.double() - exact).abs() <= 0.51 * step + 1e-6).all())


def test_diffusers_loads_merged_weights_in_float8(tiny_ltx: Path, tmp_path: Path) -> None:
    family = opened(("ltx", None), tiny_ltx)
    merged.write_merged(random_lora(family), family, tmp_path, Details("float8"))
    file = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = diffusers.LTXVideoTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(loaded[name], tensor.to(torch.bfloat16)) for name, tensor in file.items())


def test_a_large_transformer_is_written_in_several_files(
    tiny_ltx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = opened(("ltx", None), tiny_ltx)
    lora = random_lora(family)
    merged.write_merged(lora, family, tmp_path / "one", Details())
    monkeypatch.setattr(shards.write_shards, "__defaults__", (200_000,))
    merged.write_merged(lora, family, tmp_path / "many", Details())
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    one, many = (
        diffusers.LTXVideoTransformer3DModel.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many")
    )
    assert all(torch.equal(one[name], many[name]) for name in one)
    monkeypatch.undo()
    merged.write_merged(lora, family, tmp_path / "many", Details())  # again, in one
    assert [file.name for file in (tmp_path / "many").glob("*.safetensors*")] == ["diffusion_pytorch_model.safetensors"]


def test_a_dora_is_merged_as_peft_merges_it(tiny_ltx: Path, tmp_path: Path) -> None:
    """Its lengths are kept in peft's folder, and ComfyUI's form has no place for them."""
    family = opened(("ltx", None), tiny_ltx)
    plain = random_lora(family)
    plain.config.use_dora = True
    lengths = {
        f"{layer}.lora_magnitude_vector": torch.rand(len(plain.tensors[f"{layer}.lora_B.weight"]))
        for layer in plain.layers
    }
    dora = TrainedLora({**plain.tensors, **lengths}, plain.scales, plain.config)
    peft_folder.write_peft(dora, family, tmp_path / "peft", Details())
    merged.write_merged(dora, family, tmp_path / "merged", Details())
    theirs = PeftModel.from_pretrained(base(family), tmp_path / "peft").merge_and_unload().state_dict()
    ours = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
    assert max(differ(ours[f"{layer}.weight"], theirs[f"{layer}.weight"].double()) for layer in dora.layers) < 1e-6
    with pytest.raises(UserError, match="is no low-rank matrix"):
        comfyui.write_comfyui(dora, family, tmp_path / "comfyui", Details())


def test_a_lora_of_another_model_is_not_merged(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    ltx, wan = (opened((name, None), tiny_model(name)) for name in ("ltx", "wan"))
    with pytest.raises(UserError, match="the base model has no transformer_blocks"):
        merged.write_merged(random_lora(ltx), wan, tmp_path, Details())


# A run


@pytest.fixture
def job(build_job: Callable[..., Job], recipe_file: Path) -> Job:
    recipe_file.write_text(recipe_file.read_text() + '[export]\nformats = ["comfyui", "diffusers", "peft", "merged"]\n')
    job = build_job("optimizer.lr=1e-2", "train.steps=1", "lora.rank=3", "data.id_token=zorp")
    job.step(0, [job.micro_batches()[index] for index in range(job.split.accumulation)])
    return job


def test_a_run_writes_every_form_and_says_where(job: Job, capsys: pytest.CaptureFixture) -> None:
    run = job.recipe.output.absolute()
    assert Results(job).export() == run / "lora"
    names = {name for name in ("lora", "comfyui", "peft", "merged") if (run / name).is_dir()}
    assert len(names) == 4
    say_usage(job, run / "lora")
    said = capsys.readouterr().err
    assert all(f"lies in {run / name}" in said for name in names)
    assert 'pipe.load_lora_weights("' in said
    metadata = {}
    for file in run.glob("*/*.safetensors"):
        with safe_open(file, "pt") as opened_file:
            metadata[file.parent.name] = opened_file.metadata()
    assert metadata.keys() == names
    for facts in metadata.values():
        assert {"step": "1", "trigger_word": "zorp", "trained_alpha": "8", "trained_rank": "3"}.items() <= facts.items()
        assert facts["base_model"] == Path(job.recipe.model.path).name
        assert str(run) not in json.dumps(facts)


def test_what_is_missing_of_the_forms_is_written_again_and_nothing_else(
    job: Job, build_job: Callable[..., Job]
) -> None:
    results, run = Results(job), job.recipe.output
    results.export()
    assert results.are_complete()
    before = {file: file.stat().st_mtime_ns for file in run.glob("*/*.safetensors")}
    (run / "comfyui" / "comfyui_lora.safetensors").unlink()
    assert not results.are_complete()
    results.export()
    assert results.are_complete()
    after = {file: file.stat().st_mtime_ns for file in run.glob("*/*.safetensors")}
    assert [file.parent.name for file in before if before[file] != after[file]] == ["comfyui"]
    export = job.recipe.export.model_copy(update={"precision": "bf16"})
    job.recipe = job.recipe.model_copy(update={"export": export})
    assert not Results(job).are_complete()
    Results(job).export()
    for file in run.glob("*/*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}, file


def test_results_that_an_older_version_noted_are_there(build_job: Callable[..., Job]) -> None:
    job = build_job("train.steps=1")
    results = Results(job)
    folder = results.export()
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    (job.recipe.output / RESULTS).write_text(json.dumps({"step": 1, "files": sizes}))
    assert Results(job).are_complete()
