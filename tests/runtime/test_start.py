"""Variables that describe a process group, without a program that has started one."""

from pathlib import Path

import pytest
from every_family import few


@pytest.mark.parametrize(
    "left", few([{"RANK": "0"}, {"WORLD_SIZE": "2"}, {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}])
)
def test_a_process_that_nobody_has_started_with_peers_is_alone(
    finetune, recipe_file: Path, left: dict[str, str]
) -> None:
    """Shells and schedulers leave some of torchrun's variables."""
    result = finetune("prepare", "--recipe", recipe_file, env=left)
    assert result.returncode == 0, result.stderr
    assert "12 clips to train on" in result.stderr
    result = finetune("--recipe", recipe_file, "--set", "train.steps=1", env=left)
    assert result.returncode == 0, result.stderr
    assert "1 process on 1 host" in result.stderr
