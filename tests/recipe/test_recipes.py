"""The recipes of the repository: each is whole, consistent, and fits its checkpoint at full size."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
from full_size import CONFIGS, open_full_size
from PIL import Image
from processes import ROOT

from finetune.checks.model import family_problems
from finetune.checks.settings import check_recipe
from finetune.models.adapters import lora
from finetune.models.family import Family
from finetune.recipe import Recipe, load_recipe

MODELS = {
    "cogvideox_2b": "cogvideox-2b",
    "cogvideox_5b": "cogvideox-5b",
    "cogvideox_5b_i2v": "cogvideox-5b-i2v",
    "cogvideox_1.5_5b": "cogvideox-1.5-5b",
    "cogvideox_1.5_5b_i2v": "cogvideox-1.5-5b-i2v",
    "hunyuan": "hunyuanvideo",
    "hunyuan_i2v": "hunyuanvideo-i2v",
    "ltx": "ltx-video",
    "ltx_i2v": "ltx-video",
    "ltx_13b": "ltx-video-0.9.7",
    "ltx_13b_i2v": "ltx-video-0.9.7",
    "mochi": "mochi-1-preview",
    "wan_1.3b": "wan2.1-t2v-1.3b",
    "wan_14b": "wan2.1-t2v-14b",
    "wan_14b_i2v": "wan2.1-i2v-14b",
    "wan_14b_flf2v": "wan2.1-flf2v-14b",
    "wan2.2_5b": "wan2.2-ti2v-5b",
    "wan2.2_5b_i2v": "wan2.2-ti2v-5b",
    "wan2.2_a14b": "wan2.2-t2v-a14b",
    "wan2.2_a14b_i2v": "wan2.2-i2v-a14b",
    "hunyuan15": "hunyuanvideo-1.5-480p-t2v",
    "hunyuan15_i2v": "hunyuanvideo-1.5-480p-i2v",
}
RECIPES = {f"{model}_{method}": checkpoint for model, checkpoint in MODELS.items() for method in ("lora", "full")}


def read(name: str, *overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / f"{name}.toml", overrides)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """Open a recipe's family on its checkpoint's published configs, once."""

    @cache
    def opened(name: str, checkpoint: str) -> Family:
        return open_full_size(name, checkpoint, tmp_path_factory.mktemp("checkpoint") / "model")

    return lambda name: opened(read(name).model.family, RECIPES[name])


@pytest.fixture
def at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to start in that has what recipes name by a relative path."""
    (tmp_path / "data").mkdir()
    for name in ("first_frame", "last_frame"):
        Image.new("RGB", (96, 64)).save(tmp_path / "data" / f"{name}.png")
    monkeypatch.chdir(tmp_path)


each_recipe = pytest.mark.parametrize("name", RECIPES)


def test_these_are_all_the_recipes() -> None:
    found = {str(path.relative_to(ROOT / "recipes")) for path in (ROOT / "recipes").rglob("*.toml")}
    assert found == {f"{name}.toml" for name in [*RECIPES, "quickstart"]}
    assert len(found) == 45


@each_recipe
@pytest.mark.parametrize("gpus", [1, 8])
def test_its_settings_go_together(name: str, gpus: int) -> None:
    assert check_recipe(read(name), gpus) == []


@each_recipe
def test_it_fits_its_checkpoint(name: str, family: Callable[[str], Family], at_start: None) -> None:
    assert list(family_problems(read(name), family(name))) == []


@each_recipe
def test_its_family_trains_its_checkpoint(name: str, family: Callable[[str], Family]) -> None:
    opened = family(name)
    assert opened.refusal(opened.folder) is None


@each_recipe
def test_its_checkpoint_leads_to_it(name: str, family: Callable[[str], Family]) -> None:
    opened = family(name)
    assert opened.recipe_for(opened.folder) in (None, name.rpartition("_")[0])


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("_lora")])
def test_every_target_of_its_adapter_is_a_layer(name: str, family: Callable[[str], Family]) -> None:
    opened = family(name)
    lora.check_targets(opened.empty_transformer(), opened, [*opened.lora_targets, *read(name).lora.targets])


