"""A bucket is accepted exactly if the pipeline generates videos of its shape; a refusal names the nearest that is."""

import re

import pytest
from recording import VARIANTS, TinyModel, generate, variant_id, variants

from finetune.recipe import Bucket

FIXED = ("cogvideox_i2v", "5b-I2V")  # learned positions, for one shape
FREE = pytest.mark.parametrize("model", [each for each in VARIANTS if each != FIXED], ids=variant_id, indirect=True)
LENGTHS = [f"{frames}x32x32" for frames in (1, 2, 4, 5, 6, 7, 9, 10, 12, 13, 17, 25)]
SIDES = [f"1x{sides}" for sides in ("16x32", "32x16", "48x64", "24x32", "32x40", "20x32", "33x32", "128x160")]


def generated_shape(model: TinyModel, bucket: Bucket) -> Bucket | None:
    """The shape of the video that the pipeline makes when it is asked for a bucket; None if it cannot."""
    try:
        video = generate(model, model.pipeline(), bucket, steps=2, output_type="pt").frames
    except (ValueError, RuntimeError):
        return None
    return Bucket(video.shape[1], *video.shape[-2:])


@FREE
@pytest.mark.parametrize("bucket", [Bucket.parse(text) for text in (*LENGTHS, *SIDES)], ids=str)
def test_a_bucket_is_accepted_exactly_if_the_pipeline_generates_its_shape(model: TinyModel, bucket: Bucket) -> None:
    if model.replaces_frame and bucket.frames == 1:
        bucket = bucket._replace(frames=5)  # see the next test
    assert (model.family.bucket_problem(bucket) is None) == (generated_shape(model, bucket) == bucket)


@pytest.mark.parametrize("model", [("hunyuan_i2v", "token_replace")], ids=variant_id, indirect=True)
def test_a_given_frame_alone_leaves_nothing_to_train(model: TinyModel) -> None:
    alone = Bucket(1, 32, 32)
    assert generated_shape(model, alone) == alone
    assert nearest(model, alone) == Bucket(5, 32, 32)


@pytest.mark.parametrize("model", variants("cogvideox"), ids=variant_id, indirect=True)
@pytest.mark.parametrize("frames", [8, 16])
def test_cogvideox_refuses_what_has_no_latent_frame_for_its_first_frame(model: TinyModel, frames: int) -> None:
    """The pipeline does generate them: an even number of latent frames is four video frames each, unlike in training."""
    even = Bucket(frames, 32, 32)
    assert generated_shape(model, even) == even
    assert nearest(model, even) in (Bucket(frames + 1, 32, 32), Bucket(frames - 7, 32, 32))


def nearest(model: TinyModel, bucket: Bucket) -> Bucket:
    """The bucket that a refusal names."""
    (named,) = re.findall(r"the nearest is (\d+x\d+x\d+)", model.family.bucket_problem(bucket))
    return Bucket.parse(named)


@pytest.mark.parametrize(
    "asked", ["50x512x768", "48x500x770", "3x10x40", "120x480x724", "2x1x1", "11x40x56", "1000x24x24"]
)
def test_a_refusal_names_a_bucket_that_is_legal(model: TinyModel, asked: str) -> None:
    assert model.family.bucket_problem(nearest(model, Bucket.parse(asked))) is None


@FREE
def test_the_named_bucket_is_the_nearest_legal_one(model: TinyModel) -> None:
    """Among all shapes around it: no legal one is nearer in frames, height or width."""
    legal = [Bucket(f, h, w) for f in range(1, 27) for h in range(16, 129, 16) for w in range(16, 129, 16)]
    legal = [bucket for bucket in legal if model.family.bucket_problem(bucket) is None]
    for asked in (Bucket(11, 40, 50), Bucket(15, 100, 70), Bucket(22, 60, 33), Bucket(3, 70, 90)):
        named = nearest(model, asked)
        for axis in range(3):
            least = min(abs(bucket[axis] - asked[axis]) for bucket in legal)
            assert abs(named[axis] - asked[axis]) == least, (asked, named)


@pytest.mark.parametrize("model", [FIXED], ids=variant_id, indirect=True)
def test_learned_positions_are_for_one_shape(model: TinyModel) -> None:
    """At another size the pipeline fails; at another length its positions silently become sines and cosines."""
    assert model.family.bucket_problem(model.bucket) is None
    assert generated_shape(model, model.bucket) == model.bucket
    smaller = model.bucket._replace(height=32)
    assert generated_shape(model, smaller) is None
    for other in (smaller, model.bucket._replace(frames=9), model.bucket._replace(width=192)):
        assert nearest(model, other) == model.bucket


@pytest.mark.parametrize("model", variants("cogvideox"), ids=variant_id, indirect=True)
def test_of_text_to_video_only_1_5_is_limited_in_size(model: TinyModel) -> None:
    large = Bucket(9, 160, 160)
    problem = model.family.bucket_problem(large)
    if model.pipeline().transformer.config.patch_size_t:
        assert "at most 128 high and 128 wide; the nearest is 9x128x128" in problem
    else:
        assert problem is None
