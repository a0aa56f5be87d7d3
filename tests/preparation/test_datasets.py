"""Several datasets, pieces of long clips and several captions, from files to batches."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from finetune.checks.everything import check_all
from finetune.checks.model import open_family
from finetune.data.clip import Clip
from finetune.preparation import encode
from finetune.preparation.encode import Prepared, prepare
from finetune.recipe import Recipe, load_recipe
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.training.job import order_of

LENGTH, FPS = 41, 24
BUCKET = 'data.buckets=["9x64x96"]'


def write_video(path: Path, seeds: list[int]) -> None:
    """A lossless video with a frame of noise for each seed."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "bgr0"
        for seed in seeds:
            picture = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def long_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips of 41 frames; the table gives the first one three captions, the others one."""
    folder = tmp_path_factory.mktemp("long")
    captions: list[str | list[str]] = [["one", "two", "three"], "four", "five"]
    rows = []
    for number, caption in enumerate(captions):
        write_video(folder / f"{number}.mkv", [100 * number + frame for frame in range(LENGTH)])
        rows.append({"video": f"{number}.mkv", "caption": caption})
    (folder / "metadata.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def recipe_of(recipe_file: Path) -> Callable[..., Recipe]:
    def make(*overrides: str) -> Recipe:
        return load_recipe(recipe_file, [BUCKET, *overrides])

    return make


@pytest.fixture
def prepared(recipe_of: Callable[..., Recipe], runtime: Runtime) -> Callable[..., Prepared]:
    def make(*overrides: str) -> Prepared:
        recipe = recipe_of(*overrides)
        return prepare(recipe, open_family(recipe), runtime)

    return make


def moments(found: Prepared, key: str) -> torch.Tensor:
    return found.cache.read("video", key)["mean"]


@pytest.fixture
def cut_at(prepared: Callable[..., Prepared], tmp_path: Path) -> Callable[[int, int], torch.Tensor]:
    """The encoding of nine of a clip's frames, in a file of their own."""

    def encode(number: int, start: int) -> torch.Tensor:
        folder = tmp_path / f"cut_{number}_{start}"
        folder.mkdir(exist_ok=True)
        write_video(folder / "a.mkv", [100 * number + frame for frame in range(start, start + 9)])
        (folder / "a.txt").write_text("cut")
        found = prepared(f"data.path={folder}")
        return moments(found, found.train[0].keys["video"])

    return encode


@pytest.mark.parametrize("window, start", [("head", 0), ("centre", 16)])
def test_the_window_is_at_its_place(
    prepared: Callable[..., Prepared], long_clips: Path, cut_at: Callable, window: str, start: int
) -> None:
    found = prepared(f"data.path={long_clips}", f"data.window={window}")
    for number, item in enumerate(found.train):
        assert len(item.windows) == 1
        assert torch.equal(moments(found, item.keys["video"]), cut_at(number, start))


def test_all_windows_are_samples_of_their_own(
    prepared: Callable[..., Prepared], long_clips: Path, cut_at: Callable, capsys: pytest.CaptureFixture
) -> None:
    found = prepared(f"data.path={long_clips}", "data.window=all")
    assert Counter(item.path.name for item in found.train) == dict.fromkeys(("0.mkv", "1.mkv", "2.mkv"), 4)
    second = [item for item in found.train if item.path.name == "1.mkv"]
    for number, item in enumerate(second):
        assert torch.equal(moments(found, item.keys["video"]), cut_at(1, 9 * number))
    assert "3 trimmed" in capsys.readouterr().err  # the last five frames are in none


def test_windows_may_overlap(prepared: Callable[..., Prepared], long_clips: Path, cut_at: Callable) -> None:
    found = prepared(f"data.path={long_clips}", "data.window=all", "data.overlap=0.5")
    second = [item for item in found.train if item.path.name == "1.mkv"]
    assert len(second) == 9  # every four frames, from 0 to 32
    assert torch.equal(moments(found, second[-1].keys["video"]), cut_at(1, 32))


