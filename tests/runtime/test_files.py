"""Files are whole or absent, a folder belongs to one run, and a full disk is said."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.runtime.errors import UserError
from finetune.runtime.files import FolderLock, atomic, disk_error, move_folder, writing


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic(path) as partial:
        partial.write_text("half")
        1 / 0  # noqa: B018
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


LOCK = "import sys; from pathlib import Path; from finetune.runtime.files import FolderLock; lock = FolderLock(Path(sys.argv[1]))"


def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    program = f"{LOCK}; print('locked', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=rf"another run is using this folder \(process {holder.pid} on"):
            FolderLock(tmp_path)
        holder.kill()
    FolderLock(tmp_path)


def test_a_process_that_holds_a_folder_refuses_others(tmp_path: Path) -> None:
    other = [sys.executable, "-c", LOCK, str(tmp_path)]
    held = FolderLock(tmp_path)
    refused = subprocess.run(other, capture_output=True, text=True, timeout=60, check=False)
    assert f"another run is using this folder (process {os.getpid()} on" in refused.stderr
    del held
    assert subprocess.run(other, capture_output=True, timeout=60, check=False).returncode == 0


def flock_fails_with(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that cannot be made here."""

    def flock(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_lock_that_is_refused_means_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    (tmp_path / ".lock").write_text("7 on node3")
    flock_fails_with(number, monkeypatch)
    with pytest.raises(UserError, match=r"another run is using this folder \(process 7 on node3\)"):
        FolderLock(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_about_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    flock_fails_with(number, monkeypatch)
    FolderLock(tmp_path)
    assert f"on a file system without locks ({os.strerror(number)})" in capsys.readouterr().err
    assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()} on ")


def test_a_lock_that_fails_for_another_reason_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock_fails_with(errno.EIO, monkeypatch)
    with pytest.raises(UserError, match=r"cannot be locked \(\[Errno 5\] Input/output error\)"):
        FolderLock(tmp_path)


def test_a_device_that_is_full_says_so() -> None:
    with pytest.raises(UserError, match="the disk is full"), writing(Path("/dev/full")), open("/dev/full", "w") as full:
        full.write("x")
        full.flush()


def test_other_errors_are_not_taken_for_the_disk() -> None:
    assert disk_error(ValueError("no such key"), Path("a")) is None


@pytest.mark.parametrize(
    "number, what",
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "your quota of this disk is used up"),
        (errno.EROFS, "is on a file system that is read-only"),
        (errno.EFBIG, "has more bytes than a file may have here"),
    ],
)
def test_causes_are_told_apart_by_number_and_in_the_words_of_libraries(tmp_path: Path, number: int, what: str) -> None:
    words = os.strerror(number)
    for error in (
        OSError(number, words),
        RuntimeError(f"[Errno {number}] {words}: 'a'"),
        RuntimeError(f"I/O error: {words} (os error {number})"),
    ):
        found = disk_error(error, tmp_path / "not" / "there")
        assert found is not None
        assert found.problems[0].what == what


def test_a_file_may_have_the_longest_name_of_the_file_system(tmp_path: Path) -> None:
    path = tmp_path / f"{'ö' * 125}.png"  # 254 of 255 bytes
    with atomic(path) as partial:
        partial.write_text("all")
        assert partial.suffix == ".png"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_moved_whole_to_another_disk(tmp_path: Path, another_disk: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("all")
    with pytest.raises(OSError, match="Invalid cross-device link"):
        (tmp_path / "a").rename(another_disk / "a")
    move_folder(tmp_path / "a", another_disk / "a")
    assert (another_disk / "a" / "b" / "c").read_text() == "all"
    assert list(another_disk.iterdir()) == [another_disk / "a"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_moved_stays(tmp_path: Path, another_disk: Path) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "pipe")
    with pytest.raises(OSError, match="named pipe"):
        move_folder(tmp_path / "a", another_disk / "a")
    assert (tmp_path / "a" / "pipe").exists()
    assert list(another_disk.iterdir()) == []
