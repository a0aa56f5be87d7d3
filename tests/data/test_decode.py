"""Decoding, against the ffmpeg binary: the same frames at the same times, upright, in the right colours and shape.

The binary converts with accurate rounding and full chroma. Frames that are not scaled may differ by 1 of 255; scaled ones
by 2, since the binary and PyAV bring a swscale each, and its filters are not bit-exact between versions. ffmpeg's scale
filter takes chroma for centred where a file says "left" (H.264, HEVC, MPEG), so it is told.
"""

from pathlib import Path

import numpy as np
import pytest
from ffmpeg_oracle import ACCURATE, H264, LEFT, VP9, Ffmpeg

from finetune.data.decode import VideoInfo, decode, probe
from finetune.data.synthetic import RECORDINGS
from finetune.data.video.info import packed
from finetune.recipe import Bucket
from finetune.runtime.errors import UserError

UNSCALED, SCALED = 1, 2
BT709 = ("-vf", "scale=out_color_matrix=bt709", *H264, "-colorspace", "bt709")
FULL_RANGE = ("-vf", "scale=out_range=full", *H264, "-color_range", "pc")
TEN_BIT = ("-pix_fmt", "yuv420p10le", "-c:v", "libx265", "-crf", "10", "-x265-params", "log-level=none")
DROPPED = ("-vf", "select='not(between(n,5,9))'", "-fps_mode", "vfr", *H264)  # a fifth of the frames is missing


def difference(ours: np.ndarray, theirs: np.ndarray) -> int:
    """Largest difference of a pixel value."""
    assert ours.shape == theirs.shape
    return int(np.abs(ours.astype(int) - theirs.astype(int)).max())


def whole(clip: VideoInfo) -> Bucket:
    """A bucket that takes a clip as it is."""
    return Bucket(clip.frames, clip.height, clip.width)


# --- probe ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda recording: recording.name)
def test_size_frames_and_duration_are_ffmpegs(ffmpeg: Ffmpeg, clips: Path, recording) -> None:
    clip, shown = probe(clips / recording.name), ffmpeg.shown(clips / recording.name)
    assert (clip.height, clip.width, clip.frames) == (shown.height, shown.width, shown.frames)
    assert clip.duration == pytest.approx(shown.duration, abs=1e-3)  # a WebM's last frame may have no duration


