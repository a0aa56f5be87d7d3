"""Files are whole or absent, a folder belongs to one run, and a full disk is said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.runtime.errors import UserError
from finetune.runtime.files import FolderLock, atomic, disk_error, writing


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic(path) as partial:
        partial.write_text("half")
        1 / 0  # noqa: B018
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    lock = "import sys; from pathlib import Path; from finetune.runtime.files import FolderLock; FolderLock(Path(sys.argv[1]))"
    other = [sys.executable, "-c", lock, str(tmp_path)]
    held = FolderLock(tmp_path)
    refused = subprocess.run(other, capture_output=True, text=True, timeout=60, check=False)
    assert f"another run is using this folder (process {os.getpid()} on" in refused.stderr
    del held
    assert subprocess.run(other, capture_output=True, timeout=60, check=False).returncode == 0


def test_a_device_that_is_full_says_so() -> None:
    with pytest.raises(UserError, match="the disk is full"), writing(Path("/dev/full")), open("/dev/full", "w") as full:
        full.write("x")
        full.flush()


def test_other_errors_are_not_taken_for_the_disk() -> None:
    assert disk_error(ValueError("no such key"), Path("a")) is None
