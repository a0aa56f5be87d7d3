"""Opens image files that may be anything: of named formats only, at most of a size, and whole.

Pillow alone would hand PostScript to Ghostscript, allocate whatever a header asks for, and accept a PNG whose data is damaged.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageFile, UnidentifiedImageError

from finetune.data.clip import AGAIN
from finetune.data.file_fault import open_fault
from finetune.data.images.colours import srgb, undeclared
from finetune.runtime.errors import Unreadable, UserError

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
MAX_PIXELS = 2**26  # 8192 x 8192: half a GB while it is converted
MAX_BYTES = 8 * MAX_PIXELS  # no image within that limit is larger: four channels of 16 bits
_CURE = f"use one of {', '.join(FORMATS)}"
_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {  # what makes an image of an orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What people take for images besides, by how the file begins (at an offset).
_OTHER_KINDS = (
    (0, b"%!PS", "EPS or PostScript"),
    (0, b"\xc5\xd0\xd3\xc6", "EPS"),
    (0, b"%PDF", "PDF"),
    (0, b"8BPS", "PSD"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (4, b"jP  ", "JPEG 2000"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "XML or SVG"),
    (0, b"<!doctype html", "a web page"),
    (0, b"<html", "a web page"),
)
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"II*\0", b"MM\0*")

# Pillow warns of sizes above a limit that is higher than ours, and of metadata, which is used for the orientation alone.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


@contextmanager
def opened_file(path: Path, where: str) -> Iterator[BinaryIO]:
    """Open an image file for reading. Raises UserError if that cannot be, or if it is empty or too large."""
    if fault := open_fault(path, "image file"):
        raise Unreadable(*fault, where)
    try:
        file = path.open("rb")
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})", "mend its permissions, or remove it", where) from None
    with file:
        size = path.stat().st_size
        if size == 0:
            raise UserError("the file is empty (0 bytes)", AGAIN, where)
        if size > MAX_BYTES:
            raise UserError(f"the file is larger than {MAX_BYTES >> 20} MB", "use a smaller image", where)
        yield file


def read_rgb(file: BinaryIO, where: str, background: str, content_type: str = "") -> Image.Image:
    """Read the first frame of an image, upright, in sRGB, on a background where it is transparent: mode "RGB".

    Args:
        content_type: what a server says that it is, for messages.
    Raises:
        UserError: it is of no known format, too large, damaged, or of colours that cannot be converted.
    """
    with _explained(file, where, content_type):
        return _upright(_open(file, where), where, background)


def checked_size(file: BinaryIO, where: str) -> tuple[int, int]:
    """Check all that `read_rgb` does. Returns height and width, upright. JPEGs are decoded at an eighth of their size.

    Raises:
        UserError: as `read_rgb`.
    """
    with _explained(file, where, ""):
        image = _open(file, where)
        width, height = image.size
        is_jpeg = image.format in ("JPEG", "MPO")
        if is_jpeg:
            image.draft(None, (max(1, width // 8), max(1, height // 8)))  # all of its data is read, and little computed
        is_turned = _orientation(image) >= 5
        whole = _upright(image, where, "white")
        if is_jpeg:
            return (width, height) if is_turned else (height, width)
        return whole.height, whole.width


def _upright(image: ImageFile.ImageFile, where: str, background: str) -> Image.Image:
    colours = srgb(image, background, where)
    turn = _TURNS.get(_orientation(image))
    return colours if turn is None else colours.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, from 1 to 8. If it cannot be read or is none of them, nothing says that the image is turned."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises errors of many kinds
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _open(file: BinaryIO, where: str) -> ImageFile.ImageFile:
    """An image whose header is read and allowed, before anything is decoded."""
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(f"{image.height}x{image.width}", where)
    if image.format == "PNG":  # checksums, which its decoder does not look at
        image.verify()
        file.seek(0)
        image = Image.open(file, formats=["PNG"])
    if problem := undeclared(image, _beginning(file)):
        raise UserError(problem, "convert it to sRGB with 8 bits", where)
    return image


def _beginning(file: BinaryIO, count: int = 2**16) -> bytes:
    """The first bytes of a file, whose position stays as it is."""
    position = file.tell()
    file.seek(0)
    head = file.read(count)
    file.seek(position)
    return head


def _too_large(size: str, where: str) -> UserError:
    return UserError(f"the image has more than {MAX_PIXELS >> 20} million pixels ({size})", "make it smaller", where)


@contextmanager
def _explained(file: BinaryIO, where: str, content_type: str) -> Iterator[None]:
    """Turn whatever Pillow raises for a file into a UserError that says what is wrong with it."""
    try:
        yield
    except UserError:
        raise
    except MemoryError:
        raise Unreadable("there is no memory for it", "free some, or make the image smaller", where) from None
    except Image.DecompressionBombError:
        raise _too_large("as its header says", where) from None
    except UnidentifiedImageError:
        head = _beginning(file, 64)
        served = f", which the server calls {content_type}" if content_type and "image" not in content_type else ""
        raise UserError(f"no image can be read from it ({_kind(head)}{served})", _CURE, where) from None
    except Exception as error:  # decoders and metadata readers raise errors of many kinds for damaged files
        reason = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.errno is not None:  # Pillow's own OSErrors have none
            raise Unreadable(f"cannot be read ({error.strerror})", "check the disk that it is on", where) from None
        raise UserError(f"no image can be read from it ({reason})", AGAIN, where) from None


def _kind(head: bytes) -> str:
    """What a file is that is not an image of a known format, by its first bytes."""
    for offset, begin, kind in _OTHER_KINDS:
        if head[offset:].lower().startswith(begin.lower()):
            return kind
    return "its header is damaged" if head.startswith(_SIGNATURES) else "of no known kind"
