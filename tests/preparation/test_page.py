"""The page of `check --report`: every clip with what becomes of it, whatever is wrong, safe to open and small."""

import base64
import io
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from page_reader import Page, read_page
from PIL import Image
from processes import Finetune
from transformers import AutoTokenizer

from finetune.checks.everything import check_all
from finetune.data.cache import Cache
from finetune.data.synthetic import RECORDINGS, Recording, record
from finetune.preparation.account import Account, CaptionLengths, account_of
from finetune.preparation.inspect import Inspection, inspect_datasets
from finetune.preparation.page import histogram, render, write_page
from finetune.preparation.report import write_report
from finetune.preparation.thumbnails import Thumbnails, bytes_of_each, small_file, thumbnails
from finetune.recipe import Recipe, load_recipe
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import Problem, UserError

Report = Callable[..., tuple[Page, list[Problem]]]
BUCKETS = 'data.buckets=["17x64x96","17x96x64","1x64x96"]'


@pytest.fixture
def folder(clips: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clips, tmp_path / "clips"))


@pytest.fixture
def report(recipe_file: Path, runtime: Runtime, folder: Path, tmp_path: Path) -> Report:
    """The page about the clips in `folder`, and what `check` finds wrong."""

    def make(*overrides: str) -> tuple[Page, list[Problem]]:
        settings = [f"data.path={folder}", f"data.cache={tmp_path / 'cache'}", "data.fps=24", BUCKETS, *overrides]
        problems = check_all(load_recipe(recipe_file, settings), runtime, 1, tmp_path / "report")
        return read_page(tmp_path / "report"), problems

    return make


def pixels(source: str) -> np.ndarray:
    kind, data = source.split(",", 1)
    assert kind == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def stripes(path: Path, colours: list[tuple[int, int, int]], across: bool = False) -> None:
    """A clip of 17 frames of each colour after the other; or 17 frames with the colours side by side, each 48 columns wide."""
    colour = np.array(colours, dtype=np.uint8)
    if across:
        video = np.broadcast_to(np.repeat(colour, 48, axis=0), (17, 64, 48 * len(colours), 3))
    else:
        video = np.broadcast_to(np.repeat(colour, 17, axis=0)[:, None, None], (17 * len(colours), 64, 96, 3))
    record(video, path, Recording(path.name, video.shape[1], video.shape[2], len(video), 24))
    path.with_suffix(".txt").write_text("stripes")


RED, GREEN, BLUE = (220, 20, 20), (20, 200, 20), (20, 20, 220)


# Every clip and its figures


def test_every_clip_has_a_card_with_its_figures_and_a_picture(report: Report, folder: Path) -> None:
    page, problems = report()
    assert problems == []
    cards = page.by_name()
    assert set(cards) == {each.name for each in RECORDINGS}
    for each in RECORDINGS:
        card, text = cards[each.name], " ".join(cards[each.name].texts)
        assert card.captions == [(folder / each.name).with_suffix(".txt").read_text().strip()]
        assert len(card.pictures) == 1
        turned = each.rotation % 180 != 0
        height, width = (each.width, each.height) if turned else (each.height, each.width)
        assert f"{width}×{height}, " in text
        assert card.bucket == ("17x96x64" if height > width else "17x64x96")
        if not each.uneven:
            available = int(each.frames / each.fps * 24 + 0.1)
            assert f"17 of {available} frames at 24 fps" in text
            assert (f"{available - 17} unused" in card.tags) == (available > 17)
            assert ("8 repeated" in card.tags) == (each.name == "slow.mp4")  # 12 frames a second: each is shown twice
            assert ("17 left out" in card.tags) == (each.name == "fast.mp4")  # 50 frames a second
    assert "33 % cropped" in cards["square.mp4"].tags  # a square that fills 3:2
    assert "17x64x96 10 clips" in " ".join(page.text.split())
    assert "17x96x64 2 clips" in " ".join(page.text.split())


