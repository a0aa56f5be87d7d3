"""An image of any depth, palette, profile and transparency is what a browser shows of it."""

import io
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from finetune.data.images import load_image, probe_image
from finetune.runtime.errors import UserError

RAMP = np.arange(256, dtype=np.uint16)[None].repeat(8, 0)  # every level of 8 bits
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)


def png(header: bytes, rows: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG made by hand: `header` is bit depth and colour type, `rows` the bytes of each row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    height, length = rows.shape
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[header[1]]
    width = length * 8 // (header[0] * channels)
    data = np.concatenate([np.zeros((height, 1), np.uint8), rows.view(np.uint8)], 1).tobytes()
    size = width.to_bytes(4) + height.to_bytes(4)
    parts = [(b"IHDR", size + header + b"\0\0\0"), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def big_endian(values: np.ndarray) -> np.ndarray:
    """The bytes of rows of 16-bit values, as PNG has them."""
    return np.ascontiguousarray(values.astype(">u2").reshape(len(values), -1)).view(np.uint8)


@pytest.fixture
def shown(tmp_path: Path) -> Callable[..., np.ndarray]:
    """Loads a file of given bytes."""

    def load(data: bytes, background: str = "white", suffix: str = ".png") -> np.ndarray:
        path = tmp_path / f"image{suffix}"
        path.write_bytes(data)
        assert probe_image(path).frames == 1
        return load_image(str(path), background)

    return load


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# Depth


def test_greys_of_16_bits_are_scaled_to_8(shown: Callable) -> None:
    grey = shown(png(b"\x10\0", big_endian(RAMP * 257)))
    assert np.array_equal(grey, np.stack([RAMP] * 3, -1))
    between = shown(png(b"\x10\0", big_endian(RAMP * 257 - (RAMP > 0) * 100)))
    assert np.array_equal(between[..., 0], RAMP)  # rounded, not cut


@pytest.mark.parametrize("colour_type", [2, 4, 6], ids=["RGB", "LA", "RGBA"])
def test_colours_of_16_bits_are_scaled_to_8(shown: Callable, colour_type: int) -> None:
    channels = {2: 3, 4: 2, 6: 4}[colour_type]
    values = np.stack([RAMP * 257] * channels, -1)
    if colour_type != 2:
        values[..., -1] = 65535
    assert np.array_equal(shown(png(bytes([16, colour_type]), big_endian(values)))[..., 0], RAMP)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_tiffs_of_16_bits_are_scaled_to_8(shown: Callable, mode: str) -> None:
    order = ">" if mode.endswith("B") else "<"
    values = (RAMP * 257).astype(f"{order}u2")
    image = Image.frombytes(mode, (256, 8), values.tobytes())
    assert np.array_equal(shown(saved(image, "TIFF"), suffix=".tiff")[..., 0], RAMP)


def test_tiffs_whose_white_is_zero_are_not_negatives(shown: Callable) -> None:
    image = Image.frombytes("I;16", (256, 8), (65535 - RAMP * 257).astype("<u2").tobytes())
    assert np.array_equal(shown(saved(image, "TIFF", tiffinfo={262: 0}), suffix=".tiff")[..., 0], RAMP)


def test_values_of_no_known_range_are_refused(shown: Callable) -> None:
    for image, reason in [
        (Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "floating-point"),
        (Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)), "32 bits"),
    ]:
        with pytest.raises(UserError, match=f"{reason}(.|\n)*save it with 8 or 16 bits"):
            shown(saved(image, "TIFF"), suffix=".tiff")


# Transparency

HALF = np.zeros((16, 24), np.uint8)
HALF[:, 12:] = 255  # the left half is transparent
PINK = np.array([255, 0, 255], np.uint8)


@pytest.mark.parametrize(
    "background, colour",
    [("white", (255, 255, 255)), ("black", (0, 0, 0)), ("grey", (128, 128, 128)), ("#12fe9a", (18, 254, 154))],
)
def test_transparent_pixels_show_the_background(shown: Callable, background: str, colour: tuple) -> None:
    hidden = COLOURS.copy()
    hidden[:, :12] = PINK
    image = Image.fromarray(np.dstack([hidden, HALF]))
    for kind, options in [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]:
        pixels = shown(saved(image, kind, **options), background, suffix=f".{kind.lower()}")
        assert (pixels[:, :12] == colour).all()
        assert np.array_equal(pixels[:, 12:], COLOURS[:, 12:])


