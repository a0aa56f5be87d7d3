"""Names and captions may hold anything; what is printed of them is text."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

from finetune.runtime.errors import Problem, UserError
from finetune.runtime.logging import ALL_PROBLEMS, print_error, say, tell

ODD = {
    "a\x1b[2Jb.mp4": "a\\x1b[2Jb.mp4",  # clears the screen
    "bell\x07": "bell\\x07",
    "back\rto the start": "back\\x0dto the start",
    "\x9b31m": "\\x9b31m",  # the 8-bit form of an escape code
    "txt.\u202e4pm": "txt.\\u202e4pm",  # is shown from right to left
    "caf\udce9.mp4": "caf\\xe9.mp4",  # Latin-1 in a name, as Python reads it
    "\ud83d": "\\ud83d",
    "naïve 猫 🐈": "naïve 猫 🐈",
}


@pytest.mark.parametrize("name, shown", ODD.items())
def test_control_characters_are_spelled_out(capsys: pytest.CaptureFixture[str], name: str, shown: str) -> None:
    say(name)
    print_error(UserError("wrong", "cure it", name))
    tell(name)
    told = capsys.readouterr()
    assert told.err == f"{shown}\nerror: {shown}: wrong\n    -> cure it\n"
    assert told.out == f"{shown}\n"


def test_a_line_feed_in_a_name_begins_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(UserError.of([Problem("wrong", "a\nerror: b", "cure it"), Problem("wrong", "c")], "2 of\x1bthem"))
    assert capsys.readouterr().err == "error: 2 of\\x1bthem\na\\nerror: b: wrong\n    -> cure it\nc: wrong\n"


def test_of_very_many_problems_the_first_are_printed_and_all_are_kept() -> None:
    kinds = ["".join(letters) for letters in itertools.product("abcdefghij", repeat=3)]
    error = UserError.of([Problem(kind, f"clip {kind}") for kind in kinds], "1000 clips cannot be used:")
    lines = str(error).splitlines()
    assert (lines[0], lines[1], lines[50]) == ("1000 clips cannot be used:", "clip aaa: aaa", "clip aej: aej")
    assert lines[51:] == ["and 950 more"]
    assert len(error.problems) == 1000


def test_many_of_one_kind_are_counted_in_one_entry_and_all_are_written_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers and paths do not make it another kind; the page of `check` and the file have each."""
    monkeypatch.chdir(tmp_path)
    short = [Problem(f"{n} frames, and 17 are needed", f"/clips/{n:02d}.mp4", "remove it") for n in range(1, 13)]
    empty = [Problem("is empty", f"rows.csv, line {n}", "fill it in") for n in range(1, 10)]
    print_error(UserError.of([*short, Problem("is a folder", "x"), *empty], "22 clips cannot be used:"))
    clips = ", ".join(f"{n:02d}.mp4" for n in range(1, 9))
    rows = ", ".join(f"rows.csv, line {n}" for n in range(1, 9))
    assert capsys.readouterr().err.splitlines() == [
        "error: 22 clips cannot be used:",
        f"12 times: the first: 1 frames, and 17 are needed (in /clips: {clips} and 4 more)",
        "    -> remove it",
        "x: is a folder",
        f"9 times: is empty ({rows} and 1 more)",
        "    -> fill it in",
        f"all 22, one by one: {tmp_path / ALL_PROBLEMS}",
    ]
    written = (tmp_path / ALL_PROBLEMS).read_text()
    assert written == "".join(f"{problem}\n" for problem in (*short, Problem("is a folder", "x"), *empty))
    (tmp_path / ALL_PROBLEMS).unlink()
    (tmp_path / ALL_PROBLEMS).mkdir()  # it cannot be written
    print_error(UserError.of(short))
    assert "all 12, one by one, could not be written" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("encoding, shown", [("utf-8:strict", "é 猫"), ("ascii:strict", "\\xe9 \\u732b")])
def test_a_stream_that_takes_ascii_alone_gets_it(encoding: str, shown: str) -> None:
    code = "from finetune.runtime.logging import say; say('\\udce9 \\ud800 \\x1b é 猫')"
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60, check=True)
    assert done.stderr.decode(encoding.split(":")[0]) == f"\\xe9 \\ud800 \\x1b {shown}\n"