@each_recipe
def test_it_is_called_after_its_method_and_writes_to_a_folder_of_its_name(name: str) -> None:
    recipe = read(name)
    assert recipe.train.method == name.rpartition("_")[2]
    assert recipe.output == Path("runs") / name
    assert recipe.model.family.endswith("_i2v") == ("_i2v_" in name or "_flf2v_" in name)


@each_recipe
def test_it_says_what_it_is_and_stays_short(name: str) -> None:
    lines = (ROOT / "recipes" / f"{name}.toml").read_text().splitlines()
    assert lines[1].startswith("# ")
    assert len(lines) <= 60


@each_recipe
def test_it_shows_samples_in_a_shape_that_it_trains(name: str) -> None:
    recipe = read(name)
    (prompt,) = recipe.validation.prompts
    assert prompt.shape in recipe.data.buckets
    assert prompt.fps == recipe.data.fps
    assert prompt.guidance is not None


@pytest.mark.parametrize("model", MODELS)
def test_adapter_and_full_finetuning_differ_in_optimization_alone(model: str) -> None:
    adapter, full = (read(f"{model}_{method}").model_dump() for method in ("lora", "full"))
    differing = {table for table in full if adapter[table] != full[table]}
    assert differing <= {"output", "train", "lora", "optimizer", "checkpoint"}


# Problems that only the checkpoint's own configs can tell


@pytest.mark.parametrize(
    "name, override",
    [
        ("ltx_lora", "data.buckets=49x480x720"),  # 720 is no multiple of 32
        ("hunyuan_lora", "data.buckets=50x512x768"),
        ("mochi_lora", "data.buckets=45x480x848"),  # not 6k + 1
        ("cogvideox_2b_lora", "data.buckets=53x480x720"),  # an even number of latent frames
        ("cogvideox_5b_i2v_lora", "data.buckets=49x480x480"),  # learned positions
        ("cogvideox_1.5_5b_lora", "data.buckets=81x768x2416"),  # beyond its RoPE
        ("cogvideox_5b_lora", "objective.shift=3"),
        ("cogvideox_5b_lora", "objective.weighting=cosmap"),
        ("cogvideox_5b_lora", "data.image_dropout=0.1"),
        ("ltx_i2v_lora", "vae.image_noise=true"),
        ("ltx_lora", "objective.guidance=6"),
        ("mochi_lora", "validation.prompts=no cat@@@37x480x850"),
        ("ltx_i2v_lora", "validation.prompts=no image@@@49x512x768"),
    ],
)
def test_a_change_that_does_not_fit_the_checkpoint_is_found(
    name: str, override: str, family: Callable[[str], Family], at_start: None
) -> None:
    found = list(family_problems(read(name, override), family(name)))
    assert [problem.where for problem in found] == [override.partition("=")[0]]


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("_lora")])
@pytest.mark.parametrize("tiling", [False, True])
def test_the_full_size_vae_takes_every_bucket_in_tiles_and_whole(name: str, tiling: bool) -> None:
    """Shapes alone, on the meta device: tiles that do not fit a size give latents or videos of another."""
    config = json.loads((CONFIGS / RECIPES[name] / "vae" / "config.json").read_text())
    with torch.device("meta"):
        vae = getattr(diffusers, config["_class_name"]).from_config(config)
    if tiling:
        vae.enable_tiling()
    time = {"temb": torch.empty(1, device="meta")} if config.get("timestep_conditioning") else {}
    for bucket in read(name).data.buckets:
        with torch.no_grad():
            latents = vae.encode(torch.empty(1, 3, *bucket, device="meta")).latent_dist.mean
            video = vae.decode(latents, **time).sample
        assert video.shape == (1, 3, *bucket)