def test_half_transparent_pixels_are_mixed(shown: Callable) -> None:
    alpha = np.full((16, 24), 51, np.uint8)  # a fifth
    pixels = shown(saved(Image.fromarray(np.dstack([COLOURS, alpha])), "PNG"), "black")
    assert np.abs(pixels - COLOURS / 5).max() <= 0.5


def test_greys_with_opacity_show_the_background(shown: Callable) -> None:
    grey = COLOURS[..., 0]
    pixels = shown(saved(Image.fromarray(np.dstack([grey, HALF]), "LA"), "PNG"), "#ff0000")
    assert (pixels[:, :12] == (255, 0, 0)).all()
    assert np.array_equal(pixels[:, 12:, 1], grey[:, 12:])


def test_a_palette_with_transparent_entries_shows_the_background(shown: Callable) -> None:
    indices = (np.arange(16 * 24, dtype=np.uint8) % 4).reshape(16, 24)
    image = Image.fromarray(indices, "P")
    image.putpalette([255, 0, 255, 10, 20, 30, 40, 50, 60, 70, 80, 90])
    for kind, options in [("PNG", {"transparency": bytes([0, 255, 255, 255])}), ("GIF", {"transparency": 0})]:
        pixels = shown(saved(image, kind, **options), "black", suffix=f".{kind.lower()}")
        assert (pixels[indices == 0] == 0).all()
        assert (pixels[indices == 2] == (40, 50, 60)).all()


def test_one_transparent_colour_of_a_png_shows_the_background(shown: Callable) -> None:
    colours = COLOURS.copy()
    colours[:, :12] = PINK
    keyed = png(b"\x08\x02", colours.reshape(16, -1), (b"tRNS", b"\0\xff\0\0\0\xff"))
    deep = png(b"\x10\x02", big_endian(colours.astype(np.uint16) * 257), (b"tRNS", b"\xff\xff\0\0\xff\xff"))
    for data in (keyed, deep):
        pixels = shown(data, "black")
        assert not pixels[:, :12].any()
        assert np.array_equal(pixels[:, 12:], colours[:, 12:])
    for values, key in [(RAMP.astype(np.uint8), b"\0\x80"), (big_endian(RAMP * 257), b"\x80\x80")]:
        pixels = shown(png(bytes([8 if key[0] == 0 else 16, 0]), values, (b"tRNS", key)), "#ff0000")
        assert (pixels[:, 128] == (255, 0, 0)).all()
        assert (pixels[:, 127] == 127).all()


# Profiles


