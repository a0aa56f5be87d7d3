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


def test_a_rank_without_a_meeting_place_is_told_what_to_do(finetune, recipe_file: Path) -> None:
    ended = finetune("check", "--recipe", recipe_file, env={"RANK": "0", "WORLD_SIZE": "2"})
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "MASTER_ADDR and MASTER_PORT not" in ended.stderr
    assert "start it with torchrun, or unset RANK and WORLD_SIZE" in ended.stderr
