"""What is printed is what was said."""

import json
from pathlib import Path

import pytest

from finetune.runtime.errors import LostPeer
from finetune.runtime.logging import print_error, say


@pytest.mark.parametrize("text", ["runs/a:fire:b", "[bold]no markup[/bold]", "a" * 300])
def test_a_line_is_printed_as_it_is(capsys: pytest.CaptureFixture[str], text: str) -> None:
    say(text)
    assert capsys.readouterr().err == f"{text}\n"


@pytest.mark.parametrize(
    "rank, local_rank, is_main_lost, speaks",
    [
        (0, 0, False, True),
        (1, 1, False, False),
        (8, 0, False, True),  # the first of another node
        (1, 1, True, True),  # rank 0 cannot
        (2, 2, True, False),
        (1, 0, True, True),  # a node has one
        (8, 0, True, True),
    ],
)
def test_one_process_of_a_node_prints_an_error_and_all_leave_it_for_torchrun(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    rank: int,
    local_rank: int,
    is_main_lost: bool,
    speaks: bool,
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr("finetune.runtime.logging._LET_THE_OTHER_SPEAK", 0)
    error = LostPeer("rank 0 answers no more", is_main_lost=is_main_lost)
    print_error(error)
    assert ("error: rank 0 answers no more" in capsys.readouterr().err) == speaks
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == str(error)
