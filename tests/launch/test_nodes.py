"""What launch/nodes.sh refuses, before any process is started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT


def nodes(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    known = {name: value for name, value in os.environ.items() if name not in ("HEAD", "NODES", "GPUS", "PORT")}
    command = [str(ROOT / "launch" / "nodes.sh"), *arguments]
    environment = {**known, "GPUS": "2", "PYTHON": sys.executable, **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"NODES": "0"}, "NODES=0 is no number of machines"),
        ({"GPUS": "two"}, "GPUS=two is no number of processes"),
        ({"GPUS": "gpu", "CUDA_VISIBLE_DEVICES": ""}, "there is no GPU here, and the number of processes is not given"),
        ({"PORT": "http"}, "PORT=http is no port"),
        ({"NODES": "2"}, "NODES=2 machines, and no HEAD where they meet"),
        ({"NODES": "2", "HEAD": "nowhere.invalid"}, "HEAD=nowhere.invalid cannot be found"),
        ({"PYTHON": "/no/python"}, "there is no /no/python"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_started_is_refused_with_a_cure(tmp_path: Path, variables: dict[str, str], said: str) -> None:
    (tmp_path / "mine.toml").touch()
    done = nodes(tmp_path, "mine.toml", **variables)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}")
    assert "\n    -> " in done.stderr


def test_a_recipe_that_is_not_there_is_refused_on_each_machine(tmp_path: Path) -> None:
    done = nodes(tmp_path, "mine.toml")
    assert done.returncode == 2
    assert done.stderr.startswith("error: mine.toml: no such recipe\n    -> ")
    for asked in ([], ["--help"]):
        assert "HEAD=gpu01 NODES=2 GPUS=8 launch/nodes.sh mine.toml" in nodes(tmp_path, *asked).stdout
