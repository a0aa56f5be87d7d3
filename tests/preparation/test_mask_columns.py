"""Masks, control and reference files that a manifest names beside its clips, from the file to what is trained."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from page_reader import read_page
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool3d

from finetune.checks.everything import check_all
from finetune.data.loader import read_sample
from finetune.data.synthetic import RECORDINGS, record
from finetune.models.batch import Tensors
from finetune.models.encoder import Encoder
from finetune.models.family import Family, SampleLike
from finetune.models.folder import ModelFolder
from finetune.models.ltx import LTXImageToVideo, LTXVideo, pack
from finetune.preparation.encode import Prepared, prepare
from finetune.recipe import load_recipe
from finetune.recipe.schema import ObjectiveSettings, Vae
from finetune.runtime import seeds
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.training.job import build

WIDE = "wide.mp4"  # 25 frames of 128x192 at 25 fps, trained in 17x64x96
SMALL = "small.mp4"  # 17 frames of 64x96 at 24 fps

Row = dict[str, str]
Prepare = Callable[..., Prepared]


def write_video(path: Path, grey: np.ndarray, fps: int) -> None:
    """Write uint8 frames (F, H, W) without loss."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *grey.shape[1:], "gray"
        for pixels in grey:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="gray")))
        container.mux(stream.encode())


