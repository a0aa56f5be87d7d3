"""The command line as a whole: what it is called by, what it refuses, and what it leaves of processes that it starts."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import ROOT, run_python

from finetune.cli import EXAMPLES, main
from finetune.commands.new import TEMPLATES, names, written
from finetune.commands.parsing import COMMANDS, parser_of
from finetune.recipe import load_recipe

SETTINGS = ["--set", "train.steps=2", "--set", "train.micro_batch_size=1"]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["tran"], "did you mean finetune train?"),
        (["mine.toml"], "to train this recipe: finetune train mine.toml"),
        (["check", "--rec", "x.toml"], "--rec"),  # no abbreviations
        (["check"], "RECIPE --recipe is required"),
        (["check", "a.toml", "--recipe", "b.toml"], "not allowed with argument"),
        (["plan", "a.toml", "--quiet", "--verbose"], "not allowed with argument"),
        (["new", "ltx_lor", "x.toml"], "did you mean ltx_lora"),
        (["new", "ltx_lora"], "name a template and the file to write"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_cure(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint in refused(arguments, capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_has_its_help(name: str) -> None:
    _, parser = parser_of(name)
    for action in parser._actions:
        assert action.help, action.dest
    assert parser.format_help()


def words_of(example: str) -> list[str]:
    """What the program is given by an example: without what is said of it, and where its output goes."""
    words = shlex.split(example.split("   ")[0].split(" > ")[0])
    is_torchrun = words[0] == "torchrun"
    given = words[words.index("finetune") + 1 :]
    return ["train", *given] if is_torchrun and given[0].startswith("-") else given


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_examples_that_it_takes(name: str) -> None:
    command, parser = parser_of(name)
    examples = command.EXAMPLES.splitlines()
    assert examples
    for example in examples:
        own, *arguments = words_of(example)
        assert own == name
        parser.parse_args(arguments)
    shown = parser.format_help()
    assert "Examples:\n" in shown
    assert all(example in shown for example in examples)


def test_the_overviews_examples_are_taken() -> None:
    for example in EXAMPLES.splitlines():
        name, *arguments = words_of(example)
        parser_of(name)[1].parse_args(arguments)


def test_the_overview_names_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("compare", "gpus-per-node", "resume-step"))
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


@pytest.mark.parametrize("name", names())
def test_a_new_recipe_is_its_template_with_other_clips(name: str, tmp_path: Path) -> None:
    template, file = TEMPLATES / f"{name}.toml", tmp_path / "mine.toml"
    text = written(template, file, "my clips", None, "base")
    file.write_text(text, encoding="utf-8")
    recipe, its_own = load_recipe(file), load_recipe(template)
    assert (recipe.data.path, recipe.model.path, recipe.output) == (Path("my clips"), "base", Path("runs/mine"))
    kept = {"output": its_own.output, "data": its_own.data, "model": its_own.model}
    assert recipe.model_copy(update=kept) == its_own
    comments = [line.partition("#")[2] for line in template.read_text().splitlines()[1:] if "#" in line]
    assert [line.partition("#")[2] for line in text.splitlines()[1:] if "#" in line] == comments
    schema = text.splitlines()[0].removeprefix("#:schema ")
    assert (tmp_path / schema).is_file()


def test_a_reader_that_has_enough_is_no_error() -> None:
    program = [sys.executable, "-m", "finetune", "new", "--list"]
    listing = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert listing.stdout
    assert listing.stderr
    listing.stdout.close()
    assert listing.stderr.read() == b""
    assert listing.wait(60) == 128 + signal.SIGPIPE


def test_processes_that_are_started_train_end_and_say_their_errors_once(
    family_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = family_recipe("ltx")
    train = [sys.executable, "-m", "finetune", "train", str(recipe), "--gpus", "2", "--cpu", "--quiet", *SETTINGS]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}"}

    def run(*further: str) -> subprocess.CompletedProcess[str]:
        output = ["--set", f"output={tmp_path / 'run'}"]
        return subprocess.run([*train, *output, *further], capture_output=True, text=True, env=environment, check=False)

    trained = run()
    assert trained.returncode == 0, trained.stderr
    assert [line for line in trained.stderr.splitlines() if line] == [
        f"done. The LoRA, verified by loading it back, lies in {tmp_path / 'run' / 'lora'}"
    ]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "2 processes" in log
    assert "step 2/2 100%" in log
    other = run("--set", "lora.rank=7")
    assert other.returncode == 2
    assert other.stderr.count("holds a run of another recipe") == 1
    assert len(other.stderr.splitlines()) == 2


@pytest.mark.full
def test_a_signal_to_the_command_saves_a_checkpoint(family_recipe: Callable[..., Path], tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = ["--set", "train.steps=100000", "--set", f"output={output}", "--set", "train.micro_batch_size=1"]
    train = [sys.executable, "-m", "finetune", "train", str(family_recipe("ltx")), "--gpus", "2", "--cpu", *settings]
    running = subprocess.Popen(train, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": f"{ROOT}"})
    while not (output / "metrics.jsonl").is_file():
        assert running.poll() is None
        time.sleep(0.2)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=120)
    assert "stopped by SIGTERM; the same command goes on from step" in said
    assert running.returncode == 128 + signal.SIGTERM
    assert list((output / "checkpoints").glob("step_*"))


def test_a_check_without_weights_needs_none(family_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = family_recipe("ltx")
    model = tmp_path / "model"
    shutil.copytree(load_recipe(recipe).model.path, model)
    for weights in model.glob("transformer/*.safetensors"):
        weights.unlink()
    check = ["-m", "finetune", "check", str(recipe), "--set", f"model.path={model}"]
    without = run_python(check)
    assert without.returncode == 2
    assert "no safetensors weights" in without.stderr
    passed = run_python([*check, "--no-weights"])
    assert passed.returncode == 0, passed.stderr
    assert "weights were not looked at" in passed.stderr
