"""Files that clips name in columns of the manifest are inspected with the clips' own."""

import json
import shutil
from pathlib import Path

import pytest

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
