"""Converts what image files hold to sRGB with 8 bits: other depths, colour profiles, CMYK and transparency."""

import io

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageFile

from finetune.runtime.errors import UserError

_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of images, by what a profile is for
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # in TIFF
_SDR_PRIMARIES = (1, 2, 5, 6, 7)  # BT.709, unknown, BT.601: code points of ITU-T H.273
_HDR_TRANSFERS = (16, 18)  # PQ, HLG


def undeclared(image: ImageFile.ImageFile, head: bytes) -> str | None:
    """What is wrong with colours that a file declares where Pillow does not look: HDR and wide gamut in AVIF and PNG.

    Args:
        head: the file's first bytes.
    """
    mark = {"AVIF": b"colrnclx", "PNG": b"\0\0\0\4cICP"}.get(image.format or "")
    if mark is None or (start := head.find(mark)) < 0:
        return None
    codes = head[start + len(mark) :]
    if image.format == "PNG":
        primaries, transfer = codes[0], codes[1]
    else:
        primaries, transfer = int.from_bytes(codes[:2]), int.from_bytes(codes[2:4])
    if transfer in _HDR_TRANSFERS:
        return "the image is HDR (PQ or HLG)"
    if primaries not in _SDR_PRIMARIES and (image.format == "PNG" or "icc_profile" not in image.info):
        return f"the image's colours are of a wide gamut (primaries {primaries} of H.273) without a colour profile"
    return None


def srgb(image: ImageFile.ImageFile, background: str, where: str) -> Image.Image:
    """Decode an image and convert it to sRGB, mode "RGB", in front of a background. EXIF orientation is not applied.

    Args:
        background: a colour as CSS writes it, seen where the image is transparent.
    Raises:
        UserError: its range of values is not known, or its colour profile cannot be used.
    """
    colour, alpha = _split(image, where)
    colour = _in_srgb(colour, image.info.get("icc_profile"), where)
    if alpha is not None:
        colour = Image.composite(colour, Image.new("RGB", colour.size, ImageColor.getrgb(background)), alpha)
    return colour


def _split(image: ImageFile.ImageFile, where: str) -> tuple[Image.Image, Image.Image | None]:
    """Colours as "L", "RGB" or "CMYK", and the opacity as "L"; None if all is opaque."""
    has_16_bits = any(";16" in str(tile.args) for tile in image.tile)  # of which Pillow keeps the upper 8 of colours
    image.load()
    if image.mode.startswith("I;16"):
        return _from_16_bits(image)
    if image.mode in ("F", "I"):
        what = f"its values are {'floating-point numbers' if image.mode == 'F' else 'of 32 bits'}, of no known range"
        raise UserError(what, "save it with 8 or 16 bits", where)
    if image.mode in ("LAB", "HSV"):
        raise UserError(f"its colours are {image.mode}", "save it in RGB", where)
    if not image.has_transparency_data:
        return (image if image.mode in ("L", "RGB", "CMYK") else _without_alpha(image)), None
    hidden = image.info.get("transparency")
    if has_16_bits and image.mode == "RGB" and isinstance(hidden, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in hidden)
    whole = image.convert("RGBA")
    alpha = whole.getchannel("A")
    is_opaque = alpha.getextrema() == (255, 255)
    return _without_alpha(whole if image.mode in ("P", "PA", "RGBa", "La") else image), None if is_opaque else alpha


def _without_alpha(image: Image.Image) -> Image.Image:
    """The colours of an image, whatever is transparent: "L" of greys, else "RGB"."""
    if image.mode == "LA":
        return image.getchannel("L")
    image.info.pop("transparency", None)  # or a conversion would keep that colour for transparent pixels
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _from_16_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Greys of 16 bits, or of 12 in TIFF, scaled to 8."""
    values = np.asarray(image).astype(np.uint32)
    tags = getattr(image, "tag_v2", {})
    (bits, *_) = tags.get(_BITS_PER_SAMPLE, (16,))
    largest = 2**bits - 1
    alpha = None
    if (hidden := image.info.get("transparency")) is not None:
        alpha = Image.fromarray(np.where(values == hidden, 0, 255).astype(np.uint8))
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # which Pillow inverts for 8 bits only
        values = largest - values
    return Image.fromarray(((values * 255 + largest // 2) // largest).astype(np.uint8)), alpha


def _in_srgb(colour: Image.Image, profile: bytes | None, where: str) -> Image.Image:
    """Colours converted from their profile to sRGB. Without one they are sRGB, as browsers have it.

    A profile that is broken or for other colours is refused: what the colours are is then not known.
    """
    if not profile:
        return colour.convert("RGB")
    cure = "convert it to sRGB, or take the profile out of it (exiftool -icc_profile:all= FILE)"
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = own.profile.xcolor_space.strip()
        if space == "RGB" and colour.mode == "L":
            colour = colour.convert("RGB")
        if _MODES.get(space) != colour.mode:
            raise UserError(f"its colour profile is for {space}, and the image is {colour.mode}", cure, where)
        converted = ImageCms.profileToProfile(colour, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        raise UserError(f"its colour profile cannot be used ({error})", cure, where) from None
    assert converted is not None  # since it is not converted in place
    return converted
