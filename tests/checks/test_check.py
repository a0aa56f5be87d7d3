"""Combinations that cannot work, or would do nothing, are refused before anything is read."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.checks.everything import check_all
from finetune.checks.model import open_family
from finetune.checks.output import check_output
from finetune.checks.settings import check_device, check_recipe
from finetune.preparation.encode import prepare
from finetune.recipe import Recipe, load_recipe, write_recipe
from finetune.runtime.device import Device
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError


def refused(recipe_file: Path, *overrides: str, world_size: int = 1) -> list[str]:
    return [problem.where for problem in check_recipe(load_recipe(recipe_file, overrides), world_size)]


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.mode_scale=2"],
        ["objective.logit_mean=1", "objective.sigma_sampling=uniform"],
        ["schedule.power=2"],
        ["schedule.cycles=3", "schedule.name=cosine"],
        ["schedule.warmup_steps=2"],
        ["data.windows=2"],
        ["data.windows=2", "data.window=all"],
        ["data.overlap=0.5"],
        ["data.overlap=0.5", "data.window=random"],
        ["validation.every=2"],
        ["validation.sigmas=8"],
        ["tracking.project=mine"],
        ["tracking.name=mine"],
        ["objective.logit_mean=1", "objective.sigma_table=[1, 2]"],
        ["objective.snr_gamma=3"],
        ["objective.loss_delta=0.5"],
        ["ema.every=2"],
        ["ema.use=samples"],
        ["ema.every=1000000", "ema.decay=0.9"],
        ["memory.checkpoint_every=3"],
        ["memory.keep_gib=2"],
        ["memory.shard_size=2"],
    ],
)
def test_a_key_without_effect_is_refused(recipe_file: Path, overrides: list[str]) -> None:
    assert refused(recipe_file, *overrides) == [overrides[0].partition("=")[0]]


def test_the_same_keys_pass_where_they_have_an_effect(recipe_file: Path) -> None:
    assert refused(recipe_file) == []
    assert refused(recipe_file, "objective.mode_scale=2", "objective.sigma_sampling=mode") == []
    assert refused(recipe_file, "schedule.power=2", "schedule.name=polynomial", "schedule.warmup_steps=2") == []
    assert refused(recipe_file, "validation.every=2", "validation.heldout=clips") == []
    assert refused(recipe_file, "data.windows=2", "data.window=random") == []
    assert refused(recipe_file, "data.overlap=0.5", "data.window=all") == []
    assert refused(recipe_file, "objective.snr_gamma=3", "objective.weighting=min_snr") == []
    assert refused(recipe_file, "objective.loss_delta=0.5", "objective.loss=smooth_l1") == []


@pytest.mark.parametrize(
    "lr, optimizer, where",
    [
        (1, "adamw", ["optimizer.lr"]),
        (1, "lion", ["optimizer.lr"]),
        (1, "prodigy", []),
        (1e3, "prodigy", ["optimizer.lr"]),
        (1e-3, "adamw", []),
    ],
)
def test_a_rate_that_no_weight_outlives_is_refused(
    recipe_file: Path, lr: float, optimizer: str, where: list[str]
) -> None:
    assert refused(recipe_file, f"optimizer.lr={lr}", f"optimizer.name={optimizer}") == where


def test_a_rank_that_no_layer_has_is_refused(recipe_file: Path, runtime: Runtime) -> None:
    (problem,) = check_all(load_recipe(recipe_file, ["lora.rank=4096"]), runtime, gpus=1)
    assert problem.where == "lora.rank"
    assert "no layer that gets an adapter has so high a rank" in problem.what


def test_sigma_has_one_distribution(recipe_file: Path) -> None:
    assert refused(recipe_file, "objective.sigma_table=[1, 2]", "objective.sigma_sampling=mode") == [
        "objective.sigma_table"
    ]
    assert refused(recipe_file, "objective.sigma_table=[1, 2]", "objective.sigma_range=0.2,0.7") == []


def test_guidance_in_the_target_needs_a_frozen_base(recipe_file: Path) -> None:
    full = load_recipe(
        recipe_file, ["objective.guidance_target=4", "train.method=full", "lora.rank=64", "lora.alpha=64"]
    )
    (problem,) = check_recipe(full, 1)
    assert problem.where == "objective.guidance_target"
    assert problem.cure == 'remove it, or set train.method = "lora"'
    assert refused(recipe_file, "objective.guidance_target=4") == []
    with pytest.raises(UserError, match="greater than 1"):  # 1 would leave the target as it is
        load_recipe(recipe_file, ["objective.guidance_target=1"])


@pytest.mark.parametrize("limits", ["0.9,0.3", "0.5,0.5"])
def test_a_range_of_noise_levels_ascends(recipe_file: Path, runtime: Runtime, limits: str) -> None:
    recipe = load_recipe(recipe_file, [f"objective.sigma_range={limits}"])
    (problem,) = check_all(recipe, runtime, gpus=1)
    low, high = limits.split(",")
    assert problem.what == f"in the range [{low}, {high}], {low} is not below {high}"
    assert problem.where == "objective.sigma_range"


def test_a_range_without_noise_levels_is_refused(recipe_file: Path, runtime: Runtime) -> None:
    limits = ["objective.sigma_min=0.2", "objective.sigma_max=0.6", "objective.sigma_sampling=uniform"]
    (problem,) = check_all(load_recipe(recipe_file, [*limits, "objective.sigma_range=0.7,1"]), runtime, gpus=1)
    assert problem.what.startswith("there is no noise level in [0.7, 1.0]: those that there are go from 0.2")
    assert problem.what.endswith(" to 0.6000")
    assert problem.where == "objective.sigma_range"
    assert check_all(load_recipe(recipe_file, [*limits, "objective.sigma_range=0.5,1"]), runtime, gpus=1) == []


def test_groups_that_do_not_divide_the_ranks_are_refused(recipe_file: Path) -> None:
    hybrid = ["memory.layout=hybrid", "memory.shard_size=4", "train.global_batch_size=12", "train.micro_batch_size=1"]
    assert refused(recipe_file, *hybrid, world_size=6) == ["memory.shard_size"]
    assert refused(recipe_file, *hybrid, world_size=4) == []
    pairs = [*hybrid, "memory.shard_size=2", "train.global_batch_size=3"]
    (problem,) = check_recipe(load_recipe(recipe_file, pairs), 3)
    assert problem.cure == 'remove it, and set memory.layout = "shard"'  # groups of one are none


def test_a_batch_is_divided_by_data_ranks_not_by_gpus(recipe_file: Path, runtime: Runtime) -> None:
    """Four samples, two at a time, are too few for four ranks that each take their own, and enough for two pairs."""
    recipe = load_recipe(recipe_file)
    (problem,) = check_all(recipe, runtime, gpus=4)
    assert problem.where == "train.global_batch_size"
    assert check_all(recipe, replace(runtime, context_size=2), gpus=4) == []


ONE_EACH = ["train.global_batch_size=2", "train.micro_batch_size=1"]  # for two ranks
OFFLOAD, REPLICATE, FULL = "memory.offload=true", "memory.layout=replicate", "train.method=full"


@pytest.mark.parametrize(
    "overrides, world_size, expected",
    [
        ([OFFLOAD, REPLICATE], 1, []),
        ([OFFLOAD, REPLICATE, FULL], 2, ["memory.layout"]),
        ([OFFLOAD, "memory.resident_blocks=4"], 1, []),
        ([OFFLOAD, "memory.resident_blocks=4", REPLICATE], 2, []),
        ([OFFLOAD, "memory.resident_blocks=4"], 2, ["memory.resident_blocks"]),
        (["memory.resident_blocks=4"], 1, ["memory.resident_blocks"]),
        ([OFFLOAD, "memory.resident_blocks=4", FULL], 1, ["memory.resident_blocks"]),
        (["train.float8=true"], 1, ["train.float8"]),
        (["train.float8=true", FULL], 1, []),
    ],
)
def test_memory_savers_that_need_each_other(
    recipe_file: Path, overrides: list[str], world_size: int, expected: list[str]
) -> None:
    found = refused(recipe_file, *overrides, "train.micro_batch_size=1", world_size=world_size)
    assert [where for where in found if where != "lora"] == expected


@pytest.mark.parametrize(
    "overrides, times",
    [
        (["train.max_grad_norm=none", FULL], 0),
        ([FULL], 1),
        (["train.max_grad_norm=none"], 1),
        (["train.max_grad_norm=none", FULL, OFFLOAD], 1),
        (["train.max_grad_norm=none", FULL, "train.global_batch_size=8"], 1),
    ],
)
def test_updates_in_the_backward_pass_need_whole_batches_and_no_clipping(
    recipe_file: Path, overrides: list[str], times: int
) -> None:
    found = refused(recipe_file, "optimizer.in_backward=true", *ONE_EACH, *overrides, world_size=2)
    assert found.count("optimizer.in_backward") == times


class OldGpu(Device):
    name = "an old GPU"
    has_float8 = False


def test_a_device_without_float8_is_refused(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["train.float8=true", FULL])
    assert check_device(recipe, Device(torch.device("cpu"))) == []  # emulated
    found = check_device(recipe, OldGpu(torch.device("cuda")))
    assert [(problem.where, problem.cure) for problem in found] == [("train.float8", "set it to false")]


def test_full_finetuning_freezes_nothing_that_could_be_rounded(recipe_file: Path) -> None:
    assert "memory.low_bit" in refused(recipe_file, "train.method=full", "memory.low_bit=int8")
    assert refused(recipe_file, "memory.low_bit=int8") == []


def test_an_adapter_table_beside_full_finetuning_is_refused(recipe_file: Path) -> None:
    assert refused(recipe_file, "train.method=full") == ["lora"]


def test_a_model_folder_of_another_pipeline_is_named(recipe_file: Path, tiny_ltx: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_ltx, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "WanPipeline"}))
    with pytest.raises(UserError, match="this is WanPipeline, and family 'ltx' trains LTXPipeline or"):
        open_family(load_recipe(recipe_file, [f"model.path={folder}"]))


# The transformer's config against its weights


@pytest.fixture
def edited(tiny_ltx: Path, recipe_file: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """What is said of a model whose transformer's config or weights have been changed."""

    def check(edit: Callable[[dict], None] = lambda weights: None, **config: object) -> list[str]:
        folder = tmp_path / "model"
        shutil.copytree(tiny_ltx, folder)
        weights_file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        weights, config_file = load_file(weights_file), folder / "transformer" / "config.json"
        edit(weights)
        save_file(weights, weights_file, {"format": "pt"})
        config_file.write_text(json.dumps(json.loads(config_file.read_text()) | config))
        with pytest.raises(UserError) as caught:
            open_family(load_recipe(recipe_file, [f"model.path={folder}"]))
        assert all(problem.where == str(folder / "transformer") for problem in caught.value.problems)
        return [problem.what for problem in caught.value.problems]

    return check


