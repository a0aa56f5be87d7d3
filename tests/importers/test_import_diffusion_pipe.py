"""diffusion-pipe's two TOMLs: each setting is in the recipe, or named with the reason."""

from pathlib import Path

import pytest
from imported import Imported, imported

from finetune.runtime.errors import UserError

CONFIG = """\
output_dir = "runs/style"
dataset = "dataset.toml"
max_steps = 800
micro_batch_size_per_gpu = 2
pipeline_stages = 1
gradient_accumulation_steps = 4
gradient_clipping = 0.5
warmup_steps = 20
blocks_to_swap = 16
save_every_n_steps = 200
eval_every_n_steps = 100
eval_datasets = [{name = "held", config = "held.toml"}]
activation_checkpointing = "unsloth"
compile = true
save_dtype = "bfloat16"
video_clip_mode = "single_middle"
uncond_fraction = 0.1
frobnicate = 3
[model]
type = "wan"
ckpt_path = "/models/Wan2.1-T2V-1.3B"
dtype = "bfloat16"
transformer_dtype = "float8"
timestep_sample_method = "logit_normal"
shift = 3
[adapter]
type = "lora"
rank = 16
dtype = "bfloat16"
[optimizer]
type = "AdamW8bitKahan"
lr = 2e-5
betas = [0.9, 0.99]
weight_decay = 0.01
stabilize = false
[monitoring]
enable_wandb = true
wandb_api_key = "secret"
wandb_tracker_name = "styles"
wandb_run_name = "first"
"""

DATASET = """\
resolutions = [512]
enable_ar_bucket = true
min_ar = 0.5
max_ar = 2.0
num_ar_buckets = 5
frame_buckets = [1, 32]
caption_prefix = "STYLE, "
[[directory]]
path = "clips/one"
num_repeats = 3
[[directory]]
path = "clips/two"
mask_path = "masks"
"""

HELD = '[[directory]]\npath = "clips/held"\n'


@pytest.fixture
def made(tmp_path: Path) -> Imported:
    return imported(*write(tmp_path))


def write(folder: Path, config: str = CONFIG, dataset: str = DATASET) -> list[Path]:
    for name, text in (("config", config), ("dataset", dataset), ("held", HELD)):
        (folder / f"{name}.toml").write_text(text)
    return [folder / "config.toml"]


def test_the_training(made: Imported, tmp_path: Path) -> None:
    recipe = made.recipe
    assert (recipe.model.family, recipe.model.path) == ("wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert (recipe.train.steps, recipe.train.global_batch_size, recipe.train.micro_batch_size) == (800, 8, 2)
    assert (recipe.lora.rank, recipe.lora.alpha) == (16, 16)
    assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.train.max_grad_norm) == ("adamw_8bit", 2e-5, 0.5)
    assert (recipe.schedule.name, recipe.schedule.warmup_steps) == ("constant_with_warmup", 20)
    assert (recipe.objective.sigma_sampling, recipe.objective.shift) == ("logit_normal", 3)
    memory = recipe.memory
    assert (memory.low_bit, memory.offload, memory.offload_activations, memory.compile) == ("float8", True, True, True)
    assert (recipe.checkpoint.every, recipe.validation.every, str(recipe.validation.heldout)) == (
        200,
        100,
        "clips/held",
    )
    assert (recipe.tracking.trackers, recipe.tracking.project, recipe.tracking.name) == (["wandb"], "styles", "first")
    assert made.problems(tmp_path) == []


def test_the_dataset(made: Imported) -> None:
    data = made.recipe.data
    assert (str(data.area), data.frames, data.bucket_count, data.fps, data.window) == (
        "512x512",
        [1, 29],
        5,
        16,
        "centre",
    )
    sources = [(str(each.path), each.repeats, each.id_token) for each in data.sources]
    assert sources == [("clips/one", 3, "STYLE"), ("clips/two", 1, "STYLE")]
    assert data.caption_dropout == 0.1
    assert "[1, 32] are [1, 29]" in made.line("resolutions")


def test_what_became_of_a_setting_is_said_in_a_line(made: Imported) -> None:
    assert made.line("adapter.rank") == "kept     adapter.rank = 16 -> lora.rank = 16"
    assert "in the layout of diffusers" in made.line("model.ckpt_path")
    assert made.line("alpha cannot be set there").startswith("default")
    assert made.line("frobnicate").startswith("unknown  frobnicate = 3")
    assert made.line("directory[1].mask_path").startswith("dropped")
    assert "secret" not in "\n".join(map(str, made.draft.notes))


