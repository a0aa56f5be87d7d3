"""Which cached items are encoded anew when what reads files changes: those of images apart from those of videos."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.checks.model import open_family
from finetune.data.decode import probe
from finetune.preparation.encode import prepare
from finetune.recipe import load_recipe
from finetune.runtime.distributed import Runtime

Keys = Callable[..., dict[str, str]]


@pytest.fixture
def keys(recipe_file: Path, few_clips: Path, tiny_model: Callable[..., Path], runtime: Runtime, tmp_path: Path) -> Keys:
    """Keys of what is encoded of a video and its mask, of an image, and of a prompt's image."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    video = sorted(few_clips.glob("*.mp4"))[0]
    shutil.copy(video, folder / "video.mp4")
    Image.fromarray(np.full((96, 144, 3), (9, 99, 199), np.uint8)).save(folder / "image.png")
    info = probe(video)
    Image.fromarray(np.full((info.height, info.width), 255, np.uint8)).save(tmp_path / "mask.png")
    lines = ["video,caption,mask", f"video.mp4,a video,{tmp_path / 'mask.png'}", "image.png,an image,"]
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    prompt = f'{{text = "a", image = "{folder / "image.png"}", shape = "9x64x64"}}'

    def made(*overrides: str) -> dict[str, str]:
        settings = [f"data.path={folder / 'clips.csv'}", "data.buckets=['1x64x64', '9x64x64']"]
        settings += [f"validation.prompts=[{prompt}]", f"data.cache={tmp_path / 'cache'}", "data.fps=24"]
        settings += ["model.family=ltx_i2v", f"model.path={tiny_model('ltx_i2v')}", *overrides]
        recipe = load_recipe(recipe_file, settings)
        found = prepare(recipe, open_family(recipe), runtime)
        of_video, of_image = sorted(found.train, key=lambda item: item.path.suffix)
        return {
            "video": of_video.keys["video"],
            "mask": of_video.keys["mask"],
            "image": of_image.keys["video"],
            "pixels": found.prompts[0].image_keys[0],
        }

    return made


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def test_images_have_no_frame_rate(keys: Keys) -> None:
    assert changed(keys(), keys("data.fps=12")) == {"video"}


@pytest.mark.parametrize(
    "version, anew",
    [
        ("finetune.data.decode.DECODER", {"video"}),
        pytest.param("finetune.data.sources.IMAGE_DECODER", {"image", "mask", "pixels"}, marks=pytest.mark.full),
        pytest.param("finetune.preparation.columns._MASKS", {"mask"}, marks=pytest.mark.full),
    ],
)
def test_a_new_version_of_what_reads_files_concerns_no_others(
    keys: Keys, monkeypatch: pytest.MonkeyPatch, version: str, anew: set[str]
) -> None:
    before = keys()
    monkeypatch.setattr(version, 99)
    assert changed(before, keys()) == anew