def quadrant(frames: int, height: int, width: int) -> np.ndarray:
    """White at the upper left, and from the tenth frame on at the lower right, uint8 (F, H, W)."""
    mask = np.zeros((frames, height, width), dtype=np.uint8)
    mask[:, : height // 2, : width // 3] = 255
    mask[9:, height // 2 :, width // 3 :] = 255
    return mask


def of_ltx(mask: np.ndarray) -> Tensor:
    """A mask of 17x64x96 as LTX-Video's latent pixels, float32 (3, 2, 3)."""
    frames = torch.from_numpy(mask).float()[None, None] / 255
    return torch.cat([avg_pool3d(frames[:, :, :1], (1, 32, 32)), avg_pool3d(frames[:, :, 1:], (8, 32, 32))], 2)[0, 0]


@pytest.fixture
def dataset(few_clips: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a manifest of clips, each with further columns: `dataset({"wide.mp4": {"mask": "m.mkv"}, "small.mp4": {}})`."""
    folder = tmp_path / "masked"
    folder.mkdir()

    def write(rows: dict[str, Row]) -> Path:
        lines = [
            {
                "video": str(few_clips / name),
                "caption": (few_clips / name).with_suffix(".txt").read_text().strip(),
                **row,
            }
            for name, row in rows.items()
        ]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return folder

    write({})
    return write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "masked"


@pytest.fixture
def prepared(recipe_file: Path, tiny_ltx: Path, folder: Path, runtime: Runtime) -> Prepare:
    def make(*overrides: str, family: type[Family] = LTXVideo) -> Prepared:
        recipe = load_recipe(recipe_file, [f"data.path={folder}", *overrides])
        return prepare(recipe, family(ModelFolder(tiny_ltx)), runtime)

    return make


def cached_mask(prepared: Prepared, name: str) -> Tensor:
    (item,) = (item for item in prepared.train if item.path.name == name)
    return prepared.cache.read("mask", item.keys["mask"])["mask"]


# Masks


def test_a_mask_is_cached_at_latent_resolution(dataset: Callable[..., Path], folder: Path, prepared: Prepare) -> None:
    """Of a video in the clip's size, of one of half the size and twice the rate, and of an image."""
    write_video(folder / "same.mkv", quadrant(17, 64, 96), 24)
    Image.fromarray(quadrant(17, 64, 96)[-1]).save(folder / "image.png")
    dataset({SMALL: {"mask": "same.mkv"}, "vp9_small.webm": {"mask": "image.png"}, "vp9.webm": {}})
    made = prepared()
    expected = quadrant(17, 64, 96)
    torch.testing.assert_close(cached_mask(made, SMALL), of_ltx(expected), rtol=0, atol=1e-6)
    expected[:] = expected[-1]
    torch.testing.assert_close(cached_mask(made, "vp9_small.webm"), of_ltx(expected), rtol=0, atol=1e-6)


def test_a_mask_is_read_at_the_clips_times_and_in_its_size(
    dataset: Callable[..., Path], folder: Path, prepared: Prepare
) -> None:
    """At twice the clip's rate and twice the bucket's size: every second frame."""
    levels = (np.arange(50) * 5).astype(np.uint8)
    write_video(folder / "fast.mkv", np.broadcast_to(levels[:, None, None], (50, 128, 192)), 50)
    dataset({WIDE: {"mask": "fast.mkv"}})
    expected = np.broadcast_to(levels[: 2 * 17 : 2, None, None], (17, 64, 96))
    torch.testing.assert_close(cached_mask(prepared(), WIDE), of_ltx(expected.copy()), rtol=0, atol=1.5 / 255)


def test_each_window_of_a_clip_has_its_piece_of_the_mask(
    dataset: Callable[..., Path], folder: Path, few_clips: Path, prepared: Prepare
) -> None:
    """And a mask that ends before the last window does is refused."""
    levels = (10 + np.arange(25) * 9).astype(np.uint8)
    mask = np.broadcast_to(levels[:, None, None], (25, 128, 192))
    write_video(folder / "mask.mkv", mask, 25)
    dataset({WIDE: {"mask": "mask.mkv"}})
    settings = ["data.window=all", "data.overlap=0.5"]
    made = prepared(*settings)
    assert len(made.train) == 2
    for item, start in zip(made.train, (0, 8), strict=True):
        expected = np.broadcast_to(levels[start : start + 17, None, None], (17, 64, 96))
        found = made.cache.read("mask", item.keys["mask"])["mask"]
        torch.testing.assert_close(found, of_ltx(expected.copy()), rtol=0, atol=1.5 / 255)
    write_video(folder / "mask.mkv", mask[:24], 25)
    with pytest.raises(UserError, match=r"its mask .* has 24 frames at 25 fps, and 25 of the clip are used"):
        prepared(*settings)
    prepared()


def test_a_mask_is_cropped_as_its_clip_is(
    recipe_file: Path, dataset: Callable[..., Path], folder: Path, prepared: Prepare
) -> None:
    """In a square bucket the middle 64 of 96 columns are left, in each of which a third of the mask is."""
    columns = np.zeros((64, 96), dtype=np.uint8)
    columns[:, 16:48], columns[:, 80:] = 255, 255
    Image.fromarray(columns).save(folder / "columns.png")
    Image.fromarray(columns).resize((192, 128), Image.Resampling.NEAREST).save(folder / "large.png")
    dataset({SMALL: {"mask": "columns.png"}, WIDE: {"mask": "large.png"}})
    made = prepared('data.buckets=["17x64x64"]')
    expected = torch.tensor([1.0, 0.0]).expand(3, 2, 2)
    torch.testing.assert_close(cached_mask(made, SMALL), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(cached_mask(made, WIDE), expected, rtol=0, atol=0.02)


def test_a_colour_counts_as_its_luma(dataset: Callable[..., Path], folder: Path, prepared: Prepare) -> None:
    colour = Image.new("RGB", (96, 64), (200, 40, 90))
    colour.save(folder / "colour.png")
    dataset({SMALL: {"mask": "colour.png"}})
    luma = colour.convert("L").getpixel((0, 0)) / 255
    torch.testing.assert_close(cached_mask(prepared(), SMALL), torch.full((3, 2, 3), luma), rtol=0, atol=1e-6)


def test_what_is_transparent_does_not_count(dataset: Callable[..., Path], folder: Path, prepared: Prepare) -> None:
    """Whatever colour it hides, and whatever background the recipe has for other images. 16 bits of grey are the levels of 8."""
    white, alpha = Image.new("RGB", (96, 64), "white"), Image.fromarray(quadrant(17, 64, 96)[0])
    white.putalpha(alpha)
    white.save(folder / "transparent.png")
    Image.fromarray(quadrant(17, 64, 96)[0].astype(np.uint16) * 257).save(folder / "deep.png")
    dataset({SMALL: {"mask": "transparent.png"}, "vp9_small.webm": {"mask": "deep.png"}})
    made = prepared("data.background=grey")
    expected = of_ltx(quadrant(17, 64, 96)[:1].repeat(17, 0))
    for name in (SMALL, "vp9_small.webm"):
        torch.testing.assert_close(cached_mask(made, name), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", [LTXVideo, LTXImageToVideo])
def test_a_clip_that_is_an_image_has_a_mask_of_one_frame(
    dataset: Callable[..., Path], folder: Path, prepared: Prepare, family: type[Family]
) -> None:
    """Image-to-video models are not given it either: they train it as an image to be made."""
    Image.new("RGB", (96, 64), (200, 90, 20)).save(folder / "still.png")
    Image.fromarray(quadrant(1, 64, 96)[0]).save(folder / "mask.png")
    row = {"video": "still.png", "caption": "an orange wall", "mask": "mask.png"}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    made = prepared('data.buckets=["1x64x96"]', family=family)
    expected = avg_pool3d(torch.from_numpy(quadrant(1, 64, 96)).float()[None] / 255, (1, 32, 32))[0]
    torch.testing.assert_close(cached_mask(made, "still.png"), expected, rtol=0, atol=1e-6)


def test_masks_change_no_other_item_and_clips_without_have_none(
    dataset: Callable[..., Path], folder: Path, prepared: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset({WIDE: {}, SMALL: {}})
    before = {item.path: item.keys for item in prepared().train}
    assert "weighed" not in capsys.readouterr().err
    Image.fromarray(quadrant(17, 64, 96)[0]).save(folder / "image.png")
    dataset({WIDE: {}, SMALL: {"mask": "image.png"}})
    after = {item.path: item.keys for item in prepared().train}
    assert {path.name for path, keys in after.items() if "mask" in keys} == {SMALL}
    assert {path: {kind: keys[kind] for kind in before[path]} for path, keys in after.items()} == before
    said = "the loss of 1 of 2 clips is weighed by their masks; the others count everywhere"
    assert said in capsys.readouterr().err


def mean_square(target: Tensor, mask: np.ndarray) -> float:
    """The mean of a target (tokens, C) squared, weighed by a mask (F, H, W)."""
    weights = pack(of_ltx(mask)[None, None])[0]
    return float((weights * target.square()).sum() / (weights.sum() * target.shape[-1]))


def test_batches_and_the_heldout_loss_are_weighed(
    dataset: Callable[..., Path], folder: Path, recipe_file: Path, tiny_ltx: Path, runtime: Runtime
) -> None:
    """By a prediction of zero: one clip with a mask, and one without, and a clip held out with a mask."""
    Image.fromarray(quadrant(17, 64, 96)[0]).save(folder / "image.png")
    held = folder / "held"
    held.mkdir()
    write_video(held / "mask.mkv", quadrant(17, 64, 96), 24)
    (dataset({SMALL: {"mask": "mask.mkv"}}) / "metadata.jsonl").rename(held / "metadata.jsonl")
    dataset({WIDE: {"mask": "image.png"}, "vp9.webm": {}})
    overrides = [f"data.path={folder}", f"validation.heldout={held}", "validation.sigmas=1"]
    recipe, family = load_recipe(recipe_file, overrides), LTXVideo(ModelFolder(tiny_ltx))
    job = build(recipe, runtime, family, prepare(recipe, family, runtime))

    term = job.micro_batches()[0].only
    masks = {False: quadrant(17, 64, 96)[:1].repeat(17, 0), True: np.full((17, 64, 96), 255, dtype=np.uint8)}
    whole = [bool((sample == 1).all()) for sample in term.counted]
    assert sorted(whole) == [False, True]  # the micro-batch has both clips
    expected = [mean_square(target, masks[each]) for target, each in zip(term.target, whole, strict=True)]
    assert term.losses(torch.zeros_like(term.target)).tolist() == pytest.approx(expected, rel=1e-5)

    (item,) = job.prepared.heldout
    sample = read_sample(item, job.prepared.cache, seeds.generator(recipe.train.seed, "heldout", 0))
    (target,) = family.batch([sample], job.objective, torch.tensor([0.5])).only.target
    assert job.heldout_loss().zero_loss == pytest.approx(mean_square(target, quadrant(17, 64, 96)), rel=1e-5)


# What is wrong with a mask


@pytest.fixture
def said(
    recipe_file: Path, folder: Path, runtime: Runtime, prepared: Prepare, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The error that preparation ends with; with `by_check`, `check` finds the same problem, too."""

    def error(by_check: bool = True, family: type[Family] = LTXVideo) -> str:
        with pytest.raises(UserError) as raised:
            prepared(family=family)
        (problem,) = raised.value.problems
        if by_check:
            found = check_all(load_recipe(recipe_file, [f"data.path={folder}"]), runtime, 1)
            assert [(each.what, each.where) for each in found] == [(problem.what, problem.where)]
        prepared_without = prepared("data.bad_clips=skip", family=family)
        assert [item.path.name for item in prepared_without.train] == ["vp9.webm"]
        assert f"skipped {problem.where}: {problem.what}" in capsys.readouterr().err
        return str(problem)

    return error


def test_a_mask_that_is_shorter_than_its_clip_is_refused(
    dataset: Callable[..., Path], folder: Path, few_clips: Path, said: Callable[..., str]
) -> None:
    write_video(folder / "short.mkv", quadrant(10, 64, 96), 24)
    dataset({SMALL: {"mask": "short.mkv"}, "vp9.webm": {}})
    message = said()
    what = f"its mask {folder / 'short.mkv'} has 10 frames at 24 fps, and 17 of the clip are used"
    assert f"{few_clips / SMALL}: {what}" in message


def test_a_mask_of_another_aspect_ratio_is_refused(
    dataset: Callable[..., Path], folder: Path, few_clips: Path, said: Callable[..., str]
) -> None:
    Image.new("L", (64, 64), 255).save(folder / "square.png")
    dataset({SMALL: {"mask": "square.png"}, "vp9.webm": {}})
    message = said()
    assert f"{few_clips / SMALL}: its mask {folder / 'square.png'} is 64x64 pixels, and the clip 96x64" in message


def test_a_mask_that_is_no_picture_is_refused(
    dataset: Callable[..., Path], folder: Path, said: Callable[..., str]
) -> None:
    (folder / "mask.png").write_text("white")
    dataset({SMALL: {"mask": "mask.png"}, "vp9.webm": {}})
    assert str(folder / "mask.png") in said()


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_black_mask_is_refused(
    dataset: Callable[..., Path], folder: Path, few_clips: Path, said: Callable[..., str], kind: str
) -> None:
    if kind == "image":
        name = "black.png"
        Image.new("L", (96, 64), 3).save(folder / name)
    else:
        name = "black.mp4"  # with a codec that loses
        record(np.zeros((17, 64, 96, 3), dtype=np.uint8), folder / name, RECORDINGS[1])
    dataset({SMALL: {"mask": name}, "vp9.webm": {}})
    message = said()
    assert f"{few_clips / SMALL}: its mask {folder / name} is black" in message


def white_in(first: int, last: int) -> np.ndarray:
    """A mask of the wide clip that is white in these frames, the last one among them: uint8 (25, 128, 192)."""
    mask = np.zeros((25, 128, 192), dtype=np.uint8)
    mask[first : last + 1] = 255
    return mask


def test_a_mask_that_is_black_in_all_that_is_trained_on_is_refused_with_the_seconds(
    dataset: Callable[..., Path], folder: Path, few_clips: Path, said: Callable[..., str]
) -> None:
    """Of 25 frames at 25 fps the first 17 are trained on."""
    write_video(folder / "late.mkv", white_in(18, 24), 25)
    dataset({WIDE: {"mask": "late.mkv"}, "vp9.webm": {}})
    message = said()
    assert f"{few_clips / WIDE}: its mask {folder / 'late.mkv'} is black from 0.00 to 0.68 s, so nothing" in message
    assert "data.window" in message


@pytest.mark.parametrize(
    "settings, white, starts, left_out",
    [
        (["data.window=all", "data.overlap=0.5"], (0, 7), [0], "1 window left out{} (0.32 to 1.00 s)"),
        (["data.window=all", "data.overlap=0.5"], (20, 24), [8], "1 window left out{} (0.00 to 0.68 s)"),
        (["data.window=random", "data.windows=9"], (0, 2), [0, 1, 2], "6 windows left out{} (0.12 to 1.00 s)"),
    ],
)
def test_windows_in_which_a_mask_is_black_are_left_out_and_named(
    dataset: Callable[..., Path],
    folder: Path,
    few_clips: Path,
    prepared: Prepare,
    capsys: pytest.CaptureFixture[str],
    settings: list[str],
    white: tuple[int, int],
    starts: list[int],
    left_out: str,
) -> None:
    mask = white_in(*white)
    write_video(folder / "mask.mkv", mask, 25)
    dataset({WIDE: {"mask": "mask.mkv"}})
    made = prepared(*settings)
    keys = [window[0].keys["mask"] for item in made.train for window in item.windows]
    for key, start in zip(keys, starts, strict=True):
        expected = np.ascontiguousarray(mask[start : start + 17, ::2, ::2])
        found = made.cache.read("mask", key)["mask"]
        torch.testing.assert_close(found, of_ltx(expected), rtol=0, atol=1.5 / 255)
    why = f", because nothing would count there by the clip's mask: {few_clips / WIDE}"
    assert left_out.format(why) in capsys.readouterr().err


def test_the_page_says_which_windows_are_left_out(
    dataset: Callable[..., Path], folder: Path, recipe_file: Path, runtime: Runtime, tmp_path: Path
) -> None:
    write_video(folder / "mask.mkv", white_in(0, 7), 25)
    dataset({WIDE: {"mask": "mask.mkv"}})
    recipe = load_recipe(recipe_file, [f"data.path={folder}", "data.window=all", "data.overlap=0.5"])
    assert check_all(recipe, runtime, 1, tmp_path / "report") == []
    (card,) = read_page(tmp_path / "report").cards
    assert "1 window left out: 0.32 to 1.00 s" in card.tags


def test_a_mask_is_decoded_once_as_long_as_it_does_not_change(
    dataset: Callable[..., Path], folder: Path, recipe_file: Path, runtime: Runtime
) -> None:
    """What is found of it is remembered: other bytes under the same size and time are not noticed, as of any file."""
    mask = folder / "mask.mkv"
    write_video(mask, white_in(18, 24), 25)
    dataset({WIDE: {"mask": "mask.mkv"}})

    def problems() -> list[str]:
        recipe = load_recipe(recipe_file, [f"data.path={folder}", f"data.cache={folder / 'cache'}"])
        return [problem.what for problem in check_all(recipe, runtime, 1)]

    before, state = problems(), mask.stat()
    assert len(before) == 1
    mask.write_bytes(bytes(state.st_size))
    os.utime(mask, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert problems() == before


def test_a_black_mask_of_copies_is_refused_with_each(
    dataset: Callable[..., Path], folder: Path, few_clips: Path, prepared: Prepare
) -> None:
    for name in ("one.mp4", "two.mp4"):
        shutil.copy(few_clips / SMALL, folder / name)
    Image.new("L", (96, 64)).save(folder / "black.png")
    rows = [{"video": name, "caption": "a ball", "mask": "black.png"} for name in ("one.mp4", "two.mp4")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError) as error:
        prepared()
    assert {each.where for each in error.value.problems} == {str(folder / "one.mp4"), str(folder / "two.mp4")}


def test_a_mask_that_is_white_in_the_given_frame_alone_is_refused_where_it_is_given(
    dataset: Callable[..., Path], folder: Path, few_clips: Path, prepared: Prepare, said: Callable[..., str]
) -> None:
    first = np.zeros((17, 64, 96), dtype=np.uint8)
    first[0] = 255
    write_video(folder / "first.mkv", first, 24)
    dataset({SMALL: {"mask": "first.mkv"}, "vp9.webm": {}})
    torch.testing.assert_close(cached_mask(prepared(), SMALL), of_ltx(first), rtol=0, atol=1e-6)
    message = said(by_check=False, family=LTXImageToVideo)
    assert f"{few_clips / SMALL}: its mask {folder / 'first.mkv'} is white only in the first frame" in message


def test_a_mask_that_is_not_there_is_named(dataset: Callable[..., Path], folder: Path, prepared: Prepare) -> None:
    dataset({SMALL: {"mask": "gone.mkv"}, WIDE: {}})
    with pytest.raises(UserError, match=r"gone\.mkv \(from metadata\.jsonl, line 1\): no such file"):
        prepared()


def test_another_mask_is_another_training(
    dataset: Callable[..., Path], folder: Path, recipe_file: Path, tiny_ltx: Path, runtime: Runtime
) -> None:
    def identity() -> dict[str, str]:
        recipe, family = load_recipe(recipe_file, [f"data.path={folder}"]), LTXVideo(ModelFolder(tiny_ltx))
        return build(recipe, runtime, family, prepare(recipe, family, runtime)).identity

    dataset({WIDE: {}, SMALL: {}})
    without = identity()
    for place in (0, 1):
        Image.fromarray(quadrant(17, 64, 96)[place * 16]).save(folder / f"{place}.png")
    identities = []
    for place in (0, 1):
        dataset({WIDE: {}, SMALL: {"mask": f"{place}.png"}})
        identities.append(identity()["clips"])
    assert len({without["clips"], *identities}) == 3


# Control and reference files


class Steered(LTXVideo):
    """LTX-Video with a control video and a reference image, whose mean colours are added to its noised latents."""

    def encoders(self, dtype: torch.dtype, settings: Vae) -> tuple[Encoder, ...]:
        def means(frames: np.ndarray) -> Tensors:
            shape = torch.tensor(frames.shape)
            return {"mean": torch.from_numpy(frames).float().mean((0, 1, 2)) / 255, "shape": shape}

        return (
            *super().encoders(dtype, settings),
            Encoder("control", ("control",), "v1", lambda _: [], lambda _: means),
            Encoder("reference", ("reference",), "v1", lambda _: [], lambda _: means),
        )

    def condition(self, sample: SampleLike, x0: Tensor, settings: ObjectiveSettings) -> Tensors:
        return {"added": sum(sample.encoded[kind]["mean"].sum() for kind in ("control", "reference"))}

    def inputs(self, noisy: Tensor, *rest: Any) -> dict[str, Any]:
        condition = rest[2]
        return super().inputs(noisy + condition["added"][:, None, None, None, None], *rest)


@pytest.fixture
def steered_rows(folder: Path, dataset: Callable[..., Path]) -> dict[str, Row]:
    """Two clips, each with a control video of its own rate and a reference image of another shape."""
    rows = {}
    for level, name in ((50, SMALL), (200, "vp9_small.webm")):
        write_video(folder / f"{level}.mkv", np.full((34, 32, 48), level, dtype=np.uint8), 48)
        Image.new("RGB", (80, 200), (0, 0, level)).save(folder / f"{level}.png")
        rows[name] = {"control": f"{level}.mkv", "reference": f"{level}.png"}
    dataset(rows)
    return rows


def test_a_family_trains_on_control_and_reference_files(
    steered_rows: dict[str, Row], folder: Path, recipe_file: Path, tiny_ltx: Path, runtime: Runtime
) -> None:
    overrides = [f"data.path={folder}", "train.global_batch_size=2"]
    recipe, family = load_recipe(recipe_file, overrides), Steered(ModelFolder(tiny_ltx))
    made = prepare(recipe, family, runtime)
    for item, level in zip(made.train, (50, 200), strict=True):
        control, reference = (made.cache.read(kind, item.keys[kind]) for kind in ("control", "reference"))
        assert control["shape"].tolist() == [17, 64, 96, 3]
        assert reference["shape"].tolist() == [1, 64, 96, 3]
        torch.testing.assert_close(control["mean"], torch.full((3,), level / 255), rtol=0, atol=1.5 / 255)
        torch.testing.assert_close(reference["mean"], torch.tensor([0, 0, level / 255]), rtol=0, atol=1e-6)
    job = build(recipe, runtime, family, made)
    plain = build(recipe, runtime, LTXVideo(ModelFolder(tiny_ltx)), made)
    ours, theirs = (each.step(0, [each.micro_batches()[0]]).loss for each in (job, plain))
    assert ours != pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("column", ["control", "reference"])
def test_a_clip_without_its_control_file_is_named(
    steered_rows: dict[str, Row], dataset: Callable[..., Path], prepared: Prepare, column: str
) -> None:
    del steered_rows[SMALL][column]
    dataset(steered_rows)
    with pytest.raises(UserError, match=f"line 1: the clip has no '{column}'"):
        prepared(family=Steered)


def test_a_control_file_that_is_an_image_is_refused(
    steered_rows: dict[str, Row], dataset: Callable[..., Path], folder: Path, few_clips: Path, prepared: Prepare
) -> None:
    Image.new("L", (96, 64), 100).save(folder / "still.png")
    steered_rows[SMALL]["control"] = "still.png"
    dataset(steered_rows)
    with pytest.raises(
        UserError, match=r"its control .*still\.png is an image, and the clip is trained with 17"
    ) as error:
        prepared(family=Steered)
    assert error.value.problems[0].where == str(few_clips / SMALL)


def test_columns_that_a_family_does_not_read_are_said(
    steered_rows: dict[str, Row], prepared: Prepare, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared()
    said = capsys.readouterr().err
    for column in ("control", "reference"):
        assert said.count(f"the column {column!r} is not used") == 1
    prepared(family=Steered)
    assert "is not used" not in capsys.readouterr().err
