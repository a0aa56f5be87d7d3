"""No test leaves a training behind; and a disk that is small."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from trainings import RUNS


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    yield
    for run in RUNS:
        if run.process.poll() is None:
            run.kill_all()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a file system of a given size, or with further options behind it, such as "2m,nr_inodes=20"; needs root."""
    mounted = []

    def mount(size: str) -> Path:
        folder = tmp_path / f"disk_{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "finetune-test", str(folder)]
        try:
            subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a small disk cannot be mounted here: {getattr(error, 'stderr', '') or error}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], timeout=30, check=True)