def test_a_missing_tensor_is_named(edited: Callable[..., list[str]]) -> None:
    found = edited(lambda weights: weights.pop("proj_out.weight"))
    assert found == ["1 of the transformer's tensors are not in its weights, proj_out.weight among them"]


def test_a_tensor_of_another_shape_is_named(edited: Callable[..., list[str]]) -> None:
    def cut(weights: dict) -> None:
        weights["proj_out.weight"] = weights["proj_out.weight"][:3].clone()

    (found,) = edited(cut)
    assert re.fullmatch(r"proj_out.weight is 3x\d+ in its weights and \d+x\d+ by its config", found)


def test_blocks_that_the_config_leaves_out_are_named(edited: Callable[..., list[str]]) -> None:
    (found,) = edited(num_layers=1)
    assert re.search(r"tensors are not in its config, transformer_blocks.1.\S+ among them", found)


def test_other_tensors_than_the_blocks_may_be_there(recipe_file: Path, tiny_ltx: Path, tmp_path: Path) -> None:
    """As diffusers has it: checkpoints carry leftovers of older versions."""
    shutil.copytree(tiny_ltx, tmp_path / "model")
    file = tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"leftover": torch.zeros(1)}, file, {"format": "pt"})
    open_family(load_recipe(recipe_file, [f"model.path={tmp_path / 'model'}"]))


