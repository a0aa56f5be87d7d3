"""What a checkpoint cannot do is refused before a weight is read, and the error names what can."""

import json
import shutil
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
        ("hunyuan", "hunyuan15", "hunyuan15"),
        ("hunyuan15", "hunyuan15_i2v", "hunyuan15_i2v"),
    ],
)
def test_a_checkpoint_of_another_family_names_the_right_one(
    family_recipe: Callable[..., Path], tiny_model: Callable[..., Path], family: str, model: str, right: str
) -> None:
    text = refusal(family_recipe, family, f"model.path={tiny_model(model)}")
    assert f'set model.family = "{right}"' in text
    assert "Pipeline, and family" in text


EXPERTS, LAST, NO_LAST = "model.experts=high,low", "data.last_image=true", "data.last_image=false"


@pytest.mark.parametrize(
    "family, variant, override, complaint, cure",
    [
        ("wan", "2.1", EXPERTS, "has no experts", "recipes/wan_1.3b_lora.toml"),
        ("wan", "2.2-5B", EXPERTS, "has no experts", "recipes/wan2.2_5b_lora.toml"),
        ("wan_i2v", "2.1", EXPERTS, "has no experts", "recipes/wan_14b_i2v_lora.toml"),
        ("wan_i2v", "2.1-FLF2V", EXPERTS, "has no experts", "recipes/wan_14b_flf2v_lora.toml"),
        ("wan_i2v", "2.1-FLF2V", NO_LAST, "is made for a first and a last image", "remove it"),
        ("wan_i2v", "2.1", LAST, "takes no last image: Wan 2.1 FLF2V and Wan 2.2 A14B do", "remove it"),
        ("wan_i2v", "2.2-5B", LAST, "takes no last image: Wan 2.1 FLF2V and Wan 2.2 A14B do", "remove it"),
        ("wan", "2.1", LAST, "Wan takes no last image", "remove it"),
    ],
)
def test_what_a_wan_checkpoint_cannot_do_names_what_is_for_it(
    family_recipe: Callable[..., Path], family: str, variant: str, override: str, complaint: str, cure: str
) -> None:
    text = refusal(family_recipe, family, override, variant=variant)
    assert text.startswith(f"{override.partition('=')[0]}: ")
    assert complaint in text
    assert cure in text


@pytest.mark.parametrize(
    "family, model, right, recipe",
    [
        ("wan", ("wan_i2v", "2.1"), "wan_i2v", "wan_14b_i2v"),
        ("wan", ("wan_i2v", "2.1-FLF2V"), "wan_i2v", "wan_14b_flf2v"),
        ("wan", ("wan_i2v", "2.2-A14B"), "wan_i2v", "wan2.2_a14b_i2v"),
        ("wan_i2v", ("wan", "2.1"), "wan", "wan_1.3b"),
        ("wan_i2v", ("wan", "2.2-A14B"), "wan", "wan2.2_a14b"),
        ("ltx", ("wan", "2.2-5B"), "wan", "wan2.2_5b"),
    ],
)
def test_a_wan_checkpoint_of_the_other_kind_names_family_and_recipe(
    family_recipe: Callable[..., Path],
    tiny_model: Callable[..., Path],
    family: str,
    model: tuple[str, str],
    right: str,
    recipe: str,
) -> None:
    text = refusal(family_recipe, family, f"model.path={tiny_model(*model)}")
    assert f'set model.family = "{right}" (recipes/{recipe}_lora.toml and recipes/{recipe}_full.toml' in text


@pytest.mark.parametrize("family", ["wan", "wan_i2v"])
def test_a_wan_5b_checkpoint_does_both(
    family_recipe: Callable[..., Path], tiny_model: Callable[..., Path], family: str
) -> None:
    for model in ("wan", "wan_i2v"):
        where = f"model.path={tiny_model(model, '2.2-5B')}"
        assert open_family(load_recipe(family_recipe(family, "2.2-5B"), [where])).name == family


@pytest.mark.parametrize("family", ["wan", "wan_i2v"])
@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"transformer_2": [None, None]}, "no transformer_2"),
        ({"boundary_ratio": None}, "does not say from which noise on it denoises"),
        ({"boundary_ratio": 1.5}, "no noise level between 0 and 1"),
        ({"boundary_ratio": "0.875"}, "no noise level between 0 and 1"),
    ],
    ids=["no transformer_2", "no boundary", "boundary too high", "boundary of text"],
)
def test_half_an_a14b_is_refused(
    family_recipe: Callable[..., Path],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    family: str,
    changes: dict,
    complaint: str,
) -> None:
    folder = Path(shutil.copytree(tiny_model(family, "2.2-A14B"), tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | changes))
    text = refusal(family_recipe, family, f"model.path={folder}", EXPERTS, variant="2.2-A14B")
    assert complaint in text
    assert "has no experts" not in text


def test_a_wan_checkpoint_without_its_image_encoder_is_refused(
    family_recipe: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model("wan_i2v", "2.1"), tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"image_encoder": [None, None]}))
    assert "no image_encoder" in refusal(family_recipe, "wan_i2v", f"model.path={folder}", variant="2.1")


