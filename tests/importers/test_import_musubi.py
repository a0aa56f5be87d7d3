"""musubi-tuner's command and dataset: each setting is in the recipe, or named with the reason."""

from pathlib import Path

import pytest
from imported import imported

from finetune.runtime.errors import UserError

COMMAND = """\
accelerate launch --num_cpu_threads_per_process 1 --num_processes 2 src/musubi_tuner/wan_train_network.py \\
  --task t2v-14B --dit wan2.1_t2v_14B_bf16.safetensors --vae vae.pth --t5 t5.pth --dataset_config dataset.toml \\
  --sdpa --mixed_precision bf16 --fp8_base --fp8_scaled --optimizer_type adamw8bit --learning_rate 2e-4 \\
  --optimizer_args weight_decay=0.1 "betas=(0.9,0.95)" amsgrad=True --gradient_checkpointing --gradient_accumulation_steps 2 \\
  --network_module networks.lora_wan --network_dim 32 --network_args "loraplus_lr_ratio=4" \\
  --timestep_sampling shift --discrete_flow_shift 3.0 --sigmoid_scale 0.8 --max_train_steps 640 --save_every_n_steps 160 \\
  --lr_scheduler cosine --lr_warmup_steps 0.1 --seed 42 --sample_prompts prompts.txt --sample_every_n_steps 80 \\
  --output_dir out --output_name waves --no_such_setting
"""
DATASET = """\
[general]
resolution = [832, 480]
caption_extension = ".txt"
batch_size = 2
enable_bucket = false
[[datasets]]
video_directory = "clips"
cache_directory = "cache"
target_frames = [1, 26, 45]
frame_extraction = "uniform"
frame_sample = 3
source_fps = 30.0
num_repeats = 2
[[datasets]]
image_directory = "images"
"""
PROMPTS = "# a comment\nA wave breaks. --w 832 --h 480 --f 81 --d 7 --s 20 --l 5.0 --n blurry\n\nA calm sea.\n"


def write(folder: Path, command: str = COMMAND, dataset: str = DATASET) -> Path:
    (folder / "dataset.toml").write_text(dataset)
    (folder / "prompts.txt").write_text(PROMPTS)
    (folder / "train.sh").write_text(command)
    return folder / "train.sh"


def test_command_and_dataset(tmp_path: Path) -> None:
    made = imported(write(tmp_path))
    recipe = made.recipe
    assert (recipe.model.family, recipe.model.path) == ("wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers")
    assert (recipe.train.global_batch_size, recipe.train.micro_batch_size, recipe.train.steps) == (8, 2, 640)
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.plus_ratio) == (32, 1, 4)
    assert "takes 1" in made.line("--network_alpha")
    assert (recipe.objective.sigma_sampling, recipe.objective.logit_std, recipe.objective.shift) == (
        "logit_normal",
        0.8,
        3,
    )
    assert (recipe.optimizer.name, recipe.optimizer.lr) == ("adamw_8bit", 2e-4)
    assert recipe.optimizer.betas == [0.9, 0.95]  # type: ignore[attr-defined]  # of AdamW
    assert made.line("--optimizer_args amsgrad").startswith("dropped")
    assert (recipe.schedule.name, recipe.schedule.warmup_steps) == ("cosine", 64)
    assert (recipe.memory.low_bit, recipe.checkpoint.every, recipe.validation.samples_every) == ("float8", 160, 80)
    assert str(recipe.output) == "out/waves"
    assert made.line("--no_such_setting").startswith("unknown")
    first, second = recipe.validation.prompts
    assert (first.text, str(first.shape), first.seed, first.steps, first.guidance, first.negative) == (
        "A wave breaks.",
        "81x480x832",
        7,
        20,
        5,
        "blurry",
    )
    assert (second.text, second.shape) == ("A calm sea.", None)
    assert made.problems(tmp_path) == []


def test_datasets(tmp_path: Path) -> None:
    made = imported(write(tmp_path))
    data = made.recipe.data
    assert list(map(str, data.buckets)) == ["1x480x832", "25x480x832", "45x480x832"]
    assert [(str(each.path), each.repeats) for each in data.sources] == [("clips", 2), ("images", 1)]
    assert (data.fps, data.window, data.windows) == (16, "random", 3)
    found = imported(write(tmp_path, dataset=DATASET.replace("enable_bucket = false", "enable_bucket = true")))
    assert (str(found.recipe.data.area), found.recipe.data.frames) == ("480x832", [1, 25, 45])
    assert found.problems(tmp_path) == []


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (
            "--timestep_sampling sigma --weighting_scheme logit_normal --logit_std 0.5 --discrete_flow_shift 5",
            ("logit_normal", 0.5, 5),
        ),
        ("--timestep_sampling sigma --discrete_flow_shift 5", ("uniform", 1, 5)),
        ("--timestep_sampling uniform --discrete_flow_shift 5", ("uniform", 1, 1)),
        ("--timestep_sampling sigmoid --sigmoid_scale 0.5", ("logit_normal", 0.5, 1)),
        ("--timestep_sampling flux_shift --discrete_flow_shift 5", ("logit_normal", 1, "scheduler")),
        ("", ("uniform", 1, 1)),
    ],
)
def test_which_settings_of_the_noise_are_read_depends_on_the_sampling(
    sampling: str, expected: tuple[str, float, float | str], tmp_path: Path
) -> None:
    old = "--timestep_sampling shift --discrete_flow_shift 3.0 --sigmoid_scale 0.8"
    made = imported(write(tmp_path, COMMAND.replace(old, sampling)))
    objective = made.recipe.objective
    assert (objective.sigma_sampling, objective.logit_std, objective.shift) == expected
    assert made.problems(tmp_path) == []


