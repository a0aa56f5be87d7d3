"""Images as training data: probed like videos of one frame, and scaled and cropped like them."""

from pathlib import Path

import numpy as np
import pytest
from ffmpeg_oracle import Ffmpeg
from PIL import Image

from finetune.data import decode
from finetune.data.images import decode_image, probe_image
from finetune.recipe import Bucket
from finetune.runtime.errors import UserError

SIDES = [(360, 640), (500, 281), (200, 300), (97, 131), (64, 96)]


def smooth(height: int, width: int) -> np.ndarray:
    """Sums of waves, of some twenty pixels and longer: the details that are left after scaling to a third."""
    draw = np.random.default_rng(height * width)
    rows, columns = np.mgrid[:height, :width]
    image = np.zeros((height, width, 3))
    for _ in range(12):
        phase = draw.uniform(0, 2 * np.pi, 3)
        image += np.sin((rows * draw.uniform(-1, 1) + columns * draw.uniform(-1, 1))[..., None] * 0.3 + phase)
    return (127.5 + 30 * image).clip(0, 255).astype(np.uint8)


def covered(height: int, width: int, bucket: Bucket) -> tuple[int, int]:
    """Height and width of an image that is scaled to cover a bucket."""
    scale = max(bucket.height / height, bucket.width / width)
    return max(bucket.height, round(height * scale)), max(bucket.width, round(width * scale))


@pytest.mark.parametrize("height, width", SIDES)
def test_an_image_is_scaled_and_cropped_as_pillow_and_ffmpeg_do(
    tmp_path: Path, ffmpeg: Ffmpeg, height: int, width: int
) -> None:
    pixels = smooth(height, width)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for bucket in (Bucket(1, 64, 96), Bucket(1, 96, 64), Bucket(1, 128, 128)):
        ours = decode_image(tmp_path / "a.png", bucket)
        assert ours.shape == (*bucket, 3)
        assert ours.dtype == np.uint8
        rows, columns = covered(height, width, bucket)
        top, left = (rows - bucket.height) // 2, (columns - bucket.width) // 2
        whole = Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BICUBIC)
        theirs = np.asarray(whole)[top : top + bucket.height, left : left + bucket.width]
        assert np.abs(ours[0].astype(int) - theirs).max() <= 2  # roundings
        # ffmpeg's cubic has another parameter by default, which is the one that videos are scaled with.
        filters = f"scale={columns}:{rows}:flags=bicubic+accurate_rnd+full_chroma_int:param0=0:param1=0.5"
        filters += f",crop={bucket.width}:{bucket.height}:{left}:{top}"
        shown = ffmpeg.frames(tmp_path / "a.png", bucket.height, bucket.width, filters)
        difference = ours.astype(int) - shown
        assert np.abs(difference).mean() < 0.5
        assert abs(difference.mean()) < 0.1


def test_an_image_of_the_buckets_size_is_left_as_it_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(decode_image(tmp_path / "a.png", Bucket(1, 64, 96))[0], pixels)
    assert np.array_equal(decode_image(tmp_path / "a.png", Bucket(1, 64, 64))[0], pixels[:, 16:80])