def rgb_profile(primaries: np.ndarray, gamma: float) -> bytes:
    """A matrix profile of RGB primaries, columns in XYZ at D50."""

    def number(value: float) -> bytes:
        return round(value * 65536).to_bytes(4, signed=True)

    def xyz(values: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    curve = b"curv\0\0\0\0" + (1).to_bytes(4) + round(gamma * 256).to_bytes(2) + b"\0\0"
    text = b"desc\0\0\0\0\0\0\0\5test\0" + bytes(4 + 4 + 2 + 1 + 67) + b"\0\0"
    tags = [(b"desc", text), (b"wtpt", xyz(np.array([0.9642, 1, 0.8249]))), (b"cprt", b"text\0\0\0\0no\0\0")]
    tags += [(name, xyz(primaries[:, i])) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))]
    tags += [(name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")]
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags:
        table += name + (offset + len(body)).to_bytes(4) + len(data).to_bytes(4)
        body += data + bytes(-len(data) % 4)
    size = offset + len(body)
    head = size.to_bytes(4) + b"\0\0\0\0\2\x10\0\0mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    head += number(0.9642) + number(1) + number(0.8249)
    return head.ljust(128, b"\0") + len(tags).to_bytes(4) + table + body


# Columns in XYZ at D50, from the ICC's profiles
P3 = np.array([[0.5151, 0.2919, 0.1572], [0.2411, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
ADOBE = np.array([[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]])
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])


def in_srgb(values: np.ndarray, primaries: np.ndarray, gamma: float) -> np.ndarray:
    """8-bit values of a colour space in sRGB, by the matrices."""
    linear = (values / 255.0) ** gamma @ (np.linalg.inv(SRGB) @ primaries).T
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("primaries, gamma", [(P3, 2.2), (ADOBE, 2.2), (SRGB, 1.8)], ids=["P3", "Adobe", "gamma 1.8"])
def test_colours_are_converted_from_their_profile(
    shown: Callable, kind: str, primaries: np.ndarray, gamma: float
) -> None:
    colours = np.full((16, 24, 3), (200, 90, 60), np.uint8)
    options = {"quality": 100} if kind in ("JPEG", "AVIF") else {"lossless": True} if kind == "WEBP" else {}
    data = saved(Image.fromarray(colours), kind, icc_profile=rgb_profile(primaries, gamma), **options)
    difference = shown(data, suffix=f".{kind.lower()}") - in_srgb(colours, primaries, gamma)
    assert np.abs(difference).max() <= (2.5 if options.get("quality") else 1)


def test_an_srgb_profile_changes_a_level_at_most(shown: Callable) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = shown(saved(Image.fromarray(COLOURS), "PNG", icc_profile=profile))
    assert np.abs(pixels.astype(int) - COLOURS).max() <= 1


def test_transparency_is_composed_after_the_conversion(shown: Callable) -> None:
    colours = np.full((16, 24, 3), (200, 90, 60), np.uint8)
    image = Image.fromarray(np.dstack([colours, HALF]))
    pixels = shown(saved(image, "PNG", icc_profile=rgb_profile(P3, 2.2)), "#12fe9a")
    assert (pixels[:, :12] == (18, 254, 154)).all()
    assert np.abs(pixels[:, 12:] - in_srgb(colours, P3, 2.2)[:, 12:]).max() <= 1


def test_greys_take_a_profile_for_colours(shown: Callable) -> None:
    grey = np.full((16, 24), 100, np.uint8)
    pixels = shown(saved(Image.fromarray(grey), "PNG", icc_profile=rgb_profile(SRGB, 1.8)))
    assert np.abs(pixels - in_srgb(np.dstack([grey] * 3), SRGB, 1.8)).max() <= 1


def test_profiles_that_cannot_be_used_are_refused(shown: Callable) -> None:
    rgb, whole = Image.fromarray(COLOURS), rgb_profile(P3, 2.2)
    for image, profile, complaint in [
        (rgb, whole[:200], "its colour profile cannot be used"),
        (rgb, b"nonsense", "its colour profile cannot be used"),
        (rgb.convert("CMYK"), whole, "its colour profile is for RGB, and the image is CMYK"),
    ]:
        with pytest.raises(UserError, match=f"{complaint}(.|\n)*convert it to sRGB"):
            shown(saved(image, "JPEG", icc_profile=profile), suffix=".jpg")


def test_cmyk_is_converted(shown: Callable) -> None:
    white, red = np.zeros((16, 24, 4), np.uint8), np.zeros((16, 24, 4), np.uint8)
    red[..., 1:3] = 255
    for ink, colour in ((white, (255, 255, 255)), (red, (255, 0, 0))):
        pixels = shown(saved(Image.fromarray(ink, "CMYK"), "TIFF"), suffix=".tiff")
        assert (pixels == colour).all()


# Colours that are declared where Pillow does not look


def test_hdr_and_wide_gamut_without_a_profile_are_refused(shown: Callable) -> None:
    rows = COLOURS.reshape(16, -1)
    for codes, complaint in [
        (b"\x09\x10\0\1", "HDR"),
        (b"\x09\x12\0\1", "HDR"),
        (b"\x0c\x0d\0\1", "wide gamut .primaries 12"),
    ]:
        with pytest.raises(UserError, match=f"{complaint}(.|\n)*convert it to sRGB"):
            shown(png(b"\x08\x02", rows, (b"cICP", codes)))
    assert np.array_equal(shown(png(b"\x08\x02", rows, (b"cICP", b"\1\x0d\0\1"))), COLOURS)
    avif = saved(Image.fromarray(COLOURS), "AVIF")
    at = avif.index(b"colrnclx") + 8
    hdr = avif[:at] + b"\0\x09\0\x10" + avif[at + 4 :]
    with pytest.raises(UserError, match="HDR"):
        shown(hdr, suffix=".avif")
