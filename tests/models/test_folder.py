"""Model folders: what is missing or cut off is found from headers, before a weight is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from safetensors.torch import load_file

from finetune.models.folder import ModelFolder, resolve
from finetune.models.ltx import LTXVideo
from finetune.runtime.errors import UserError

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tiny_ltx: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(tiny_ltx, tmp_path / "model")


@pytest.fixture
def sharded(model: Path) -> Path:
    """A copy whose transformer diffusers has saved in several files."""
    transformer = LTXVideoTransformer3DModel.from_pretrained(model, subfolder="transformer")
    shutil.rmtree(model / "transformer")
    transformer.save_pretrained(model / "transformer", max_shard_size="300KB")
    assert len(list((model / "transformer").glob("*.safetensors"))) > 1
    return model


def problems(folder: Path) -> list[str]:
    return [str(problem) for problem in ModelFolder(folder).problems(LTXVideo.components)]


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "transformer").glob("*.safetensors"))


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_whole_pipeline_has_no_problem(tiny_ltx: Path) -> None:
    assert problems(tiny_ltx) == []


def test_a_pipeline_of_several_weight_files_has_no_problem(sharded: Path) -> None:
    assert problems(sharded) == []


def test_a_missing_shard_is_named(sharded: Path) -> None:
    missing = shards(sharded)[1]
    missing.unlink()
    (problem,) = problems(sharded)
    assert str(missing) in problem
    assert "missing" in problem


def test_a_shard_that_was_cut_off_is_named(sharded: Path) -> None:
    cut_in_half(shards(sharded)[-1])
    (problem,) = problems(sharded)
    assert str(shards(sharded)[-1]) in problem
    assert "damaged" in problem


@pytest.mark.parametrize(
    "damage",
    [cut_in_half, lambda file: file.write_bytes(b""), lambda file: file.write_bytes(b"not a safetensors file" * 10)],
    ids=["cut off", "empty", "not safetensors"],
)
def test_a_damaged_weight_file_is_named(model: Path, damage: Callable[[Path], None]) -> None:
    damage(model / WEIGHTS)
    (problem,) = problems(model)
    assert str(model / WEIGHTS) in problem
    assert "download it again" in problem


def test_missing_weights_are_named_by_their_folder(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (problem,) = problems(model)
    assert str(model / "transformer") in problem


@pytest.mark.parametrize("config", ["transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_a_missing_config_is_named(model: Path, config: str) -> None:
    (model / config).unlink()
    (problem,) = problems(model)
    assert str(model / config) in problem


def test_a_config_that_is_not_json_is_named(model: Path) -> None:
    (model / "vae" / "config.json").write_text('{"latent_channels": 16,')
    (problem,) = problems(model)
    assert str(model / "vae" / "config.json") in problem


def test_a_shard_index_that_is_not_json_is_named(sharded: Path) -> None:
    (index,) = (sharded / "transformer").glob("*.index.json")
    cut_in_half(index)
    (problem,) = problems(sharded)
    assert str(index) in problem


@pytest.mark.parametrize("index", ["{}", '{"metadata": {}}', "[]"])
def test_a_shard_index_without_a_map_is_named(sharded: Path, index: str) -> None:
    (file,) = (sharded / "transformer").glob("*.index.json")
    file.write_text(index)
    (problem,) = problems(sharded)
    assert str(file) in problem


def test_a_missing_tokenizer_is_named(model: Path) -> None:
    shutil.rmtree(model / "tokenizer")
    (problem,) = problems(model)
    assert str(model / "tokenizer") in problem


def test_a_component_that_the_pipeline_does_not_have_is_named(model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text())
    del index["text_encoder"]
    (model / "model_index.json").write_text(json.dumps(index))
    (problem,) = problems(model)
    assert "'text_encoder'" in problem


def test_all_problems_are_found_at_once(model: Path) -> None:
    (model / "vae" / "config.json").unlink()
    cut_in_half(model / WEIGHTS)
    shutil.rmtree(model / "tokenizer")
    assert len(problems(model)) == 3


# Reading


def test_weight_files_are_those_of_the_index_alone(sharded: Path) -> None:
    files = shards(sharded)
    shutil.copy(files[0], sharded / "transformer" / "diffusion_pytorch_model.fp16-00001-of-00001.safetensors")
    assert ModelFolder(sharded).weight_files("transformer") == files


def test_one_tensor_is_read_by_name_from_whichever_file_holds_it(sharded: Path) -> None:
    for file in shards(sharded):
        name, value = next(iter(load_file(file).items()))
        assert torch.equal(ModelFolder(sharded).tensor("transformer", name), value)


def test_a_tensor_that_is_not_there_is_an_error(tiny_ltx: Path) -> None:
    with pytest.raises(UserError, match="no tensor 'latents_median'"):
        ModelFolder(tiny_ltx).tensor("vae", "latents_median")


def test_the_fingerprint_follows_the_weights_and_the_config(model: Path) -> None:
    def fingerprint() -> str:
        return json.dumps(ModelFolder(model).fingerprint("vae", lambda file: str(hash(file.read_bytes()))))

    original = fingerprint()
    config = model / "vae" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"_diffusers_version": "9"}))
    assert fingerprint() == original
    config.write_text(json.dumps(values | {"scaling_factor": 0.5}))
    assert fingerprint() != original
    config.write_text(json.dumps(values))
    cut_in_half(model / "vae" / "diffusion_pytorch_model.safetensors")
    assert fingerprint() != original


# Finding


def test_a_folder_is_found_as_it_is(tiny_ltx: Path) -> None:
    assert resolve(str(tiny_ltx), "main", LTXVideo.components) == tiny_ltx


def test_a_folder_in_the_home_directory_is_found(tiny_ltx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_ltx.parent))
    assert resolve(f"~/{tiny_ltx.name}", "main", LTXVideo.components) == tiny_ltx


def test_a_folder_in_the_home_directory_of_nobody_is_an_error() -> None:
    with pytest.raises(UserError, match="there is no user 'nosuchuser'\n    -> write the folder"):
        resolve("~nosuchuser/model", "main", [])


def test_a_folder_that_is_no_pipeline_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model_index\.json"):
        resolve(str(tmp_path), "main", LTXVideo.components)


@pytest.mark.parametrize("path", ["/no/such/folder", "./model", "../model", "~/model", "model", "a/b/c"])
def test_a_path_that_is_no_hub_id_and_no_folder_is_an_error(path: str) -> None:
    with pytest.raises(UserError, match="no such folder") as error:
        resolve(path, "main", LTXVideo.components)
    assert path in str(error.value)


def test_a_hub_id_that_cannot_be_reached_is_an_error_with_a_cure() -> None:
    with pytest.raises(UserError, match="Hub") as error:
        resolve("nobody/no-such-model", "main", LTXVideo.components)
    assert "nobody/no-such-model" in str(error.value)
    assert "->" in str(error.value)
