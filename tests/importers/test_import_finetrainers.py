"""finetrainers, first and last release, and cogvideox-factory: each setting is in the recipe, or named with the reason."""

import json
from pathlib import Path

import pytest
from imported import imported

from finetune.recipe.schema import Recipe
from finetune.runtime.errors import UserError

FIRST = """\
#!/bin/bash
GPUS="0,1"
OUT="runs/waves"
model_cmd="--model_name ltx_video \\
  --pretrained_model_name_or_path Lightricks/LTX-Video"
data_cmd="--data_root clips --video_column videos.txt --caption_column prompts.txt --id_token WAVES \\
  --video_resolution_buckets 50x500x768 17x256x256 --caption_dropout_p 0.1"
train_cmd="--training_type lora --seed 7 --batch_size 2 --train_steps 900 --rank 32 --lora_alpha 16 \\
  --target_modules to_q to_k --gradient_accumulation_steps 3 --gradient_checkpointing \\
  --checkpointing_steps 300 --checkpointing_limit 4 --validation_steps 150 \\
  --flow_weighting_scheme logit_normal --flow_shift 5"
valid_cmd="--validation_prompts \\"A wave breaks.@@@49x512x768:::A calm sea.\\" \\
  --num_validation_videos 2 --validation_frame_rate 24"
optim_cmd="--optimizer adamw --use_8bit_bnb --lr 3e-5 --lr_scheduler linear --lr_warmup_steps 50 --beta1 0.8 --beta2 0.99 \\
  --weight_decay 1e-3 --epsilon 1e-7 --max_grad_norm 0.5 --enable_tiling --pin_memory --no_such_setting 3"
cmd="accelerate launch --config_file accelerate_configs/uncompiled_2.yaml --gpu_ids $GPUS train.py $model_cmd $data_cmd \\
  $train_cmd $valid_cmd $optim_cmd --output_dir $OUT"
echo "Running: $cmd"
eval $cmd
"""

LAST = """\
NUM=4
PARALLEL="--parallel_backend ptd --dp_degree 2 --dp_shards 2 --pp_degree 1 --cp_degree 1 --tp_degree 1"
training=(
  --training_type "full-finetune"
  --batch_size 1
  --train_steps 1200
  --gradient_accumulation_steps 4
  --checkpointing_steps 400 # passes
  --validation_steps 200
  --layerwise_upcasting_modules transformer
  --compile_modules transformer
)
torchrun --standalone --nproc_per_node=$NUM train.py $PARALLEL --model_name wan \\
  --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --dataset_config training.json \\
  "${training[@]}" --optimizer adam --lr 1e-5 --lr_scheduler constant --lr_warmup_steps 1000 \\
  --validation_dataset_file validation.json --output_dir out
"""

TRAINING = {
    "datasets": [
        {
            "data_root": "clips/one",
            "dataset_type": "video",
            "id_token": "ONE",
            "video_resolution_buckets": [[49, 480, 832], [81, 480, 832]],
            "reshape_mode": "bicubic",
            "remove_common_llm_caption_prefixes": True,
        },
        {"data_root": "clips/two", "dataset_type": "image", "image_resolution_buckets": [[480, 832]], "new_key": 1},
    ]
}
VALIDATION = {
    "data": [
        {
            "caption": "A boat.",
            "image_path": None,
            "video_path": None,
            "num_inference_steps": 40,
            "height": 480,
            "width": 832,
            "num_frames": 50,
            "frame_rate": 16,
        }
    ]
}

FACTORY = """\
RATES=("1e-4" "2e-4")
for rate in "${RATES[@]}"; do
  cmd="accelerate launch --num_processes 1 training/cogvideox/cogvideox_image_to_video_lora.py \\
    --pretrained_model_name_or_path THUDM/CogVideoX-5b-I2V --data_root clips --caption_column prompt.txt \\
    --video_column videos.txt --id_token TOK --height_buckets 480 --width_buckets 720 --frame_buckets 49 \\
    --train_batch_size 1 --max_train_steps 500 \\
    --learning_rate $rate --lr_scheduler cosine_with_restarts --lr_warmup_steps 100 --lr_num_cycles 2 --optimizer prodigy \\
    --mixed_precision bf16 --gradient_checkpointing --noised_image_dropout 0.1 --output_dir out_$rate \\
    --validation_prompt \\"A cat:::A dog\\" --validation_images \\"cat.png\\" --allow_tf32"
  eval $cmd
done
"""


