"""Names and captions may hold anything; what is printed of them is text."""

import os
import subprocess
import sys

import pytest
from processes import ROOT

from finetune.runtime.errors import Problem, UserError
from finetune.runtime.logging import print_error, say

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
    assert capsys.readouterr().err == f"{shown}\nerror: {shown}: wrong\n    -> cure it\n"


def test_a_line_feed_in_a_name_begins_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(UserError.of([Problem("wrong", "a\nerror: b", "cure it"), Problem("wrong", "c")], "2 of\x1bthem"))
    assert capsys.readouterr().err == "error: 2 of\\x1bthem\na\\nerror: b: wrong\n    -> cure it\nc: wrong\n"


def test_of_very_many_problems_the_first_are_printed_and_all_are_kept() -> None:
    error = UserError.of([Problem("wrong", f"clip {number}") for number in range(1000)], "1000 clips cannot be used:")
    lines = str(error).splitlines()
    assert (lines[0], lines[1], lines[50]) == ("1000 clips cannot be used:", "clip 0: wrong", "clip 49: wrong")
    assert lines[51:] == ["and 950 more"]
    assert len(error.problems) == 1000


@pytest.mark.parametrize("encoding, shown", [("utf-8:strict", "é 猫"), ("ascii:strict", "\\xe9 \\u732b")])
def test_a_stream_that_takes_ascii_alone_gets_it(encoding: str, shown: str) -> None:
    code = "from finetune.runtime.logging import say; say('\\udce9 \\ud800 \\x1b é 猫')"
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60, check=True)
    assert done.stderr.decode(encoding.split(":")[0]) == f"\\xe9 \\ud800 \\x1b {shown}\n"
