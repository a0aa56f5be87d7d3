"""Videos as they come, from real encoders: each is frame by frame right, in time and in colour, or refused by name.

Frames say their own number (`drawn`). Colours are compared with those that were drawn, and with the ffmpeg binary.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from drawn import PATCHES, film, numbers, patches
from ffmpeg_oracle import ACCURATE, H264, LEFT, VP9, Ffmpeg

from finetune.data.decode import VideoInfo, decode, probe
from finetune.recipe import Bucket
from finetune.runtime.errors import UserError

COUNT = 12
MEAN = 0.5  # of 255, over a frame, against ffmpeg with accurate flags
DRAWN = 4  # of 255, over the middle of a patch: what encoders lose of a colour

FINE = "settb=1/90000,setpts="  # exact times; encoders and containers must then take ticks of 1/90000 s
TIMED = ("-fps_mode", "passthrough", "-enc_time_base", "1:90000", "-video_track_timescale", "90000")
JITTER = "({at})/TB+(random(1)*2-1)*{reach}/TB"
MATRIX_709 = ("-vf", f"scale=out_color_matrix=bt709:flags={ACCURATE}")
MATRIX_601 = ("-vf", f"scale=out_color_matrix=bt601:flags={ACCURATE}")
X265 = ("-c:v", "libx265", "-preset", "ultrafast", "-crf", "8", "-x265-params", "log-level=none:keyint=6:open-gop=1")
AV1 = ("-pix_fmt", "yuv420p", "-c:v", "libaom-av1", "-cpu-used", "8", "-usage", "realtime", "-crf", "10")
INTRA = ("-c:v", "mjpeg", "-q:v", "2", "-pix_fmt", "yuvj420p")


class Kind(NamedTuple):
    """How a file of the zoo is made, and what is known of it."""

    options: tuple[str, ...]
    fps: str = "25"
    siting: str = f":{LEFT}"  # of chroma, for the oracle
    matrix: str = ""  # for the oracle, where it would guess another one than players do
    size: tuple[int, int] = (128, 192)
    count: int = COUNT


CENTRED = ""
ZOO = {
    "h264.mp4": Kind(H264),
    "h264_ten_bit.mkv": Kind(("-pix_fmt", "yuv420p10le", *H264[2:])),
    "h265_ten_bit.mp4": Kind(("-pix_fmt", "yuv420p10le", *X265)),
    "h265_open.mkv": Kind(("-pix_fmt", "yuv420p", *X265)),
    "vp9.webm": Kind(VP9, siting=CENTRED),
    "av1.webm": Kind(AV1, siting=CENTRED),
    "av1.mp4": Kind(AV1, siting=CENTRED),
    "prores.mov": Kind(("-c:v", "prores_ks", "-profile:v", "3")),
    "prores_4444.mov": Kind(("-c:v", "prores_ks", "-profile:v", "4", "-pix_fmt", "yuv444p10le")),
    "mjpeg.avi": Kind(INTRA, siting=CENTRED),
    "mjpeg.mov": Kind(INTRA, siting=CENTRED),
    "mpeg2.mpg": Kind(("-c:v", "mpeg2video", "-q:v", "2", "-bf", "2")),
    "mpeg2.ts": Kind(("-c:v", "mpeg2video", "-q:v", "2", "-bf", "2")),
    "mpeg4.avi": Kind(("-c:v", "mpeg4", "-q:v", "2", "-bf", "2")),
    "vp8.webm": Kind(("-c:v", "libvpx", "-crf", "8", "-b:v", "4M", "-auto-alt-ref", "1"), siting=CENTRED),
    "film.gif": Kind((), siting=CENTRED),
    "fragments.mp4": Kind((*H264, "-g", "5", "-movflags", "frag_keyframe+empty_moov")),
    "stream.ts": Kind((*H264, "-g", "5")),
    "late.mp4": Kind((*H264, "-output_ts_offset", "3.3")),
    "film_rate.mp4": Kind(H264, fps="24000/1001"),
    "film_rate.webm": Kind(VP9, fps="24000/1001", siting=CENTRED),
    "ntsc.avi": Kind(("-c:v", "mpeg4", "-q:v", "2"), fps="30000/1001"),
    "fast.webm": Kind(VP9, fps="240", siting=CENTRED, count=60),
    "fast.mkv": Kind(H264, fps="120000/1001", count=60),
    "fast.gif": Kind((), fps="50", siting=CENTRED),
    "uneven.gif": Kind((), fps="30", siting=CENTRED),  # 3, 3 and 4 hundredths of a second
    "full_chroma.mp4": Kind(("-pix_fmt", "yuv444p", *H264[2:])),
    "chroma_422.mkv": Kind(("-pix_fmt", "yuv422p", *H264[2:])),
    "full_range.mp4": Kind(("-vf", f"scale=out_range=full:flags={ACCURATE}", *H264, "-color_range", "pc")),
    "bt601.mp4": Kind((*MATRIX_601, *H264, "-colorspace", "smpte170m")),
    "bt709.mp4": Kind((*MATRIX_709, *H264, "-colorspace", "bt709")),
    "odd_sizes.mkv": Kind(("-pix_fmt", "yuv420p", "-c:v", "ffv1"), siting=CENTRED, size=(127, 191)),
    "untagged_hd.mp4": Kind((*MATRIX_709, *H264), matrix=":in_color_matrix=bt709", size=(720, 960), count=3),
    "tagged_hd.mp4": Kind((*MATRIX_601, *H264, "-colorspace", "smpte170m"), size=(720, 960), count=3),
}


def whole(path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """All frames of a file at its own size and rate, and what is done to its picture."""
    info = probe(path)
    assert info.resampled(info.fps, info.frames) == (0, 0)
    return decode(path, info, Bucket(info.frames, info.height, info.width), info.fps), info.changes


@pytest.mark.parametrize("name", ZOO)
def test_each_frame_once_in_its_colours(ffmpeg: Ffmpeg, name: str) -> None:
    kind = ZOO[name]
    path = film(ffmpeg, name, *kind.options, fps=kind.fps, count=kind.count, size=kind.size)
    frames, changes = whole(path)
    assert (numbers(frames), changes) == (list(range(kind.count)), ())
    assert np.abs(patches(frames) - PATCHES).max() <= DRAWN
    height, width = kind.size
    theirs = ffmpeg.frames(path, height, width, f"scale={width}:{height}:flags={ACCURATE}{kind.siting}{kind.matrix}")
    assert np.abs(frames - theirs.astype(float)).mean() <= MEAN


@pytest.mark.parametrize(
    "name", ["h264.mp4", "h265_open.mkv", "vp9.webm", "mpeg4.avi", "film.gif", "stream.ts", "mpeg2.mpg"]
)
def test_scaled_frames_have_their_colours_too(ffmpeg: Ffmpeg, name: str) -> None:
    kind = ZOO[name]
    path = film(ffmpeg, name, *kind.options)
    frames = decode(path, probe(path), Bucket(COUNT, 64, 96), 25.0)
    assert np.abs(patches(frames) - PATCHES).max() <= DRAWN
    theirs = ffmpeg.frames(path, 64, 96, f"scale=96:64:flags={ACCURATE}{kind.siting}")
    assert np.abs(frames - theirs.astype(float)).mean() <= MEAN


# --- times ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", ["0.00002", "0.001"])
@pytest.mark.parametrize("fps", [30, 240])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_jitter_repeats_nothing(ffmpeg: Ffmpeg, suffix: str, fps: int, reach: str) -> None:
    times = FINE + JITTER.format(at=f"N/{fps}+0.01", reach=reach)
    path = film(ffmpeg, f"jitter_{fps}_{reach}.{suffix}", "-vf", times, *H264, *TIMED, count=60)
    info = probe(path)
    assert info.fps == pytest.approx(fps, rel=1e-3)
    assert numbers(whole(path)[0]) == list(range(60))


def test_a_clip_of_variable_rate_shows_the_nearest_frames(ffmpeg: Ffmpeg) -> None:
    times = np.cumsum([0, 20, 70, 15, 15, 120, 33, 33, 50, 10, 90, 40]) / 1000
    steps = "+".join(f"gte(N,{number})*{step:.6f}" for number, step in enumerate(np.diff(times), 1))
    path = film(ffmpeg, "variable.mp4", "-vf", f"{FINE}'({steps})/TB'", *H264, *TIMED)
    info = probe(path)
    count = info.frames_at(20)
    nearest = [int(np.abs(times - k / 20).round(6).argmin()) for k in range(count)]
    assert numbers(decode(path, info, Bucket(count, 128, 192), 20.0)) == nearest
    shown = set(nearest)
    assert info.resampled(20, count) == (count - len(shown), max(nearest) - min(nearest) + 1 - len(shown))
    late = decode(path, info, Bucket(4, 128, 192), 20.0, start=0.2)
    assert numbers(late) == [int(np.abs(times - 0.2 - k / 20).round(6).argmin()) for k in range(4)]


@pytest.mark.parametrize("name", ["h264.mp4", "mpeg4.avi", "film.gif", "vp9.webm"])
@pytest.mark.parametrize("fps", [10.0, 20.0, 50.0])
def test_the_container_does_not_change_which_frames_are_nearest(ffmpeg: Ffmpeg, name: str, fps: float) -> None:
    path = film(ffmpeg, name, *ZOO[name].options)
    info = probe(path)
    count = info.frames_at(fps)
    expected = [int(np.ceil(k * 25 / fps - 0.5)) for k in range(count)]  # of two equally near, the earlier
    assert numbers(decode(path, info, Bucket(count, 128, 192), fps)) == [min(number, COUNT - 1) for number in expected]


# --- turned, mirrored, interlaced -------------------------------------------------------------------------------------

TURNS = {  # options of ffmpeg, and what they mean for an array
    "mirrored": (("-display_hflip",), lambda frames: frames[:, :, ::-1]),
    "upside_down": (("-display_vflip",), lambda frames: frames[:, ::-1]),
    "quarter": (("-display_rotation", "90"), lambda frames: np.rot90(frames, 1, (1, 2))),
    "half": (("-display_rotation", "180"), lambda frames: np.rot90(frames, 2, (1, 2))),
}


@pytest.mark.parametrize("name", TURNS)
def test_a_display_matrix_turns_and_mirrors(ffmpeg: Ffmpeg, name: str) -> None:
    options, turned = TURNS[name]
    plain = film(ffmpeg, "h264.mp4", *H264)
    path = ffmpeg.remake(f"{name}.mp4", plain, *options)
    frames, changes = whole(path)
    assert changes == (("mirrored",) if name in ("mirrored", "upside_down") else ())
    assert np.array_equal(frames, turned(whole(plain)[0]))


def test_a_mirrored_and_turned_clip_is_ffmpegs(ffmpeg: Ffmpeg) -> None:
    grey = film(ffmpeg, "grey.mp4", "-vf", "format=gray", *H264)
    path = ffmpeg.remake("both.mp4", grey, "-display_rotation", "90", "-display_hflip")
    frames, changes = whole(path)
    assert changes == ("mirrored",)
    assert np.abs(frames - ffmpeg.frames(path, 192, 128).astype(int)).max() <= 1


def test_a_clip_that_is_turned_by_an_odd_angle_is_refused(ffmpeg: Ffmpeg) -> None:
    path = ffmpeg.remake("odd.mp4", film(ffmpeg, "h264.mp4", *H264), "-display_rotation", "30")
    with pytest.raises(UserError, match=r"not upright\n.*ffmpeg -i odd.mp4 odd_new.mp4"):
        probe(path)


INTERLACED = {
    "interlaced.mp4": ("-flags", "+ilme+ildct", *H264),
    "interlaced.mpg": ("-flags", "+ilme+ildct", "-c:v", "mpeg2video", "-q:v", "2"),
}


@pytest.mark.parametrize("name", INTERLACED)
def test_interlaced_video_is_deinterlaced(ffmpeg: Ffmpeg, name: str) -> None:
    """ffmpeg's own bwdif is the oracle; fields of two moments would differ from row to row."""
    path = ffmpeg.make(name, "-vf", "tinterlace=interleave_top,setfield=tff", *INTERLACED[name])
    info = probe(path)
    assert info.changes == ("deinterlaced",)
    frames = decode(path, info, Bucket(info.frames, info.height, info.width), info.fps)
    filters = f"bwdif=mode=send_frame,scale=flags={ACCURATE}:{LEFT}"
    theirs = ffmpeg.frames(path, info.height, info.width, filters)
    assert np.abs(frames - theirs.astype(float)).mean() <= MEAN
    late = decode(path, info, Bucket(3, info.height, info.width), info.fps, start=5 / info.fps)
    assert np.array_equal(late, frames[5:8])


