"""What is wrong with a file is remembered; that the system could not read it for a moment is not."""

import errno
import io
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from finetune.data.cache import Cache
from finetune.data.images.opening import read_rgb
from finetune.preparation.facts import Use, facts_of, read_facts
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import Unreadable, UserError


@contextmanager
def no_further_file() -> Iterator[None]:
    """Inside the block, this process can open no file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = os.open("/dev/null", os.O_RDONLY)  # the lowest number that is free
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + 1, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(held)


@pytest.fixture
def files(clips: Path, tmp_path: Path) -> dict[Use, Path]:
    video = Path(shutil.copy(sorted(clips.glob("*.mp4"))[0], tmp_path / "a.mp4"))
    Image.new("RGB", (96, 64), "red").save(tmp_path / "a.png")
    return {"video": video, "image": tmp_path / "a.png"}


@pytest.mark.parametrize("use", ["video", "image"])
def test_a_file_that_could_not_be_opened_is_looked_at_again(files: dict[Use, Path], use: Use, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    cache.file_hash(files[use])
    with no_further_file():
        found = facts_of(files[use], use, cache)
    assert isinstance(found, Unreadable)
    assert "Too many open files" in str(found)
    assert "height" in facts_of(files[use], use, cache)


@pytest.mark.parametrize("use", ["video", "image"])
def test_a_file_that_is_damaged_is_read_once(files: dict[Use, Path], use: Use, tmp_path: Path) -> None:
    path, cache = files[use], Cache(tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:-100])
    found = facts_of(path, use, cache)
    assert isinstance(found, UserError)
    with no_further_file():
        assert str(facts_of(path, use, cache)) == str(found)


class Failing(io.BytesIO):
    """A file that cannot be read after its first bytes."""

    def __init__(self, data: bytes, error: BaseException) -> None:
        super().__init__(data)
        self.error = error

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > 64:
            raise self.error
        return super().read(size)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_an_image_on_a_broken_disk_is_not_called_damaged(files: dict[Use, Path], error: BaseException) -> None:
    with pytest.raises(Unreadable, match=r"Input/output error|no memory"):
        read_rgb(Failing(files["image"].read_bytes(), error), "a.png", "white")


def test_reading_files_that_takes_long_says_how_far_it_is(
    clips: Path,
    tmp_path: Path,
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uses: dict[Path, Use] = dict.fromkeys(clips.glob("*.mp4"), "video")
    monkeypatch.setattr("finetune.preparation.facts.PATIENCE", 1e-9)
    monkeypatch.setattr("finetune.runtime.progress._SECONDS_BETWEEN_LINES", 0)
    read_facts(uses, Cache(tmp_path / "cache"), runtime)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reading files ")]
    assert lines[-1] == f"reading files {len(uses)}/{len(uses)} 100%  ETA 0:00:00"
    assert len(lines) > 1
