"""Full disks, read-only folders and odd file systems: one clear error or warning, nothing lost, and the same command goes on.

Real processes. Where no disk can be mounted, a limit on the size of files (setrlimit) stands in for a full one: it stops a write
anywhere, in Python or not, and can be lifted while the process runs.
"""

import os
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from every_family import few
from processes import ROOT, command, run_python
from trainings import Run, assert_equal_ends, checkpoints, descendants, resumed_after, rows, steps_done

import finetune as finetune_package

PACKAGE = Path(finetune_package.__file__).parent
STEPS, SOON = 12, 20.0  # seconds
SETTINGS = (f"train.steps={STEPS}", "checkpoint.every=2", "checkpoint.keep_last=all")
PROMPT = ("--prompt", "a ball", "--shape", "17x64x96", "--steps", "2")
LIMIT = "has more bytes than a file may have here"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_ltx: Path, clips: Path, cache: Path) -> Path:
    path = tmp_path_factory.mktemp("disks") / "recipe.toml"
    path.write_text(
        f"""
output = "{path.with_name("straight")}"
[model]
family = "ltx"
path = "{tiny_ltx}"
[data]
path = "{clips}"
buckets = ["17x64x96"]
cache = "{cache}"
workers = 1
[train]
steps = {STEPS}
global_batch_size = 4
precision = "float32"
[lora]
rank = 4
alpha = 8
[optimizer]
lr = 1e-2
"""
    )
    return path


@pytest.fixture(scope="module")
def straight(recipe: Path) -> Run:
    """The run that has all the room it needs, in two processes."""
    run = Run(recipe, recipe.with_name("straight"), 2, SETTINGS)
    assert run.wait() == 0, run.said
    return run