def test_the_expert_that_is_trained_second_is_checked_before_the_first_is_trained(
    family_recipe: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    text = refusal(family_recipe, "wan", "objective.sigma_min=0.9", variant="2.2-A14B")
    assert "there is no noise level in [0.0, 0.875]" in text
    recipe = family_recipe("wan", "2.2-A14B")
    assert open_family(load_recipe(recipe, ["objective.sigma_min=0.9", "model.experts=high"])).expert == "high"

    model, weights = tmp_path / "model", "diffusion_pytorch_model.safetensors"
    shutil.copytree(tiny_model("wan", "2.2-A14B"), model)
    shutil.copy(tiny_model("wan", "2.2-5B") / "transformer" / weights, model / "transformer_2" / weights)
    assert "transformer_2: " in refusal(family_recipe, "wan", f"model.path={model}", variant="2.2-A14B")


def test_a14b_takes_a_last_image_if_the_recipe_says_so(family_recipe: Callable[..., Path]) -> None:
    recipe = family_recipe("wan_i2v", "2.2-A14B")
    assert open_family(load_recipe(recipe, [LAST])).last_image
    assert not open_family(load_recipe(recipe)).last_image


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
        ("hunyuan15", None, "16x64x100", "17x64x96"),
        ("hunyuan_i2v", "token_replace", "1x64x100", "5x64x96"),
        ("mochi", None, "17x64x96", "19x64x96"),
        ("cogvideox", "5b", "13x64x88", "17x64x96"),
        ("cogvideox", "1.5-5B", "17x160x96", "17x128x96"),
        ("cogvideox_i2v", "5b-I2V", "17x64x80", "17x64x96"),
        ("ltx", "0.9.7", "12x40x96", "9x32x96"),
        ("wan", "2.1", "16x64x90", "17x64x96"),
        ("wan", "2.2-5B", "17x80x96", "17x64x96"),
        ("wan_i2v", "2.1-FLF2V", "2x64x100", "5x64x96"),
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
        ("ltx", "objective.weighting=min_snr"),
        ("hunyuan", "objective.weighting=min_snr"),
        ("cogvideox", "data.image_dropout=0.1"),
        ("mochi", "vae.image_noise=true"),
        ("ltx_i2v", "vae.image_noise=true"),
        ("hunyuan15_i2v", "vae.image_noise=true"),
        ("hunyuan_i2v", "vae.image_noise=true"),
        ("hunyuan_i2v", "objective.guidance=6"),  # "latent_concat", which has no embedded guidance
        ("ltx", "objective.guidance=6"),
        ("wan", "data.image_dropout=0.1"),
        ("wan", "objective.guidance=6"),
        ("wan_i2v", "vae.image_noise=true"),
    ],
)
def test_a_setting_that_means_nothing_to_the_family_is_refused(
    family_recipe: Callable[..., Path], family: str, override: str
) -> None:
    text = refusal(family_recipe, family, override)
    assert override.partition("=")[0] in text
    assert "no effect here" in text


def test_a_weighting_of_another_objective_names_those_there_are(family_recipe: Callable[..., Path]) -> None:
    assert 'set it to "sigma_sqrt" or "cosmap"' in refusal(family_recipe, "wan", "objective.weighting=min_snr")
    assert 'set it to "min_snr"' in refusal(family_recipe, "cogvideox", "objective.weighting=sigma_sqrt")
    open_family(load_recipe(family_recipe("cogvideox"), ["objective.weighting=min_snr"]))


def test_a_model_is_told_the_guidance_that_its_target_has(family_recipe: Callable[..., Path]) -> None:
    text = refusal(family_recipe, "hunyuan", "objective.guidance_target=6")
    assert "HunyuanVideo is told the scale of its guidance, 1, but its target would have another" in text
    assert "set objective.guidance = 6, too" in text
    told = ["objective.guidance_target=6", "objective.guidance=6"]
    for family, overrides in (("hunyuan", told), ("hunyuan_i2v", told[:1]), ("ltx", told[:1])):
        open_family(load_recipe(family_recipe(family), overrides))


@pytest.mark.parametrize(
    "family, prompt, complaint",
    [
        ("ltx", '{text = "a", image = "x.png"}', "takes no condition image"),
        ("ltx_i2v", '{text = "a"}', "needs a condition image"),
        ("cogvideox_i2v", '{text = "a", image = "nowhere.png"}', "no such condition image"),
        ("ltx", '{text = "a", steps = 1}', "at least 2 denoising steps"),
        ("mochi", '{text = "a", steps = 1}', "at least 2 denoising steps"),
        ("mochi", '{text = "a", true_guidance = 2.0}', "takes no `true_guidance`"),
        ("hunyuan", '{text = "a", negative = "b"}', "uses no negative prompt"),
        ("hunyuan15", '{text = "a", true_guidance = 2.0}', "takes no `true_guidance`"),
        ("hunyuan15_i2v", '{text = "a", image = "x.png", shape = "17x96x96"}', "the nearest is 17x80x80"),
        ("wan_i2v", '{text = "a", image = "x.png", last_image = "x.png"}', "remove `last_image`"),
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
        ("hunyuan15", "flash", [TWO], PADDED, "train.micro_batch_size = 1"),
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
    "variant, images, complaint",
    [
        ("2.1-FLF2V", 'image = "x.png"', "set `last_image`"),
        ("2.2-A14B", 'image = "x.png", last_image = "x.png"', "or set data.last_image = true"),
    ],
)
def test_a_prompt_has_as_many_images_as_wan_takes(
    family_recipe: Callable[..., Path], variant: str, images: str, complaint: str
) -> None:
    prompts = f'validation.prompts=[{{text = "a", {images}}}]'
    assert complaint in refusal(family_recipe, "wan_i2v", prompts, variant=variant)


@pytest.mark.parametrize(
    "family, kernel, overrides",
    [
        ("wan", "flash", [TWO, COMPILED]),
        ("wan_i2v", "cudnn", [TWO]),
        ("hunyuan", "flash", [ONE]),
        ("hunyuan15_i2v", "flash", [ONE]),
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