def write(folder: Path, **files: object) -> list[Path]:
    paths = []
    for name, content in files.items():
        path = folder / (f"{name}.sh" if isinstance(content, str) else f"{name}.json")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        paths.append(path)
    return paths


def test_the_first_release(tmp_path: Path) -> None:
    made = imported(*write(tmp_path, train=FIRST))
    recipe = made.recipe
    assert (recipe.model.family, recipe.model.path) == ("ltx", "Lightricks/LTX-Video")
    assert list(map(str, recipe.data.buckets)) == ["49x512x768", "17x256x256"]
    assert (recipe.train.global_batch_size, recipe.train.micro_batch_size, recipe.train.steps) == (12, 2, 900)
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) == (32, 16, ["to_q", "to_k"])
    assert (recipe.optimizer.name, recipe.optimizer.lr) == ("adamw_8bit", 3e-5)
    assert recipe.optimizer.betas == [0.8, 0.99]  # type: ignore[attr-defined]  # of AdamW
    assert (recipe.schedule.name, recipe.schedule.warmup_steps) == ("linear", 50)
    assert (recipe.data.id_token, recipe.data.caption_dropout) == ("WAVES", 0.1)
    assert (recipe.checkpoint.every, recipe.checkpoint.keep_last, recipe.validation.samples_every) == (300, 4, 150)
    texts = [(prompt.text, str(prompt.shape or ""), prompt.count, prompt.fps) for prompt in recipe.validation.prompts]
    assert texts == [("A wave breaks.", "49x512x768", 2, 24), ("A calm sea.", "", 2, 24)]
    assert made.problems(tmp_path) == []


def test_what_became_of_a_setting_is_said_in_a_line(tmp_path: Path) -> None:
    made = imported(*write(tmp_path, train=FIRST))
    assert made.line("--rank") == "kept     --rank 32 -> lora.rank = 32"
    assert made.line("--lr 3e-5") == "kept     --lr 3e-5 -> optimizer.lr = 3e-05"
    assert made.line("--checkpointing_steps") == "renamed  --checkpointing_steps 300 -> checkpoint.every = 300"
    assert "2 a GPU x 3 accumulated x 2 GPUs" in made.line("--batch_size")
    assert made.line("--batch_size").startswith("changed")
    assert "50x500x768 is 49x512x768" in made.line("--video_resolution_buckets")
    assert "never read there" in made.line("--flow_shift")
    assert made.recipe.objective.shift == 1
    assert made.line("--pin_memory").startswith("dropped  --pin_memory: ")
    assert made.line("--no_such_setting").startswith("unknown  --no_such_setting 3")


def test_the_last_release_counts_passes_and_names_its_datasets_in_a_file(tmp_path: Path) -> None:
    made = imported(*write(tmp_path, train=LAST, training=TRAINING, validation=VALIDATION))
    recipe = made.recipe
    assert recipe.train.method == "full"
    assert (recipe.train.global_batch_size, recipe.train.steps) == (16, 300)
    assert (recipe.checkpoint.every, recipe.validation.samples_every) == (100, 50)
    assert "each pass counted as a step" in made.line("--train_steps")
    assert (recipe.memory.layout, recipe.memory.shard_size) == ("hybrid", 2)
    assert recipe.memory.activation_checkpointing == "none"
    assert recipe.memory.low_bit == "none"
    assert "no weight is frozen" in made.line("--layerwise_upcasting_modules")
    sources = [(str(each.path), each.id_token) for each in recipe.data.sources]
    assert sources == [("clips/one", "ONE"), ("clips/two", None)]
    assert list(map(str, recipe.data.buckets)) == ["49x480x832", "81x480x832", "1x480x832"]
    assert recipe.schedule.warmup_steps == 0
    assert "has no warm-up, there as here" in made.line("--lr_warmup_steps")
    assert [(each.text, str(each.shape), each.steps) for each in recipe.validation.prompts] == [
        ("A boat.", "49x480x832", 40)
    ]
    assert made.line("datasets[1].new_key").startswith("unknown")
    assert made.problems(tmp_path) == []


