"""What a training is told of its memory: before its first step, after its last, and when there is too little."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from foresight_worker import Card
from processes import ROOT, Finetune

from finetune.planning.forecast import Forecast
from finetune.recipe import load_recipe
from finetune.runtime.device import Device
from finetune.runtime.distributed import Runtime

GIB = 2**30
Result = subprocess.CompletedProcess
Train = Callable[..., Result]


@pytest.fixture(scope="module")
def recipe(family_recipe: Callable[..., Path]) -> Path:
    return family_recipe("ltx")


@pytest.fixture(scope="module")
def train(recipe: Path) -> Train:
    """Train three steps with tests/planning/forecast_worker.py."""

    def run(output: Path, card: int, fails: str = "never", processes: int = 0) -> Result:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        settings = ["train.steps=3", f"train.micro_batch_size={2 // max(processes, 1)}", f"output={output}"]
        output.mkdir(parents=True)
        return subprocess.run(
            [sys.executable, *(torchrun if processes else []), ROOT / "tests" / "planning" / "forecast_worker.py"]
            + [str(card), fails, "--recipe", recipe]
            + [part for setting in settings for part in ("--set", setting)],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(output)},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def fitting(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A training of two processes that fits."""
    output = tmp_path_factory.mktemp("fitting") / "run"
    return output, train(output, 24 * GIB, processes=2)