def test_sizes_are_buckets(tmp_path: Path) -> None:
    sizes = 'size_buckets = [[832, 480, 33], [480, 832, 81]]\n[[directory]]\npath = "clips"\n'
    made = imported(*write(tmp_path, dataset=sizes))
    assert list(map(str, made.recipe.data.buckets)) == ["33x480x832", "81x832x480"]
    assert made.problems(tmp_path) == []


def test_without_an_adapter_all_weights_are_trained(tmp_path: Path) -> None:
    config = CONFIG.replace('[adapter]\ntype = "lora"\nrank = 16\ndtype = "bfloat16"\n', "").replace(
        '"AdamW8bitKahan"', '"offload"'
    )
    made = imported(*write(tmp_path, config))
    assert (made.recipe.train.method, made.recipe.optimizer.offload) == ("full", "state")
    assert made.problems(tmp_path) == []


@pytest.mark.parametrize(
    "old, new, family, checkpoint",
    [
        ("Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        ("Wan2.1-T2V-1.3B", "Wan2.1-I2V-14B-480P", "wan_i2v", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"),
        ("Wan2.1-T2V-1.3B", "Wan2.2-TI2V-5B", "wan", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
        ("Wan2.1-T2V-1.3B", "Wan2.2-T2V-A14B/low_noise_model", "wan", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
        ('type = "wan"', 'type = "hunyuan-video"', "hunyuan", "hunyuanvideo-community/HunyuanVideo"),
        (
            'type = "wan"',
            'type = "hunyuan_video_15"',
            "hunyuan15",
            "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
        ),
        ('type = "wan"', 'type = "ltx-video"', "ltx", "Lightricks/LTX-Video"),
    ],
)
def test_models(old: str, new: str, family: str, checkpoint: str, tmp_path: Path) -> None:
    made = imported(*write(tmp_path, CONFIG.replace(old, new)))
    assert (made.recipe.model.family, made.recipe.model.path) == (family, checkpoint)
    assert made.recipe.model.experts == (["low"] if "low_noise" in new else None)
    assert made.problems(tmp_path) == []


def test_a_command_names_the_file_and_the_gpus(tmp_path: Path) -> None:
    write(tmp_path)
    command = tmp_path / "run.sh"
    command.write_text(
        "NCCL_P2P_DISABLE=1 deepspeed --num_gpus=2 train.py --deepspeed --config config.toml --regenerate_cache\n"
    )
    made = imported(command)
    assert made.recipe.train.global_batch_size == 16
    assert made.line("--regenerate_cache").startswith("dropped")
    assert made.problems(tmp_path) == []


@pytest.mark.parametrize(
    "old, new, what",
    [
        ('type = "wan"', 'type = "sdxl"', "'sdxl' is no model that can be trained here"),
        ("rank = 16", 'rank = "x"', "adapter.rank: x is no whole number"),
        ('dataset = "dataset.toml"', 'dataset = "gone.toml"', "finetune import .*config.toml dataset.toml"),
        ("[optimizer]", "[optimizer", "not valid TOML"),
    ],
)
def test_what_no_recipe_can_be_made_of_is_an_error_that_names_it(old: str, new: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=what):
        imported(*write(tmp_path, CONFIG.replace(old, new)))


@pytest.mark.parametrize("resolutions", ["[]", '["a"]', "[[512]]", "3", "[-1]"])
def test_odd_resolutions(resolutions: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="resolutions"):
        imported(*write(tmp_path, dataset=DATASET.replace("[512]", resolutions)))


@pytest.mark.parametrize("resolutions, repeats, items", [("[512]", 1, 1), ("[512, 768]", 1, 2), ("[512, 768]", 5, 10)])
def test_an_epoch_has_an_item_of_each_resolution_and_repeat(
    tmp_path: Path, resolutions: str, repeats: int, items: int
) -> None:
    config = 'output_dir = "out"\ndataset = "dataset.toml"\nepochs = 7\nmicro_batch_size_per_gpu = 1\n'
    config += '[model]\ntype = "wan"\nckpt_path = "/models/Wan2.1-T2V-1.3B"\ndtype = "bfloat16"\n'
    config += '[adapter]\ntype = "lora"\nrank = 16\n[optimizer]\ntype = "adamw"\nlr = 2e-5\n'
    dataset = (
        f'resolutions = {resolutions}\nframe_buckets = [33]\n[[directory]]\npath = "nowhere"\nnum_repeats = {repeats}\n'
    )
    assert imported(*write(tmp_path, config, dataset), clips=10).recipe.train.steps == 7 * 10 * items