def test_random_windows_are_drawn_once_by_the_seed(
    prepared: Callable[..., Prepared], long_clips: Path, tmp_path: Path
) -> None:
    def keys(*overrides: str) -> list[tuple[str, ...]]:
        found = prepared(f"data.path={long_clips}", "data.window=random", "data.windows=3", *overrides)
        return [tuple(window[0].keys["video"] for window in item.windows) for item in found.train]

    drawn = keys()
    assert [len(set(windows)) for windows in drawn] == [3, 3, 3]
    assert keys() == drawn
    assert keys("train.seed=7") != drawn
    few = prepared(f"data.path={long_clips}", 'data.buckets=["41x64x96"]', "data.window=random")
    assert [len(item.windows) for item in few.train] == [1, 1, 1]  # the whole clip is the only one


def test_captions_and_windows_take_turns(prepared: Callable[..., Prepared], long_clips: Path) -> None:
    found = prepared(f"data.path={long_clips}", "data.window=random", "data.windows=2")
    item = found.train[0]
    assert [[each.caption for each in window] for window in item.windows] == [["one", "two", "three"]] * 2
    texts = {each.caption: each.keys["text"] for each in item.variants}
    assert len(set(texts.values())) == 3
    turns = [item.variant(turn, 42, 0) for turn in range(6)]
    assert Counter(each.caption for each in turns) == {"one": 2, "two": 2, "three": 2}
    assert Counter(each.keys["video"] for each in turns).most_common(1)[0][1] == 3


def test_of_held_out_clips_only_what_is_measured_is_encoded(
    prepared: Callable[..., Prepared], long_clips: Path, few_clips: Path, tmp_path: Path
) -> None:
    """Their first window with their first caption."""
    settings = [f"data.path={few_clips}", f"validation.heldout={long_clips}", f"data.cache={tmp_path / 'cache'}"]
    found = prepared(*settings, "data.window=random", "data.windows=2")
    trained = {key for item in found.train for key in item.all_keys}
    measured = {key for item in found.heldout for key in item.keys.values()}
    assert len(measured) == 6
    assert {item.caption for item in found.heldout} == {"one", "four", "five"}
    assert {item.key for item in found.cache.items()} == trained | measured