# --- high dynamic range and wide gamut --------------------------------------------------------------------------------

HDR_LINE = (
    "zscale=t=linear:npl=100:agamma=false,format=gbrpf32le,zscale=p=bt709,tonemap=hable:desat=0,"
    "zscale=t=bt709:m=gbr:r=pc,format=gbrp"
)
WIDE_LINE = "zscale=p=bt709:t=bt709:m=gbr:r=pc,format=gbrp"
WIDE = {  # tags of primaries, transfer and matrix; the oracle's filters; what is said
    "pq.mkv": (("bt2020", "smpte2084", "bt2020nc"), HDR_LINE, "tone-mapped from PQ, BT.2020"),
    "hlg.mkv": (("bt2020", "arib-std-b67", "bt2020nc"), HDR_LINE, "tone-mapped from HLG, BT.2020"),
    "p3_pq.mkv": (("smpte432", "smpte2084", "bt2020nc"), HDR_LINE, "tone-mapped from PQ, Display P3"),
    "p3.mkv": (("smpte432", "bt709", "bt709"), WIDE_LINE, "converted from Display P3"),
    "wide.mkv": (("bt2020", "bt2020-10", "bt2020nc"), WIDE_LINE, "converted from BT.2020"),
}


@pytest.mark.parametrize("name", WIDE)
def test_wide_colours_become_what_zscale_makes_of_them(ffmpeg: Ffmpeg, name: str) -> None:
    (primaries, transfer, matrix), filters, said = WIDE[name]
    tags = ("-color_primaries", primaries, "-color_trc", transfer, "-colorspace", matrix, "-color_range", "tv")
    to = f"scale=out_color_matrix={matrix.removesuffix('nc')}:out_range=tv:flags={ACCURATE},format=yuv444p10"
    params = f"setparams=color_primaries={primaries}:color_trc={transfer}:colorspace={matrix}:range=tv"
    path = film(ffmpeg, name, "-vf", f"{to},{params}", *X265, *tags, count=3)
    frames, changes = whole(path)
    assert changes == (said,)
    assert np.abs(frames - ffmpeg.frames(path, 128, 192, filters).astype(float)).mean() <= 1


