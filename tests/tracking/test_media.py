"""Videos and contact sheets are files that other programs read."""

import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image

from finetune.data.synthetic import scene
from finetune.tracking.labels import MISSING, text_width, wrapped
from finetune.tracking.media import contact_sheet, strip, suffix_of, write_video


def test_a_written_video_has_the_frames_rate_and_size_that_ffmpeg_reads(tmp_path: Path) -> None:
    video, _ = scene(0, 17, 64, 97)
    write_video(video, tmp_path / "a.mp4", fps=24)
    report = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-i", tmp_path / "a.mp4", "-f", "null", "-"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert "h264" in report
    assert "96x64" in report
    assert "24 fps" in report
    assert re.findall(r"frame=\s*(\d+)", report)[-1] == "17"


def test_a_contact_sheet_shows_a_row_a_video(tmp_path: Path) -> None:
    red, _ = scene(0, 9, 64, 96)
    blue, _ = scene(2, 9, 64, 96)
    rows = [("red", strip(red, 3, 64)), ("blue", strip(blue, 3, 64))]
    contact_sheet(rows, tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    upper, lower = np.array_split(sheet, 2)
    is_red = lambda pixels: ((pixels[..., 0] > 180) & (pixels[..., 2] < 80)).sum()  # noqa: E731
    is_blue = lambda pixels: ((pixels[..., 2] > 180) & (pixels[..., 0] < 80)).sum()  # noqa: E731
    assert is_red(upper) > 500 > is_blue(upper)
    assert is_blue(lower) > 500 > is_red(lower)


def test_a_single_frame_is_a_png_without_loss_and_shown_once(tmp_path: Path) -> None:
    video, _ = scene(0, 9, 65, 97)
    assert (suffix_of(video), suffix_of(video[:1])) == (".mp4", ".png")
    write_video(video[:1], tmp_path / "a.png", fps=24)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), video[0])
    assert strip(video[:1]).shape == (1, 128, 191, 3)
    assert len(strip(video)) == 8


def test_a_long_label_is_wrapped_and_its_videos_lie_below_it(tmp_path: Path) -> None:
    red, _ = scene(0, 9, 64, 96)
    words = "a red ball moves over a dark floor while somebody says so many times, " * 2
    heights = []
    for label in ("red", words, words * 20):
        contact_sheet([(label, strip(red, 3, 64))], tmp_path / "sheet.png", ["first", "second", "third"], "a title")
        with Image.open(tmp_path / "sheet.png") as sheet:
            heights.append(sheet.height)
    assert heights[2] - heights[1] == heights[1] - heights[0] > 0  # of three lines at most


def test_letters_that_no_font_has_are_boxes_and_all_others_stay() -> None:
    assert wrapped("so bewegt sich der Ball – шар", 2000, 14) == ["so bewegt sich der Ball – шар"]
    assert text_width("\ue123" * 3, 14) == text_width(MISSING * 3, 14) > 0


def test_a_line_is_no_wider_than_asked_for_and_no_word_is_lost() -> None:
    text = "one two three 一只红色的球在黑暗的地板上向右移动 " + "x" * 80
    lines = wrapped(text, 150, 14, most=50)
    assert max(text_width(line, 14) for line in lines) <= 150
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert wrapped("one two three", 150, 14) == ["one two three"]
    short = wrapped(text, 150, 14, most=2)
    assert len(short) == 2
    assert short[1].endswith("…")
