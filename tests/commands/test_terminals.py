"""What is seen in a real terminal of 80 or 200 columns, in a pipe, and without colours."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import ROOT

from finetune.commands.parsing import COMMANDS, parser_of

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|4[0-7]|9[0-7]|10[0-7]|38|48)(?:;\d+)*m")
WORK = """
import sys, time
from finetune.runtime.progress import ProgressLine
with ProgressLine("encoding a kind of item", 1200, done=1100) as line:
    for number in range(1101, 1201):
        line.update(number, "and a text behind that says more than there is room for, " * 3)
        time.sleep(0.02)
"""


def in_terminal(program: list[str], columns: int, **variables: str) -> tuple[int, str]:
    """(exit status, all that a program writes) in a terminal of some width. Its name is xterm's."""
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    given = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    environment = {**given, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **variables}
    running = subprocess.Popen(
        [sys.executable, *program], stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True
    )
    os.close(other)
    seen = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # Linux has no end of file here
            break
        if not part:
            break
        seen += part
    os.close(main)
    return running.wait(120), seen.decode()


def drawn(seen: str, label: str) -> list[str]:
    """The pictures of a progress line, one after the other."""
    plain = CONTROL.sub("", seen)
    return [line for line in re.split(r"[\r\n]+", plain) if line.startswith(label)]


@pytest.mark.parametrize("columns", [80, 200])
def test_a_progress_line_fits_the_terminal_and_says_how_long(columns: int) -> None:
    status, seen = in_terminal(["-c", WORK], columns)
    assert status == 0
    lines = drawn(seen, "encoding a kind of item")
    assert len(lines) >= 3
    assert max(map(len, lines)) <= columns
    for line in lines:
        assert re.match(r"encoding a kind of item \d+/1200 \d+%  ETA (\?|\d:\d\d:\d\d)", line), line
    assert all(line.rstrip().endswith("…") for line in lines[1:])  # what is cut says so


def test_the_time_that_remains_is_by_the_last_steps() -> None:
    program = """
import time
from finetune.runtime.progress import ProgressLine
with ProgressLine("step", 1000) as line:
    time.sleep(2)                                   # start-up
    for number in range(1, 5):
        time.sleep(0.02)
        line.update(number, "", others=3600)        # an hour of samples is known to be due
    time.sleep(0.6)
"""
    _, seen = in_terminal(["-c", program], 80)
    (hours, minutes, _) = re.findall(r"ETA (\d):(\d\d):(\d\d)", drawn(seen, "step")[-1])[0]
    assert (hours, minutes) in (("1", "00"), ("1", "01"))  # start-up at the pace of 2 s a step would be 33 minutes more


def test_nothing_is_drawn_with_quiet_or_in_a_pipe() -> None:
    quiet = WORK.replace("import sys", "from finetune.runtime.logging import be_quiet\nbe_quiet()\nimport sys")
    assert in_terminal(["-c", quiet], 80) == (0, "")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    piped = subprocess.run([sys.executable, "-c", WORK], capture_output=True, text=True, env=environment, check=True)
    assert "\x1b[" not in piped.stderr
    assert "\r" not in piped.stderr
    assert "1200/1200 100%  ETA 0:00:00" in piped.stderr.splitlines()[-1]


def test_work_inside_of_other_work_draws_no_second_line() -> None:
    program = """
from finetune.runtime.progress import ProgressLine
with ProgressLine("outer", 2) as outer, ProgressLine("inner", 2) as inner:
    inner.update(1, "")
    outer.update(2, "")
"""
    status, seen = in_terminal(["-c", program], 80)
    assert status == 0
    assert drawn(seen, "outer")
    assert not drawn(seen, "inner")


@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}], ids=["colours", "no colours"])
def test_errors_are_red_where_colours_are_wanted(variables: dict[str, str]) -> None:
    status, seen = in_terminal(["-m", "finetune", "train", "no-such-recipe.toml"], 80, **variables)
    assert status == 2
    assert bool(COLOUR.search(seen)) == (not variables)


def test_the_overview_fits_80_columns() -> None:
    status, seen = in_terminal(["-m", "finetune", "--help"], 80)
    assert status == 0
    assert [line for line in seen.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_80_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    command, parser = parser_of(name)
    examples = [f"  {line}" for line in command.EXAMPLES.splitlines()]  # to be copied as they are
    assert [line for line in parser.format_help().splitlines() if len(line) > 80 and line not in examples] == []


def test_a_training_in_a_terminal_shows_its_steps(family_recipe: Callable[..., Path], tmp_path: Path) -> None:
    settings = ["train.steps=3", "train.micro_batch_size=1", f"output={tmp_path / 'run'}"]
    program = ["-m", "finetune", "train", str(family_recipe("ltx")), "--cpu", *(f"--set={each}" for each in settings)]
    status, seen = in_terminal(program, 80, NO_COLOR="1")
    assert status == 0, seen
    lines = drawn(seen, "step ")
    assert max(map(len, lines)) <= 80
    assert all(re.match(r"step \d/3 \d+%  ETA (\?|\d:\d\d:\d\d)", line) for line in lines), lines
    assert re.match(r"step 3/3 100%  ETA 0:00:00  loss \d", lines[-1])
    assert not COLOUR.search(seen)