def test_grey_of_another_white_stays_grey(ffmpeg: Ffmpeg) -> None:
    """The white of DCI-P3 is greener than BT.709's. (zscale does not adapt it.)"""
    tags = "setparams=color_primaries=smpte431:color_trc=bt709:colorspace=bt709"
    path = film(
        ffmpeg,
        "dci.mkv",
        "-vf",
        f"{MATRIX_709[1]},format=yuv420p,{tags}",
        *X265,
        "-color_primaries",
        "smpte431",
        count=3,
    )
    frames, changes = whole(path)
    assert changes == ("converted from DCI-P3",)
    assert np.abs(patches(frames)[0] - PATCHES[0]).max() <= DRAWN


def test_grey_stays_grey_and_brightness_its_order(ffmpeg: Ffmpeg) -> None:
    ramp = (
        "geq=lum='16*4+X*876/W':cb=512:cr=512,setparams=color_primaries=bt2020:color_trc=smpte2084:colorspace=bt2020nc"
    )
    tags = ("-color_primaries", "bt2020", "-color_trc", "smpte2084", "-colorspace", "bt2020nc")
    path = film(ffmpeg, "ramp.mkv", "-vf", f"format=yuv420p10,{ramp}", *X265, *tags, count=2)
    row = whole(path)[0][0, 64].astype(int)
    assert np.ptp(row, axis=-1).max() <= 2
    assert (np.diff(row.mean(-1)) >= -2).all()
    assert (row[0].max() <= 2, row[-1].min() >= 253) == (True, True)


