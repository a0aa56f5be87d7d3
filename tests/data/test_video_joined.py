"""Files whose frames do not follow one another in time: no frame is lost without a word, and the cure that is named works."""

import re
import shlex
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from drawn import film, numbers
from ffmpeg_oracle import H264, VP9, Ffmpeg

from finetune.data.decode import decode, probe
from finetune.data.video.timeline import constant_rate
from finetune.recipe import Bucket
from finetune.runtime.errors import UserError

SIZE, COUNT = (64, 128), 20
MPEG2 = ("-c:v", "mpeg2video", "-q:v", "2")
KINDS = {"mpg": MPEG2, "vob": MPEG2, "ts": (*H264, "-g", "10"), "mkv": H264, "webm": VP9}


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        probe(path)
    return str(caught.value)


def cured(ffmpeg: Ffmpeg, path: Path) -> np.ndarray:
    """All frames of the file that the ffmpeg line of a refusal makes."""
    words = shlex.split(re.findall(r"ffmpeg [^;\n]*_new\.mp4", refusal(path))[0])[1:]
    made = path.parent / words[-1]
    ffmpeg.run(*[path if word == path.name else word for word in words[:-1]], made)
    info = probe(made)
    return decode(made, info, Bucket(info.frames, *SIZE), info.fps)


@pytest.mark.parametrize("offset", ["0", "0.42"])
@pytest.mark.parametrize("suffix", KINDS)
def test_films_that_are_joined_byte_by_byte_are_refused(
    ffmpeg: Ffmpeg, tmp_path: Path, suffix: str, offset: str
) -> None:
    one = film(ffmpeg, f"one.{suffix}", *KINDS[suffix], count=COUNT, size=SIZE)
    late = ("-output_ts_offset", offset)
    two = film(ffmpeg, f"two_{offset}.{suffix}", *KINDS[suffix], *late, count=COUNT, size=SIZE)
    path = tmp_path / f"joined.{suffix}"
    path.write_bytes(one.read_bytes() + two.read_bytes())
    lost = int(re.findall(rf"(\d+) of its {2 * COUNT} frames are shown no later than", refusal(path))[0])
    assert 1 <= lost <= COUNT
    assert numbers(cured(ffmpeg, path)) == [*range(COUNT), *range(COUNT)]


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_a_second_film_that_players_do_not_show_is_named(ffmpeg: Ffmpeg, tmp_path: Path, suffix: str) -> None:
    one = film(ffmpeg, f"one.{suffix}", *H264, count=COUNT, size=SIZE)
    two = film(ffmpeg, f"later.{suffix}", *H264, "-output_ts_offset", "2", count=COUNT, size=SIZE)
    path = tmp_path / f"joined.{suffix}"
    path.write_bytes(one.read_bytes() + two.read_bytes())
    text = refusal(path)
    assert f"a second film begins behind the first (at byte {one.stat().st_size:,})" in text
    assert f"its first {COUNT} frames" in text


def test_frames_that_the_container_gives_one_time_are_not_lost(ffmpeg: Ffmpeg) -> None:
    """Matroska's times are milliseconds: too coarse for 1,200 frames a second."""
    path = film(ffmpeg, "faster.mkv", *H264, fps="1200", count=60, size=SIZE)
    assert "10 of its 60 frames are shown no later than" in refusal(path)
    assert numbers(cured(ffmpeg, path)) == list(range(60))


@pytest.mark.parametrize("fps", ["950", "960", "999", "1000"])
@pytest.mark.parametrize("suffix", ["mkv", "webm"])
def test_frames_that_are_hardly_longer_than_a_tick_are_of_constant_rate(ffmpeg: Ffmpeg, suffix: str, fps: str) -> None:
    path = film(ffmpeg, f"fast_{fps}.{suffix}", *KINDS[suffix], fps=fps, count=60, size=SIZE)
    info = probe(path)
    assert (info.frames, info.fps, info.times) == (60, pytest.approx(float(fps)), "")
    assert numbers(decode(path, info, Bucket(60, *SIZE), info.fps)) == list(range(60))


def test_a_frame_that_is_left_out_is_no_rounding() -> None:
    ticks = np.array([0, 1, 2, 3, 5, 6, 7, 8])
    assert constant_rate(ticks, Fraction(1, 25), [Fraction(25)]) != 25


def test_two_fields_of_a_frame_that_have_one_time_are_one_frame(ffmpeg: Ffmpeg) -> None:
    path = ffmpeg.make("fields.ts", "-flags", "+ilme+ildct", *H264, "-x264-params", "tff=1", seconds=1.0)
    assert probe(path).frames == len(ffmpeg.frames(path, 128, 192))


STREAMS = {  # two films of other sizes and numbers; options of the file; the film that ffmpeg shows
    "marked_second.mkv": ("-disposition:v:0", "0", "-disposition:v:1", "default"),
    "marked_first.mkv": ("-disposition:v:0", "default", "-disposition:v:1", "0"),
    "marked_second.mp4": ("-disposition:v:0", "0", "-disposition:v:1", "default"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_of_several_streams_the_one_that_ffmpeg_shows_is_taken(ffmpeg: Ffmpeg, name: str) -> None:
    one = film(ffmpeg, "one.mp4", *H264, count=COUNT, size=SIZE)
    two = film(ffmpeg, "short.mp4", *H264, count=COUNT // 2, size=(128, 64))
    path = ffmpeg.folder / name
    ffmpeg.run("-i", one, "-i", two, "-map", "0", "-map", "1", "-c", "copy", *STREAMS[name], path)
    info, shown = probe(path), ffmpeg.shown(path)
    assert (info.height, info.width, info.frames) == (shown.height, shown.width, shown.frames)
    assert info.changes == ("taken from one of several video streams",)
    frames = decode(path, info, Bucket(info.frames, info.height, info.width), info.fps)
    assert numbers(frames) == list(range(shown.frames))


def test_a_picture_that_comes_first_is_not_the_film(ffmpeg: Ffmpeg) -> None:
    """A cover in Matroska that is not marked as one."""
    one = film(ffmpeg, "one.mp4", *H264, count=COUNT, size=SIZE)
    picture, path = ffmpeg.folder / "picture.png", ffmpeg.folder / "picture_first.mkv"
    ffmpeg.run("-i", one, "-frames:v", "1", picture)
    ffmpeg.run("-i", picture, "-i", one, "-map", "0", "-map", "1", "-c:v:0", "png", "-c:v:1", "copy", path)
    info = probe(path)
    assert info.frames == ffmpeg.shown(path).frames == COUNT
    assert numbers(decode(path, info, Bucket(COUNT, *SIZE), info.fps)) == list(range(COUNT))
