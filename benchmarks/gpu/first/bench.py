"""What a check is given, and how functions are called in processes of their own."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.runtime import distributed
from finetune.runtime.device import Device
from finetune.runtime.distributed import Runtime

ROOT = Path(__file__).parents[3]
WORKER = "benchmarks.gpu.first.worker"
TAIL = 12  # lines of a traceback or a log that are told


class Failed(Exception):
    """Something is not as it should be. The message is the verdict."""


class Skipped(Exception):
    """There is nothing to check here. The message is the reason."""


@dataclass
class Bench:
    """What a check is given.

    Attributes:
        folder: for files; the checks of one run share it.
        smoke: on a CPU, with tiny models.
        notes: lines that are told below the table.
    """

    folder: Path
    smoke: bool
    notes: list[str] = field(default_factory=list)

    @cached_property
    def runtime(self) -> Runtime:
        """The process group, started when it is first asked for."""
        return distributed.start(120, on_cpu=self.smoke)

    @property
    def device(self) -> Device:
        return self.runtime.device

    @property
    def gpus(self) -> int:
        """How many GPUs are used: 0 with `smoke`."""
        import torch

        return 0 if self.smoke else torch.accelerator.device_count()

    def elsewhere(
        self, call: str, environment: dict[str, str] | None = None, processes: int = 0, seconds: float = 240
    ) -> Any:
        """What a function, named as module:function, returns in another process, as JSON has it.

        Args:
            processes: of torchrun; 0 for a plain process.
        Raises:
            Failed, Skipped: it did.
        """
        outcome = call_in_process(call, self.folder, self.smoke, environment, processes, seconds)
        self.notes += outcome.notes
        if outcome.kind == "skipped":
            raise Skipped(outcome.text)
        if outcome.kind != "passed":
            raise Failed("; ".join([outcome.text, *outcome.trace[-3:]]))
        return outcome.value


@dataclass(frozen=True)
class Outcome:
    """How a call ended: "passed", "failed", "skipped" or "cut off".

    Attributes:
        value: what the function returned.
        text: the verdict, in one line.
        trace: the last lines of its traceback or log, if it failed.
    """

    kind: str
    value: Any = None
    text: str = ""
    trace: Sequence[str] = ()
    notes: Sequence[str] = ()


def call_in_process(
    call: str,
    folder: Path,
    smoke: bool,
    environment: dict[str, str] | None = None,
    processes: int = 0,
    seconds: float = 240,
) -> Outcome:
    """Call a function of a `Bench` in a process of its own, which is ended after some seconds."""
    place = Path(tempfile.mkdtemp(prefix=f"{call.rpartition(':')[2]}-", dir=folder))
    out, log = place / "outcome.json", place / "log"
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"] if processes else []
    command = [sys.executable, "-m", *launcher, WORKER, call, str(out), str(folder), *(["--smoke"] if smoke else [])]
    ended = run_program(command, log, child_environment(smoke) | (environment or {}), seconds)
    if ended is None:
        return Outcome("cut off", text=f"not done after {seconds:.0f} s", trace=tail(log))
    outcome = Outcome(**json.loads(out.read_text())) if out.exists() else None
    if outcome is None or (ended != 0 and outcome.kind != "failed"):
        return Outcome("failed", text=f"its process ended with status {ended}", trace=tail(log))
    if outcome.kind == "failed" and (races := _races(log)):
        return replace(outcome, notes=[*outcome.notes, *races])
    return outcome


def _races(log: Path) -> list[str]:
    """What TORCH_CUDA_SANITIZER has printed of the first race: kernels and where they were called."""
    lines = log.read_text(errors="replace").splitlines()
    begin = next((index for index, line in enumerate(lines) if line.startswith("CSAN detected")), len(lines))
    told = [line.strip() for line in lines[begin : begin + 200]]
    return [
        line
        for line in told
        if line.startswith(("CSAN", "Access", "Previous", "aten::", "File")) and "torch/" not in line
    ]


def child_environment(smoke: bool) -> dict[str, str]:
    """The environment of a process: this checkout is imported, and with `smoke` no GPU is seen."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    return environment | ({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if smoke else {})


def run_program(command: Sequence[str], log: Path, environment: dict[str, str], seconds: float) -> int | None:
    """The exit status of a program whose output goes to `log`; None if it took too long, and was ended with all it started."""
    process = start_program(command, log, environment)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end_all(process)


def start_program(command: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
    with log.open("w") as file:
        return subprocess.Popen(
            list(command), cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )


def end_all(process: subprocess.Popen) -> None:
    """End a program that still runs, and all that it has started; torchrun puts its ranks into sessions of their own."""
    if process.poll() is not None:
        return
    for pid in [process.pid, *descendants(process.pid)]:
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            continue
    process.wait(30)


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and theirs."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [each for child in map(int, children) for each in (child, *descendants(child))]


def wait_until(condition: Any, process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    """Watch a program closely until something is true. Raises Failed if it ends before, or after some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise Failed(f"it ended with status {process.returncode} too early: {' / '.join(tail(log)[-3:])}")
        if time.monotonic() > deadline:
            raise Failed(f"nothing for {seconds:.0f} s: {' / '.join(tail(log)[-3:])}")
        time.sleep(0.005)


def tail(log: Path) -> list[str]:
    """The last lines of a log that are not empty."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [line.rstrip() for line in lines if line.strip()][-TAIL:]
