"""The command that exports a checkpoint: in the run's own form, or another that is named."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from peft import PeftModel
from random_loras import change, differ, opened, random_lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.commands import export
from finetune.engine.weights.exporters import EXPORTERS, diffusers_lora
from finetune.engine.weights.exporters.exporter import Details
from finetune.engine.weights.exporters.trained_lora import TrainedLora
from finetune.recipe import load_recipe
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.training.job import Job


@pytest.fixture
def run(build_job: Callable[..., Job], recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Export the only checkpoint of a run, in this process."""
    job = build_job()
    job.step(0, [job.micro_batches()[index] for index in range(job.split.accumulation)])
    job.save(1)
    monkeypatch.setattr(export, "with_runtime", lambda recipe, body: body(job.state.runtime))

    def command(*arguments: str) -> None:
        parser = argparse.ArgumentParser()
        export.add_arguments(parser)
        export.run(parser.parse_args(["--recipe", str(recipe_file), *arguments]))

    return command


def test_a_second_form_is_written_where_it_is_named(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(transformer, family, folder: Path, runtime: Runtime, details: Details) -> None:
        folder.mkdir()
        (folder / "other").write_text(family.name)

    monkeypatch.setitem(EXPORTERS, "other", type(diffusers_lora.EXPORTER)("lora", lambda family: "other", write))
    run("--out", str(tmp_path / "first"))
    run("--out", str(tmp_path / "second"), "--format", "other")
    assert [file.name for file in (tmp_path / "first").iterdir()] == [diffusers_lora.LORA_FILE]
    assert (tmp_path / "second" / "other").read_text() == "ltx"


def test_a_form_that_is_not_for_the_method_lists_those_that_are(run: Callable[..., None], tmp_path: Path) -> None:
    named = r"(?s)not written as 'diffusers_transformer'.*formats are: diffusers, comfyui, peft, merged"
    with pytest.raises(UserError, match=named):
        run("--out", str(tmp_path / "out"), "--format", "diffusers_transformer")
    assert not (tmp_path / "out").exists()


def test_the_optimizers_state_is_not_needed(run: Callable[..., None], recipe_file: Path, tmp_path: Path) -> None:
    """Moments would need memory, and those in few bits the number of ranks that saved them."""
    file = load_recipe(recipe_file).output / "checkpoints" / "step_00000001" / "trainer.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({**facts, "parts": ["model"]}))
    run("--out", str(tmp_path / "out"))
    assert (tmp_path / "out" / diffusers_lora.LORA_FILE).is_file()


def test_several_forms_are_written_into_folders_of_their_own(run: Callable[..., None], tmp_path: Path) -> None:
    run("--out", str(tmp_path / "out"), "--format", "diffusers", "comfyui", "peft", "--precision", "bf16")
    files = {file.relative_to(tmp_path / "out").as_posix(): file for file in (tmp_path / "out").rglob("*.safetensors")}
    assert sorted(files) == [
        "comfyui/comfyui_lora.safetensors",
        "lora/pytorch_lora_weights.safetensors",
        "peft/adapter_model.safetensors",
    ]
    assert {each.dtype for file in files.values() for each in load_file(file).values()} == {torch.bfloat16}


def test_a_precision_that_a_form_has_not_is_refused(run: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'comfyui' is not written in float8"):
        run("--out", str(tmp_path / "out"), "--format", "merged", "comfyui", "--precision", "float8")
    assert not (tmp_path / "out").exists()


def test_a_dora_for_comfyui_is_refused_before_any_checkpoint_is_looked_for(
    run: Callable[..., None], tmp_path: Path
) -> None:
    dora = ["--set", "lora.dora=true", "--set", f"output={tmp_path / 'none'}"]
    with pytest.raises(UserError, match="a DoRA is not written for ComfyUI"):
        run(*dora, "--out", str(tmp_path / "out"), "--format", "diffusers", "comfyui")
    assert not (tmp_path / "out").exists()


def command(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    export.run(parser.parse_args([*map(str, arguments)]))


@pytest.fixture
def of_another_trainer(tmp_path: Path, tiny_ltx: Path) -> tuple[Path, TrainedLora]:
    """A LoRA as kohya's scripts name it, with its alpha as a tensor, and what was trained."""
    lora = random_lora(opened(("ltx", None), tiny_ltx))
    tensors = {}
    for layer in lora.layers:
        name = "lora_unet_" + layer.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = lora.tensors[f"{layer}.lora_A.weight"]
        tensors[f"{name}.lora_up.weight"] = lora.tensors[f"{layer}.lora_B.weight"]
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "theirs.safetensors")
    return tmp_path / "theirs.safetensors", lora


def test_the_lora_of_another_trainer_is_converted_without_a_run(
    of_another_trainer: tuple[Path, TrainedLora], tiny_ltx: Path, tmp_path: Path
) -> None:
    file, lora = of_another_trainer
    forms = ("diffusers", "comfyui", "peft", "merged")
    command("--from", file, "--family", "ltx", "--model", tiny_ltx, "--format", *forms, "--out", tmp_path / "out")
    prefixes = {"lora/pytorch_lora_weights": "transformer.", "comfyui/comfyui_lora": "diffusion_model."}
    for name, prefix in prefixes.items():
        found = load_file(tmp_path / "out" / f"{name}.safetensors")
        for layer in lora.layers:
            up, down = (found[f"{prefix}{layer}.lora_{side}.weight"].double() for side in "BA")
            assert differ(up @ down, change(lora, layer)) < 1e-6
    base = diffusers.LTXVideoTransformer3DModel.from_pretrained(tiny_ltx / "transformer")
    weights = {name: tensor.double() for name, tensor in base.state_dict().items()}
    merged = load_file(tmp_path / "out" / "merged" / "diffusion_pytorch_model.safetensors")
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "peft")
    for layer in lora.layers:
        delta = adapted.get_submodule(f"base_model.model.{layer}").get_delta_weight("default").detach()
        assert differ(delta, change(lora, layer)) < 1e-6
        assert differ(merged[f"{layer}.weight"], weights[f"{layer}.weight"] + change(lora, layer)) < 1e-6


def test_matrices_of_several_dtypes_keep_their_values(
    of_another_trainer: tuple[Path, TrainedLora], tiny_ltx: Path, tmp_path: Path
) -> None:
    file, _ = of_another_trainer
    halves = (torch.bfloat16, torch.float32, torch.float16)
    theirs = {name: tensor.to(halves[at % 3]) for at, (name, tensor) in enumerate(load_file(file).items())}
    save_file(theirs, file)
    base = ("--from", file, "--family", "ltx", "--model", tiny_ltx)
    command(*base, "--format", "diffusers", "comfyui", "peft", "merged", "--out", tmp_path / "out")
    found = load_file(tmp_path / "out" / "comfyui" / "comfyui_lora.safetensors")
    for name, tensor in theirs.items():
        if name.endswith("lora_down.weight"):
            (layer,) = {
                each
                for each in found
                if each.replace(".", "_").endswith(
                    name.removeprefix("lora_unet_").removesuffix(".lora_down.weight") + "_lora_A_weight"
                )
            }
            assert torch.equal(found[layer].double(), tensor.double())


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "peft", "merged"])
def test_values_that_float16_cannot_hold_are_refused(
    of_another_trainer: tuple[Path, TrainedLora], tiny_ltx: Path, tmp_path: Path, form: str
) -> None:
    file, _ = of_another_trainer
    save_file({name: tensor * 1e6 for name, tensor in load_file(file).items()}, file)
    base = ("--from", file, "--family", "ltx", "--model", tiny_ltx, "--precision", "float16", "--format", form)
    with pytest.raises(UserError, match=r"export.precision: .* float16 ends at 6\.55e\+04"):
        command(*base, "--out", tmp_path / "out")


