"""What killed runs leave behind in a cache is swept, and what a live process is just writing never."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune.data.cache import Cache

NOBODY = 2**22 + 1  # above Linux's largest process id


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


WRITE_AND_WAIT = """
import sys
from pathlib import Path
from finetune.runtime.files import atomic

with atomic(Path(sys.argv[1]) / "video" / "ab" / "abcd.safetensors") as partial:
    partial.write_bytes(b"half")
    print(partial, flush=True)
    sys.stdin.read()
"""


@contextmanager
def writer(folder: Path, *before: str) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A process that has begun to write an item into a cache, and its partial file."""
    command = [*before, sys.executable, "-c", WRITE_AND_WAIT, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        partial = Path(process.stdout.readline().strip())
        assert partial.is_file()
        yield process, partial
        process.kill()


def make_older(path: Path, hours: float) -> None:
    written = time.time() - 3600 * hours
    os.utime(path, (written, written))


def test_what_a_live_process_writes_is_left_alone_and_what_a_dead_one_left_is_swept(store: Cache) -> None:
    with writer(store.folder) as (process, partial):
        store.sweep()
        assert partial.exists()
        process.kill()
        process.wait()
        store.sweep()
        assert not partial.exists()


def test_a_live_writer_in_another_container_of_the_same_name_is_left_alone(store: Cache) -> None:
    """In a PID namespace of its own, the writer has an id that nobody has here, or that another process has."""
    apart = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("PID namespaces cannot be made here")
    with writer(store.folder, *apart) as (_, partial):
        renamed = partial.with_name(re.sub(r"-\d+~", f"-{NOBODY}~", partial.name))
        partial.rename(renamed)
        store.sweep()
        assert renamed.exists()
        renamed.rename(partial)


def test_a_process_of_another_host_with_our_name_is_not_taken_for_dead(store: Cache) -> None:
    """Its file has the form that older versions gave it, or is of another kernel: all that is known is its age."""
    folder = store.folder / "video" / "ab"
    folder.mkdir(parents=True)
    for table in (socket.gethostname(), "0123456789abcdef"):
        partial = folder / f".partial-{table}-{NOBODY}~abcd.safetensors"
        for hours, is_kept in ((1, True), (25, False)):
            partial.write_bytes(b"half")
            make_older(partial, hours)
            store.sweep()
            assert partial.exists() == is_kept


def test_a_folder_that_a_killed_writer_left_is_swept_after_a_day(store: Cache) -> None:
    folder = store.folder / "video" / ".mode-abcd"
    folder.mkdir(parents=True)
    (folder / "new").touch()
    store.sweep()
    assert folder.exists()
    make_older(folder, 25)
    store.sweep()
    assert not folder.exists()