def test_colours_that_cannot_be_converted_are_refused_with_the_line_that_converts_them(ffmpeg: Ffmpeg) -> None:
    params = "setparams=colorspace=ictcp:color_primaries=bt2020:color_trc=smpte2084"
    path = film(ffmpeg, "ictcp.mkv", "-vf", f"format=yuv420p10,{params}", *X265, "-colorspace", "ictcp", count=2)
    with pytest.raises(UserError, match=r"coded as ICtCp.*\n.*ffmpeg -i ictcp.mkv -vf libplacebo"):
        probe(path)


# --- what is not there ------------------------------------------------------------------------------------------------


def test_a_stream_that_does_not_begin_with_a_key_frame_is_refused(ffmpeg: Ffmpeg, tmp_path: Path) -> None:
    data = film(ffmpeg, "stream.ts", *ZOO["stream.ts"].options).read_bytes()
    packets = [data[at : at + 188] for at in range(0, len(data), 188)]
    video = [at for at, packet in enumerate(packets) if packet[1] & 0x5F == 0x41 and packet[2] == 0]
    (tmp_path / "headless.ts").write_bytes(b"".join(packets[: video[0]] + packets[video[1] :]))
    with pytest.raises(UserError, match=r"does not begin with a key frame: its first \d+ frames cannot be decoded"):
        probe(tmp_path / "headless.ts")


