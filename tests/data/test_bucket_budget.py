"""Shapes of about one area for a dataset: legal, no larger, as few as needed, and cropping least of the clips."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.bucket_budget import best_shapes, find_buckets, near_lengths, shapes
from finetune.data.buckets import fit_to_bucket
from finetune.data.decode import VideoInfo
from finetune.recipe.bucket import Area, Bucket

AREA, SMALL = Area(512, 768), Area(256, 384)
Legal = Callable[[Bucket], bool]


def multiples(side: int, frames: int = 8) -> Legal:
    """What most models take."""
    return lambda bucket: (bucket.frames - 1) % frames == 0 and bucket.height % side == 0 and bucket.width % side == 0


def video(height: int, width: int, frames: int = 50) -> tuple[VideoInfo, bool]:
    return VideoInfo(height, width, frames, frames / 25), False


def found(
    clips: Sequence[tuple[VideoInfo, bool]],
    frames: Sequence[int] = (49,),
    count: int = 9,
    side: int = 32,
    area: Area = AREA,
) -> dict[Bucket, int]:
    return find_buckets(clips, [], area, frames, count, None, multiples(side))


def cropped(height: int, width: int, shape: tuple[int, int]) -> float:
    """The share of a picture that is lost where it is scaled to cover a shape, by its geometry."""
    scale = max(shape[0] / height, shape[1] / width)
    return 1 - shape[0] * shape[1] / (height * scale * width * scale)


def loss(clips: Sequence[tuple[int, int]], chosen: Sequence[tuple[int, int]]) -> float:
    """The mean share that clips lose in the shape that is best for each."""
    return sum(min(cropped(*clip, shape) for shape in chosen) for clip in clips) / len(clips)


SIDES = st.integers(200, 2200)
CLIPS = st.lists(st.builds(video, SIDES, SIDES, st.integers(1, 120)), min_size=1, max_size=25)
LENGTHS = st.lists(st.sampled_from([1, 9, 17, 49, 81]), min_size=1, max_size=4, unique=True)


@settings(max_examples=25, deadline=None)
@given(CLIPS, LENGTHS, st.integers(1, 9), st.sampled_from([16, 32]), st.randoms())
def test_what_holds_for_all_clips(clips: list, frames: list[int], count: int, side: int, rng: random.Random) -> None:
    buckets = found(clips, frames, count, side, SMALL)
    usable = [info for info, _ in clips if info.frames_at(info.fps) >= min(frames)]
    for bucket in buckets:
        assert multiples(side)(bucket)
        assert bucket.frames in frames
        assert bucket.height * bucket.width <= 256 * 384 < (bucket.height + side) * (bucket.width + side)
    per_length = Counter(bucket.frames for bucket in buckets)
    assert max(per_length.values(), default=0) <= min(count, len({info.width / info.height for info in usable}))
    fits = Counter(fit_to_bucket(info, list(buckets), None, "").bucket for info in usable)
    assert fits == buckets, "each has the clips that go to it, and at least one"
    for info in usable:
        longest = max(length for length in frames if length <= info.frames_at(info.fps))
        assert fit_to_bucket(info, list(buckets), None, "").bucket.frames == longest
    rng.shuffle(clips)
    rng.shuffle(frames)
    assert list(found(clips, frames, count, side, SMALL).items()) == list(buckets.items())


@pytest.mark.parametrize("count", [1, 2, 4, 9])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full)])
def test_no_other_choice_of_as_many_legal_shapes_crops_less(seed: int, count: int) -> None:
    rng = random.Random(seed)
    sizes = [(1080, 1920), (1920, 1080), (480, 640), (1000, 1000)] * 5
    sizes += [(rng.randint(300, 2000), rng.randint(300, 2000)) for _ in range(60)]
    chosen = {bucket[1:] for bucket in found([video(*size) for size in sizes], count=count)}
    ours = loss(sizes, list(chosen))
    sides = range(32, 4096, 32)
    legal = [(h, w) for h in sides for w in sides if 0.92 * 512 * 768 <= h * w <= 512 * 768]
    others = [rng.sample(legal, len(chosen)) for _ in range(200)]
    near = [shape for shape in legal if 0.2 < shape[0] / shape[1] < 5]
    others += [rng.sample(near, len(chosen)) for _ in range(200)]
    others += [[*(chosen - {gone}), rng.choice(near)] for gone in chosen for _ in range(20)]  # one of ours replaced
    assert ours <= min(loss(sizes, other) for other in others) + 1e-12


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=12), st.integers(1, 3))
def test_the_choice_is_the_best_of_all(sizes: list[tuple[int, int]], count: int) -> None:
    possible = shapes(Area(192, 256), [1], multiples(64))
    chosen = best_shapes([width / height for height, width in sizes], possible, count)
    assert len(chosen) <= count
    choices = itertools.combinations(possible, min(count, len(possible)))
    assert loss(sizes, chosen) == pytest.approx(min(loss(sizes, choice) for choice in choices), abs=1e-6)
    for fewer in itertools.combinations(possible, len(chosen) - 1) if len(chosen) > 1 else ():
        assert loss(sizes, fewer) > loss(sizes, chosen), "as few shapes as do it"


def test_a_clip_with_the_ratio_of_the_area_has_its_shape() -> None:
    assert found([video(1024, 1536), video(1080, 1920)]) == {Bucket(49, 512, 768): 1, Bucket(49, 448, 800): 1}


def test_sides_are_as_the_model_wants_them() -> None:
    assert list(found([video(1080, 1920)], side=16)) == [Bucket(49, 464, 832)]
    assert list(found([video(1080, 1920)], side=64)) == [Bucket(49, 448, 768)]


def test_the_longest_come_first_and_of_these_the_one_that_is_most_like_the_area() -> None:
    clips = [video(768, 512), video(512, 768, 20), video(512, 768), video(500, 500)]
    order = ["49x512x768", "49x608x608", "49x768x512", "17x512x768"]
    assert [str(bucket) for bucket in found(clips, [17, 49])] == order


def test_a_length_is_the_longest_that_a_clip_fills_and_one_that_is_longer_than_all_makes_no_bucket() -> None:
    clips = [video(512, 768, frames) for frames in (1, 16, 17, 48, 49, 80)]
    lengths = {str(bucket): count for bucket, count in found(clips, [1, 17, 49, 81]).items()}
    assert lengths == {"49x512x768": 2, "17x512x768": 2, "1x512x768": 2}


def test_lengths_count_at_the_frame_rate_of_training() -> None:
    slow = find_buckets([video(512, 768, 50)], [], AREA, [17, 49], 9, 12.5, multiples(32))
    assert slow == {Bucket(17, 512, 768): 1}


def test_a_clip_does_not_go_to_a_shorter_bucket_for_its_ratio() -> None:
    clips = [video(480, 640), *(video(470 + n, 640, 1) for n in range(20))]
    assert sum(count for bucket, count in found(clips, [1, 49]).items() if bucket.frames == 49) == 1


def test_an_image_is_one_frame() -> None:
    image = (VideoInfo(512, 768, 1, 1.0), True)
    assert found([image, video(512, 768)], [1, 49]) == {Bucket(49, 512, 768): 1, Bucket(1, 512, 768): 1}
    assert found([image, video(512, 768)], [9]) == {Bucket(9, 512, 768): 1}


def test_held_out_clips_get_buckets_but_have_no_part_in_the_choice_of_shapes() -> None:
    clips = [video(1080, 1920), video(1920, 1080)]
    held = [video(1000, 1000), video(1080, 1920, 20)]
    alone = find_buckets(clips, [], AREA, [17, 49], 9, None, multiples(32))
    both = find_buckets(clips, held, AREA, [17, 49], 9, None, multiples(32))
    assert both.items() >= alone.items()
    assert [str(bucket) for bucket in both.keys() - alone.keys()] == ["17x448x800"]
    assert both[Bucket(17, 448, 800)] == 0


def test_clips_that_are_all_too_short_make_no_bucket() -> None:
    assert found([video(512, 768, 8)], [9, 17]) == {}
    assert found([], [9, 17]) == {}


def test_where_the_model_limits_a_side_shapes_of_its_length_keep_the_ratio() -> None:
    def legal(bucket: Bucket) -> bool:  # as CogVideoX 1.5, whose positions end there
        return multiples(16)(bucket) and bucket.height <= 768 and bucket.width <= 1360

    sizes = [(1920, 1080), (768, 1360), (1000, 1000)]
    buckets = find_buckets([video(*size) for size in sizes], [], Area(768, 1360), [49], 9, None, legal)
    assert [str(bucket) for bucket in buckets] == ["49x768x1360", "49x768x768", "49x768x432"]


def test_a_model_of_one_shape_gets_it() -> None:
    only = Bucket(49, 480, 720)
    clips = [video(1920, 1080), video(480, 720)]
    assert find_buckets(clips, [], Area(480, 720), [49], 9, None, lambda bucket: bucket == only) == {only: 2}


def test_the_nearest_legal_lengths_are_on_both_sides() -> None:
    legal = multiples(32)
    assert near_lengths(Bucket(20, 512, 768), legal) == [17, 25]
    assert near_lengths(Bucket(20, 500, 768), legal) == []
    assert near_lengths(Bucket(2, 512, 768), lambda bucket: bucket.frames == 5) == [5]


def test_three_thousand_clips_of_any_size() -> None:
    """As many clips of different sizes as there hardly are; it must end at all."""
    rng = random.Random(1)
    clips = [video(rng.randint(300, 2000), rng.randint(300, 2000)) for _ in range(3_000)]
    assert sum(found(clips, [1, 17, 49], side=16).values()) == 3_000
