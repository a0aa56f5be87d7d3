"""Which bucket a clip goes to, and what is said to be lost to it."""

import itertools

import pytest

from finetune.data.buckets import fit_to_bucket
from finetune.data.decode import VideoInfo
from finetune.recipe import Bucket
from finetune.runtime.errors import UserError

WIDE = VideoInfo(height=512, width=768, frames=50, duration=2.0)  # 25 fps


def choose(clip: VideoInfo, *buckets: str, fps: float | None = None) -> str:
    """The bucket of a clip; the same for every order of the list."""
    parsed = [Bucket.parse(text) for text in buckets]
    chosen = {str(fit_to_bucket(clip, order, fps, "clip").bucket) for order in itertools.permutations(parsed)}
    (only,) = chosen
    return only


@pytest.mark.parametrize("text", ["49x512x768", "1x32x32"])
def test_a_bucket_is_printed_as_it_is_written(text: str) -> None:
    assert str(Bucket.parse(text)) == text


def test_the_nearest_aspect_ratio_is_preferred() -> None:
    assert choose(WIDE, "49x512x512", "25x512x768", "49x768x512") == "25x512x768"


def test_of_equal_aspect_the_most_frames_are_kept() -> None:
    assert choose(WIDE, "17x512x768", "49x256x384", "33x512x768") == "49x256x384"


def test_of_equal_frames_the_largest_picture_that_is_not_enlarged_is_taken() -> None:
    assert choose(WIDE, "49x128x192", "49x256x384", "49x1024x1536") == "49x256x384"


def test_where_all_enlarge_the_smallest_does_least_harm() -> None:
    assert choose(WIDE, "49x1024x1536", "49x2048x3072") == "49x1024x1536"


def test_a_bucket_with_more_frames_than_the_clip_is_not_considered() -> None:
    assert choose(WIDE, "57x512x768", "17x512x512") == "17x512x512"


def test_a_clip_just_as_long_as_the_bucket_fits() -> None:
    assert choose(VideoInfo(512, 768, 49, 49 / 30), "49x512x768") == "49x512x768"


def test_frames_are_counted_at_the_recipes_rate() -> None:
    assert choose(WIDE, "49x512x768", "25x512x768", fps=12.5) == "25x512x768"
    assert choose(WIDE, "97x512x768", "25x512x768", fps=50) == "97x512x768"


@pytest.mark.parametrize("fps, rate", [(None, 25.0), (24.0, 24.0)])
def test_the_rate_is_the_recipes_or_the_clips_own(fps: float | None, rate: float) -> None:
    assert fit_to_bucket(WIDE, [Bucket(17, 512, 768)], fps, "clip").fps == rate


def test_frames_left_over_are_counted() -> None:
    assert fit_to_bucket(WIDE, [Bucket(33, 512, 768)], None, "clip").trimmed == 17
    assert fit_to_bucket(WIDE, [Bucket(17, 512, 768)], 12.5, "clip").trimmed == 8


@pytest.mark.parametrize(
    "bucket, cropped",
    [(Bucket(17, 512, 768), 0), (Bucket(17, 64, 64), 1 / 3), (Bucket(17, 64, 192), 1 / 2), (Bucket(17, 256, 384), 0)],
    ids=str,
)
def test_cropped_is_the_share_of_the_picture_that_is_lost(bucket: Bucket, cropped: float) -> None:
    assert fit_to_bucket(WIDE, [bucket], None, "clip").cropped == pytest.approx(cropped)


@pytest.mark.parametrize("bucket, enlarged", [(Bucket(17, 256, 384), 0.5), (Bucket(17, 768, 768), 1.5)], ids=str)
def test_enlarged_is_how_far_the_picture_is_scaled(bucket: Bucket, enlarged: float) -> None:
    assert fit_to_bucket(WIDE, [bucket], None, "clip").enlarged == pytest.approx(enlarged)


def test_a_clip_shorter_than_every_bucket_is_refused_with_its_length() -> None:
    with pytest.raises(UserError) as caught:
        fit_to_bucket(WIDE, [Bucket(57, 512, 768), Bucket(97, 512, 768)], 24, "clips/a.mp4")
    assert str(caught.value) == (
        "clips/a.mp4: 48 frames at 24 fps, but the shortest bucket has 57\n"
        "    -> add a bucket of at most 48 frames to data.buckets, raise data.fps, or remove the clip"
    )
