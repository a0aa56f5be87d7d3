"""Trainings in processes of their own, which a test can watch, signal and kill."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from processes import ROOT, command
from safetensors.torch import load_file
from torch import Tensor

DEADLINE = 100.0  # seconds that any one wait may take
RUNS: list["Run"] = []


class Run:
    """A training process that can be watched and killed; its folder and what it has said.

    `starter` is a program that starts it, such as nohup; `torchrun` are further options of torchrun.
    """

    def __init__(
        self,
        recipe: Path,
        output: Path,
        processes: int,
        overrides: Sequence[str] = (),
        starter: Sequence[str] = (),
        torchrun: Sequence[str] = (),
    ) -> None:
        self.output = output
        self.log = output.with_name(f"{output.name}-{time.monotonic_ns()}.log")
        settings = [f"output={output}", f"train.micro_batch_size={4 // max(processes, 1)}", *overrides]
        arguments = ["--recipe", recipe, *(part for setting in settings for part in ("--set", setting))]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*starter, *command(arguments, processes, torchrun)],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        RUNS.append(self)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait(self) -> int:
        """Its exit status."""
        return self.process.wait(DEADLINE)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Watch it closely until something is true; an error if it ends before."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.said}"
            assert time.monotonic() < deadline, self.said
            time.sleep(0.002)

    def rank(self, rank: int) -> int:
        """The process id of a rank on this torchrun."""
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            if b"RANK=%d" % rank in variables:
                return int(child)
        raise LookupError(f"there is no rank {rank} (yet)")

    def kill_all(self) -> None:
        """SIGKILL to torchrun, its ranks and theirs at once: torchrun puts each rank into a session of its own."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(DEADLINE)


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for child in map(int, children) for each in (child, *descendants(child))]


def rows(output: Path, key: str = "loss") -> list[dict]:
    """The whole lines of metrics.jsonl that have a key."""
    path = output / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [row for line in text[: text.rfind("\n") + 1].splitlines() if key in (row := json.loads(line))]


def steps_done(output: Path) -> int:
    return max((row["step"] for row in rows(output)), default=0)


def checkpoints(output: Path) -> list[int]:
    return sorted(
        int(file.parent.name.removeprefix("step_")) for file in output.glob("checkpoints/step_*/trainer.json")
    )


def resumed_after(said: str) -> int:
    """The step that a run says it goes on from; 0 if it starts."""
    match = re.search(r"resuming after step (\d+):", said)
    assert match or "starting:" in said, said
    return int(match[1]) if match else 0


def adapter(output: Path) -> dict[str, Tensor]:
    """The tensors of a run's exported adapter."""
    return load_file(output / "lora" / "pytorch_lora_weights.safetensors")


def assert_equal_ends(run: Run, straight: Run) -> None:
    """Two runs have ended with the same adapter and the same losses, bit for bit."""
    ours, theirs = adapter(run.output), adapter(straight.output)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert [row["loss"] for row in rows(run.output)] == [row["loss"] for row in rows(straight.output)]
