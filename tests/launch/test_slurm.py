"""launch/slurm.sbatch on a real SLURM: a preempted training saves, is queued again, and ends as one that was not disturbed."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import ROOT
from slurm_here import NoSlurm, Slurm
from trainings import Run, assert_equal_ends, checkpoints, resumed_after, steps_done

GRACE, DEADLINE = 40, 120.0  # seconds
SETTINGS = ("train.steps=40", "optimizer.lr=1e-2", "checkpoint.every=1000", "train.micro_batch_size=2")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    try:
        with Slurm(tmp_path_factory.mktemp("slurm"), GRACE) as running:
            yield running
    except NoSlurm as why:
        pytest.skip(f"there can be no SLURM here: {why}")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, small_recipe: Callable[[Path], Path]) -> Path:
    return small_recipe(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def straight(recipe: Path) -> Run:
    run = Run(recipe, recipe.with_name("straight"), 2, SETTINGS)
    assert run.wait() == 0, run.said
    return run


class Job:
    """A training that is submitted with two processes."""

    def __init__(self, slurm: Slurm, recipe: Path, output: Path, *options: str, **variables: str) -> None:
        self.slurm, self.output, self.log = slurm, output, output.with_suffix(".log")
        chosen = [part for setting in (*SETTINGS, f"output={output}") for part in ("--set", setting)]
        given = {"GPUS": "2", "PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join([str(ROOT)]), **variables}
        own = [f"--export=ALL,{','.join(f'{name}={value}' for name, value in given.items())}"]
        command = ["sbatch", "--parsable", f"--chdir={ROOT}", f"--output={self.log}", *own, *options]
        self.number = slurm.run(*command, str(ROOT / "launch" / "slurm.sbatch"), str(recipe), *chosen)

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def fact(self, name: str) -> str:
        """One of the facts that the controller knows of it."""
        shown = self.slurm.run("scontrol", "show", "job", self.number)
        return next(part.partition("=")[2] for part in shown.split() if part.startswith(f"{name}="))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, self.said
            assert self.fact("JobState") not in ("FAILED", "NODE_FAIL", "CANCELLED", "TIMEOUT"), self.said
            time.sleep(0.05)


def test_a_preempted_job_saves_is_queued_again_and_ends_with_the_same_tensors(
    slurm: Slurm, recipe: Path, straight: Run
) -> None:
    output = recipe.with_name("preempted")
    job = Job(slurm, recipe, output)
    job.wait_until(lambda: steps_done(output) >= 4)
    before = len(job.said)
    slurm.run("sbatch", "--partition=high", f"--output={output}-high.log", "--wrap", "sleep 1")
    job.wait_until(lambda: "queued again, start 2" in job.said[before:])
    (saved,) = checkpoints(output)  # by no timetable, but by the signal
    job.wait_until(lambda: job.fact("JobState") == "COMPLETED")
    assert job.fact("Restarts") == "1"
    assert resumed_after(job.said) == saved
    assert_equal_ends(job, straight)


@pytest.mark.full
def test_the_signal_before_the_time_is_up_does_the_same_from_the_nodes_own_disk(
    slurm: Slurm, recipe: Path, straight: Run
) -> None:
    output, stage = recipe.with_name("timed"), recipe.with_name("local_disk")
    job = Job(slurm, recipe, output, STAGE=str(stage))
    job.wait_until(lambda: steps_done(output) >= 2)
    slurm.run("scancel", "--signal=USR1", job.number)
    job.wait_until(lambda: "queued again, start 2" in job.said)
    job.wait_until(lambda: job.fact("JobState") == "COMPLETED")
    assert list(stage.rglob("*.safetensors"))
    assert "encoding clips" not in job.said
    assert_equal_ends(job, straight)