def test_an_image_is_scaled_as_a_video_of_it_is(tmp_path: Path, ffmpeg: Ffmpeg) -> None:
    pixels, bucket = smooth(360, 640), Bucket(1, 64, 96)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    lossless = ("-c:v", "libx264rgb", "-qp", "0", "-pix_fmt", "rgb24")
    ffmpeg.run("-i", tmp_path / "a.png", *lossless, tmp_path / "a.mp4")
    video = decode.decode(tmp_path / "a.mp4", decode.probe(tmp_path / "a.mp4"), bucket, 25)
    difference = decode_image(tmp_path / "a.png", bucket).astype(int) - video
    assert np.abs(difference).mean() < 1.5
    assert abs(difference.mean()) < 0.3


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "gif", "bmp", "tiff"])
def test_every_format_is_probed_and_decoded(tmp_path: Path, suffix: str) -> None:
    path, pixels = tmp_path / f"a.{suffix}", smooth(128, 192)
    Image.fromarray(pixels).save(path, **({"quality": 95} if suffix in ("jpg", "webp", "avif") else {}))
    info = probe_image(path)
    assert (info.height, info.width, info.frames) == (128, 192, 1)
    assert all(info.frames_at(fps) == 1 for fps in (1, 24, 60, 480))
    difference = decode_image(path, Bucket(1, 128, 192))[0].astype(int) - pixels
    assert np.abs(difference).mean() < (16 if suffix == "gif" else 4)  # a GIF has 256 colours


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_and_mirrored_as_their_camera_says(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:32, :48], upright[:32, 48:], upright[32:, :48] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {  # as EXIF describes the place of row 0 and column 0
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    info = probe_image(path)
    assert (info.height, info.width) == (64, 96)
    difference = decode_image(path, Bucket(1, 64, 96))[0].astype(int) - upright
    assert np.abs(difference).mean() < 4


def test_exif_data_that_cannot_be_read_leaves_an_image_as_it_is(tmp_path: Path) -> None:
    Image.fromarray(smooth(64, 96)).save(tmp_path / "a.jpg", exif=b"Exif\0\0nonsense")
    assert probe_image(tmp_path / "a.jpg").height == 64


@pytest.mark.parametrize("orientation", [0, 9, 99])
def test_orientations_that_there_are_not_leave_an_image_as_it_is(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (96, 64)).save(tmp_path / "a.jpg", exif=exif)
    info = probe_image(tmp_path / "a.jpg")
    assert (info.height, info.width) == (64, 96)


@pytest.mark.parametrize("height, width", [(1, 1), (7, 7), (3, 500), (500, 3)])
def test_jpegs_of_few_pixels_are_read(tmp_path: Path, height: int, width: int) -> None:
    Image.new("RGB", (width, height), "red").save(tmp_path / "a.jpg")
    info = probe_image(tmp_path / "a.jpg")
    assert (info.height, info.width) == (height, width)
    assert np.abs(decode_image(tmp_path / "a.jpg", Bucket(1, 32, 32))[0] - (254.0, 0, 0)).max() <= 2


def test_of_an_animated_image_the_first_frame_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (96, 64), colour) for colour in ("red", "lime", "blue")]
    for suffix, options in (("gif", {}), ("webp", {"lossless": True}), ("png", {}), ("avif", {"quality": 95})):
        path = tmp_path / f"a.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        assert probe_image(path).frames == 1
        assert np.abs(decode_image(path, Bucket(1, 64, 96)).astype(int) - (255, 0, 0)).max() <= 3


def test_transparent_images_are_composed_on_the_background(tmp_path: Path) -> None:
    Image.new("RGBA", (192, 128), (255, 0, 255, 0)).save(tmp_path / "a.png")
    assert (decode_image(tmp_path / "a.png", Bucket(1, 64, 96)) == 255).all()
    assert (decode_image(tmp_path / "a.png", Bucket(1, 64, 96), "#102030") == (16, 32, 48)).all()


def test_a_long_strip_is_fitted_without_being_scaled_as_a_whole(tmp_path: Path) -> None:
    """As a whole it would have 2,000,000 x 64 times as many pixels."""
    Image.new("RGB", (2_000_000, 1), "red").save(tmp_path / "a.png")
    assert (decode_image(tmp_path / "a.png", Bucket(1, 64, 96)) == (255, 0, 0)).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "gif", "bmp", "tiff"])
@pytest.mark.parametrize("kept", [0, 8, 0.3, 0.7, 0.97])
def test_images_that_are_cut_off_are_found_by_probing(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 192, 3), np.uint8)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(UserError, match=r"empty|no image can be read") as caught:
        probe_image(path)
    assert str(path) in str(caught.value)


def test_a_flipped_byte_in_a_png_is_found_by_probing(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(smooth(128, 192)).save(path)
    data = bytearray(path.read_bytes())
    for place in range(60, len(data) - 12, len(data) // 20):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        with pytest.raises(UserError, match="no image can be read"):
            probe_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "gif", "bmp", "tiff"])
@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.full)])
def test_damaged_images_are_read_or_refused_by_name(tmp_path: Path, suffix: str, count: int) -> None:
    path, draw = tmp_path / f"a.{suffix}", np.random.default_rng(5)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth(40, 60)).save(path, **({} if suffix in ("gif", "bmp") else {"exif": exif}))
    whole, refused = np.frombuffer(path.read_bytes(), np.uint8), []
    for _ in range(count):
        data = whole.copy()
        places = draw.integers(0, len(data), draw.integers(1, 6))
        data[places] = draw.integers(0, 256, len(places))
        path.write_bytes(data.tobytes())
        try:
            info = probe_image(path)
            assert decode_image(path, Bucket(1, 32, 32)).shape == (1, 32, 32, 3)
            assert info.height > 0 < info.width
        except UserError as error:
            refused.append(str(error))
    assert all(str(path) in message for message in refused)
