"""A NaN or an infinity in a training: what it came from is said, nothing spoilt is resumed from, and the way back is named."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from trainings import checkpoints, rows

from finetune.recipe import load_recipe
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.training.not_finite import sound_step
from finetune.training.run import train

Train = Callable[..., str]
FULL = ["train.method=full", "lora.rank=64", "lora.alpha=64"]
SPOILING = ["optimizer.lr=0.5", "lora.plus_ratio=1e39", "optimizer.weight_decay=0"]  # a higher lr is refused


@pytest.fixture
def fails(recipe_file: Path, runtime: Runtime) -> Train:
    """Train the small recipe with changes; returns the error that it ends with, in one line."""

    def run(*overrides: str) -> str:
        with pytest.raises(UserError) as error:
            train(load_recipe(recipe_file, overrides), runtime)
        return " ".join(str(error.value).split())

    return run


@contextmanager
def output_of_step(step: int, change: Callable[[Tensor], Tensor], micro_batches: int = 2) -> Iterator[None]:
    """Have the transformer's output changed in a step, counted from 1."""
    passes: list[None] = []

    def hook(module: nn.Module, _: object, output: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not (type(module).__name__.endswith("Transformer3DModel") and torch.is_grad_enabled()):
            return None
        passes.append(None)
        return (change(output[0]), *output[1:]) if (len(passes) - 1) // micro_batches + 1 == step else None

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# What it came from


def spoilt_model(model: Path, folder: Path, component: str, name: str, value: float = math.nan) -> Path:
    """A copy of a model with one number of a tensor changed."""
    copy = Path(shutil.copytree(model, folder / "model"))
    file = copy / component / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights[name].view(-1)[3] = value
    save_file(weights, file, metadata={"format": "pt"})
    return copy


LOW_BIT = [["memory.low_bit=int8"], ["memory.low_bit=float8"], ["memory.low_bit=nf4", "memory.offload=true"]]


@pytest.mark.parametrize(
    "settings",
    [["memory.offload=true"], [], FULL, *LOW_BIT],
    ids=["streamed", "resident", "full", "int8", "float8", "nf4 streamed"],
)
def test_nan_in_the_pretrained_weights_is_told_with_the_tensors_name(
    fails: Train, tiny_ltx: Path, tmp_path: Path, settings: list[str]
) -> None:
    """Streamed and resident, in few bits, and where all weights are trained, before the first update."""
    name = "transformer_blocks.1.ff.net.2.weight"
    said = fails(f"model.path={spoilt_model(tiny_ltx, tmp_path, 'transformer', name)}", *settings)
    assert f"the pretrained weights hold NaN or infinities ({name})" in said
    assert "fetch or save the model anew" in said


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_what_is_encoded_is_told_with_the_clip(
    fails: Train, recipe_file: Path, runtime: Runtime, tmp_path: Path, clips: Path, value: float
) -> None:
    cache = tmp_path / "own_cache"
    settings = [f"data.cache={cache}", "train.global_batch_size=12", "train.micro_batch_size=4"]
    train(load_recipe(recipe_file, [*settings, "train.steps=1", f"output={tmp_path / 'first'}"]), runtime)
    file = sorted((cache / "video").rglob("*.safetensors"))[3]
    moments = load_file(file)
    moments["mean"][0, 0, 0, 0] = value
    save_file(moments, file)
    said = fails(*settings)
    assert "step 1: what is encoded of 1 clip holds NaN or infinities: " in said
    assert str(clips) in said
    assert f"or their items from {cache} to have them encoded anew" in said


def test_nan_in_what_is_encoded_of_a_held_out_clip_is_told_with_the_clip(
    fails: Train, recipe_file: Path, runtime: Runtime, tmp_path: Path, heldout: Path
) -> None:
    cache = tmp_path / "own_cache"
    settings = [f"data.cache={cache}", f"validation.heldout={heldout}"]
    before = set((cache / "video").rglob("*.safetensors"))
    train(load_recipe(recipe_file, [f"data.cache={cache}", "train.steps=1", f"output={tmp_path / 'first'}"]), runtime)
    trained = set((cache / "video").rglob("*.safetensors")) - before
    train(load_recipe(recipe_file, [*settings, "train.steps=1", f"output={tmp_path / 'second'}"]), runtime)
    for file in set((cache / "video").rglob("*.safetensors")) - trained:
        moments = load_file(file)
        moments["mean"][0, 0, 0, 0] = math.nan
        save_file(moments, file)
    said = fails(*settings)
    assert "what is encoded of this held-out clip holds NaN or infinities" in said
    assert str(heldout) in said


def test_an_encoder_that_makes_nan_is_told_before_anything_is_trained(
    fails: Train, tiny_ltx: Path, tmp_path: Path
) -> None:
    model = spoilt_model(tiny_ltx, tmp_path, "vae", "encoder.conv_in.conv.bias")
    said = fails(f"model.path={model}", f"data.cache={tmp_path / 'own_cache'}")
    assert "what is encoded of it as video holds NaN or infinities" in said
    assert 'train.precision = "float32"' in said
    assert not (tmp_path / "run").exists()


def test_an_update_that_spoils_the_weights_is_told(fails: Train, tmp_path: Path) -> None:
    said = fails(*SPOILING)
    assert "the update of step 1 has put NaN or infinities into the trained weights" in said
    assert checkpoints(tmp_path / "run") == []


def test_weights_that_an_update_has_spoilt_are_not_saved(fails: Train, tmp_path: Path) -> None:
    said = fails(*SPOILING, "train.steps=1")
    assert "the update of step 1 has put NaN or infinities into the trained weights" in said
    assert "they are not saved" in said
    assert checkpoints(tmp_path / "run") == []
    assert not (tmp_path / "run" / "lora").exists()


@pytest.mark.parametrize("factor, what", [(math.inf, "the loss"), (1e18, "a gradient")])
def test_a_loss_and_a_gradient_are_told_apart(fails: Train, factor: float, what: str) -> None:
    with output_of_step(2, lambda output: output * factor):
        said = fails()
    assert f"in step 2: {what} is not finite, though weights, clips and captions are" in said


def test_with_updates_in_the_backward_pass_it_is_said_to_be_part_of_the_update(fails: Train, tmp_path: Path) -> None:
    settings = [*FULL, "optimizer.in_backward=true", "train.max_grad_norm=none", "checkpoint.every=2"]
    with output_of_step(4, lambda output: output * math.inf, micro_batches=1):
        said = fails(*settings, "train.micro_batch_size=4")
    assert "in step 4: the loss is not finite, and was part of the update (optimizer.in_backward)" in said
    assert "run the same command, which goes on from step 2" in said
    assert checkpoints(tmp_path / "run") == [2]
    assert not (tmp_path / "run" / "checkpoints" / "set_aside").exists()


# The way back


def test_the_weights_before_it_are_kept_where_no_run_resumes_from(fails: Train, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with output_of_step(6, lambda output: output * math.inf):
        said = fails("checkpoint.every=2", "checkpoint.keep_last=1")
    aside = output / "checkpoints" / "set_aside" / "step_00000005"
    assert f"the weights before it are kept in {aside}" in said
    assert (aside / "trainer.json").is_file()
    assert checkpoints(output) == [4]
    assert "run the same command, which goes on from step 4" in said


def test_the_same_command_goes_on_as_if_nothing_had_been(
    fails: Train, recipe_file: Path, runtime: Runtime, tmp_path: Path
) -> None:
    with output_of_step(6, lambda output: output * math.inf):
        fails("checkpoint.every=2")
    train(load_recipe(recipe_file), runtime)
    train(load_recipe(recipe_file, [f"output={tmp_path / 'straight'}"]), runtime)
    ours, theirs = ([row["loss"] for row in rows(tmp_path / name)] for name in ("run", "straight"))
    assert ours == theirs
    adapters = (
        load_file(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors") for name in ("run", "straight")
    )
    first, second = adapters
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_after_a_loss_that_rose_the_checkpoint_before_is_named_with_the_command(
    fails: Train, recipe_file: Path, runtime: Runtime, tmp_path: Path
) -> None:
    """The metrics' losses of steps 41 to 60 are made ten times as high; step 61 is infinite."""
    output = tmp_path / "run"
    settings = ["train.steps=100", "checkpoint.every=20", "checkpoint.keep_last=all"]
    short = ["train.global_batch_size=1", "train.micro_batch_size=1"]
    train(load_recipe(recipe_file, [*settings, *short, "train.steps=60"]), runtime)
    metrics = output / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    changed = [
        row | {"loss": row["loss"] * 10} if row["step"] > 40 and "loss" in row else row
        for row in map(json.loads, lines)
    ]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in changed))
    with output_of_step(1, lambda output: output * math.inf, micro_batches=1):
        said = fails(*settings, *short)
    assert "run the same command with --resume-step 40, the last checkpoint before the loss rose" in said
    assert train(load_recipe(recipe_file, [*settings, *short, "train.steps=41"]), runtime, resume_step=40) == 0
    assert checkpoints(output) == [20, 40, 41]
    assert (output / "checkpoints" / "set_aside" / "step_00000060").is_dir()


LEVEL = dict.fromkeys(range(1, 101), 1.0)


@pytest.mark.parametrize(
    "losses, expected",
    [
        (LEVEL, 100),
        (LEVEL | dict.fromkeys(range(81, 101), 1.4), 100),
        (LEVEL | dict.fromkeys(range(81, 101), 1.6), 80),
        (LEVEL | dict.fromkeys(range(61, 101), 5.0), 60),
        (LEVEL | dict.fromkeys(range(96, 101), math.nan), 80),
        (LEVEL | {90: 12.0}, 80),  # a mean of 1.55
        (LEVEL | {90: 10.0}, 100),  # a mean of 1.45
        ({}, 100),
        (dict.fromkeys(range(1, 6), 1.0), 100),  # too few to judge by
        (dict.fromkeys(range(1, 101), 3.0) | dict.fromkeys(range(21, 41), 1.0), 40),
    ],
)
def test_the_newest_sound_checkpoint_is_judged_by_the_mean_loss_of_20_steps(
    losses: dict[int, float], expected: int
) -> None:
    assert sound_step([20, 40, 60, 80, 100], losses) == expected
