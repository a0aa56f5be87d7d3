"""What a checkpoint cannot do is refused before a weight is read, and the error names what can."""

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.checks.everything import check_all
from finetune.checks.model import open_family
from finetune.recipe import load_recipe
from finetune.runtime.errors import UserError


def refusal(family_recipe: Callable[..., Path], family: str, *overrides: str, variant: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        open_family(load_recipe(family_recipe(family, variant), overrides))
    return str(caught.value)


@pytest.mark.parametrize(
    "family, model, right",
    [
        ("cogvideox_i2v", "cogvideox", "cogvideox"),
        ("cogvideox", "cogvideox_i2v", "cogvideox_i2v"),
        ("hunyuan", "hunyuan_i2v", "hunyuan_i2v"),
        ("hunyuan", "mochi", "mochi"),
        ("mochi", "ltx", "ltx"),
        ("ltx_i2v", "hunyuan", "hunyuan"),
    ],
)
def test_a_checkpoint_of_another_family_names_the_right_one(
    family_recipe: Callable[..., Path], tiny_model: Callable[..., Path], family: str, model: str, right: str
) -> None:
    text = refusal(family_recipe, family, f"model.path={tiny_model(model)}")
    assert f'set model.family = "{right}"' in text
    assert "Pipeline, and family" in text


@pytest.mark.parametrize("family", ["ltx", "ltx_i2v"])
def test_an_ltx_checkpoint_does_both(
    family_recipe: Callable[..., Path], tiny_model: Callable[..., Path], family: str
) -> None:
    for model in ("ltx", "ltx_i2v"):
        assert open_family(load_recipe(family_recipe(family), [f"model.path={tiny_model(model)}"])).name == family


@pytest.mark.parametrize(
    "family, variant, bucket, nearest",
    [
        ("hunyuan", None, "16x64x100", "17x64x96"),
        ("hunyuan_i2v", "token_replace", "1x64x100", "5x64x96"),
        ("mochi", None, "17x64x96", "19x64x96"),
        ("cogvideox", "5b", "13x64x88", "17x64x96"),
        ("cogvideox", "1.5-5B", "17x160x96", "17x128x96"),
        ("cogvideox_i2v", "5b-I2V", "17x64x80", "17x64x96"),
        ("ltx", "0.9.7", "12x40x96", "9x32x96"),
    ],
)
def test_a_bucket_that_is_illegal_names_the_nearest(
    family_recipe: Callable[..., Path], family: str, variant: str | None, bucket: str, nearest: str
) -> None:
    text = refusal(family_recipe, family, f"data.buckets={bucket}", variant=variant)
    assert f"the nearest is {nearest}" in text
    assert f"{bucket}: " in text
    open_family(load_recipe(family_recipe(family, variant), [f"data.buckets={nearest}"]))


@pytest.mark.parametrize(
    "family, override",
    [
        ("cogvideox", "objective.shift=3"),
        ("cogvideox", "objective.weighting=cosmap"),
        ("cogvideox", "data.image_dropout=0.1"),
        ("mochi", "vae.image_noise=true"),
        ("ltx_i2v", "vae.image_noise=true"),
        ("hunyuan_i2v", "vae.image_noise=true"),
        ("hunyuan_i2v", "objective.guidance=6"),  # "latent_concat", which has no embedded guidance
        ("ltx", "objective.guidance=6"),
    ],
)
def test_a_setting_that_means_nothing_to_the_family_is_refused(
    family_recipe: Callable[..., Path], family: str, override: str
) -> None:
    text = refusal(family_recipe, family, override)
    assert override.partition("=")[0] in text
    assert "no effect here" in text


@pytest.mark.parametrize(
    "family, prompt, complaint",
    [
        ("ltx", '{text = "a", image = "x.png"}', "takes no condition image"),
        ("ltx_i2v", '{text = "a"}', "needs a condition image"),
        ("cogvideox_i2v", '{text = "a", image = "nowhere.png"}', "no such condition image"),
        ("mochi", '{text = "a", true_guidance = 2.0}', "takes no `true_guidance`"),
        ("hunyuan", '{text = "a", negative = "b"}', "uses no negative prompt"),
        ("hunyuan_i2v", '{text = "a"}', "needs a condition image"),
        ("hunyuan_i2v", '{text = "a", image = "x.png", guidance = 6.0}', "has no embedded guidance"),
        ("hunyuan", '{text = "a", shape = "18x64x96"}', "18x64x96: HunyuanVideo needs 4k + 1 frames"),
    ],
)
def test_a_prompt_that_the_pipeline_cannot_generate_is_refused(
    family_recipe: Callable[..., Path], family: str, prompt: str, complaint: str
) -> None:
    assert complaint in refusal(family_recipe, family, f"validation.prompts=[{prompt}]")


def test_a_missing_file_of_prompts_is_one_problem_among_others(
    family_recipe: Callable[..., Path], runtime, tmp_path: Path
) -> None:
    overrides = [f"validation.prompts_file={tmp_path / 'nowhere.txt'}", f"data.path={tmp_path / 'no_clips'}"]
    text = "\n".join(map(str, check_all(load_recipe(family_recipe("ltx"), overrides), runtime, gpus=1)))
    assert "nowhere.txt" in text
    assert "no_clips" in text


ONE, TWO, COMPILED = "train.micro_batch_size=1", "train.micro_batch_size=2", "memory.compile=true"
PADDED, COMPILED_PADDED = "captions of a micro-batch that differ in length", "compiled blocks take padded captions"


@pytest.mark.parametrize(
    "family, kernel, overrides, why, cure",
    [
        ("hunyuan", "flash", [TWO], PADDED, "train.micro_batch_size = 1"),
        ("mochi", "fa3", [TWO], PADDED, "train.micro_batch_size = 1"),
        ("mochi", "flash", [ONE, COMPILED], COMPILED_PADDED, "memory.compile = false"),
        ("hunyuan", "cudnn", [TWO], "gradients may be NaN with a mask", "train.micro_batch_size = 1"),
        ("ltx", "flash", [ONE], "attention to captions always has a mask", 'set it to "efficient" or "auto"'),
        ("ltx_i2v", "fa4", [ONE], "attention to captions always has a mask", 'set it to "efficient" or "auto"'),
    ],
)
def test_a_kernel_of_attention_that_cannot_take_the_models_masks_is_refused(
    family_recipe: Callable[..., Path], family: str, kernel: str, overrides: list[str], why: str, cure: str
) -> None:
    text = refusal(family_recipe, family, f"memory.attention={kernel}", *overrides)
    assert text.startswith("memory.attention: ")
    assert why in text
    assert cure in text


@pytest.mark.parametrize(
    "family, kernel, overrides",
    [
        ("hunyuan", "flash", [ONE]),
        ("mochi", "cudnn", [ONE]),
        ("hunyuan", "efficient", [TWO]),
        ("mochi", "math", [TWO, COMPILED]),
        ("cogvideox", "flash", [TWO, COMPILED]),
        ("cogvideox_i2v", "fa4", [TWO]),
        ("ltx", "cudnn", [TWO]),
        ("ltx", "efficient", [TWO]),
    ],
)
def test_a_kernel_of_attention_that_takes_what_the_model_gives_it_is_taken(
    family_recipe: Callable[..., Path], family: str, kernel: str, overrides: list[str]
) -> None:
    open_family(load_recipe(family_recipe(family), [f"memory.attention={kernel}", *overrides]))
