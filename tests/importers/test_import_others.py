"""ai-toolkit's YAML and SimpleTuner's JSON: each setting is in the recipe, or named with the reason."""

import json
from pathlib import Path

import pytest
from imported import imported

from finetune.runtime.errors import UserError

JOB = """\
job: extension
config:
  name: "waves"
  process:
    - type: 'sd_trainer'
      training_folder: "output"
      device: cuda:0
      trigger_word: "w4ves"
      network: {type: "lora", linear: 16, linear_alpha: 8}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4, push_to_hub: false}
      datasets:
        - folder_path: "clips"
          caption_ext: "txt"
          caption_dropout_rate: 0.05
          num_frames: 40
          resolution: [480, 632]
      train:
        batch_size: 2
        steps: 2000
        gradient_accumulation: 3
        gradient_checkpointing: true
        timestep_type: 'sigmoid'
        optimizer: "adamw8bit"
        lr: 1e-4
        optimizer_params: {weight_decay: 1e-4}
        ema_config: {use_ema: true, ema_decay: 0.99}
        dtype: bf16
        new_key: 3
      model: {name_or_path: "Wan-AI/Wan2.1-T2V-14B-Diffusers", arch: 'wan21', quantize: true, low_vram: true}
      sample:
        sample_every: 200
        width: 832
        height: 480
        num_frames: 41
        fps: 16
        prompts: ["[trigger] breaks", "a calm sea"]
        neg: "blurry"
        seed: 42
        guidance_scale: 5
        sample_steps: 30
"""
CONFIG = {
    "model_family": "wan",
    "model_flavour": "t2v-480p-1.3b-2.1",
    "model_type": "lora",
    "lora_rank": 16,
    "--max_train_steps": 200,
    "num_train_epochs": 0,
    "train_batch_size": 2,
    "learning_rate": "6e-5",
    "optimizer": "adamw_bf16",
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 50,
    "max_grad_norm": 0.1,
    "base_model_precision": "int8-torchao",
    "gradient_checkpointing": True,
    "checkpoint_step_interval": 100,
    "checkpoints_total_limit": 5,
    "caption_dropout_probability": 0.1,
    "data_backend_config": "config/backend.json",
    "resolution": 480,
    "resolution_type": "pixel_area",
    "validation_prompt": "A wave breaks.",
    "validation_resolution": "832x480",
    "validation_num_video_frames": 80,
    "validation_steps": 50,
    "use_ema": False,
    "report_to": "none",
    "tracker_project_name": "waves",
    "mixed_precision": "bf16",
    "new_key": 1,
}
BACKEND = [
    {
        "id": "one",
        "type": "local",
        "dataset_type": "video",
        "instance_data_dir": "clips/one",
        "repeats": 4,
        "video": {"num_frames": 80},
        "caption_strategy": "textfile",
    },
    {"id": "two", "type": "local", "dataset_type": "image", "instance_data_dir": "images"},
    {"id": "embeds", "dataset_type": "text_embeds", "type": "local", "default": True},
]


def test_ai_toolkit(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(JOB)
    made = imported(job)
    recipe = made.recipe
    assert (recipe.model.family, recipe.memory.low_bit, str(recipe.output)) == ("wan", "float8", "output/waves")
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.ema.decay) == (16, 8, 0.99)
    assert (recipe.train.global_batch_size, recipe.train.steps, recipe.optimizer.lr) == (6, 2000, 1e-4)
    assert (str(recipe.data.area), recipe.data.frames, recipe.data.fps, recipe.data.id_token) == (
        "632x632",
        [37],
        16,
        "w4ves",
    )
    assert (recipe.objective.sigma_sampling, recipe.objective.shift) == ("logit_normal", 1)
    assert (recipe.checkpoint.every, recipe.checkpoint.keep_last, recipe.validation.samples_every) == (250, 4, 200)
    assert [prompt.text for prompt in recipe.validation.prompts] == ["w4ves breaks", "a calm sea"]
    assert made.line("train.new_key").startswith("unknown")
    assert made.problems(tmp_path) == []


def test_simpletuner(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "backend.json").write_text(json.dumps(BACKEND))
    config = tmp_path / "config" / "config.json"
    config.write_text(json.dumps(CONFIG))
    made = imported(config)
    recipe = made.recipe
    assert (recipe.model.family, recipe.model.path) == ("wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert (recipe.train.steps, recipe.train.global_batch_size, recipe.optimizer.lr) == (200, 2, 6e-5)
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.memory.low_bit) == (16, 16, "int8")
    assert [(str(each.path), each.repeats) for each in recipe.data.sources] == [("clips/one", 5), ("images", 1)]
    assert (str(recipe.data.area), recipe.data.frames, recipe.objective.shift) == ("480x480", [1, 77], 3)
    assert [str(prompt.shape) for prompt in recipe.validation.prompts] == ["77x480x832"]
    assert "none of them is on" in made.line("tracker_project_name")
    assert made.line("new_key").startswith("unknown")
    assert made.problems(tmp_path) == []


@pytest.mark.parametrize(
    "old, new, what",
    [
        ("arch: 'wan21'", "arch: 'flux'", "'flux' is no model that can be trained here"),
        ("steps: 2000", "steps: many", "train.steps: many is no whole number"),
        ("folder_path", "other_path", "a dataset has no folder_path"),
        ("network: {", "network: 3 # {", "network: 3 is no table"),
    ],
)
def test_a_job_that_no_recipe_can_be_made_of(old: str, new: str, what: str, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(JOB.replace(old, new))
    with pytest.raises(UserError, match=what):
        imported(job)


def test_a_config_without_its_data_backends_asks_for_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match=r"config/backend.json is not here"):
        imported(tmp_path / "config.json")