SIZES = {"small": "192:128", "large": "256:192"}


def test_a_picture_that_changes_size_is_refused(ffmpeg: Ffmpeg, tmp_path: Path) -> None:
    sizes = [film(ffmpeg, f"{name}.h264", "-vf", f"scale={size}", *H264, "-bf", "0") for name, size in SIZES.items()]
    stream, path = tmp_path / "both.h264", tmp_path / "grows.mkv"
    stream.write_bytes(b"".join(size.read_bytes() for size in sizes))
    ffmpeg.run("-r", "25", "-i", stream, "-c", "copy", path)
    with pytest.raises(UserError, match=r"its picture changes size, from 192x128 to 256x192"):
        whole(path)


@pytest.mark.parametrize("name", ["raw.h264", "raw.mjpeg", "b_frames.avi", "h264.mpg"])
def test_files_without_times_are_refused_when_they_are_probed(ffmpeg: Ffmpeg, name: str) -> None:
    options = INTRA if name.endswith("mjpeg") else (*H264, "-bf", "2")
    with pytest.raises(UserError, match="does not say when its frames are shown"):
        probe(film(ffmpeg, name, *options))


# --- names and rights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["12:30.mp4", "http:x.mp4", "a b'c.mp4", "-v.mp4", "%03d.mp4", "ü.mp4", "caf\udce9.mp4"]
)
def test_any_name_that_the_system_allows(ffmpeg: Ffmpeg, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(film(ffmpeg, "h264.mp4", *H264).read_bytes())
    assert numbers(whole(path)[0]) == list(range(COUNT))


def test_a_title_that_is_not_utf_8_does_not_matter(ffmpeg: Ffmpeg, tmp_path: Path) -> None:
    data = ffmpeg.remake(
        "titled.mkv", film(ffmpeg, "h264.mp4", *H264), after=("-metadata", "title=caf_XX")
    ).read_bytes()
    assert data.count(b"caf_XX") == 1
    path = tmp_path / "titled.mkv"
    path.write_bytes(data.replace(b"caf_XX", b"caf_\xe9\xff"))
    assert numbers(whole(path)[0]) == list(range(COUNT))


@pytest.mark.parametrize(
    "name", ["x" * 5000 + ".mp4", "folder.mp4", "pipe.mp4", "empty.mp4", "absent.mp4", "nul\0.mp4"]
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.startswith("folder"):
        path.mkdir()
    elif name.startswith("pipe"):
        os.mkfifo(path)
    elif name.startswith("empty"):
        path.touch()
    with pytest.raises(UserError) as caught:
        probe(path)
    assert f"{tmp_path}/{name[:3]}" in str(caught.value)
    assert "->" in str(caught.value)


# --- what is remembered, and memory -----------------------------------------------------------------------------------


GAPS = ("-vf", "select='not(between(n,5,9))'", "-fps_mode", "vfr", *H264)


def test_what_is_known_of_a_clip_can_be_remembered(ffmpeg: Ffmpeg) -> None:
    for path in (ffmpeg.make("gaps.mp4", *GAPS), film(ffmpeg, "h264.mp4", *H264)):
        info = probe(path)
        facts = json.loads(json.dumps(asdict(info)))
        assert VideoInfo.of(facts) == info
        assert VideoInfo.of({key: facts[key] for key in ("height", "width", "frames", "duration")}) is None


GROWTH = """
import resource, sys
from pathlib import Path
from finetune.data.decode import VideoInfo, decode, probe
from finetune.recipe import Bucket

def read(path):
    info = probe(path)
    decode(path, info, Bucket(5, 64, 96), info.fps, threads=1)
    decode(path, info, Bucket(5, 64, 96), info.fps, start=info.duration - 1, threads=1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

short, long = [read(Path(path)) for path in sys.argv[1:]]
print(long - short)
"""


def test_memory_does_not_grow_with_the_file(ffmpeg: Ffmpeg) -> None:
    noise = ("-f", "lavfi", "-i", "nullsrc=size=384x256:rate=25:duration=1", "-vf", "noise=alls=100:allf=t")
    short, long = ffmpeg.folder / "noise.mkv", ffmpeg.folder / "long_noise.mkv"
    ffmpeg.run(*noise, "-pix_fmt", "yuv420p", "-c:v", "ffv1", "-g", "1", short)
    ffmpeg.run("-stream_loop", "39", "-i", short, "-c", "copy", long)
    assert long.stat().st_size > 80e6
    command = [sys.executable, "-c", GROWTH, str(short), str(long)]
    grown = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    assert float(grown) < 8  # MB


PAUSE = ("-vf", "select='not(between(n,8,18))'", "-fps_mode", "vfr", *H264)


def test_a_pause_is_meant_where_the_file_shows_that_nothing_is_missing(ffmpeg: Ffmpeg) -> None:
    for name in ("pause.mkv", "pause.mp4"):
        info = probe(ffmpeg.make(name, *PAUSE))
        assert (info.frames, info.frames_at(25), info.resampled(25, 25)) == (14, 25, (11, 0))


@pytest.mark.parametrize("name", ["pause.ts", "pause_fragments.mp4"])
def test_a_pause_that_may_be_a_hole_is_refused_with_the_line_that_fills_it(ffmpeg: Ffmpeg, name: str) -> None:
    fragments = ("-g", "4", "-movflags", "frag_keyframe+empty_moov") if name.endswith("mp4") else ()
    path = ffmpeg.make(name, *PAUSE, *fragments)
    with pytest.raises(UserError, match=r"frames are missing between 0.28 and 0.76 s(.|\n)*-vf fps=25 "):
        probe(path)