def test_a_recipe_names_the_base_of_a_converted_lora(
    of_another_trainer: tuple[Path, TrainedLora], recipe_file: Path, tmp_path: Path
) -> None:
    file, _ = of_another_trainer
    command("--from", file, "--recipe", recipe_file, "--out", tmp_path / "out")
    assert [each.name for each in (tmp_path / "out").iterdir()] == [diffusers_lora.LORA_FILE]


def test_our_own_file_keeps_what_it_says_of_its_training(
    run: Callable[..., None], tiny_ltx: Path, tmp_path: Path
) -> None:
    run("--out", str(tmp_path / "first"))
    first, second = tmp_path / "first" / diffusers_lora.LORA_FILE, tmp_path / "second"
    command("--from", first, "--family", "ltx", "--model", tiny_ltx, "--format", "comfyui", "--out", second)
    facts = []
    for file in (first, second / "comfyui_lora.safetensors"):
        with safe_open(file, "pt") as opened_file:
            facts.append(opened_file.metadata())
    assert facts[0]["step"] == "1"
    assert facts[0]["trained_alpha"] == "8"
    assert {name: facts[0][name] for name in facts[1] if name != "format"} == {
        name: value for name, value in facts[1].items() if name != "format"
    }


@pytest.mark.parametrize(
    "arguments, what",
    [
        (["--family", "ltx"], "the LoRA's base model is not named"),
        (["--step", "3", "--family", "ltx", "--model", "MODEL"], "a file has no steps"),
        (["--family", "cogvideox", "--model", "MODEL"], "this is LTXPipeline"),
        (["--family", "ltx", "--model", "MODEL", "--format", "full"], "are not written as 'full'"),
        (["--family", "ltx", "--model", "MODEL", "--expert", "high"], "has one transformer, and no experts"),
    ],
)
def test_what_a_conversion_lacks_is_named(
    of_another_trainer: tuple[Path, TrainedLora], tiny_ltx: Path, tmp_path: Path, arguments: list[str], what: str
) -> None:
    given = [str(tiny_ltx) if each == "MODEL" else each for each in arguments]
    with pytest.raises(UserError, match=what):
        command("--from", of_another_trainer[0], *given, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, what", [([], "there is nothing to export"), (["--recipe", "r", "--family", "ltx"], "about --from")]
)
def test_without_a_file_the_command_is_about_a_run(tmp_path: Path, arguments: list[str], what: str) -> None:
    with pytest.raises(UserError, match=what):
        command(*arguments, "--out", tmp_path / "out")
