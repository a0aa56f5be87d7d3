"""`sample` shows what trained weights change, and refuses weights that are not the model's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exports import export_weights
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune import cli
from finetune.checks.model import open_family
from finetune.recipe import Recipe, load_recipe
from finetune.runtime.errors import UserError
from finetune.training.exported_videos import sample
from finetune.training.job import Job

PROMPTS = 'validation.prompts=[{text = "a red ball", steps = 2, guidance = 1.0, count = 2}]'


@pytest.fixture
def trained(build_job: Callable[..., Job], family_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Train two steps of a family and export what was trained."""

    def train(family: str, method: str) -> Path:
        job = build_job(f"train.method={method}", "optimizer.lr=0.05", recipe_file=family_recipe(family))
        for step in range(2):
            job.step(step, [job.micro_batches()[step]])
        export_weights(job.state, job.recipe.train.method, tmp_path / family)
        return tmp_path / family

    return train


def opened(family_recipe: Callable[..., Path], family: str) -> Recipe:
    return load_recipe(family_recipe(family), [PROMPTS])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_trained_weights_are_compared_with_the_base(
    family_recipe: Callable[..., Path], trained: Callable[..., Path], runtime, tmp_path: Path, capsys, method: str
) -> None:
    recipe = opened(family_recipe, "cogvideox")
    sample(recipe, open_family(recipe), runtime, tmp_path / "out", trained("cogvideox", method), compare=True)
    made = {path.name for path in (tmp_path / "out").iterdir()}
    videos = {f"00_seed{seed}_{version}.mp4" for seed in (0, 1) for version in ("base", "trained")}
    assert made == videos | {"contact_sheet.png"}
    assert "training changes a pixel by" in capsys.readouterr().err


def test_a_lora_of_another_family_is_refused_before_anything_is_generated(
    family_recipe: Callable[..., Path], trained: Callable[..., Path], runtime, tmp_path: Path
) -> None:
    recipe = opened(family_recipe, "hunyuan")
    with pytest.raises(UserError, match="this LoRA is of another model"):
        sample(recipe, open_family(recipe), runtime, tmp_path / "out", trained("ltx", "lora"), compare=True)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_weights_is_refused(family_recipe: Callable[..., Path], runtime, tmp_path: Path) -> None:
    recipe = opened(family_recipe, "ltx")
    with pytest.raises(UserError, match="nor a transformer in it"):
        sample(recipe, open_family(recipe), runtime, tmp_path / "out", tmp_path, compare=True)


def test_a_prompt_of_one_frame_makes_an_image(family_recipe: Callable[..., Path], runtime, tmp_path: Path) -> None:
    prompts = PROMPTS.replace("count = 2", 'shape = "1x64x96"')
    recipe = load_recipe(family_recipe("ltx"), [prompts])
    sample(recipe, open_family(recipe), runtime, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"00_seed0_base.png", "contact_sheet.png"}
    assert Image.open(tmp_path / "00_seed0_base.png").size == (96, 64)


def test_damaged_weights_are_refused_by_name(
    family_recipe: Callable[..., Path], trained: Callable[..., Path], runtime, tmp_path: Path
) -> None:
    recipe, folder = opened(family_recipe, "ltx"), trained("ltx", "lora")
    (file,) = folder.glob("**/*.safetensors")
    tensors, content = load_file(file), file.read_bytes()
    first = min(name for name in tensors if "lora_A" in name)

    def refused(expected: str) -> None:
        with pytest.raises(UserError, match=expected) as error:
            sample(recipe, open_family(recipe), runtime, tmp_path / "out", folder)
        assert error.value.problems[0].cure
        assert str(folder) in error.value.problems[0].where

    file.write_bytes(content[:-10])
    refused("this LoRA is damaged")
    for changed, expected in (
        (tensors | {first: tensors[first] * float("nan")}, "has values that are not finite"),
        ({name: tensor for name, tensor in tensors.items() if name != first}, "lacks .*lora_A"),
        (tensors | {first: tensors[first].to(torch.int8)}, "is torch.int8"),
        (tensors | {first: tensors[first][:0]}, "diffusers cannot load these weights"),
    ):
        save_file(changed, file)
        refused(expected)
    file.unlink()
    (file.parent / "config.json").write_text("{")
    refused("diffusers cannot load these weights")


@pytest.mark.parametrize(
    "arguments, what",
    [
        (["--adapter", "lora=nan"], "'nan' is not a finite number"),
        (["--adapter", ""], "it is empty"),
        (["--adapter", "lora", "--strength", "inf"], "'inf' is not a finite number"),
        (["--adapter", "lora", "--strength", "0", "--compare"], "at strength 0 there is only the base model"),
        (["--adapter", "lora", "--out", ""], "it is empty"),
        (["--prompt", "a ball", "--steps", "0"], "--steps: 0 is refused"),
    ],
)
def test_arguments_that_can_mean_nothing_are_refused(
    family_recipe: Callable[..., Path], capsys: pytest.CaptureFixture, arguments: list[str], what: str
) -> None:
    assert cli.main(["sample", "--recipe", str(family_recipe("ltx")), *arguments]) == 2
    said = capsys.readouterr().err
    assert what in said
    assert "->" in said