def run_command(*arguments: object, starter: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    if not starter:
        return run_python(["-m", "finetune", *arguments])
    program = [*starter, *command(arguments, 0)]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def told(said: str) -> str:
    """The one error of a command, which is no traceback of ours."""
    assert f'File "{PACKAGE}{os.sep}' not in said, said
    assert said.count("error: ") == 1, said
    return re.split(r"\n[A-Z]\d{4} ", said.partition("error: ")[2])[0]


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def limit(process: int, size: int) -> None:
    """Let no process of a family write a file past a size, in bytes; -1 lifts it again."""
    for pid in [process, *descendants(process)]:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


# Commands that find no room


def at_most(kibibytes: int) -> list[str]:
    """Starts a program that may write no larger files."""
    return ["bash", "-c", f'ulimit -S -f {kibibytes}; exec "$@"', "bash"]


@pytest.mark.parametrize(
    "arguments, named, kibibytes",
    [
        pytest.param(["demo"], "model", 16, marks=pytest.mark.full),
        pytest.param(["sample", "--recipe", "RECIPE", *PROMPT], "00_seed0_base.mp4", 2, marks=pytest.mark.full),
        (["export", "--recipe", "RECIPE"], "", 16),
    ],
    ids=["demo", "sample", "export"],
)
def test_a_command_names_what_it_cannot_write_leaves_no_half_of_it_and_makes_it_with_room(
    recipe: Path, straight: Run, tmp_path: Path, arguments: list[str], named: str, kibibytes: int
) -> None:
    given = [str(recipe) if part == "RECIPE" else part for part in arguments]
    out = tmp_path / "out"
    failed = run_command(*given, "--out", out, starter=at_most(kibibytes))
    assert failed.returncode == 2, failed.stderr
    assert told(failed.stderr).startswith(f"{out / named}: {LIMIT}\n    -> name a folder on another file system")
    assert files_of(out) == []
    again = run_command(*given, "--out", out)
    assert again.returncode == 0, again.stderr
    assert files_of(out)
    assert not [path for path in out.rglob("*") if "partial" in path.name]


@pytest.mark.full
def test_a_plan_that_cannot_be_written_leaves_the_one_that_is_there(recipe: Path, tmp_path: Path) -> None:
    written = tmp_path / "fits.toml"
    written.write_text("old")
    arguments = ("plan", "--recipe", recipe, "--fit", "--gpu", "A100", "--write", written)
    failed = run_command(*arguments, starter=at_most(1))
    assert failed.returncode == 2, failed.stderr
    assert told(failed.stderr).startswith(f"{written}: {LIMIT}")
    assert written.read_text() == "old"
    assert files_of(tmp_path) == [written]


@pytest.mark.parametrize("name", few(["schema", "families"]))
def test_output_that_cannot_be_written_is_an_error(name: str) -> None:
    with open("/dev/full", "w") as full:
        program = command([name], 0)
        failed = subprocess.run(program, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert failed.returncode == 2
    assert told(failed.stderr).startswith("standard output: the disk is full\n    -> free some space")


@pytest.mark.full
def test_a_log_that_cannot_be_written_ends_no_training(recipe: Path, straight: Run) -> None:
    output = recipe.with_name("no-log")
    program = command(["--recipe", recipe, "--set", f"output={output}", "--set", "train.steps=2"], 0)
    with open("/dev/full", "w") as full:
        done = subprocess.run(program, cwd=ROOT, stdout=full, stderr=full, timeout=100, check=False)
    assert done.returncode == 0
    assert checkpoints(output) == [2]
    assert (output / "lora" / "pytorch_lora_weights.safetensors").is_file()


# A disk that fills while a training runs


def test_a_checkpoint_that_one_rank_cannot_write_ends_both_and_the_same_command_goes_on(
    recipe: Path, straight: Run
) -> None:
    output = recipe.with_name("checkpoint")
    run = Run(recipe, output, 2, SETTINGS)
    run.wait_until(lambda: bool(checkpoints(output)))
    limit(run.rank(1), 4096)
    began = time.monotonic()
    assert run.wait() != 0
    assert time.monotonic() - began < SOON
    kept = checkpoints(output)[-1]
    assert 2 <= kept < STEPS
    error = told(run.said)
    assert re.search(rf"checkpoints: the checkpoint of step {kept + 2} was not written .*; step {kept} is safe", error)
    assert "then run the same command: it goes on from there" in error
    assert not list(output.glob("checkpoints/.partial-*"))
    again = Run(recipe, output, 2, SETTINGS)
    assert again.wait() == 0, again.said
    assert resumed_after(again.said) == kept
    assert_equal_ends(again, straight)


@pytest.mark.parametrize("processes", few([0, 2]))
def test_metrics_that_cannot_be_written_are_written_once_there_is_room(recipe: Path, processes: int) -> None:
    output, steps = recipe.with_name(f"metrics-{processes}"), 60
    run = Run(recipe, output, processes, (f"train.steps={steps}",))
    run.wait_until(lambda: steps_done(output) >= 3)
    main = run.rank(0) if processes else run.process.pid
    limit(main, (output / "metrics.jsonl").stat().st_size + 100)
    run.wait_until(lambda: "the training goes on, and its metrics are written once they can be" in run.said)
    whole = (output / "metrics.jsonl").read_text()
    assert whole.endswith("}\n")
    limit(main, -1)
    assert run.wait() == 0, run.said
    assert run.said.count("warning: ") == 1
    assert f"{output / 'metrics.jsonl'} is complete again" in run.said
    assert [row["step"] for row in rows(output)] == list(range(1, steps + 1))


@pytest.mark.full
def test_a_folder_that_is_moved_away_ends_both_ranks_and_goes_on_under_its_new_name(
    recipe: Path, straight: Run
) -> None:
    output, moved = recipe.with_name("before"), recipe.with_name("after")
    run = Run(recipe, output, 2, SETTINGS)
    run.wait_until(lambda: bool(checkpoints(output)))
    output.rename(moved)
    assert run.wait() != 0
    error = told(run.said)
    assert re.match(rf"{output}: the run's folder is gone: the checkpoint of step \d+ was not written\n", error)
    assert "put it back, or set `output` to where it is now; then the same command goes on" in error
    assert not output.exists()
    again = Run(recipe, moved, 2, SETTINGS)
    assert again.wait() == 0, again.said
    assert resumed_after(again.said) >= 2
    assert_equal_ends(again, straight)


@pytest.mark.full
def test_a_disk_that_has_room_and_holds_as_many_files_as_it_can(
    recipe: Path, straight: Run, small_disk: Callable[[str], Path]
) -> None:
    output = small_disk("64m,nr_inodes=24") / "run"
    run = run_command("--recipe", recipe, "--set", f"output={output}", "--set", "checkpoint.every=1")
    assert run.returncode == 2, run.stderr
    error = told(run.stderr)
    assert re.search(r"checkpoints: the disk is full: the checkpoint of step \d was not written", error)
    assert "free some space (see df -h and df -i)" in error


# Folders that are read-only


@pytest.fixture
def read_only(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[Path], Path]:
    """A copy of a folder in which nothing can be written: by its permissions, or for root by its mount."""

    def make(source: Path) -> Path:
        if os.geteuid() == 0:
            disk = request.getfixturevalue("small_disk")("64m")
            shutil.copytree(source, disk / "copy")
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], timeout=30, check=True)
            return disk / "copy"
        copy = Path(shutil.copytree(source, tmp_path / "copy"))
        for folder in [copy, *(path for path in copy.rglob("*") if path.is_dir())]:
            folder.chmod(0o555)
        return copy

    return make


@pytest.mark.full
def test_a_cache_that_is_read_only_is_used(
    recipe: Path, straight: Run, cache: Path, read_only: Callable[[Path], Path]
) -> None:
    run = Run(recipe, recipe.with_name("shared"), 2, (*SETTINGS, f"data.cache={read_only(cache)}"))
    assert run.wait() == 0, run.said
    assert "encoding" not in run.said
    assert "warning" not in run.said
    assert_equal_ends(run, straight)


