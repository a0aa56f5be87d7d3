"""`finetune import` as a user runs it: a new file or standard output, and one line for each thing that is wrong."""

import io
import sys
from pathlib import Path

import pytest
from test_import_finetrainers import FIRST

from finetune.cli import main
from finetune.recipe import load_recipe


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "train.sh").write_text(FIRST)
    return tmp_path / "train.sh"


def test_the_recipe_goes_into_a_new_file_and_the_lines_are_printed(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.toml"
    assert main(["import", str(script), "--out", str(out)]) == 0
    assert load_recipe(out).lora.rank == 32
    printed = capsys.readouterr()
    assert "kept     --rank 32 -> lora.rank = 32" in printed.out
    assert f"{out} is written. Next: python -m finetune check --recipe {out} --gpus 2" in printed.out
    before = out.read_bytes()
    assert main(["import", str(script), "--out", str(out)]) == 2
    assert f"{out}: the file is there already" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_without_a_file_the_recipe_alone_is_on_standard_output(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", str(script), "--gpus", "4"]) == 0
    printed = capsys.readouterr()
    (tmp_path / "piped.toml").write_text(printed.out)
    assert load_recipe(tmp_path / "piped.toml").train.global_batch_size == 24
    assert "renamed  --train_steps 900 -> train.steps = 900" in printed.err


def test_a_command_on_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(FIRST.encode())))
    assert main(["import", "-"]) == 0
    assert 'family = "ltx"' in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, content, what",
    [
        ("gone.sh", None, "no such file"),
        ("empty.sh", b" \n", "the file is empty"),
        ("binary.sh", b"\x00\x01\x02", "it is no text"),
        ("latin.sh", "train --a \xe9".encode("latin-1"), "not UTF-8 text"),
        ("other.sh", b"python serve.py --port 8000\n", "no trainer is known that has such settings"),
        ("list.json", b"[1, 2]", "no trainer is known that has such settings"),
        ("broken.json", b"{", "not valid JSON"),
        ("deep.json", b"[" * 100_000, "not valid JSON"),
        ("broken.toml", b"a = ", "not valid TOML"),
        ("broken.yaml", b"a: [", "not valid YAML"),
        ("number.yaml", b"3", "no trainer is known that has such settings"),
    ],
)
def test_files_of_nothing(
    name: str, content: bytes | None, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert main(["import", str(path)]) == 2
    printed = capsys.readouterr().err
    assert what in printed
    assert str(path) in printed
    assert "->" in printed


@pytest.mark.parametrize(
    "old, new, key",
    [
        ("--lr 3e-5", "--lr -1", "--lr -1: optimizer.lr = -1"),
        ("--rank 32", "--rank 0", "--rank 0: lora.rank = 0"),
        ("--caption_dropout_p 0.1", "--caption_dropout_p 3", "--caption_dropout_p 3: data.caption_dropout = 3"),
        ("--train_steps 900", "--train_steps nan", "--train_steps"),
    ],
)
def test_values_that_no_recipe_can_have_name_the_setting(
    old: str, new: str, key: str, script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script.write_text(FIRST.replace(old, new))
    assert main(["import", str(script)]) == 2
    assert key in capsys.readouterr().err


def test_a_folder_that_is_not_there(script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(script), "--out", str(tmp_path / "no" / "mine.toml")]) == 2
    assert "cannot be written (No such file or directory)" in capsys.readouterr().err
