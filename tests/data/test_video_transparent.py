"""Videos with an alpha channel: what is transparent shows the background, and what is opaque is as it was."""

from pathlib import Path

import numpy as np
import pytest
from ffmpeg_oracle import Ffmpeg
from PIL import Image

from finetune.data import column_files
from finetune.data.buckets import BucketFit
from finetune.data.decode import decode, probe
from finetune.data.masks import decode_mask
from finetune.data.sources import SourceFile
from finetune.data.video.picture import UNREAD_ALPHA
from finetune.recipe import Bucket
from finetune.runtime.errors import UserError

CHANGE = "with transparent parts shown on the background"
COUNT, HEIGHT, WIDTH = 4, 64, 96
BUCKET = Bucket(COUNT, HEIGHT, WIDTH)
FILMS = {
    "prores_4444.mov": ("-c:v", "prores_ks", "-profile:v", "4444", "-pix_fmt", "yuva444p10le"),
    "png.mov": ("-c:v", "png", "-pix_fmt", "rgba"),
    "animation.mov": ("-c:v", "qtrle", "-pix_fmt", "argb"),
    "ffv1.mkv": ("-c:v", "ffv1", "-pix_fmt", "bgra"),
    "ffv1_yuv.mkv": ("-c:v", "ffv1", "-pix_fmt", "yuva420p"),
    "ffv1_422.mkv": ("-c:v", "ffv1", "-pix_fmt", "yuva422p"),
    "gif.gif": (),
}
BACKGROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "#20a040": (32, 160, 64)}


def layers(opaque_frames: int = 0, half: int = 0) -> np.ndarray:
    """White to the left, and hidden white of the alpha `half` to the right, but in the first frames: uint8 (F, H, W, 4)."""
    frames = np.full((COUNT, HEIGHT, WIDTH, 4), 255, np.uint8)
    frames[opaque_frames:, :, WIDTH // 2 :, 3] = half
    return frames


def video(ffmpeg: Ffmpeg, path: Path, frames: np.ndarray, *options: str) -> Path:
    if path.suffix == ".gif":
        first, *others = [Image.fromarray(frame) for frame in frames]
        first.save(path, save_all=True, append_images=others, duration=40, disposal=2)
    else:
        source = ("-f", "rawvideo", "-pix_fmt", "rgba", "-s", f"{WIDTH}x{HEIGHT}", "-r", "25", "-i", "-")
        ffmpeg.run(*source, *options, path, given=frames.tobytes())
    return path


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("name", FILMS)
def test_transparent_parts_show_the_background(ffmpeg: Ffmpeg, tmp_path: Path, name: str, background: str) -> None:
    path = video(ffmpeg, tmp_path / name, layers(), *FILMS[name])
    info = probe(path)
    assert info.changes == (CHANGE,)
    frames = decode(path, info, Bucket(info.frames, HEIGHT, WIDTH), info.fps, background=background).astype(int)
    assert np.abs(frames[:, :, : WIDTH // 2] - 255).max() <= 1
    assert np.abs(frames[:, :, WIDTH // 2 :] - BACKGROUNDS[background]).max() <= 1


def test_half_transparent_parts_are_mixed(ffmpeg: Ffmpeg, tmp_path: Path) -> None:
    path = video(ffmpeg, tmp_path / "half.mkv", layers(half=128), *FILMS["ffv1.mkv"])
    frames = decode(path, probe(path), BUCKET, 25.0, background="black")
    assert (frames[:, :, : WIDTH // 2].min(), np.unique(frames[:, :, WIDTH // 2 :]).tolist()) == (255, [128])


def test_parts_that_become_transparent_later_are_told_too(ffmpeg: Ffmpeg, tmp_path: Path) -> None:
    path = video(ffmpeg, tmp_path / "later.mov", layers(opaque_frames=COUNT - 1), *FILMS["png.mov"])
    info = probe(path)
    frames = decode(path, info, BUCKET, 25.0, background="black")
    assert info.changes == (CHANGE,)
    assert frames[:-1].min() == 255
    assert frames[-1, :, WIDTH // 2 :].max() == 0


@pytest.mark.parametrize("name", ["png.mov", "ffv1_yuv.mkv", "ffv1_422.mkv", "gif.gif", "prores_4444.mov"])
def test_an_opaque_alpha_channel_changes_nothing(ffmpeg: Ffmpeg, tmp_path: Path, name: str) -> None:
    frames = layers(opaque_frames=COUNT)
    frames[:, :, :, 0] = np.arange(COUNT)[:, None, None] * 60  # or a GIF keeps one frame
    path = video(ffmpeg, tmp_path / name, frames, *FILMS[name])
    info = probe(path)
    assert info.changes == ()
    assert np.array_equal(decode(path, info, BUCKET, 25.0, background="black"), decode(path, info, BUCKET, 25.0))


@pytest.mark.parametrize("name", FILMS)
def test_transparent_parts_of_a_mask_do_not_count(ffmpeg: Ffmpeg, tmp_path: Path, name: str) -> None:
    path = video(ffmpeg, tmp_path / name, layers(), *FILMS[name])
    info = column_files.probe_picture(path)
    mask = decode_mask(SourceFile(path, 0.0, BUCKET._replace(frames=info.frames), info.fps, path, info, "black"))
    assert mask[:, :, : WIDTH // 2].min() >= 254
    assert mask[:, :, WIDTH // 2 :].max() <= 1


def test_a_mask_whose_transparency_is_not_read_is_refused(ffmpeg: Ffmpeg, tmp_path: Path) -> None:
    """FFmpeg's own VP9 decoder leaves the alpha channel out."""
    options = ("-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-deadline", "realtime", "-cpu-used", "8")
    path = video(ffmpeg, tmp_path / "mask.webm", layers(), *options)
    info, fit = column_files.probe_picture(path), BucketFit(BUCKET, 25.0, COUNT, 0.0, 1.0)
    assert info.changes == (UNREAD_ALPHA,)
    clip = tmp_path / "clip.mp4"
    with pytest.raises(UserError, match=r"its mask .* is not read .*: what is transparent in it would count"):
        column_files.check_picture("mask", path, info, clip, info, fit, COUNT)
    column_files.check_picture("control", path, info, clip, info, fit, COUNT)
