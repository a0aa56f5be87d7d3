"""What a run takes from its dataset: clips to train on, clips held out, prompts."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.checks.model import open_family
from finetune.data.clip import VIDEO_SUFFIXES
from finetune.preparation.encode import Prepared, prepare
from finetune.recipe import load_recipe
from finetune.runtime.errors import UserError


@pytest.fixture
def prepared(recipe_file: Path, runtime) -> Callable[..., Prepared]:
    def make(*overrides: str) -> Prepared:
        recipe = load_recipe(recipe_file, overrides)
        return prepare(recipe, open_family(recipe), runtime)

    return make


def names(items) -> list[str]:
    return sorted(item.path.name for item in items)


def test_held_out_clips_are_taken_out_of_the_dataset(prepared: Callable[..., Prepared]) -> None:
    whole, carved = prepared(), prepared("validation.heldout_clips=3")
    assert whole.heldout == []
    assert len(carved.heldout) == 3
    assert sorted(names(carved.train) + names(carved.heldout)) == names(whole.train)


def test_which_clips_are_held_out_depends_on_content_and_seed_alone(
    prepared: Callable[..., Prepared], clips: Path, tmp_path: Path
) -> None:
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    videos = [path for path in sorted(clips.iterdir(), reverse=True) if path.suffix in VIDEO_SUFFIXES]
    for number, video in enumerate(videos):
        shutil.copy(video, renamed / f"{number}{video.suffix}")
        shutil.copy(video.with_suffix(".txt"), renamed / f"{number}.txt")
    held = {item.keys["video"] for item in prepared("validation.heldout_clips=3").heldout}
    again = prepared("validation.heldout_clips=3", f"data.path={renamed}")
    assert {item.keys["video"] for item in again.heldout} == held
    others = [prepared("validation.heldout_clips=3", f"train.seed={seed}").heldout for seed in range(3)]
    assert any({item.keys["video"] for item in other} != held for other in others)


def test_copies_of_a_clip_are_held_out_together(prepared: Callable[..., Prepared], clips: Path, tmp_path: Path) -> None:
    doubled = tmp_path / "doubled"
    shutil.copytree(clips, doubled)
    for video in clips.glob("*.mp4"):
        shutil.copy(video, doubled / f"copy_{video.name}")
        shutil.copy(video.with_suffix(".txt"), doubled / f"copy_{video.stem}.txt")
    found = prepared("validation.heldout_clips=2", f"data.path={doubled}")
    assert not {item.keys["video"] for item in found.train} & {item.keys["video"] for item in found.heldout}
    assert len({item.keys["video"] for item in found.heldout}) == 2


def test_at_least_one_clip_is_left_to_train_on(prepared: Callable[..., Prepared]) -> None:
    with pytest.raises(UserError, match=r"12 of \d+ clips would be held out"):
        prepared("validation.heldout_clips=12")


def test_captions_are_encoded_anew_for_another_pipeline(
    prepared: Callable[..., Prepared], tiny_model: Callable[..., Path]
) -> None:
    """LTX's two forms may have the same text encoder, and do not use it alike."""
    keys = [
        {item.keys["text"] for item in prepared(f"model.path={tiny_model('ltx', variant)}").train}
        for variant in ("0.9.0", "0.9.7")
    ]
    assert not keys[0] & keys[1]


def test_families_of_the_users_own_share_no_encodings_by_name_or_by_code(
    recipe_file: Path, runtime, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two classes of one file, and one whose base class is in another file that changes."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "base_family.py").write_text(
        "from finetune.models.ltx import LTXVideo\nclass Base(LTXVideo):\n    name = 'own'\n"
    )
    (tmp_path / "two_families.py").write_text(
        "from base_family import Base\nclass One(Base):\n    pass\nclass Two(Base):\n    pass\n"
    )

    def keys(name: str) -> set[str]:
        recipe = load_recipe(recipe_file, [f"model.family=two_families:{name}", f"data.cache={tmp_path / 'cache'}"])
        return {key for item in prepare(recipe, open_family(recipe), runtime).train for key in item.keys.values()}

    one, two = keys("One"), keys("Two")
    assert not one & two
    assert keys("One") == one
    with (tmp_path / "base_family.py").open("a") as file:
        file.write("# changed\n")
    assert not keys("One") & one


def test_a_condition_image_is_cached_in_its_own_size(
    recipe_file: Path, runtime, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    Image.fromarray(np.full((200, 200, 3), (9, 99, 199), np.uint8)).save(tmp_path / "first.png")
    prompt = f'{{text = "a", image = "{tmp_path / "first.png"}", shape = "9x64x32"}}'
    overrides = ["model.family=ltx_i2v", f"model.path={tiny_model('ltx_i2v')}", f"validation.prompts=[{prompt}]"]
    recipe = load_recipe(recipe_file, overrides)
    found = prepare(recipe, open_family(recipe), runtime)
    pixels = found.cache.read("image", found.prompts[0].image_keys[0])["pixels"].numpy()
    assert pixels.shape == (200, 200, 3)
    assert (pixels == (9, 99, 199)).all()
    (tmp_path / "first.png").write_text("no image")
    with pytest.raises(UserError, match="no image can be read"):
        prepare(recipe, open_family(recipe), runtime)
