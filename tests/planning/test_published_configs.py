"""Plans of published checkpoints without a network and without anything downloaded: by the configs that come with the package."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from processes import ROOT, run_python

from finetune.checks.model import open_family
from finetune.models.published import CONFIGS, PUBLISHED, PublishedFolder
from finetune.recipe import load_recipe
from finetune.runtime.errors import UserError

RECIPES = sorted(file for file in (ROOT / "recipes").glob("*.toml") if file.stem != "quickstart")

SMALL = ["data.buckets=9x256x256", 'validation.prompts=[{text = "a prompt", shape = "9x256x256"}]']


@pytest.fixture
def offline(tmp_path: Path) -> Mapping[str, str]:
    """An environment with an empty cache of the Hub, kept off it."""
    return {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_each_recipe_has_a_checkpoint_whose_configs_come_with_the_package(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    published = PUBLISHED[loaded.model.path]
    index = json.loads((CONFIGS / published.folder / "model_index.json").read_text())
    assert set(published.from_hub) <= set(index)


OPEN = """
import sys
from pathlib import Path
from finetune.checks.model import open_family
from finetune.recipe import load_recipe
for file in sys.argv[1:]:
    family = open_family(load_recipe(file), with_weights=False, only_plans=True)
    (first, second) = family.folder.origin
    assert family.transformer_config, file
    print(Path(file).stem, first)
"""


def test_each_checkpoint_is_opened_without_a_network(offline: Mapping[str, str]) -> None:
    recipes = [file for file in RECIPES if file.stem.endswith("_lora")]  # full finetuning is of the same ones
    done = run_python(["-c", OPEN, *recipes], environment=offline, seconds=250)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "this package's own" in line]
    assert [line.split()[0] for line in lines] == [file.stem for file in recipes]


@pytest.mark.parametrize(
    "name",
    ["cogvideox_2b_lora", *(pytest.param(name, marks=pytest.mark.full) for name in ("hunyuan_lora", "ltx_lora"))],
)
def test_a_plan_without_a_network_says_whose_configs_it_is_of(name: str, offline: Mapping[str, str]) -> None:
    done = run_python(
        ["-m", "finetune", "plan", ROOT / "recipes" / f"{name}.toml", "--json", *(f"--set={each}" for each in SMALL)],
        environment=offline,
        seconds=280,
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    first, second = plan["notes"][:2]
    assert "this package's own" in first
    assert load_recipe(ROOT / "recipes" / f"{name}.toml").model.path in first
    assert "text_encoder" in second
    assert "diffusers' convert_" in second
    phases = {phase["kind"]: phase for phase in plan["phases"]}
    assert phases["encode text"]["device"]["reserved"] > 8 * 2**30  # T5-XXL's encoder, or Llama's, in bfloat16


def test_no_other_command_takes_the_packages_configs(offline: Mapping[str, str]) -> None:
    recipe = ROOT / "recipes" / "cogvideox_2b_lora.toml"
    done = run_python(["-m", "finetune", "check", recipe, "--no-weights"], environment=offline)
    assert done.returncode == 2
    assert "nor reachable on the Hugging Face Hub" in done.stderr


def test_another_revision_is_not_taken_for_the_published_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    recipe = load_recipe(ROOT / "recipes" / "cogvideox_2b_lora.toml", ["model.revision=other"])
    with pytest.raises(UserError, match="nor reachable"):
        open_family(recipe, with_weights=False, only_plans=True)


# Parameters of encoders in billions, as they are published: T5 v1.1 XXL's and UMT5-XXL's encoders, Llama 3 8B without its head,
# Llama 3 8B with CLIP ViT-L/14-336 (LLaVA), and Qwen2.5-VL-7B's language model without its head.
ENCODERS = {
    "zai-org/CogVideoX-2b": ("T5EncoderModel", 4.762),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("UMT5EncoderModel", 5.681),
    "hunyuanvideo-community/HunyuanVideo": ("LlamaModel", 7.505),
    "hunyuanvideo-community/HunyuanVideo-I2V": ("LlavaForConditionalGeneration", 8.356),
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v": ("Qwen2_5_VLTextModel", 7.07),
}


@pytest.mark.parametrize("path", ENCODERS)
def test_text_encoders_have_the_sizes_that_are_published(path: str) -> None:
    import transformers

    name, billions = ENCODERS[path]
    folder = PublishedFolder(path)
    assert folder.class_name("text_encoder") == name
    cls = getattr(transformers, name)
    with torch.device("meta"):
        encoder = cls(cls.config_class.from_pretrained(folder.path / "text_encoder"))
    assert sum(parameter.numel() for parameter in encoder.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)