def test_files_that_a_script_names_are_read_where_they_lie(tmp_path: Path) -> None:
    script, *_ = write(tmp_path, train=LAST, training=TRAINING, validation=VALIDATION)
    assert imported(script).recipe.data.sources


def test_cogvideox_factory(tmp_path: Path) -> None:
    made = imported(*write(tmp_path, train=FACTORY))
    recipe = made.recipe
    assert (recipe.model.family, recipe.optimizer.name) == ("cogvideox_i2v", "prodigy")
    assert (recipe.data.image_dropout, recipe.vae.image_noise) == (0.1, True)
    assert (recipe.schedule.cycles, recipe.train.steps) == (2, 500)
    assert str(recipe.output) == "out_1e-4"
    assert [prompt.image for prompt in recipe.validation.prompts] == ["cat.png"]
    assert "1 of 2 prompts" in made.line("1 of 2")
    assert any("$rate 2 values" in what for what in made.draft.todo)
    assert made.problems(tmp_path) == []


def test_epochs_are_counted_from_the_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = FIRST.replace("--train_steps 900", "--train_epochs 4")
    (tmp_path / "clips").mkdir()
    for number in range(30):
        (tmp_path / "clips" / f"{number}.mp4").touch()
        (tmp_path / "clips" / f"{number}.txt").touch()
    assert imported(*write(tmp_path, train=script)).recipe.train.steps == 4 * 30 / 12
    assert imported(*write(tmp_path, train=script), clips=90).recipe.train.steps == 4 * 90 / 12
    (tmp_path / "clips").rename(tmp_path / "elsewhere")
    without = imported(*write(tmp_path, train=script))
    assert any("train.steps: set it to 4 x clips / 12" in what for what in without.draft.todo)


def test_a_dataset_on_the_hub_says_how_it_is_fetched(tmp_path: Path) -> None:
    made = imported(*write(tmp_path, train=FIRST.replace("--data_root clips", "--data_root someone/waves")))
    assert str(made.recipe.data.path) == "someone/waves"
    assert any(
        "hf download --repo-type dataset someone/waves --local-dir someone/waves" in what for what in made.draft.todo
    )


def test_tokens_are_not_printed(tmp_path: Path) -> None:
    made = imported(*write(tmp_path, train=FIRST.replace("--pin_memory", "--hub_token hf_abcdef")))
    assert "hf_abcdef" not in "\n".join(map(str, made.draft.notes))


@pytest.mark.parametrize(
    "old, new, what",
    [
        ("--model_name ltx_video", "--model_name flux", "'flux' is no model that can be trained here"),
        ("--training_type lora", "--training_type control-lora", "trains a control model"),
        ("50x500x768", "50x500", "'50x500' is not a bucket"),
        ("--rank 32", "--rank many", "--rank: many is no whole number"),
        ("--rank 32", "--rank", "--rank: it has no value; it takes whole number"),
        ("--seed 7", "--seed $SEED", "a variable of the shell must be set in the script itself"),
        ("--data_root clips", "", "the command names no --data_root"),
        ("--pretrained_model_name_or_path", "--other", "--pretrained_model_name_or_path is not there"),
    ],
)
def test_what_no_recipe_can_be_made_of_is_an_error_that_names_it(old: str, new: str, what: str, tmp_path: Path) -> None:
    assert old in FIRST
    with pytest.raises(UserError, match=what.replace("(", r"\(")) as caught:
        imported(*write(tmp_path, train=FIRST.replace(old, new)))
    assert caught.value.problems[0].cure


def test_datasets_alone_ask_for_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"finetune import train.sh training.json"):
        imported(*write(tmp_path, training=TRAINING))


def test_every_key_that_is_written_is_one_of_a_recipe(tmp_path: Path) -> None:
    made = imported(*write(tmp_path, train=FIRST))
    assert all(key.partition(".")[0] in Recipe.model_fields for key in made.draft.values)
