"""Condition images come from files, addresses and videos, in their own size; what else a file may be is refused by name."""

import http.server
import io
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import ROOT

from finetune.data import decode
from finetune.data.images import load_image, missing_image, probe_image
from finetune.recipe import Bucket
from finetune.runtime.errors import UserError

QUARTERS = np.zeros((64, 96, 3), np.uint8)
QUARTERS[:32, :48], QUARTERS[:32, 48:], QUARTERS[32:, :48] = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A web server that serves `tmp_path`."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **keywords) -> None:
            super().__init__(*arguments, directory=str(tmp_path), **keywords)

        def log_message(self, *arguments) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_image_is_left_as_it_is(tmp_path: Path) -> None:
    Image.fromarray(QUARTERS).save(tmp_path / "a.png")
    assert np.array_equal(load_image(str(tmp_path / "a.png")), QUARTERS)


def test_an_image_is_fetched_from_an_address(tmp_path: Path, address: str) -> None:
    Image.fromarray(QUARTERS).save(tmp_path / "a.png")
    assert missing_image(f"{address}/a.png") is None
    assert np.array_equal(load_image(f"{address}/a.png"), QUARTERS)


def test_a_video_gives_its_first_frame_as_training_sees_it(clips: Path) -> None:
    video = sorted(clips.glob("*.mp4"))[0]
    info = decode.probe(video)
    first = decode.decode(video, info, Bucket(17, info.height, info.width), info.fps)[0]
    assert np.array_equal(load_image(str(video)), first)


def test_a_photo_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise to show
    Image.fromarray(QUARTERS).save(tmp_path / "photo.png", exif=exif)
    image = load_image(str(tmp_path / "photo.png"))
    assert np.array_equal(image, np.rot90(QUARTERS, -1))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(QUARTERS).convert(mode).save(path)
    assert load_image(str(path)).shape == (64, 96, 3)


def test_what_cannot_be_read_is_named(tmp_path: Path, address: str) -> None:
    (tmp_path / "page.png").write_text("<html>")
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:3000])
    for source, complaint in [
        (str(tmp_path / "nowhere.png"), "no such condition image"),
        (str(tmp_path / "page.png"), "no image can be read"),
        (str(tmp_path / "cut.png"), "no image can be read"),
        (f"{address}/nowhere.png", "cannot be fetched.*404"),
        (f"{address}/page.png", "no image can be read"),
        ("http://127.0.0.1:9/a.png", "cannot be fetched"),
    ]:
        with pytest.raises(UserError, match=complaint) as caught:
            load_image(source)
        assert source in str(caught.value)


# What a file may be


def refusal(path: Path) -> str:
    """How a file is refused: the same as a condition image and as a training image."""
    messages = []
    for read in (probe_image, lambda each: load_image(str(each))):
        with pytest.raises(UserError) as caught:
            read(path)
        (problem,) = caught.value.problems
        assert problem.where == str(path)
        assert problem.cure
        messages.append(problem.what.removeprefix("no such condition image: "))
    assert messages[0] == messages[1]
    return messages[0]


@pytest.mark.parametrize("kind", ["EPS", "PDF", "TGA", "PPM", "ICO", "JPEG2000", "PCX", "DDS", "SGI"])
def test_other_formats_are_refused_whatever_their_name(tmp_path: Path, kind: str) -> None:
    """Ghostscript would run for the first."""
    Image.fromarray(QUARTERS).save(tmp_path / "a.png", kind)
    what = refusal(tmp_path / "a.png")
    known = {"EPS": "EPS or PostScript", "PDF": "PDF", "JPEG2000": "JPEG 2000"}
    assert what == f"no image can be read from it ({known.get(kind, 'of no known kind')})"