def test_pictures_show_what_the_model_sees_of_each_window(report: Report, folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    stripes(folder / "across.mp4", [RED, BLUE, BLUE, GREEN], across=True)  # the middle of 64x192 fills 64x96
    stripes(folder / "after.mp4", [RED, GREEN, BLUE])
    page, problems = report("data.window=all")
    assert problems == []
    cards = page.by_name()
    (middle,) = map(pixels, cards["across.mp4"].pictures)
    assert middle.shape[:2] == (64, 96)
    assert np.abs(middle[:, 4:-4].mean((0, 1)) - BLUE).max() < 12
    assert "50 % cropped" in cards["across.mp4"].tags
    shown = [pixels(picture).mean((0, 1)) for picture in cards["after.mp4"].pictures]
    assert [int(colour.argmax()) for colour in shown] == [0, 1, 2]
    assert "51 of 51 frames at 24 fps in 3 windows" in " ".join(cards["after.mp4"].texts)


def test_a_mask_is_shown_at_the_frame_of_each_picture(report: Report, folder: Path) -> None:
    """As it weighs the loss: cropped as the clip is, and at the window's time. A clip without one has none."""
    for file in folder.iterdir():
        file.unlink()
    white, black = (255,) * 3, (0,) * 3
    stripes(folder / "after.mp4", [RED, GREEN, BLUE])
    stripes(folder / "turns.mkv", [white, (128,) * 3, white])
    stripes(folder / "across.mp4", [RED, BLUE, BLUE, GREEN], across=True)  # the middle of 64x192 fills 64x96
    stripes(folder / "side.mkv", [white, black, white, white], across=True)
    stripes(folder / "bare.mp4", [RED])
    for file in folder.glob("*.txt"):
        file.unlink()
    rows = ["video,caption,mask", "after.mp4,x,turns.mkv", "across.mp4,x,side.mkv", "bare.mp4,x,"]
    (folder / "metadata.csv").write_text("\n".join(rows))
    page, problems = report("data.window=all")
    assert problems == []
    cards = page.by_name()
    assert [round(pixels(mask).mean(), -1) for mask in cards["after.mp4"].masks] == [260, 130, 260]
    assert len(cards["after.mp4"].pictures) == 3
    (mask,) = map(pixels, cards["across.mp4"].masks)
    assert mask.shape[:2] == (32, 48)
    assert mask[:, :20].mean() < 12
    assert mask[:, 28:].mean() > 243
    assert cards["bare.mp4"].masks == []


def test_images_copies_held_out_clips_and_unused_files(report: Report, folder: Path) -> None:
    Image.new("RGB", (96, 64), RED).save(folder / "still.png")
    (folder / "still.txt").write_text("all red")
    shutil.copy(folder / "wide.mp4", folder / "twin.mp4")
    (folder / "twin.txt").write_text("the same again")
    (folder / "notes.docx").write_text("not a clip")
    page, problems = report("validation.heldout_clips=2")
    assert problems == []
    cards = page.by_name()
    assert cards["still.png"].bucket == "1x64x96"
    assert "image, 96×64" in cards["still.png"].texts
    assert np.abs(pixels(cards["still.png"].pictures[0]).mean((0, 1)) - RED).max() < 12
    assert "same as wide.mp4" in cards["twin.mp4"].tags
    assert "same as twin.mp4" in cards["wide.mp4"].tags
    held = {name for name, card in cards.items() if "held out" in card.tags}
    assert len(held - {"twin.mp4"}) == 2
    assert "notes.docx" in page.text


def test_several_captions_and_those_that_are_cut(report: Report, folder: Path, tiny_ltx: Path) -> None:
    caption = "a red ball moves to the left " * 40
    (folder / "wide.txt").write_text(caption)
    page, problems = report()
    assert problems == []
    tokens = len(AutoTokenizer.from_pretrained(tiny_ltx / "tokenizer")(caption.strip()).input_ids)
    cut = [(card.name, tag) for card in page.cards for tag in card.tags if "too long" in tag]
    assert cut == [("wide.mp4", f"caption {tokens - 128} tokens too long")]
    assert f"longest {tokens} tokens; 128 are read. 1 caption longer than that" in page.text


# Whatever is wrong


def test_a_page_is_written_when_clips_are_refused(report: Report, folder: Path) -> None:
    (folder / "wide.mp4").write_bytes((folder / "wide.mp4").read_bytes()[:300])
    (folder / "long.txt").unlink()
    page, problems = report()
    assert len(problems) == 2
    assert len(page.cards) == len(RECORDINGS) - 2
    for problem in problems:
        assert problem.what in page.refused
        assert Path(problem.where.split(" ")[0]).name in page.refused


def test_a_clip_that_cannot_be_decoded_has_the_reason_in_place_of_its_picture(
    recipe_file: Path, runtime: Runtime, folder: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_file, [f"data.path={folder}", f"data.cache={tmp_path / 'cache'}"])
    inspected = inspect_datasets(recipe, Cache(recipe.data.cache), runtime)
    (folder / "wide.mp4").write_bytes(b"something else")  # after it was found to be sound
    with pytest.raises(UserError, match=r"wide\.mp4: cannot be read as a video") as error:
        write_report(tmp_path / "report", recipe, inspected, None, [], runtime)
    card = read_page(tmp_path / "report").by_name()["wide.mp4"]
    assert card.pictures == []
    assert error.value.problems[0].what in card.texts
    skipping = load_recipe(recipe_file, [f"data.path={folder}", "data.bad_clips=skip"])
    write_report(tmp_path / "report", skipping, inspected, None, [], runtime)


def test_a_dataset_that_cannot_be_read_is_named(report: Report, folder: Path) -> None:
    shutil.rmtree(folder)
    page, problems = report()
    assert page.cards == []
    assert problems[0].what in page.text
    assert "This dataset cannot be read" in page.text


def test_a_folder_that_cannot_be_made_is_an_error(report: Report, tmp_path: Path) -> None:
    (tmp_path / "report").write_text("a file")
    with pytest.raises(OSError, match=r"dataset\.html"):  # `read_page` finds no page
        report()
    assert (tmp_path / "report").read_text() == "a file"


# Names and captions of strangers

HOSTILE = '</p></li></ul><script>alert(1)</script><img src="https://example.org/x.png" onerror="alert(2)">\'"&amp;'


def test_hostile_names_and_captions_are_text(report: Report, folder: Path) -> None:
    (folder / "wide.txt").write_text(f"{HOSTILE} \u202eשלום \x1b[31m end", encoding="utf-8")
    (folder / "slow.txt").write_text("word " * 8000)
    named = 'x"><svg onload=alert(3)>&.mp4'
    shutil.copy(folder / "small.mp4", folder / named)
    (folder / named).with_suffix(".txt").write_text("by name")
    odd = os.fsdecode(b"caf\xe9.mp4")
    shutil.copy(folder / "small.mp4", folder / odd)
    (folder / odd).with_suffix(".txt").write_text("by bytes")
    page, _ = report()
    cards = page.by_name()
    assert len(cards) == len(RECORDINGS) + 1
    assert cards["wide.mp4"].captions == [f"{HOSTILE} \\u202eשלום \\x1b[31m end"]
    assert named in cards
    assert "caf\\xe9.mp4" in page.refused
    assert len(cards["slow.mp4"].captions[0]) < 700
    assert "39,999 characters" in cards["slow.mp4"].captions[0]
    assert page.scripts == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_the_page_refers_to_nothing_outside_and_allows_no_other_script(report: Report, folder: Path) -> None:
    (folder / "wide.txt").write_text(HOSTILE)
    page, _ = report()
    for _, name, value in page.attributes:
        if name in ("src", "href", "action", "srcset", "data", "poster"):
            assert value.startswith(("data:image/webp;base64,", "#")), (name, value)
    assert "url(" not in page.style
    assert "@import" not in page.style
    (policy,) = [value for tag, _, value in page.attributes if tag == "meta" and "default-src" in value]
    assert "default-src 'none'; img-src data:;" in policy
    assert "script-src 'sha256-" in policy


# Size and many


@pytest.fixture
def many(recipe_file: Path, runtime: Runtime, folder: Path, tmp_path: Path) -> tuple[Recipe, list[Inspection]]:
    """3,000 clips, each with captions of 50,000 characters of three bytes and a name of 255 bytes."""
    recipe = load_recipe(recipe_file, [f"data.path={folder}", f"data.cache={tmp_path / 'cache'}"])
    (found,) = inspect_datasets(recipe, Cache(recipe.data.cache), runtime)
    clips = []
    for number in range(3000):
        entry = found.clips[number % len(found.clips)]
        path = folder / f"{number:04d}{'長' * 80}.mp4"
        clip = replace(entry.clip, path=path, captions=(f"{number} " + "字" * 50_000,) * 2)
        clips.append(entry._replace(clip=clip, hash=str(number)))
    refused = [
        Problem("the file is cut off " * 8, str(folder / f"bad{number}.mp4"), "export it") for number in range(300)
    ]
    return recipe, [Inspection(folder, clips, refused)]


def test_a_page_about_3000_clips_has_at_most_20_mb(many: tuple[Recipe, list[Inspection]], tmp_path: Path) -> None:
    recipe, inspected = many
    account = account_of(recipe, inspected)
    largest = os.urandom(bytes_of_each(2 * 3000, masks=2 * 3000))
    masks = (largest[: len(largest) // 4],) * 2
    path, size = write_page(tmp_path, account, [Thumbnails((largest, largest), 85, 128, masks=masks)] * 3000)
    assert size == path.stat().st_size
    assert 12e6 < size <= 20e6
    assert path.read_text(encoding="utf-8").count('<li class="card"') == 3000


def test_pictures_of_noise_are_as_small_as_is_asked() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 832, 3), dtype=np.uint8))
    for most in (5000, bytes_of_each(3000), bytes_of_each(6000)):
        file = small_file(noise, most)
        assert 0 < len(file) <= most
        assert max(Image.open(io.BytesIO(file)).size) >= 64


