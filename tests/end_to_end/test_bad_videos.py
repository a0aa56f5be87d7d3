"""Videos that cannot be used among others with odd names, through `check` and training on two processes, refused and skipped."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import av
import imageio_ffmpeg
import pytest
from trainings import rows

Finetune = Callable[..., CompletedProcess]
H264 = ("-pix_fmt", "yuv420p", "-c:v", "libx264", "-g", "50")


def film(path: Path, *options: str, size: str = "96x64") -> Path:
    """Two seconds of a test pattern."""
    source = f"testsrc2=size={size}:rate=25:duration=2"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "lavfi", "-i", source, *options, path]
    subprocess.run(command, check=True, timeout=60)
    return path


def damage_a_picture(path: Path) -> None:
    """Overwrite most of the tenth packet, which leaves the file's structure as it is."""
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][9]
        start, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    at = data.index(bytes(packet)[: size // 2], start)
    data[at + size // 8 : at + size] = bytes(255 for _ in range(size - size // 8))
    path.write_bytes(data)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    """A folder, its files that are refused when they are looked at, and those whose damage is found when they are decoded."""
    folder = tmp_path_factory.mktemp("videos") / "clips"
    folder.mkdir()
    good = film(folder / "12:30.mp4", *H264)
    shutil.copy(good, folder / "http:a b'c.mp4")
    titled = film(folder / "titled.mkv", *H264, "-metadata", "title=caf_XX")
    titled.write_bytes(titled.read_bytes().replace(b"caf_XX", b"caf_\xe9\xff"))
    film(folder / "still.png", "-frames:v", "1")

    cut = film(folder / "cut.mp4", *H264)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    half = film(folder / "half.webm", "-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8")
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    (folder / "empty.mov").touch()
    film(folder / "no_times.avi", *H264, "-bf", "2")
    (folder / "text.mp4").write_text("not a video at all")
    refused = ["cut.mp4", "empty.mov", "half.webm", "no_times.avi", "text.mp4"]

    broken = film(folder / "broken.mkv", *H264, "-bf", "0")
    damage_a_picture(broken)
    shutil.copy(broken, folder / "copy_of_broken.mkv")
    for file in list(folder.iterdir()):
        (folder / (os.path.splitext(file.name)[0] + ".txt")).write_text(f"a clip called {file.stem}")
    return folder, refused, ["broken.mkv", "copy_of_broken.mkv"]


@pytest.fixture
def settings(dataset: tuple[Path, list[str], list[str]]) -> list[str]:
    values = (f"data.path={dataset[0]}", 'data.buckets=["17x64x96", "1x64x96"]', "train.steps=2")
    return [part for each in values for part in ("--set", each)]


def problems(said: str, folder: Path) -> list[str]:
    """The names of the files that an error is about."""
    lines = [line.removeprefix("error: ") for line in said.splitlines()]
    return sorted({line.removeprefix(f"{folder}/").split(": ")[0] for line in lines if line.startswith(f"{folder}/")})


@pytest.mark.parametrize("command", [pytest.param("check", marks=pytest.mark.full), None])
def test_all_of_them_are_named_before_anything_is_encoded(
    finetune: Finetune, small_recipe: Callable, tmp_path: Path, dataset, settings: list[str], command: str | None
) -> None:
    folder, refused, _ = dataset
    arguments = [*([command] if command else []), "--recipe", small_recipe(tmp_path), *settings]
    done = finetune(*arguments, "--set", f"data.cache={tmp_path / 'cache'}", processes=2)
    assert done.returncode != 0
    assert problems(done.stderr, folder) == refused
    assert (
        done.stderr.count(f"{len(refused)} clips cannot be used") + done.stderr.count(f"{len(refused)} problems") >= 1
    )
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_damage_inside_a_picture_is_named_with_what_is_sound(
    finetune: Finetune, small_recipe: Callable, tmp_path: Path, dataset, settings: list[str]
) -> None:
    folder, refused, broken = dataset
    copy = tmp_path / "clips"
    shutil.copytree(folder, copy)
    for name in refused:
        (copy / name).unlink()
        (copy / name).with_suffix(".txt").unlink()
    done = finetune("--recipe", small_recipe(tmp_path), *settings, "--set", f"data.path={copy}", processes=2)
    assert done.returncode != 0
    assert problems(done.stderr, copy) == broken
    assert "the 9 frames before it are sound" in done.stderr


def test_with_skip_the_rest_is_trained_on_and_each_is_named_once(
    finetune: Finetune, small_recipe: Callable, tmp_path: Path, dataset, settings: list[str]
) -> None:
    folder, refused, broken = dataset
    recipe, skip = small_recipe(tmp_path), ("--set", "data.bad_clips=skip")
    done = finetune("--recipe", recipe, *settings, *skip, processes=2)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert [done.stderr.count(f"skipped {folder / name}") for name in (*refused, *broken)] == [1] * 7
    assert f"{folder}: 6 clips (5 videos, 1 image), 1 in 1x64x96, 5 in 17x64x96" in done.stderr
    assert len(rows(tmp_path / "run")) == 2
    checked = finetune("check", "--recipe", recipe, *settings, *skip, processes=2)
    assert checked.returncode == 0, checked.stderr
