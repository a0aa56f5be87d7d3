"""Windows that begin anywhere in a file show the frames that are there, whatever the codec, the container and the seek."""

import numpy as np
import pytest
from drawn import film, numbers
from ffmpeg_oracle import H264, VP9, Ffmpeg
from test_video_zoo import ZOO, whole

from finetune.data.decode import decode, probe
from finetune.recipe import Bucket

COUNT, WINDOW, STRIDE = 100, 5, 9
SIZE = (64, 128)
X264 = (*H264, "-bf", "3", "-g", "30")
X265 = ("-pix_fmt", "yuv420p", "-c:v", "libx265", "-preset", "veryfast", "-x265-params", "log-level=none:keyint=30")
SVT_AV1 = ("-pix_fmt", "yuv420p", "-c:v", "libsvtav1", "-preset", "10", "-crf", "20")
AOM_AV1 = ("-pix_fmt", "yuv420p", "-c:v", "libaom-av1", "-cpu-used", "8", "-crf", "20")
MPEG1 = ("-c:v", "mpeg1video", "-q:v", "2")
MPEG2 = ("-c:v", "mpeg2video", "-q:v", "2")
FILMS = {
    "h264.mp4": X264,
    "h264.mkv": X264,
    "h264.ts": X264,
    "h264.flv": X264,
    "fragments.mp4": (*X264, "-movflags", "frag_keyframe+empty_moov"),
    "h265.mp4": X265,
    "h265.mkv": X265,
    "svt_av1.mp4": SVT_AV1,
    "svt_av1.webm": (*SVT_AV1, "-g", "48"),
    "aom_av1.mkv": AOM_AV1,
    "vp8.webm": ("-c:v", "libvpx", "-b:v", "5M", "-cpu-used", "8", "-auto-alt-ref", "1", "-lag-in-frames", "25"),
    "vp9.webm": (*VP9, "-auto-alt-ref", "1", "-lag-in-frames", "25"),
    "vp9.mp4": VP9,
    "mpeg1.mpg": (*MPEG1, "-bf", "2"),
    "mpeg1_ordered.mpg": (*MPEG1, "-bf", "0"),
    "mpeg1.mkv": (*MPEG1, "-bf", "2"),
    "mpeg1_vcd.mpg": (*MPEG1, "-bf", "2", "-f", "vcd"),
    "mpeg2.mpg": (*MPEG2, "-bf", "2"),
    "mpeg2.vob": (*MPEG2, "-bf", "2"),
    "mpeg2_ordered.vob": (*MPEG2, "-bf", "0"),  # whose times FFmpeg guesses with a step, so that its rate varies
    "mpeg2_dvd.vob": (*MPEG2, "-bf", "2", "-f", "dvd"),
    "mpeg2.ts": (*MPEG2, "-bf", "2"),
    "mpeg2.mxf": (*MPEG2, "-bf", "2"),
    "mpeg4.avi": ("-c:v", "mpeg4", "-q:v", "2", "-bf", "2"),
    "mpeg4.3gp": ("-c:v", "mpeg4", "-q:v", "2", "-bf", "2"),
    "wmv2.wmv": ("-c:v", "wmv2", "-q:v", "2"),
    "rv20.rm": ("-c:v", "rv20", "-q:v", "2"),
    "theora.ogv": ("-c:v", "libtheora", "-q:v", "9"),
    "prores.mov": ("-c:v", "prores_ks"),
    "ffv1.mkv": ("-c:v", "ffv1"),
    "film.gif": (),
}


@pytest.mark.parametrize("name", FILMS)
def test_a_window_may_begin_anywhere(ffmpeg: Ffmpeg, name: str) -> None:
    path = film(ffmpeg, f"windows_{name}", *FILMS[name], count=COUNT, size=SIZE)
    info = probe(path)
    assert info.frames == COUNT
    last = COUNT - WINDOW
    for first in [*range(0, last, STRIDE), last]:
        window = decode(path, info, Bucket(WINDOW, *SIZE), info.fps, first / info.fps, threads=1)
        shown = (
            range(first, first + WINDOW) if not info.times else info.frame_indices(info.fps, WINDOW, first / info.fps)
        )
        assert numbers(window) == list(shown)


@pytest.mark.parametrize("first", [1, 5, 6, 7, 11])
@pytest.mark.parametrize(
    "name", ["h265_open.mkv", "h265_ten_bit.mp4", "fragments.mp4", "stream.ts", "mpeg2.mpg", "mpeg4.avi"]
)
def test_a_window_that_starts_later_shows_the_same_frames(ffmpeg: Ffmpeg, name: str, first: int) -> None:
    path = film(ffmpeg, name, *ZOO[name].options)
    info, (frames, _) = probe(path), whole(path)
    window = decode(path, info, Bucket(len(frames) - first, 128, 192), info.fps, start=first / info.fps)
    assert np.array_equal(window, frames[first:])
