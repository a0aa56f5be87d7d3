"""Bash scripts are read for what they would start; bash itself says what that is."""

import subprocess
from pathlib import Path

import pytest

from finetune.importers.shell import read_script

SCRIPTS = {
    "continued lines and comments": "show --a 1 \\\n  --b 'two words' \\\n  --c \"$HOME_OF\" # --d\nshow --e",
    "variables": 'A=1\nexport B="x y"\nshow $A "$B" $B ${A}2 "${MISSING:-d}" \'$A\' \\$A',
    "arrays": 'M=(--a 1 # one\n  --b "x y"\n  # --c\n)\nM+=(--d)\nshow "${M[@]}" "${M[*]}" ${M[1]} ${M[@]}',
    "a command in a variable": 'X="--a 1 \\\n --b"\ncmd="show $X --t \\"two words\\""\neval $cmd\neval "$cmd"\nshow $X',
    "branches": 'B="ptd"\nif [ "$B" == "other" ]; then\n  show 1\nelif [ "$B" = ptd ]; then\n  show 2\nelse\n  show 3\nfi\n'
    'if [[ -z "$B" ]]; then show 4; else show 5; fi\n[ "$B" != ptd ] || show 6',
    "nested branches": "A=1\nif [ $A -eq 1 ]; then if [ $A -eq 2 ]; then show 1; else show 2; fi; show 3; fi",
    "quotes within words": "show --a='x y' --b=\"z\"w a'b'\"c\"",
    "redirections and pipes": "show --a > /dev/null; show --b 2>&1 | cat; show --c >> /dev/null",
    "here-documents": "cat > /dev/null <<'EOF'\nshow no\nEOF\nshow yes",
    "shells in shells": "bash -c 'show --a \"1 2\"'",
}
_SHOW = 'show() { printf "<%s>" "$@" >> "$SHOWN"; echo >> "$SHOWN"; }; export -f show\n'


@pytest.mark.parametrize("name", SCRIPTS)
def test_words_are_those_of_bash(name: str, tmp_path: Path) -> None:
    script = SCRIPTS[name]
    shown = tmp_path / "shown"
    shown.touch()
    environment = {"PATH": "/usr/bin:/bin", "SHOWN": str(shown), "HOME_OF": "h"}
    subprocess.run(["bash", "-c", _SHOW + script], env=environment, cwd=tmp_path, capture_output=True, timeout=20)
    ours = [
        "".join(f"<{word}>" for word in words[1:])
        for words in read_script("HOME_OF=h\n" + script).commands
        if words[0] == "show"
    ]
    assert ours == shown.read_text().splitlines()
    assert ours


def test_nothing_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    script = f"touch {mark}\nX=$(touch {mark})\nY=`touch {mark}`\neval touch {mark}\ntrain $X $Y $(touch {mark})"
    read = read_script(script)
    assert not mark.exists()
    written = " ".join(read.commands[-1])
    assert written == f"train $(touch {mark}) `touch {mark}` $(touch {mark})"
    assert f"$(touch {mark})" in read.open


def test_of_a_loop_the_first_round_is_taken_and_the_others_are_named() -> None:
    read = read_script(
        'RATES=("1e-4" "1e-3")\nfor rate in "${RATES[@]}"; do\n  train --lr $rate --out "r_${rate}"\ndone'
    )
    assert read.commands == [["train", "--lr", "1e-4", "--out", "r_1e-4"]]
    assert read.loops == {"rate": ["1e-4", "1e-3"]}


def test_a_variable_that_the_script_does_not_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the import is not that of the training."""
    monkeypatch.setenv("DATA", "/of/this/machine")
    read = read_script("train --data $DATA/clips --again ${DATA}")
    assert read.commands == [["train", "--data", "$DATA/clips", "--again", "${DATA}"]]
    assert read.open == ["$DATA", "${DATA}"]


@pytest.mark.parametrize(
    "script",
    [
        "",
        "'",
        '"',
        "A=(",
        "A=(1",
        "$(",
        "${",
        "`",
        "if",
        "fi",
        "else",
        "for x in",
        "<<EOF",
        "a \\",
        "((",
        "eval eval eval",
    ],
)
def test_broken_scripts_are_read_as_far_as_they_go(script: str) -> None:
    assert read_script(script + "\n") is not None
    assert read_script(script) is not None
