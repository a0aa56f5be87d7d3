"""Files that clips name in columns of the manifest are inspected with the clips' own."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from finetune.data.cache import Cache
from finetune.preparation.inspect import inspect_data
from finetune.recipe import load_recipe
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError


@pytest.fixture
def manifest(clips: Path, tmp_path: Path) -> Path:
    """Three clips with a control video each; the first is cut off, and is the second one's control video, too."""
    folder = Path(shutil.copytree(clips, tmp_path / "controlled"))
    videos = sorted(folder.glob("*.mp4"))[:3]
    videos[0].write_bytes(videos[0].read_bytes()[:200])
    rows = [{"video": video.name, "caption": "a clip", "control": videos[2].name} for video in videos]
    rows[1]["control"] = videos[0].name
    path = folder / "metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_damaged_clip_that_another_names_is_refused_with_both(
    recipe_file: Path, runtime: Runtime, manifest: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_file, [f"data.path={manifest}"])
    with pytest.raises(UserError, match="2 clips cannot be used") as error:
        inspect_data(recipe, Cache(tmp_path / "cache"), runtime, ["control"])
    assert str(error.value).count(str(sorted(manifest.parent.glob("*.mp4"))[0])) == 2


def test_with_skip_both_are_left_out(recipe_file: Path, runtime: Runtime, manifest: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["data.bad_clips=skip", f"data.path={manifest}"])
    (usable,) = inspect_data(recipe, Cache(tmp_path / "cache"), runtime, ["control"]).train
    assert usable.clip.path == sorted(manifest.parent.glob("*.mp4"))[2]
    assert usable.files == {"control": usable.hash}


def test_names_with_line_feeds_are_printed_in_one_line(
    recipe_file: Path, runtime: Runtime, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of clips that are skipped, held out, and copies of others."""
    folder = tmp_path / "odd"
    folder.mkdir()
    first, second = sorted(clips.glob("*.mp4"))[:2]
    for video, name in ((first, "a\nb.mp4"), (first, "c\nd.mp4"), (second, "plain.mp4")):
        shutil.copy(video, folder / name)
        (folder / name).with_suffix(".txt").write_text(f"{name[0]} caption")
    (folder / "e\nf.mp4").write_text("no video")
    (folder / "e\nf.txt").write_text("broken")
    overrides = ["data.bad_clips=skip", f"data.path={folder}", "validation.heldout_clips=1"]
    for seed in range(10):  # with one of them the clip with odd names is held out
        recipe = load_recipe(recipe_file, [*overrides, f"train.seed={seed}"])
        inspect_data(recipe, Cache(tmp_path / "cache"), runtime)
    said = capsys.readouterr().err
    assert f"skipped {folder}/e\\nf.mp4: " in said
    assert f"{folder}/a\\nb.mp4 = {folder}/c\\nd.mp4" in said
    assert f"held out: {folder}/a\\nb.mp4, {folder}/c\\nd.mp4" in said
    assert not [line for line in said.splitlines() if line.startswith(("b.mp4", "d.mp4", "f.mp4"))]


def test_identical_clips_are_named_as_copies(
    recipe_file: Path, runtime: Runtime, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = sorted(clips.glob("*.mp4"))[0]
    for number in range(6):
        shutil.copy(video, tmp_path / f"{number}.mp4")
        (tmp_path / f"{number}.txt").write_text("a clip")
    inspect_data(load_recipe(recipe_file, [f"data.path={tmp_path}"]), Cache(tmp_path / "cache"), runtime)
    names = " = ".join(str(tmp_path / f"{number}.mp4") for number in range(4))
    told = (
        f"{tmp_path}: 5 clips are copies of others, byte for byte, which leaves 1 distinct clip: {names} and 2 more ("
    )
    assert told in capsys.readouterr().err


def test_images_and_videos_are_counted_where_there_are_both(
    recipe_file: Path, runtime: Runtime, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for video in sorted(clips.glob("*.mp4"))[:2]:
        shutil.copy(video, folder)
        shutil.copy(video.with_suffix(".txt"), folder)
    recipe = load_recipe(recipe_file, [f"data.path={folder}", 'data.buckets=["17x64x96", "1x64x96"]'])
    inspect_data(recipe, Cache(tmp_path / "cache"), runtime)
    assert f"{folder}: 2 clips, 2 in 17x64x96; " in capsys.readouterr().err
    Image.new("RGB", (96, 64), "red").save(folder / "red.png")
    (folder / "red.txt").write_text("red")
    inspect_data(recipe, Cache(tmp_path / "cache"), runtime)
    assert f"{folder}: 3 clips (2 videos, 1 image), 1 in 1x64x96, 2 in 17x64x96; " in capsys.readouterr().err


def test_a_clip_that_is_trained_on_and_held_out_is_named_with_what_to_do(
    recipe_file: Path, runtime: Runtime, clips: Path, tmp_path: Path
) -> None:
    held = tmp_path / "held"
    held.mkdir()
    video = sorted(clips.glob("*.mp4"))[0]
    shutil.copy(video, held)
    shutil.copy(video.with_suffix(".txt"), held)
    recipe = load_recipe(recipe_file, [f"validation.heldout={held}"])
    with pytest.raises(UserError, match=r"is trained on, too.*\n.*take it out of validation\.heldout"):
        inspect_data(recipe, Cache(tmp_path / "cache"), runtime)
