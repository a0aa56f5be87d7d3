"""The plan beside a training: it stops no training, keeps no rank waiting, and is remembered for the next start."""

import importlib.metadata
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forecast_worker import Card
from processes import ROOT

from finetune.checks.model import open_family
from finetune.planning.forecast import Forecast
from finetune.planning.plan import Plan
from finetune.planning.plan_cache import read_plan
from finetune.recipe import Bucket, load_recipe
from finetune.runtime.device import Device
from finetune.runtime.distributed import Runtime
from finetune.training.memory import NoPlan, compare, out_of_memory

GIB = 2**30


def card(runtime: Runtime, memory: int = 24 * GIB, **changes: object) -> Runtime:
    return replace(runtime, device=Card(torch.device("cpu"), memory), **changes)


def forecast(recipe: Path, runtime: Runtime, cache: Path, *overrides: str) -> Forecast:
    loaded = load_recipe(recipe, [f"data.cache={cache}", *overrides])
    return Forecast(loaded, open_family(loaded), runtime)


@pytest.fixture(scope="module")
def planned(recipe: Path, runtime: Runtime, fresh_cache: Path) -> Forecast:
    """A forecast whose plan was made, told and kept."""
    with forecast(recipe, card(runtime), fresh_cache) as plan:
        assert plan.process is not None
        plan.process.process.wait(200)
        plan.poll()
    assert plan.fits is True
    return plan


# A plan stops no training, and keeps no rank waiting


def test_a_plan_that_is_not_there_yet_says_nothing(recipe: Path, runtime: Runtime, tmp_path: Path, capsys) -> None:
    with forecast(recipe, card(runtime), tmp_path) as plan:
        plan.process.process.send_signal(signal.SIGSTOP)
        plan.poll()
        assert plan.process.is_running
        assert (plan.step_peak, plan.fits) == (None, None)
    assert capsys.readouterr().err == ""


def test_nothing_of_a_plan_is_collective(planned: Forecast, recipe: Path, runtime: Runtime, fresh_cache: Path) -> None:
    """There is no process group here: anything that met the other rank would raise."""
    alone = card(runtime, world_size=2, local_world_size=2, control=None)
    for rank in (0, 1):
        with forecast(recipe, replace(alone, rank=rank), fresh_cache, "train.micro_batch_size=1") as plan:
            plan.poll()
            assert plan.fit_command.endswith("--gpus 2 --device-memory 25768755200B --fit")
    assert planned.plan is not None


