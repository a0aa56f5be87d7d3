"""The checks that are made in the first minutes with a GPU, on a CPU: by the command line, in real processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

from benchmarks.gpu.first.run import CHECKS
from benchmarks.gpu.measure import beside
from finetune.runtime.device import PeakMemory
from finetune.runtime.units import GIB

BROKEN = """
import os

def raises(bench):
    bench.notes.append("so far so good")
    return {}["what is not there"]

def dies(bench):
    print("last words", flush=True)
    os.abort()

def passes(bench):
    return f"on {bench.device.name}"
"""


def first(*arguments: object, seconds: float = 120, path: Path = ROOT) -> subprocess.CompletedProcess:
    """Run `python -m benchmarks.gpu --first` where no GPU is seen; modules in `path` are found."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}{os.pathsep}{path}"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--first", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )


def rows(table: str) -> dict[str, list[str]]:
    """Name of a check -> the cells of its row."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {cells[0]: [cell.strip(" |") for cell in cells] for cells in lines[1:]}


@pytest.mark.full
@pytest.mark.timeout(900)
def test_every_check_has_a_row_and_none_fails(tmp_path: Path) -> None:
    done = first("--smoke", "--seconds", 840, "--out", tmp_path / "first.md", seconds=880)
    assert done.returncode == 0, done.stderr + done.stdout
    found = rows(done.stdout)
    assert list(found) == [check.name for check in CHECKS]
    assert {name: cells[2] for name, cells in found.items()} == {
        check.name: "skipped" if check.name == "syncs" else "passed" for check in CHECKS
    }
    assert [cells[5] for cells in found.values()] == [check.unseen for check in CHECKS]
    assert (tmp_path / "first.md").read_text() == done.stdout


def test_a_broken_check_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    names = ["broken:raises", "broken:dies", "broken:passes"]
    done = first("--smoke", "--only", "copies", *names, path=tmp_path)
    assert done.returncode == 1
    found = rows(done.stdout)
    assert {name: cells[2] for name, cells in found.items()} == {
        "copies": "passed",
        "broken:raises": "failed",
        "broken:dies": "failed",
        "broken:passes": "passed",
    }
    assert found["broken:raises"][4] == "KeyError: 'what is not there'"
    assert re.search(r'line \d+, in raises\n +return {}\["what is not there"\]', done.stdout)
    assert "- so far so good" in done.stdout
    assert found["broken:dies"][4] == "its process ended with status -6"
    assert "\nlast words\n" in done.stdout
    assert found["broken:passes"][4] == "on CPU"


def test_checks_past_the_time_are_listed_as_not_run() -> None:
    done = first("--smoke", "--seconds", 0)
    assert done.returncode == 0
    assert {name: cells[2] for name, cells in rows(done.stdout).items()} == {check.name: "not run" for check in CHECKS}


def test_without_a_gpu_it_refuses() -> None:
    done = first()
    assert done.returncode == 2
    assert "there is no GPU here" in done.stderr
    assert "--smoke runs on a CPU" in done.stderr


def test_an_unknown_check_is_refused_with_the_names_that_there_are() -> None:
    done = first("--smoke", "--only", "savres")
    assert done.returncode == 1
    assert "there is no check 'savres'; checks are: attention, compile, copies" in done.stderr


def test_planned_memory_stands_beside_measured_with_its_error() -> None:
    measured, plan = PeakMemory(8 * GIB, 10 * GIB), PeakMemory(int(8.4 * GIB), 9 * GIB)
    assert beside(measured, plan) == ["8.00", "8.40", "+5.0%", "10.00", "9.00", "-10.0%"]
    assert beside(measured, None) == ["8.00", "", "", "10.00", "", ""]