@pytest.mark.parametrize("resident, refused", [(1, False), (2, True), (99, True)])
def test_no_more_blocks_stay_than_there_are(recipe_file: Path, resident: int, refused: bool) -> None:
    recipe = load_recipe(recipe_file, [OFFLOAD, f"memory.resident_blocks={resident}"])
    with pytest.raises(UserError, match="the model has 2 blocks") if refused else nullcontext():
        open_family(recipe)


def test_a_folder_of_another_training_is_refused_and_free_keys_may_change(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    recipe.output.mkdir()
    write_recipe(recipe, recipe.output / "recipe.toml")
    check_output(load_recipe(recipe_file, ["lora.rank=8"]))  # nothing was trained in it
    (recipe.output / "checkpoints" / "step_00000001").mkdir(parents=True)
    (recipe.output / "checkpoints" / "step_00000001" / "trainer.json").touch()
    check_output(load_recipe(recipe_file, ["optimizer.lr=0.5", "train.steps=20"]))
    with pytest.raises(UserError, match=r"lora.rank = 4 there, 8 here"):
        check_output(load_recipe(recipe_file, ["lora.rank=8"]))


def test_a_held_out_clip_that_is_trained_on_is_refused(recipe_file: Path, runtime, clips: Path, tmp_path: Path) -> None:
    for name in ("wide.mp4", "wide.txt"):
        (tmp_path / "heldout").mkdir(exist_ok=True)
        shutil.copy(clips / name, tmp_path / "heldout" / name)
    recipe = load_recipe(recipe_file, [f"validation.heldout={tmp_path / 'heldout'}"])
    with pytest.raises(UserError, match="this held-out clip is trained on, too"):
        prepare(recipe, open_family(recipe), runtime)


def test_a_run_in_its_dataset_s_folder_does_not_train_on_its_own_samples(
    recipe_file: Path, runtime: Runtime, clips: Path, tmp_path: Path
) -> None:
    def recipe(output: Path) -> Recipe:
        return load_recipe(recipe_file, [f"data.path={data}", f"data.cache={data / 'cache'}", f"output={output}"])

    data = shutil.copytree(clips, tmp_path / "own")
    for samples in (data / "run" / "samples", data / "samples"):
        samples.mkdir(parents=True)
        shutil.copy(clips / "wide.mp4", samples / "00_seed0.mp4")
    (problem,) = check_all(recipe(data / "run"), runtime, gpus=1)
    assert problem.where == str(data / "samples" / "00_seed0.mp4")
    assert len(check_all(recipe(tmp_path / "elsewhere"), runtime, gpus=1)) == 2
    shutil.rmtree(data / "run")
    assert check_all(recipe(data), runtime, gpus=1) == []
    assert len(prepare(recipe(data), open_family(recipe(data)), runtime).train) == len(list(clips.glob("*.txt")))