def test_of_very_many_clips_the_first_are_listed_and_all_counted(
    many: tuple[Recipe, list[Inspection]], runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.preparation.page._LISTED", 20)
    recipe, (found,) = many
    page = Page(render(account_of(recipe, [Inspection(found.path, found.clips[:60])]), [Thumbnails()] * 60))
    assert len(page.cards) == 20
    assert "The first 20 of 60 clips are listed" in page.text
    assert thumbnails([], "white", runtime) == []


# Captions


@pytest.mark.parametrize("limit", [None, 1, 7, 77, 128, 226, 512])
@pytest.mark.parametrize("longest", [0, 1, 30, 1000, 10**6])
def test_a_histogram_has_every_caption_and_no_bar_across_the_limit(limit: int | None, longest: int) -> None:
    lengths = [*np.random.default_rng(1).integers(0, min(longest, 300) + 1, 500).tolist(), longest]
    bars = histogram(lengths, limit)
    assert sum(bar.count for bar in bars) == len(lengths)
    assert len(bars) <= 35
    for bar, following in pairwise(bars):
        assert bar.last is not None
        assert following.first == bar.last + 1
        assert bar.count == sum(bar.first <= length <= bar.last for length in lengths)
    if limit is not None:
        assert sum(bar.count for bar in bars if bar.is_cut) == sum(length > limit for length in lengths)


def test_no_caption_is_too_long_where_the_limit_is_not_known() -> None:
    lengths = CaptionLengths("captions", "words", None, {"a b": 2})
    assert lengths.cut("a b") == 0
    assert Account((), (), (), (), (), (lengths,)).captions[0].limit is None


# The command


def test_the_command_says_where_the_page_is_and_two_processes_write_what_one_does(
    finetune: Finetune, recipe_file: Path, runtime: Runtime, folder: Path, tmp_path: Path
) -> None:
    (folder / "wide.mp4").write_bytes((folder / "wide.mp4").read_bytes()[:300])
    settings = [f"data.path={folder}", f"data.cache={tmp_path / 'cache'}"]
    out = tmp_path / "report"
    sets = [argument for each in settings for argument in ("--set", each)]
    result = finetune("check", "--recipe", recipe_file, *sets, "--report", out, processes=2)
    assert result.returncode != 0  # a clip is refused
    assert f"report: {out / 'dataset.html'} (0.0 MB)" in result.stderr
    assert [file.name for file in out.iterdir()] == ["dataset.html"]
    assert "wide.mp4" in read_page(out).refused
    check_all(load_recipe(recipe_file, settings), runtime, 2, tmp_path / "alone")
    assert (tmp_path / "alone" / "dataset.html").read_bytes() == (out / "dataset.html").read_bytes()