def test_a_read_only_cache_that_lacks_an_item_is_named(
    recipe: Path, straight: Run, cache: Path, tmp_path: Path, read_only: Callable[[Path], Path]
) -> None:
    """The items are there, and damaged: they can be neither used nor removed."""
    damaged = Path(shutil.copytree(cache, tmp_path / "cache"))
    for item in files_of(damaged / "video"):
        item.write_bytes(item.read_bytes()[:100])
    folder = read_only(damaged)
    failed = run_command("prepare", "--recipe", recipe, "--set", f"data.cache={folder}")
    assert failed.returncode == 2, failed.stderr
    items = [folder / item.relative_to(damaged) for item in files_of(damaged / "video")]
    named = [item for item in items if f"{item}, because" in failed.stderr]  # others are of other recipes
    assert named
    assert told(failed.stderr).startswith(f"{folder}: {len(named)} items are not in it, and it cannot be written")


def test_an_output_that_is_read_only_is_refused_before_clips_are_encoded(
    recipe: Path, tmp_path: Path, read_only: Callable[[Path], Path]
) -> None:
    (tmp_path / "runs").mkdir()
    folder, cache = read_only(tmp_path / "runs"), tmp_path / "cache"
    settings = [f"output={folder / 'mine'}", f"data.cache={cache}"]
    failed = run_command("--recipe", recipe, *(part for each in settings for part in ("--set", each)))
    assert failed.returncode == 2, failed.stderr
    assert told(failed.stderr).startswith(f"{folder}: cannot be written\n    -> check its permissions")
    assert not cache.exists()


def test_weights_of_a_run_that_is_read_only_can_be_exported(
    recipe: Path, straight: Run, tmp_path: Path, read_only: Callable[[Path], Path]
) -> None:
    run = read_only(straight.output)
    done = run_command("export", "--recipe", recipe, "--set", f"output={run}", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr


# Disks that change bytes


@pytest.mark.full
def test_a_bit_that_flips_in_the_cache_ends_the_run_by_name_and_the_same_command_goes_on(
    recipe: Path, straight: Run, cache: Path, tmp_path: Path
) -> None:
    """On two processes, of which one notices it: neither hangs, and nothing is trained on it."""
    own, output = Path(shutil.copytree(cache, tmp_path / "cache")), tmp_path / "run"
    training = (*SETTINGS, f"data.cache={own}")
    clip = "wide.mp4"
    items = [file for file in files_of(own / "video") if f"/{clip}".encode() in file.read_bytes()[:1000]]
    for item in items:  # of other recipes, too
        data = bytearray(item.read_bytes())
        data[-7] ^= 2
        item.write_bytes(data)
    failed = Run(recipe, output, 2, training)
    assert failed.wait() != 0
    why = rf"the cached item cannot be read \(its bytes are not .* made of '.*/{clip}'"
    (item,) = (item for item in items if re.search(f"{item}: {why}", failed.said))
    assert not item.exists()
    again = Run(recipe, output, 2, training)
    assert again.wait() == 0, again.said
    assert item.exists()
    assert_equal_ends(again, straight)


# File systems that can do little

ODD = """
import errno, fcntl, os, stat

def refused(number):
    raise OSError(number, os.strerror(number))

sync = os.fsync
fcntl.flock = lambda *_: refused(errno.ENOLCK)
os.chmod = lambda *_, **__: refused(errno.EPERM)
os.fsync = lambda file: refused(errno.EINVAL) if stat.S_ISDIR(os.fstat(file).st_mode) else sync(file)
"""


@pytest.mark.full
def test_a_file_system_without_locks_modes_and_syncs_of_folders_serves(
    recipe: Path, straight: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(ODD)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    run = Run(recipe, recipe.with_name("odd"), 2, (*SETTINGS, f"data.cache={tmp_path / 'cache'}"))
    assert run.wait() == 0, run.said
    assert run.said.count("is on a file system without locks (No locks available): start no second run in it") == 1
    assert_equal_ends(run, straight)


def test_checkpoints_are_set_aside_on_another_disk(recipe: Path, straight: Run, another_disk: Path) -> None:
    output = recipe.with_name("aside")
    shutil.copytree(straight.output, output)
    (output / "checkpoints" / "set_aside").symlink_to(another_disk)
    done = run_command(
        "--recipe", recipe, "--set", f"output={output}", "--resume-step", 10, "--set", "checkpoint.every=2"
    )
    assert done.returncode == 0, done.stderr
    (aside,) = another_disk.iterdir()
    before, after = straight.output / "checkpoints" / "step_00000012", aside
    assert {path.relative_to(before): path.read_bytes() for path in files_of(before)} == {
        path.relative_to(after): path.read_bytes() for path in files_of(after)
    }