@pytest.fixture(scope="module")
def too_large(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A training of one process that does not fit, by its plan."""
    output = tmp_path_factory.mktemp("too-large") / "run"
    return output, train(output, 3 * 2**20)


def line_of(result: Result, text: str) -> int:
    (found,) = [number for number, line in enumerate(result.stderr.splitlines()) if text in line]
    return found


# Before the first step


def test_a_training_that_fits_is_told_so_before_its_first_step(fitting: tuple[Path, Result]) -> None:
    _, result = fitting
    assert result.returncode == 0, result.stderr
    assert "memory plan: fits: each of 2 GPUs needs 0.0" in result.stderr
    assert line_of(result, "memory plan: ") < line_of(result, "step 3/3")


def test_a_training_that_does_not_fit_is_warned_before_its_first_step(too_large: tuple[Path, Result]) -> None:
    output, result = too_large
    warning, cure = result.stderr.splitlines()[line_of(result, "warning: ") :][:2]
    assert "does not fit: a GPU needs 0.0" in warning
    assert "GiB more than there are (peak in encode video 17x64x96, " in warning
    command = f"python -m finetune plan --recipe {output}/recipe.toml --gpus 1 --device-memory 2097152B --fit"
    assert cure.endswith(command)
    assert line_of(result, "warning: ") < line_of(result, "step 3/3")


def test_a_training_that_does_not_fit_by_its_plan_is_trained_all_the_same(too_large: tuple[Path, Result]) -> None:
    output, result = too_large
    assert result.returncode == 0, result.stderr
    assert (output / "lora").is_dir()


def test_the_wait_for_a_plan_is_not_the_first_steps_time(fitting: tuple[Path, Result]) -> None:
    output, _ = fitting
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    first = next(row for row in rows if "loss" in row)
    assert first["seconds_per_step"] < 3  # a plan takes longer


def test_nothing_of_the_plan_is_left_when_the_training_has_ended(fitting: tuple[Path, Result]) -> None:
    output, _ = fitting
    assert not list(output.glob("finetune-plan-*"))


# After the last


def test_the_plan_is_written_beside_what_the_steps_took_of_any_rank(
    fitting: tuple[Path, Result], finetune: Finetune
) -> None:
    output, result = fitting
    figures = json.loads((output / "memory.json").read_text())
    assert figures["measured"] == {"allocated": 6 * GIB, "reserved": 12 * GIB}  # the second step's, of the second rank
    plan = finetune("plan", "--recipe", output / "recipe.toml", "--gpus", 2, "--device-memory", "24GiB", "--json")
    phases = {phase["name"]: phase for phase in json.loads(plan.stdout)["phases"]}
    step = phases["step 17x64x96"]["device"]
    assert figures["planned"] == {name: step[name] for name in ("allocated", "reserved")}
    off = step["allocated"] / (6 * GIB) - 1
    assert figures["relative_error"]["allocated"] == pytest.approx(off)
    assert "the steps took 6.00 GiB allocated, 12.00 reserved; planned were 0.0" in result.stderr
    assert f"({off:+.1%})" in result.stderr


# Out of memory


def test_out_of_memory_says_what_where_and_what_to_do(train: Train, tmp_path: Path) -> None:
    result = train(tmp_path / "run", 0, fails="0:2")
    assert result.returncode == 2, result.stderr
    message = result.stderr.partition("error: ")[2].splitlines()
    assert message == [
        "step 2 of bucket 17x64x96, rank 0: CUDA out of memory. Tried to allocate 2.00 GiB.",
        f"    -> settings that fit: python -m finetune plan --recipe {tmp_path}/run/recipe.toml --gpus 1 --fit",
    ]
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "run").glob("*.pickle"))


def test_out_of_memory_of_one_rank_ends_both_and_leaves_its_snapshot(train: Train, tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = train(output, 24 * GIB, fails="1:2", processes=2)
    assert result.returncode == 1, result.stderr  # torchrun's
    assert "step 2 of bucket 17x64x96, rank 1: CUDA out of memory" in result.stderr
    assert "(the plan for the steps: 0.0" in result.stderr
    assert "--gpus 2 --device-memory 25768755200B --fit, with less for --device-memory" in result.stderr
    assert f"what was in memory: {output}/memory_rank1.pickle, to be viewed at https://" in result.stderr
    assert [path.name for path in output.glob("*.pickle")] == ["memory_rank1.pickle"]


def test_a_snapshot_that_cannot_be_written_does_not_hide_what_ran_out(
    recipe: Path, runtime: Runtime, tmp_path: Path
) -> None:
    (tmp_path / "run").write_text("in the way of the folder")
    shown = forecast(recipe, card(runtime), f"output={tmp_path}/run").out_of_memory(
        torch.OutOfMemoryError("CUDA out of memory."), 2, "17x64x96"
    )
    assert str(shown).startswith("step 2 of bucket 17x64x96, rank 0: CUDA out of memory.\n")
    assert "(no snapshot of the memory: " in str(shown)


def test_a_cpu_has_no_snapshot(tmp_path: Path) -> None:
    device = Device(torch.device("cpu"))
    device.record_memory()
    assert device.snapshot(tmp_path / "none.pickle") is False
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")
def test_a_snapshot_knows_who_holds_memory(tmp_path: Path) -> None:
    device = Device(torch.device("cuda", 0))
    device.record_memory()
    held = torch.empty(2**20, device=device.torch_device)
    assert device.snapshot(tmp_path / "memory.pickle")
    blocks = [
        block
        for segment in pickle.loads((tmp_path / "memory.pickle").read_bytes())["segments"]
        for block in segment["blocks"]
    ]
    (block,) = [block for block in blocks if block["address"] == held.data_ptr()]
    assert any(frame["filename"] == __file__ for frame in block["frames"])


# A plan stops no training


def card(runtime: Runtime) -> Runtime:
    return replace(runtime, device=Card(torch.device("cpu"), 24 * GIB))


def forecast(recipe: Path, runtime: Runtime, *overrides: str, model: Path | None = None, **options) -> Forecast:
    loaded = load_recipe(recipe, overrides)
    return Forecast(loaded, model or Path(loaded.model.path), runtime, **options)


def test_a_plan_that_fails_is_said_in_a_line(recipe: Path, runtime: Runtime, tmp_path: Path, capsys) -> None:
    with forecast(recipe, card(runtime), model=tmp_path / "gone") as plan:
        plan.tell(lambda: False)
    assert plan.plan is None
    assert capsys.readouterr().err == (
        f"no memory plan (error: {tmp_path}/gone: no such folder); the training goes on without\n"
    )


def test_a_plan_that_takes_too_long_is_said_in_a_line_and_ended(recipe: Path, runtime: Runtime, capsys) -> None:
    with forecast(recipe, card(runtime), patience=0.2) as plan:
        plan.tell(lambda: False)
        assert plan.process.wait(10) == -signal.SIGKILL
    assert capsys.readouterr().err == "no memory plan (not made within 0.2 s); the training goes on without\n"


def test_a_plan_is_awaited_for_less_time_than_other_ranks_wait(recipe: Path, runtime: Runtime) -> None:
    assert forecast(recipe, card(runtime), "distributed.timeout_seconds=30").patience < 30


def test_a_run_that_is_asked_to_end_does_not_wait_for_its_plan(recipe: Path, runtime: Runtime, capsys) -> None:
    with forecast(recipe, card(runtime)) as plan:
        plan.tell(lambda: True)
        assert plan.process.poll() is None
    assert plan.process.returncode == -signal.SIGKILL
    assert capsys.readouterr().err == ""


def test_a_training_that_fails_before_its_plan_ends_it(recipe: Path, runtime: Runtime) -> None:
    with pytest.raises(ValueError, match="clips"), forecast(recipe, card(runtime)) as plan:
        raise ValueError("the clips cannot be read")
    assert plan.process.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot")
def test_a_killed_training_takes_its_plan_with_it(recipe: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from test_foresight import card, forecast
from finetune.runtime import distributed
with forecast(Path({str(recipe)!r}), card(distributed.start(60))) as plan:
    print(plan.process.pid, flush=True)
    time.sleep(60)
"""
    path = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))}
    started = [sys.executable, "-c", script]
    with subprocess.Popen(started, cwd=ROOT, env={**os.environ, **path}, stdout=subprocess.PIPE, text=True) as training:
        plan = int(training.stdout.readline())
        wait_until(lambda: "libtorch" in Path(f"/proc/{plan}/maps").read_text())
        os.kill(plan, signal.SIGSTOP)  # it will not end by itself
        training.kill()
    try:
        wait_until(lambda: not alive(plan))
    finally:
        if alive(plan):
            os.kill(plan, signal.SIGKILL)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_plan_sees_no_gpu_and_no_launcher(recipe: Path, runtime: Runtime, monkeypatch) -> None:
    launcher = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_ERROR_FILE"]
    for name in launcher:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with forecast(recipe, card(runtime)) as plan:
        environment = Path(f"/proc/{plan.process.pid}/environ")
        wait_until(lambda: environment.read_text() != "")  # it is being loaded
        seen = dict(line.split("=", 1) for line in environment.read_text().split("\0") if line)
    assert seen["CUDA_VISIBLE_DEVICES"] == ""
    assert not [name for name in launcher if name in seen]
    assert seen["PATH"] == os.environ["PATH"]


def test_a_cpu_is_told_nothing(recipe: Path, runtime: Runtime, tmp_path: Path, capsys) -> None:
    with forecast(recipe, runtime, f"output={tmp_path}") as plan:
        plan.tell(lambda: False)
        plan.compare(runtime.device.memory())
    assert plan.process is None
    assert capsys.readouterr().err == ""
    assert not list(tmp_path.iterdir())


def test_ranks_other_than_the_first_start_no_plan(recipe: Path, runtime: Runtime) -> None:
    with forecast(recipe, replace(card(runtime), rank=1)) as plan:
        assert plan.process is None