@pytest.mark.parametrize(
    "begin, kind",
    [
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\xff\x0a", "JPEG XL"),
        (b"<svg xmlns=", "SVG"),
        (b"<!DOCTYPE HTML>", "a web page"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "its header is damaged"),
        (b"\xff\xd8\xff" + bytes(100), "its header is damaged"),
    ],
)
def test_what_people_take_for_images_is_named(tmp_path: Path, begin: bytes, kind: str) -> None:
    (tmp_path / "a.png").write_bytes(begin + bytes(100))
    assert f"({kind})" in refusal(tmp_path / "a.png")


def bomb(chunk: tuple[bytes, bytes] | None = None, side: int = 13_000) -> bytes:
    """A PNG of black and white pixels, of 20 KB; with a chunk before its data."""

    def written(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = side.to_bytes(4) * 2 + b"\x01\0\0\0\0"
    data = zlib.compress(bytes((1 + (side + 7) // 8) * side), 9)
    parts = [(b"IHDR", header), *([chunk] if chunk else []), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written(*part) for part in parts)


def test_an_image_of_too_many_pixels_is_refused_before_anything_is_decoded(tmp_path: Path) -> None:
    """By the peak memory of a process that reads nothing else."""
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb())
    assert path.stat().st_size < 30_000
    script = f"""
import resource
from pathlib import Path
from finetune.data.images import probe_image
from finetune.runtime.errors import UserError
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
try:
    probe_image(Path({str(path)!r}))
except UserError as error:
    print(peak() - before, error.problems[0].what)
"""
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not printed.stderr
    grown, _, what = printed.stdout.strip().partition(" ")
    assert what == "the image has more than 64 million pixels (13000x13000)"
    assert int(grown) < 20_000  # KB


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_a_header_that_claims_too_many_pixels_is_enough(tmp_path: Path, kind: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (24, 16)).save(file, kind)
    data = bytearray(file.getvalue())
    side = b"\xff\xff" if kind == "GIF" else (60_000).to_bytes(4, "little")
    if kind == "TIFF":
        places = [data.index(tag) + 8 for tag in (b"\x00\x01\x04\0", b"\x01\x01\x04\0")]
    else:
        start = {"GIF": 6, "BMP": 18}[kind]
        places = [start, start + len(side)]
    for place in places:
        data[place : place + len(side)] = side
    (tmp_path / "a.png").write_bytes(data)
    assert "more than 64 million pixels" in refusal(tmp_path / "a.png")


def test_text_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    packed = zlib.compress(bytes(2**27), 9)
    (tmp_path / "a.png").write_bytes(bomb((b"zTXt", b"note\0\0" + packed), side=64))
    assert "no image can be read" in refusal(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(bomb((b"iCCP", b"note\0\0" + packed), side=64))
    assert "no image can be read" in refusal(tmp_path / "a.png")


def test_paths_that_are_no_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # whose opening would wait for a writer
    (tmp_path / "empty.png").touch()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for name, complaint in [
        ("folder.png", "this is a folder"),
        ("pipe.png", "this is a FIFO, not a regular file"),
        ("empty.png", "the file is empty"),
        ("loop.png", "symbolic links"),
        ("a\0b.png", "NUL character"),
        ("x" * 5000 + ".png", "too long"),
        ("folder.png/a.png", "no such image file"),
    ]:
        assert complaint in refusal(tmp_path / name)


@pytest.mark.parametrize(
    "source, complaint",
    [
        ("~nosuchuser/a.png", "no such condition image"),
        ("ftp://example.com/a.png", "not fetched from ftp: addresses"),
        ("file:///etc/hostname", "not fetched from file: addresses"),
        ("s3://bucket/a.png", "not fetched from s3: addresses"),
        ("", "this is a folder"),
    ],
)
def test_sources_that_are_neither_file_nor_address_are_named(source: str, complaint: str) -> None:
    problem = missing_image(source)
    assert problem
    assert complaint in problem.what
    with pytest.raises(UserError):
        load_image(source)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_files_without_permission_are_named(tmp_path: Path) -> None:
    Image.fromarray(QUARTERS).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    assert "cannot be read (permission denied)" in refusal(tmp_path / "a.png")