def test_what_captions_share_is_made_once_for_a_window(
    prepared: Callable[..., Prepared], long_clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = [], encode.clip_sources

    def noted(clip: Clip, *arguments: Any) -> Any:
        made.append(clip.path.stem)
        return make(clip, *arguments)

    monkeypatch.setattr(encode, "clip_sources", noted)
    prepared(f"data.path={long_clips}", "data.window=random", "data.windows=2")
    assert Counter(made) == {"0": 2, "1": 2, "2": 2}


@pytest.fixture
def sources(recipe_file: Path, clips: Path, heldout: Path) -> Callable[..., Recipe]:
    """Recipes of two datasets, of twelve clips and three."""

    def make(*repeats: float) -> Recipe:
        text = recipe_file.read_text().replace(f'path = "{clips}"\n', "")
        for path, rate in zip((clips, heldout), repeats, strict=True):
            token = ' id_token = "TOK"' if path == heldout else ""
            text += f'\n[[data.sources]]\npath = "{path}"\nrepeats = {rate}\n{token.strip()}\n'
        recipe_file.write_text(text)
        return load_recipe(recipe_file)

    return make


def test_sources_are_taken_as_often_as_they_say(
    sources: Callable[..., Recipe], runtime: Runtime, heldout: Path
) -> None:
    recipe = sources(0.5, 2)
    found = prepare(recipe, open_family(recipe), runtime)
    order = order_of(recipe, found)
    plans = [order.plan(step) for step in range(200)]
    pairs = {pair for plan in plans if plan.epoch < 4 for pair in zip(plan.items, plan.turns, strict=True)}
    counts = Counter(item for item, _ in pairs)
    assert {counts[index] for index, item in enumerate(found.train) if item.source == 0} == {2}
    assert {counts[index] for index, item in enumerate(found.train) if item.source == 1} == {8}
    tokens = {item.caption.startswith("TOK ") for item in found.train if item.path.parent == heldout}
    assert tokens == {True}
    assert not any(item.caption.startswith("TOK") for item in found.train if item.path.parent != heldout)


def test_a_source_of_no_repeats_is_not_read(sources: Callable[..., Recipe], runtime: Runtime) -> None:
    recipe = sources(1, 0)
    found = prepare(recipe, open_family(recipe), runtime)
    assert {item.source for item in found.train} == {0}


def test_clips_of_two_sources_are_said_to_be_trained_on_for_each(
    sources: Callable[..., Recipe], runtime: Runtime, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A source that lies in another one has all its clips there, too."""
    outer = tmp_path / "outer"
    inner = Path(shutil.copytree(clips, outer / "inner"))
    shutil.copy(clips / "wide.mp4", outer / "alone.mp4")
    (outer / "alone.txt").write_text("a clip")
    recipe = sources(1, 1)
    parts = [
        each.model_copy(update={"path": path}) for each, path in zip(recipe.data.sources, (outer, inner), strict=True)
    ]
    assert check_all(recipe, runtime, 1) == []
    assert "in both" not in capsys.readouterr().err
    nested = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": parts})})
    assert check_all(nested, runtime, 1) == []
    said = capsys.readouterr().err
    assert (
        f"{outer} and {inner} (sources 1 and 2 of those that are trained on): 13 clips are in both, byte for byte"
        in said
    )


def test_a_recipe_of_no_samples_is_refused(sources: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match="repeats"):
        sources(0, 0)


def test_check_and_training_name_what_is_wrong_in_every_source(
    sources: Callable[..., Recipe], runtime: Runtime, clips: Path, tmp_path: Path, recipe_file: Path
) -> None:
    sources(1, 1)
    text = recipe_file.read_text() + f'\n[[data.sources]]\npath = "{tmp_path / "nowhere"}"\n'
    recipe_file.write_text(text)
    recipe = load_recipe(recipe_file)
    problems = check_all(recipe, runtime, 1)
    assert [(each.what, each.where) for each in problems] == [("the dataset does not exist", str(tmp_path / "nowhere"))]
    with pytest.raises(UserError, match="the dataset does not exist"):
        prepare(recipe, open_family(recipe), runtime)


def test_held_out_clips_that_are_trained_on_are_found_by_check(
    recipe_file: Path, clips: Path, heldout: Path, runtime: Runtime
) -> None:
    recipe = load_recipe(recipe_file, [f"validation.heldout={clips}"])
    (first, *rest) = check_all(recipe, runtime, 1)
    assert len(rest) == 11
    assert "is trained on, too" in first.what


@pytest.mark.parametrize(
    "data, words",
    [
        ('buckets = ["9x64x96"]', "no `path`"),
        ('path = "a"', "no training shapes"),
        ('path = "a"\nbuckets = ["9x64x96"]\n[[data.sources]]\npath = "b"', "both `path` and"),
        ('buckets = ["9x64x96"]\n[[data.sources]]\npath = "b"\nrepeats = -1.0', "greater than or equal to 0"),
        ('buckets = ["9x64x96"]\n[[data.sources]]\npath = "b"\nrepeat = 1.0', "did you mean"),
    ],
)
def test_a_table_that_says_too_little_or_too_much_is_refused(tmp_path: Path, data: str, words: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f'[model]\nfamily = "ltx"\npath = "m"\n[data]\n{data}\n')
    with pytest.raises(UserError, match=words):
        load_recipe(path)


@pytest.mark.parametrize(
    "buckets, why",
    [
        ('["1x64x96"]', "because all buckets have one frame"),
        ('["49x64x96", "1x64x96"]', "too short for every bucket of several frames"),
    ],
)
def test_videos_that_become_images_are_named_with_the_reason(
    recipe_of: Callable[..., Recipe],
    runtime: Runtime,
    long_clips: Path,
    capsys: pytest.CaptureFixture,
    buckets: str,
    why: str,
) -> None:
    recipe = recipe_of(f"data.path={long_clips}", f"data.buckets={buckets}")
    assert check_all(recipe, runtime, 1) == []
    names = ", ".join(str(long_clips / f"{number}.mkv") for number in range(3))
    assert f"3 videos are trained as images, {why}: {names}" in capsys.readouterr().err