CONTAINERS = {
    "b_frames.mp4": (*H264, "-bf", "3"),
    "fragments.mp4": (*H264, "-movflags", "frag_keyframe+empty_moov"),
    "late_start.mp4": (*H264, "-output_ts_offset", "3.3"),
    "stream.ts": H264,
    "mpeg2.mpg": ("-c:v", "mpeg2video", "-q:v", "2", "-bf", "2"),
    "mpeg4.avi": ("-c:v", "mpeg4", "-q:v", "2", "-bf", "2"),
    "prores.mov": ("-c:v", "prores_ks"),
    "one_frame.mp4": (*H264, "-frames:v", "1"),
    "gaps.mp4": DROPPED,
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_tells_size_frames_and_duration(ffmpeg: Ffmpeg, name: str) -> None:
    path = ffmpeg.make(name, *CONTAINERS[name])
    clip, shown = probe(path), ffmpeg.shown(path)
    assert (clip.height, clip.width, clip.frames) == (shown.height, shown.width, shown.frames)
    assert clip.duration == pytest.approx(shown.duration, abs=1e-3)


def test_sound_that_outlasts_the_picture_does_not_count(ffmpeg: Ffmpeg) -> None:
    path = ffmpeg.make("sound.mp4", "-f", "lavfi", "-i", "sine=duration=2", *H264, "-c:a", "aac")
    assert (probe(path).frames, probe(path).duration) == (25, 1.0)


@pytest.mark.parametrize("turn, size", [(90, (192, 128)), (180, (128, 192)), (270, (192, 128))])
def test_size_is_that_of_the_upright_picture(ffmpeg: Ffmpeg, turn: int, size: tuple[int, int]) -> None:
    path = ffmpeg.remake(f"turned_{turn}.mp4", ffmpeg.make("plain.mp4", *H264), "-display_rotation", str(turn))
    shown = ffmpeg.shown(path)
    assert (probe(path).height, probe(path).width) == (shown.height, shown.width) == size


@pytest.mark.parametrize("aspect", ["4/3", "1/2"])
def test_width_is_that_of_square_pixels(ffmpeg: Ffmpeg, aspect: str) -> None:
    path = ffmpeg.make(f"aspect_{aspect[0]}.mp4", "-vf", f"setsar={aspect}", *H264)
    clip, shown = probe(path), ffmpeg.shown(path)
    assert (clip.height, clip.width) == (shown.height, shown.width * shown.pixel_aspect)


def test_pixel_aspect_is_applied_before_rotation(ffmpeg: Ffmpeg) -> None:
    flat = ffmpeg.make("aspect_4.mp4", "-vf", "setsar=4/3", *H264)
    clip = probe(ffmpeg.remake("aspect_turned.mp4", flat, "-display_rotation", "90"))
    shown = ffmpeg.shown(ffmpeg.folder / "aspect_turned.mp4")
    assert (clip.height, clip.width) == (256, 128)
    assert clip.width / clip.height == pytest.approx(shown.width * shown.pixel_aspect / shown.height)


@pytest.mark.parametrize("start", ["0.5", "0.31"])
def test_a_clip_that_was_cut_out_without_encoding_shows_its_part_only(ffmpeg: Ffmpeg, start: str) -> None:
    """`ffmpeg -ss ... -c copy` keeps the frames from the last key frame on, and hides them by an edit list."""
    path = ffmpeg.remake(f"part_{start}.mp4", ffmpeg.make("plain.mp4", *H264), "-ss", start)
    clip, shown = probe(path), ffmpeg.shown(path)
    assert (clip.frames, clip.duration) == (shown.frames, pytest.approx(shown.duration))
    assert clip.frames < 25
    assert difference(decode(path, clip, whole(clip), clip.fps), ffmpeg.frames(path, 128, 192)) <= UNSCALED


@pytest.mark.parametrize("offset", ["-0.3", "-0.5", "-0.52"])
def test_a_clip_that_begins_before_its_time_shows_what_players_show(ffmpeg: Ffmpeg, offset: str) -> None:
    """FFmpeg leaves out whole groups of frames that an edit list hides: they are not missing."""
    plain, late = ffmpeg.make("groups.mp4", *H264, "-g", "5"), ("-output_ts_offset", offset)
    path = ffmpeg.remake(f"early{offset}.mp4", plain, after=(*late, "-avoid_negative_ts", "disabled"))
    clip, theirs = probe(path), ffmpeg.frames(path, 128, 192)
    assert clip.frames == len(theirs) < 25
    assert difference(decode(path, clip, whole(clip), clip.fps), theirs) <= UNSCALED
    window = decode(path, clip, Bucket(5, 128, 192), clip.fps, start=4 / clip.fps)
    assert difference(window, theirs[4:9]) <= UNSCALED


@pytest.mark.parametrize(
    "duration, fps, frames",
    [
        (1.0, 25, 25),
        (61 / 30, 24, 48),  # 48.8: a frame that is not filled does not count
        (1.98, 24, 47),
        (0.708, 24, 17),  # 17 frames of 1/24 s, in the milliseconds of a WebM
        (0.417, 60000 / 1001, 25),
        (0.04, 10, 1),
    ],
)
def test_frames_that_fill_a_duration(duration: float, fps: float, frames: int) -> None:
    assert VideoInfo(128, 192, 10, duration).frames_at(fps) == frames


@pytest.mark.parametrize("name, fps", [("one_frame.mp4", 16.0), ("one_frame.mp4", 25.0), ("b_frames.mp4", 0.5)])
def test_the_first_frame_is_there_at_any_rate(ffmpeg: Ffmpeg, name: str, fps: float) -> None:
    path = ffmpeg.make(name, *CONTAINERS[name])
    clip = probe(path)
    assert clip.frames_at(fps) == 1
    frames = decode(path, clip, Bucket(1, 128, 192), fps)
    assert difference(frames, ffmpeg.frames(path, 128, 192)[:1]) <= UNSCALED
    with pytest.raises(UserError, match=rf"2 frames at {fps:g} fps"):
        decode(path, clip, Bucket(2, 128, 192), fps)


# --- frames and pixels ------------------------------------------------------------------------------------------------

FILES = {
    "plain.mp4": H264,
    "bt709.mp4": BT709,
    "full_range.mp4": FULL_RANGE,
    "ten_bit.mkv": TEN_BIT,
    "full_chroma.mp4": ("-pix_fmt", "yuv444p", *H264[2:]),
    "vp9.webm": VP9,
    "alpha.webm": ("-pix_fmt", "yuva420p", *VP9[2:]),
    "animation.gif": (),
    "mpeg2.mpg": CONTAINERS["mpeg2.mpg"],
    "mpeg4.avi": CONTAINERS["mpeg4.avi"],
    "late_start.mp4": CONTAINERS["late_start.mp4"],
    "stream.ts": H264,
}
CENTRED = ("vp9.webm", "alpha.webm", "animation.gif")


def siting(name: str) -> str:
    return "" if name in CENTRED else f":{LEFT}"


@pytest.mark.parametrize("name", FILES)
def test_unscaled_frames_are_ffmpegs(ffmpeg: Ffmpeg, name: str) -> None:
    path = ffmpeg.make(name, *FILES[name])
    clip = probe(path)
    theirs = ffmpeg.frames(path, 128, 192, f"scale=192:128:flags={ACCURATE}{siting(name)}")
    assert difference(decode(path, clip, whole(clip), clip.fps), theirs) <= UNSCALED


@pytest.mark.parametrize("name", FILES)
def test_scaled_frames_are_ffmpegs(ffmpeg: Ffmpeg, name: str) -> None:
    path = ffmpeg.make(name, *FILES[name])
    clip = probe(path)
    theirs = ffmpeg.frames(path, 64, 96, f"scale=96:64:flags={ACCURATE}{siting(name)}")
    assert difference(decode(path, clip, Bucket(25, 64, 96), clip.fps), theirs) <= SCALED


@pytest.mark.parametrize(
    "bucket, scaled, corner",
    [
        (Bucket(9, 64, 64), "96:64", "16:0"),  # square out of wide: the sides go
        (Bucket(9, 64, 160), "160:107", "0:21"),  # flat out of wide: top and bottom go
        (Bucket(9, 256, 384), "384:256", "0:0"),  # larger than the clip
        (Bucket(9, 160, 128), "240:160", "56:0"),
    ],
    ids=str,
)
def test_a_clip_covers_its_bucket_and_is_cropped_at_the_centre(
    ffmpeg: Ffmpeg, bucket: Bucket, scaled: str, corner: str
) -> None:
    path = ffmpeg.make("plain.mp4", *H264)
    filters = f"scale={scaled}:flags={ACCURATE}:{LEFT},format=rgb24,crop={bucket.width}:{bucket.height}:{corner}"
    theirs = ffmpeg.frames(path, bucket.height, bucket.width, filters)
    assert difference(decode(path, probe(path), bucket, 25.0), theirs[:9]) <= SCALED


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_turned_clip_is_upright(ffmpeg: Ffmpeg, turn: int) -> None:
    plain = ffmpeg.make("plain.mp4", *H264)
    path = ffmpeg.remake(f"turned_{turn}.mp4", plain, "-display_rotation", str(turn))
    clip, theirs = probe(path), np.rot90(ffmpeg.frames(plain, 128, 192), turn // 90, axes=(1, 2))
    assert difference(decode(path, clip, whole(clip), 25.0), theirs) <= UNSCALED


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_turned_clip_is_scaled_and_cropped_upright(ffmpeg: Ffmpeg, turn: int) -> None:
    """Grey, since ffmpeg turns first and then takes the turned chroma for one that was stored like that."""
    grey = ffmpeg.make("grey.mp4", "-vf", "format=gray", *H264)
    path = ffmpeg.remake(f"grey_{turn}.mp4", grey, "-display_rotation", str(turn))
    crop = {90: f"scale=64:96:flags={ACCURATE},format=rgb24,crop=64:64:0:16"}
    filters = crop.get(turn % 180, f"scale=96:64:flags={ACCURATE},format=rgb24,crop=64:64:16:0")
    assert (
        difference(decode(path, probe(path), Bucket(25, 64, 64), 25.0), ffmpeg.frames(path, 64, 64, filters)) <= SCALED
    )


@pytest.mark.parametrize("aspect, width", [("4/3", 256), ("1/2", 96)])
def test_oblong_pixels_become_square(ffmpeg: Ffmpeg, aspect: str, width: int) -> None:
    path = ffmpeg.make(f"aspect_{aspect[0]}.mp4", "-vf", f"setsar={aspect}", *H264)
    clip = probe(path)
    theirs = ffmpeg.frames(path, 128, width, f"scale=iw*sar:ih:flags={ACCURATE}:{LEFT}")
    assert difference(decode(path, clip, whole(clip), 25.0), theirs) <= SCALED


# --- times ------------------------------------------------------------------------------------------------------------

RATES = {
    "30fps.mkv": (H264, "30", 2.0),
    "ntsc.mkv": (H264, "30000/1001", 2.0),
    "film.webm": (VP9, "24000/1001", 2.0),
    "60fps.mkv": (H264, "60", 1.0),
    "12fps.gif": ((), "12", 1.0),
    "25fps.mp4": (H264, "25", 1.0),
    "ntsc.mp4": (H264, "30000/1001", 2.0),
}


@pytest.mark.parametrize("name", RATES)
def test_at_its_own_rate_a_clip_shows_every_frame_once(ffmpeg: Ffmpeg, name: str) -> None:
    """Matroska and WebM round times to milliseconds, GIF to hundredths of a second."""
    options, fps, seconds = RATES[name]
    path = ffmpeg.make(name, *options, fps=fps, seconds=seconds)
    clip = probe(path)
    assert clip.frames_at(clip.fps) == clip.frames
    theirs = ffmpeg.frames(
        path, 128, 192, f"scale=192:128:flags={ACCURATE}{'' if name.endswith(('webm', 'gif')) else ':' + LEFT}"
    )
    assert difference(decode(path, clip, whole(clip), clip.fps), theirs) <= UNSCALED


@pytest.mark.parametrize("fps", [8, 12, 16, 24, 30, 60])
@pytest.mark.parametrize("name", ["wide.mp4", "long.mp4", "fast.mp4", "uneven.mp4"])
def test_resampled_clip_shows_the_nearest_frames(ffmpeg: Ffmpeg, clips: Path, name: str, fps: int) -> None:
    """Frames and their times are ffmpeg's; frames here differ by 70 and more."""
    path = clips / name
    clip = probe(path)
    bucket = Bucket(clip.frames_at(fps), clip.height, clip.width)
    theirs, times = ffmpeg.frames(path, clip.height, clip.width), ffmpeg.times(path)
    nearest = [int(np.abs(times - k / fps).round(6).argmin()) for k in range(bucket.frames)]
    assert difference(decode(path, clip, bucket, float(fps)), theirs[nearest]) <= UNSCALED


def test_a_gap_in_a_clip_is_filled_with_the_frames_beside_it(ffmpeg: Ffmpeg) -> None:
    path = ffmpeg.make("gaps.mp4", *DROPPED)
    clip = probe(path)
    nearest = [int(np.abs(ffmpeg.times(path) - k / 25).round(6).argmin()) for k in range(25)]
    assert (clip.frames, clip.frames_at(25), clip.resampled(25, 25)) == (20, 25, (5, 0))
    frames = ffmpeg.frames(path, 128, 192)
    assert difference(decode(path, clip, Bucket(25, 128, 192), 25.0), frames[nearest]) <= UNSCALED


@pytest.mark.parametrize("fps", [12.0, 24.0, 60.0])
def test_the_container_does_not_change_which_frames_are_shown(ffmpeg: Ffmpeg, fps: float) -> None:
    fine = ffmpeg.make("30fps.mp4", *H264, fps="30", seconds=2.0)
    coarse = ffmpeg.remake("30fps_copy.mkv", fine)
    bucket = Bucket(probe(fine).frames_at(fps), 128, 192)
    assert np.array_equal(decode(coarse, probe(coarse), bucket, fps), decode(fine, probe(fine), bucket, fps))


@pytest.mark.parametrize(
    "ticks, fps, start, indices",
    [
        ([0, 100, 200, 300], 10, 0.0, [0, 1, 2, 3]),
        ([0, 100, 200, 300], 20, 0.0, [0, 0, 1, 1, 2, 2, 3, 3]),  # of two equally near, the earlier
        ([0, 100, 200, 300], 5, 0.0, [0, 2]),
        ([0, 100, 200, 300], 10, 0.2, [2, 3]),
        ([0, 150, 200, 900], 10, 0.0, [0, 1, 2, 2, 2, 2, 3, 3, 3, 3]),
    ],
)
def test_the_nearest_frame_in_time(ticks: list[int], fps: float, start: float, indices: list[int]) -> None:
    info = VideoInfo(128, 192, len(ticks), 1.0, tick=0.001, times=packed(np.array(ticks)))
    assert info.frame_indices(fps, len(indices), start) == indices


def test_what_resampling_repeats_and_leaves_out() -> None:
    clip = VideoInfo(128, 192, 50, 2.0)
    assert clip.resampled(25, 50) == (0, 0)
    assert clip.resampled(50, 100) == (50, 0)
    assert clip.resampled(12.5, 25) == (0, 24)
    assert clip.resampled(20, 4) == (0, 1)  # frames 0, 1, 2 and 4


# --- files that cannot be used ----------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        probe(path)
    return str(caught.value)


def test_a_cut_file_is_refused_before_it_is_decoded(ffmpeg: Ffmpeg, tmp_path: Path) -> None:
    data = ffmpeg.make("faststart.mp4", *H264, "-movflags", "+faststart").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    assert "of the 25 frames it announces are there" in refusal(tmp_path / "cut.mp4")


def test_a_file_that_breaks_while_it_is_decoded_says_where(ffmpeg: Ffmpeg, tmp_path: Path) -> None:
    """A download that was broken off and left zeros: all frames are announced, some are none."""
    data = bytearray(ffmpeg.make("faststart.mp4", *H264, "-movflags", "+faststart").read_bytes())
    half, more = len(data) // 2, len(data) * 3 // 4
    data[half:more] = bytes(more - half)
    path = tmp_path / "zeros.mp4"
    path.write_bytes(data)
    clip = probe(path)
    with pytest.raises(UserError, match=r"the file breaks at frame \d+ of 25, .* frames before it are sound"):
        decode(path, clip, whole(clip), clip.fps)


def test_frames_before_the_break_can_be_used(ffmpeg: Ffmpeg, tmp_path: Path) -> None:
    whole_file = ffmpeg.make("faststart.mp4", *H264, "-movflags", "+faststart")
    data = bytearray(whole_file.read_bytes())
    data[-200:] = bytes(200)
    (tmp_path / "zeros.mp4").write_bytes(data)
    few = Bucket(5, 128, 192)
    clip = probe(tmp_path / "zeros.mp4")
    assert np.array_equal(decode(tmp_path / "zeros.mp4", clip, few, 25.0), decode(whole_file, clip, few, 25.0))


def test_a_file_without_frame_times_is_refused(ffmpeg: Ffmpeg) -> None:
    """AVI stores no presentation times, and those of H.264 with B-frames cannot be told from its order."""
    path = ffmpeg.make("b_frames.avi", *H264, "-bf", "3")
    assert "-> convert it: ffmpeg -i b_frames.avi b_frames_new.mp4" in refusal(path)
