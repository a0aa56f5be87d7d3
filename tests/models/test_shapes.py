"""A bucket is accepted exactly if the pipeline generates videos of its shape; a refusal names the nearest that is."""

import json
import re
import shutil
from pathlib import Path

import pytest
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor, generate_crop_size_list
from PIL import Image
from recording import VARIANTS, TinyModel, generate, variant_id, variants

from finetune.data.bucket_budget import find_buckets
from finetune.data.decode import VideoInfo
from finetune.recipe import Bucket
from finetune.recipe.bucket import Area
from finetune.recipe.validation import Prompt

FIXED = ("cogvideox_i2v", "5b-I2V")  # learned positions, for one shape
BY_IMAGE = ("hunyuan15_i2v", None)  # of the size that its pipeline takes from the image
FREE = pytest.mark.parametrize(
    "model", [each for each in VARIANTS if each not in (FIXED, BY_IMAGE)], ids=variant_id, indirect=True
)
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
    if bucket.frames == 1:
        bucket = bucket._replace(frames=model.family.least_frames)  # see the next test
    assert (model.family.bucket_problem(bucket) is None) == (generated_shape(model, bucket) == bucket)


GIVEN_IN_FULL = [*variants("cogvideox_i2v", "hunyuan_i2v", "hunyuan15_i2v", "wan_i2v")]
GIVEN_IN_FULL = [each for each in GIVEN_IN_FULL if each not in (FIXED, ("wan_i2v", "2.2-5B"))]


@pytest.mark.parametrize("model", GIVEN_IN_FULL, ids=variant_id, indirect=True)
def test_a_given_frame_alone_leaves_nothing_to_train(model: TinyModel) -> None:
    """Though most of the pipelines generate it."""
    least = 9 if model.family.name == "cogvideox_i2v" else 5
    assert nearest(model, Bucket(1, 32, 32)) == Bucket(least, 32, 32)
    assert f"at least {least} because" in model.family.bucket_problem(Bucket(1, 32, 32))
    assert model.family.bucket_problem(Bucket(least, 32, 32)) is None


@pytest.mark.parametrize("model", variants("ltx_i2v", "wan_i2v"), ids=variant_id, indirect=True)
def test_no_single_frame_is_generated_from_an_image(model: TinyModel) -> None:
    one, video = (Prompt(text="a", shape=shape, image="a.png") for shape in ("1x32x32", "9x32x32"))
    if model.family.last_image:
        one, video = (each.model_copy(update={"last_image": "b.png"}) for each in (one, video))
    refused = model.family.bucket_problem(one.shape) or model.family.prompt_problem(one)
    assert "frames" in refused
    assert model.family.prompt_problem(video) is None


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


@pytest.mark.parametrize("model", [BY_IMAGE], ids=variant_id, indirect=True)
@pytest.mark.parametrize("sides", [(64, 96), (96, 64), (80, 80), (48, 128), (128, 48), (64, 64), (96, 96), (32, 160)])
def test_a_prompt_is_accepted_exactly_if_the_pipeline_makes_its_shape_of_the_image(
    model: TinyModel, sides: tuple[int, int]
) -> None:
    bucket = Bucket(5, *sides)
    assert model.family.bucket_problem(bucket) is None  # it can be trained
    prompt = Prompt(text="a", shape=str(bucket), image="first.png")
    made = generated_shape(model, bucket)
    problem = model.family.prompt_problem(prompt)
    assert (problem is None) == (made == bucket)
    if problem:
        assert f"the nearest is {made}" in problem


@pytest.mark.parametrize("model", [BY_IMAGE], ids=variant_id, indirect=True)
@pytest.mark.parametrize("target, count", [(640, 121), (960, 181)])
def test_every_shape_of_the_pipeline_can_be_asked_for(
    model: TinyModel, tmp_path: Path, target: int, count: int
) -> None:
    """Its own rounding makes some of them from no image of exactly their size."""
    folder = Path(shutil.copytree(model.folder, tmp_path / "model"))
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_size": target}))
    family = TinyModel.open(folder, model.family.name).family
    shapes, processor = generate_crop_size_list(target, 16), HunyuanVideo15ImageProcessor(vae_scale_factor=16)
    assert len(shapes) == count
    found = []
    for height, width in shapes:
        given = family.condition_image(Image.new("RGB", (300, 200)), Bucket(5, height, width))
        found.append(processor.calculate_default_height_width(given.height, given.width, target))
    assert found == shapes
    assert any(processor.calculate_default_height_width(*shape, target) != shape for shape in shapes)


@pytest.mark.parametrize("model", [BY_IMAGE], ids=variant_id, indirect=True)
def test_the_pipeline_crops_what_is_added_to_an_image(model: TinyModel) -> None:
    image = Image.fromarray(model.clip[0])
    processor = HunyuanVideo15ImageProcessor(vae_scale_factor=16, do_resize=False)
    for height, width in generate_crop_size_list(80, 16):
        fitted = processor.resize(image, height=height, width=width, resize_mode="crop")
        given = model.family.condition_image(image, Bucket(5, height, width))
        assert given.height - height + given.width - width in (0, 1)
        assert processor.resize(given, height=height, width=width, resize_mode="crop").tobytes() == fitted.tobytes()


def test_shapes_that_are_found_for_an_area_are_legal_and_follow_the_clips(model: TinyModel) -> None:
    area = model.bucket
    sizes = [(480, 854), (854, 480), (500, 500), (area.height, area.width)]
    clips = [(VideoInfo(height, width, 50, 2.0), False) for height, width in sizes]
    found = find_buckets(
        clips, [], Area(*area[1:]), [area.frames], 9, None, lambda bucket: model.family.bucket_problem(bucket) is None
    )
    assert [bucket for bucket in found if model.family.bucket_problem(bucket)] == []
    assert next(iter(found)) == area
    assert sum(found.values()) == len(clips)
    assert max(bucket.height * bucket.width for bucket in found) == area.height * area.width
