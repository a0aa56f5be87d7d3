"""Damaged files: what is given out is what the sound file shows, or the file is refused with how much of it is sound."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
from damage import DAMAGES
from ffmpeg_oracle import H264, VP9, Ffmpeg

from finetune.data.decode import decode, probe
from finetune.recipe import Bucket
from finetune.runtime.errors import UserError

X265 = ("-pix_fmt", "yuv420p", "-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none:keyint=12")
FILES = {
    "h264.mp4": (*H264, "-g", "12", "-movflags", "+faststart"),
    "h264.mkv": (*H264, "-g", "12"),
    "h264.ts": (*H264, "-g", "12"),
    "fragments.mp4": (*H264, "-g", "12", "-movflags", "frag_keyframe+empty_moov"),
    "h265.mp4": (*X265, "-movflags", "+faststart"),
    "h265.mkv": X265,
    "vp9.webm": (*VP9, "-g", "12"),
    "av1.webm": ("-pix_fmt", "yuv420p", "-c:v", "libaom-av1", "-cpu-used", "8", "-usage", "realtime", "-g", "12"),
    "mpeg2.mpg": ("-c:v", "mpeg2video", "-q:v", "3", "-bf", "2"),
    "mpeg2.ts": ("-c:v", "mpeg2video", "-q:v", "3", "-bf", "2"),
    "mpeg4.avi": ("-c:v", "mpeg4", "-q:v", "3"),
    "mjpeg.avi": ("-c:v", "mjpeg", "-q:v", "3"),
    "mjpeg.mov": ("-c:v", "mjpeg", "-q:v", "3", "-movflags", "+faststart"),
    "prores.mov": ("-c:v", "prores_ks", "-movflags", "+faststart"),
    "film.gif": (),
}
# Entropy-coded pictures without a checksum: a wrong bit within them decodes to another picture, and no decoder can tell.
BLIND = {"h265.mp4", "h265.mkv", "vp9.webm", "av1.webm", "film.gif", "mjpeg.avi", "mjpeg.mov", "prores.mov"}
WITHIN = {"flips", "noise", "zeros"}  # damages that may lie within one picture
EASY = [(name, kind) for name in FILES for kind in DAMAGES if not (name in BLIND and kind in WITHIN)]
SECONDS, FRAMES = 2.0, 50


def check(ffmpeg: Ffmpeg, name: str, kind: str, seed: int, path: Path) -> str:
    """Damage a file, and read it. Returns "refused" or "sound", and "blind" if pixels are wrong."""
    whole = ffmpeg.make(f"long_{name}", *FILES[name], seconds=SECONDS)
    info = probe(whole)
    right = decode(whole, info, Bucket(FRAMES, 128, 192), info.fps, threads=1)
    path.write_bytes(DAMAGES[kind](whole.read_bytes(), random.Random(f"{name} {kind} {seed}")))
    verdict = "sound"
    try:
        found = probe(path)
        for first, count in ((0, 10), (0, found.frames), (found.frames // 2, found.frames - found.frames // 2)):
            frames = decode(path, found, Bucket(count, 128, 192), found.fps, first / found.fps, threads=1)
            if not any(np.array_equal(frames, right[at : at + count]) for at in range(FRAMES - count + 1)):
                verdict = "blind"
    except UserError as error:
        text = str(error)
        assert str(path) in text
        assert "->" in text
        return "refused"
    return verdict


@pytest.mark.parametrize("name, kind", EASY)
def test_damage_is_refused_or_does_not_matter(ffmpeg: Ffmpeg, tmp_path: Path, name: str, kind: str) -> None:
    assert check(ffmpeg, name, kind, 0, tmp_path / name) in ("refused", "sound")


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("name, kind", EASY)
def test_more_damage_is_refused_or_does_not_matter(
    ffmpeg: Ffmpeg, tmp_path: Path, name: str, kind: str, seed: int
) -> None:
    assert check(ffmpeg, name, kind, seed, tmp_path / name) in ("refused", "sound")


@pytest.mark.parametrize("name", sorted(BLIND))
def test_damage_within_pictures_that_cannot_be_told_ends_no_run(ffmpeg: Ffmpeg, tmp_path: Path, name: str) -> None:
    for kind in sorted(WITHIN):
        check(ffmpeg, name, kind, 0, tmp_path / name)


def test_a_cut_file_says_how_much_of_it_is_sound(ffmpeg: Ffmpeg, tmp_path: Path) -> None:
    data = ffmpeg.make("long_vp9.webm", *FILES["vp9.webm"], seconds=SECONDS).read_bytes()
    path = tmp_path / "cut.webm"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError) as caught:
        probe(path)
    (found,) = re.findall(r"its first (\d+) frames \((\d\.\d\d) s\) are sound", str(caught.value))
    kept = ffmpeg.remake("kept.mkv", path, after=("-t", found[1]))
    assert 5 < int(found[0]) < FRAMES
    assert ffmpeg.shown(kept).frames == pytest.approx(int(found[0]), abs=1)


def test_what_lies_before_the_damage_can_be_used(ffmpeg: Ffmpeg, tmp_path: Path) -> None:
    """The damage is found by the decoder, at the frame where it is, and not by the windows before it."""
    whole = ffmpeg.make("long_h264.mp4", *FILES["h264.mp4"], seconds=SECONDS)
    data = whole.read_bytes()
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data[: len(data) * 3 // 4] + bytes(2000) + data[len(data) * 3 // 4 + 2000 :])
    info, few = probe(path), Bucket(20, 128, 192)
    assert np.array_equal(decode(path, info, few, 25.0), decode(whole, probe(whole), few, 25.0))
    with pytest.raises(
        UserError, match=r"breaks at frame (\d+) of 50, at \d.\d\d s .* the \1 frames before it are sound"
    ):
        decode(path, info, Bucket(50, 128, 192), 25.0)