@pytest.mark.parametrize(
    "task, more, family, experts",
    [
        ("i2v-14B", "", "wan_i2v", None),
        ("t2v-A14B", "--min_timestep 875 --max_timestep 1000", "wan", ["high"]),
        ("t2v-A14B", "--min_timestep 0 --max_timestep 875", "wan", ["low"]),
        ("i2v-A14B", "--dit_high_noise high.safetensors", "wan_i2v", ["high", "low"]),
    ],
)
def test_tasks(task: str, more: str, family: str, experts: list[str] | None, tmp_path: Path) -> None:
    command = (
        COMMAND.replace("t2v-14B", task, 1).replace("--no_such_setting", more).replace("wan2.1_t2v_14B_bf16", "wan")
    )
    made = imported(write(tmp_path, command))
    assert (made.recipe.model.family, made.recipe.model.experts) == (family, experts)
    assert made.problems(tmp_path) == []


@pytest.mark.parametrize(
    "keeps, expected", [("--preserve_distribution_shape", ([0.2, 0.9], 0, 1)), ("", (None, 0.2, 0.9))]
)
def test_a_range_of_timesteps(keeps: str, expected: tuple[list[float] | None, float, float], tmp_path: Path) -> None:
    more = f"--min_timestep 200 --max_timestep 900 {keeps}"
    objective = imported(write(tmp_path, COMMAND.replace("--no_such_setting", more))).recipe.objective
    assert (objective.sigma_range, objective.sigma_min, objective.sigma_max) == expected


def test_a_config_file(tmp_path: Path) -> None:
    write(tmp_path)
    config = tmp_path / "wan.toml"
    config.write_text(
        'network_module = "networks.lora_wan"\nnetwork_dim = 8\nnetwork_alpha = 8\n'
        'task = "t2v-1.3B"\ndataset_config = "dataset.toml"\n'
    )
    made = imported(config)
    assert (made.recipe.lora.rank, made.recipe.lora.alpha, made.recipe.train.steps) == (8, 8, 1600)
    assert made.problems(tmp_path) == []


@pytest.mark.parametrize(
    "old, new, what",
    [
        ("wan_train_network.py", "qwen_image_train_network.py", "qwen_image_train_network.py trains no model"),
        ("t2v-14B", "t2v-14B-FC", "--task t2v-14B-FC is no model"),
        ("--dataset_config dataset.toml", "--dataset_config gone.toml", "--dataset_config gone.toml is not here"),
    ],
)
def test_what_no_recipe_can_be_made_of_is_an_error_that_names_it(old: str, new: str, what: str, tmp_path: Path) -> None:
    command = COMMAND.replace(old, new, 1)
    if "qwen" in new:
        command = command.replace("networks.lora_wan", "networks.lora_qwen_image")
    with pytest.raises(UserError, match=what):
        imported(write(tmp_path, command))


@pytest.mark.parametrize(
    "kind, lengths, repeats, items",
    [
        ("head", "[1, 25, 45]", 1, 3),
        ("head", "[25]", 4, 4),
        ("uniform", "[25, 45]", 2, 2 * 2 * 3),
        ("chunk", "[25]", 1, 1),
    ],
)
def test_an_epoch_has_an_item_of_each_length_and_repeat(
    tmp_path: Path, kind: str, lengths: str, repeats: int, items: int
) -> None:
    command = COMMAND.replace("--max_train_steps 640", "--max_train_epochs 16").replace("--num_processes 2", "")
    command = command.replace("--gradient_accumulation_steps 2", "")
    dataset = (
        f'[[datasets]]\nresolution = [832, 480]\nvideo_directory = "nowhere"\ntarget_frames = {lengths}\n'
        f'frame_extraction = "{kind}"\nframe_sample = 3\nnum_repeats = {repeats}\nbatch_size = 2\n'
    )
    made = imported(write(tmp_path, command, dataset), clips=10)
    assert made.recipe.train.steps == 16 * 10 * items / 2
    without = imported(write(tmp_path, command, dataset))
    often = f" x {items}" if items > 1 else ""
    assert any(f"train.steps: set it to 16 x clips{often} / 2" in what for what in without.draft.todo)
