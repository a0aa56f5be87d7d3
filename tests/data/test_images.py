"""Condition images come from files, addresses and videos, in their own size."""

import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.data import decode
from finetune.data.images import load_image, missing_image
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