def test_a_plan_that_fails_is_said_in_a_line(recipe: Path, runtime: Runtime, tmp_path: Path, capsys) -> None:
    plan = forecast(recipe, card(runtime), tmp_path)
    plan.recipe = plan.recipe.model_copy(
        update={"train": plan.recipe.train.model_copy(update={"float8": True})}
    )  # `plan` refuses it with LoRA
    with plan:
        plan.process.process.wait(200)
        plan.poll()
        plan.poll()
    assert plan.plan is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no memory plan (error: train.float8: ")
    assert line.endswith("); the training goes on without")
    assert not list(tmp_path.rglob("*.json"))  # nothing to remember


def test_a_torch_that_the_simulated_device_does_not_know_is_said_in_a_line(
    recipe: Path, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    program = (
        "from finetune.planning import device; device.VERSION = '2.16.0'; import sys; from finetune.cli import main; "
    )
    program += "sys.exit(main(sys.argv[1:]))"
    monkeypatch.setattr("finetune.planning.forecast._PROGRAM", (sys.executable, "-c", program))
    with forecast(recipe, card(runtime), tmp_path) as plan:
        plan.process.process.wait(200)
        plan.poll()
    assert capsys.readouterr().err == (
        "no memory plan (error: the simulated device does not know torch 2.16.0); the training goes on without\n"
    )


@pytest.mark.full
def test_a_plan_that_cannot_be_kept_is_told_all_the_same(
    planned: Forecast, recipe: Path, runtime: Runtime, tmp_path: Path, capsys
) -> None:
    (tmp_path / "plans").write_text("in the way of the folder")
    with forecast(recipe, card(runtime), tmp_path) as plan:
        plan.process.process.wait(200)
        plan.poll()
    told, warning = capsys.readouterr().err.splitlines()[:2]
    assert told.startswith("memory plan: fits: ")
    assert warning.startswith(f"warning: the memory plan is not kept for the next start: {tmp_path}/plans/")


def test_a_training_that_fails_before_its_plan_ends_it(recipe: Path, runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clips"), forecast(recipe, card(runtime), tmp_path) as plan:
        raise ValueError("the clips cannot be read")
    assert plan.process.process.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot")
def test_a_killed_training_takes_its_plan_with_it(recipe: Path, tmp_path: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from test_forecast import card, forecast
from finetune.runtime import distributed
with forecast(Path({str(recipe)!r}), card(distributed.start(60)), Path({str(tmp_path)!r})) as plan:
    print(plan.process.process.pid, flush=True)
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
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_plan_sees_no_gpu_and_no_launcher(recipe: Path, runtime: Runtime, tmp_path: Path, monkeypatch) -> None:
    launcher = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_ERROR_FILE"]
    for name in launcher:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with forecast(recipe, card(runtime), tmp_path) as plan:
        environment = Path(f"/proc/{plan.process.process.pid}/environ")
        wait_until(lambda: environment.read_text() != "")  # it is being loaded
        seen = dict(line.split("=", 1) for line in environment.read_text().split("\0") if line)
    assert seen["CUDA_VISIBLE_DEVICES"] == ""
    assert not [name for name in launcher if name in seen]
    assert seen["PATH"] == os.environ["PATH"]


def test_a_cpu_is_told_nothing(recipe: Path, runtime: Runtime, tmp_path: Path, capsys) -> None:
    loaded = load_recipe(recipe, [f"output={tmp_path}"])
    compare(NoPlan(loaded, runtime), runtime.device.memory(), loaded, runtime)
    assert capsys.readouterr().err == ""
    assert not list(tmp_path.iterdir())


def test_ranks_other_than_the_first_start_no_plan(recipe: Path, runtime: Runtime, tmp_path: Path) -> None:
    with forecast(recipe, card(runtime, rank=1), tmp_path) as plan:
        assert plan.process is None


# Out of memory


def ran_out(plan: Forecast | NoPlan, recipe_file: Path, runtime: Runtime, output: Path) -> str:
    """The message of a third step that ran out of memory."""
    error = torch.OutOfMemoryError("CUDA out of memory.\nand much else that is of no use")
    loaded = load_recipe(recipe_file, [f"output={output}"])
    return str(out_of_memory(error, 3, Bucket(17, 64, 96), plan, loaded, runtime))


def test_where_the_plan_is_known_out_of_memory_names_its_figure(
    planned: Forecast, recipe: Path, runtime: Runtime, tmp_path: Path
) -> None:
    message = ran_out(planned, recipe, card(runtime), tmp_path)
    first = "step 3 of bucket 17x64x96, rank 0: CUDA out of memory. (the plan for the steps: 0.0"
    assert message.startswith(first)
    assert "--fit, with less for --device-memory: by their plan, these fit\n" in message


def test_a_snapshot_that_cannot_be_written_does_not_hide_what_ran_out(
    recipe: Path, runtime: Runtime, tmp_path: Path
) -> None:
    (tmp_path / "run").write_text("in the way of the folder")
    plan = NoPlan(load_recipe(recipe), card(runtime))
    message = ran_out(plan, recipe, card(runtime), tmp_path / "run")
    assert message.startswith("step 3 of bucket 17x64x96, rank 0: CUDA out of memory.\n")
    assert "(no snapshot of the memory: " in message


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


# Whose plan it is


def test_a_damaged_plan_is_made_anew(planned: Forecast, recipe: Path, runtime: Runtime, fresh_cache: Path) -> None:
    (file,) = files_of(planned)
    whole = file.read_text()
    for damaged in (whole[: len(whole) // 2], "[]", "{}", '{"phases": [1]}'):
        file.write_text(damaged)
        with forecast(recipe, card(runtime), fresh_cache) as plan:
            assert plan.process is not None
            assert plan.plan is None
    file.write_text(whole)
    with forecast(recipe, card(runtime), fresh_cache) as plan:
        assert plan.process is None
        assert plan.step_peak == planned.step_peak


@pytest.mark.parametrize("setting", ["optimizer.lr=1e-5", "train.steps=77", "train.seed=1", "checkpoint.every=3"])
def test_settings_that_take_no_memory_share_a_plan(
    planned: Forecast, recipe: Path, runtime: Runtime, fresh_cache: Path, setting: str
) -> None:
    with forecast(recipe, card(runtime), fresh_cache, setting) as plan:
        assert plan.process is None
        assert plan.plan == planned.plan


@pytest.mark.parametrize(
    "setting", ["lora.rank=8", "memory.activation_checkpointing=none", "train.micro_batch_size=1", "train.method=full"]
)
def test_settings_that_take_memory_have_plans_of_their_own(
    planned: Forecast, recipe: Path, runtime: Runtime, fresh_cache: Path, setting: str
) -> None:
    with forecast(recipe, card(runtime), fresh_cache, setting) as plan:
        assert plan.process is not None


def test_other_gpus_have_plans_of_their_own(
    planned: Forecast, recipe: Path, runtime: Runtime, fresh_cache: Path
) -> None:
    for other in (card(runtime, 16 * GIB), card(runtime, world_size=2, local_world_size=2)):
        with forecast(recipe, other, fresh_cache) as plan:
            assert plan.process is not None


def test_other_versions_have_plans_of_their_own(
    planned: Forecast, recipe: Path, runtime: Runtime, fresh_cache: Path, monkeypatch
) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "diffusers" else version(name))
    with forecast(recipe, card(runtime), fresh_cache) as plan:
        assert plan.process is not None


def test_other_models_have_plans_of_their_own(
    planned: Forecast, recipe: Path, runtime: Runtime, fresh_cache: Path, tmp_path: Path
) -> None:
    """The configs count, not where they lie."""
    model = tmp_path / "model"
    shutil.copytree(load_recipe(recipe).model.path, model)
    with forecast(recipe, card(runtime), fresh_cache, f"model.path={model}") as plan:
        assert plan.process is None
    config = json.loads((model / "vae" / "config.json").read_text())
    (model / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    with forecast(recipe, card(runtime), fresh_cache, f"model.path={model}") as plan:
        assert plan.process is not None


def files_of(plan: Forecast) -> list[Path]:
    """The kept plans whose figures are those of one."""
    return [file for file in (plan.recipe.data.cache / "plans").iterdir() if read_plan(file) == whole_plan(plan)]


def whole_plan(plan: Forecast) -> Plan:
    """The plan as it is kept: judged by all of the GPU's memory."""
    return plan.plan.with_capacity(plan.runtime.device.total_memory)
