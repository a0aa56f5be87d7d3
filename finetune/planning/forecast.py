"""The memory that a training will take, asked of `plan` while the dataset is prepared; and beside it what the steps took."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from finetune.planning.gpus import GPUS
from finetune.planning.report import GIB, Plan
from finetune.recipe import Bucket, Recipe, write_recipe
from finetune.runtime.device import PeakMemory, has_expandable_segments
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.files import atomic
from finetune.runtime.logging import say

MEMORY_FILE = "memory.json"
PATIENCE = 120.0  # seconds that the first step waits for a plan
VIEWER = "https://docs.pytorch.org/memory_viz"

_FITS, _DOES_NOT_FIT = 0, 3  # exit statuses of `plan`; both come with its figures
_COMMAND = """
from finetune.runtime.signals import end_with_parent
end_with_parent()
import sys
from finetune.cli import main
from finetune.runtime.exit import leave
leave(main(sys.argv[1:]))
"""
_LAUNCHER = ("MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


class Forecast:
    """The plan of a training that begins: made beside it, in a process that rank 0 starts on entering and ends on leaving.

    It never stops a training: what goes wrong with it is said in a line. On a device that does not know its memory, a CPU,
    nothing is planned.
    """

    def __init__(self, recipe: Recipe, model: Path, runtime: Runtime, patience: float = PATIENCE) -> None:
        """
        Args:
            model: the local folder of the recipe's model.
            patience: seconds to wait for the plan; less if the other ranks would not wait that long.
        """
        self.recipe, self.model, self.runtime = recipe, model, runtime
        self.patience = min(patience, recipe.distributed.timeout_seconds / 2)
        self.capacity = runtime.device.total_memory  # by which `layout = "auto"` divides; what is free, from `tell` on
        self.plan: Plan | None = None
        self.process: subprocess.Popen | None = None
        self._files: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> "Forecast":
        if self.capacity is not None and self.runtime.is_main:
            try:
                self._files = tempfile.TemporaryDirectory(prefix="finetune-plan-", ignore_cleanup_errors=True)
                self.process = self._start(Path(self._files.name))
            except OSError as error:
                say(f"no memory plan ({error}); the training goes on without")
        return self

    def __exit__(self, *error: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self._files is not None:
            self._files.cleanup()

    def tell(self, stop: Callable[[], bool]) -> None:
        """Wait for the plan, and say whether the training fits; every rank knows the plan from then on. Collective.

        Args:
            stop: whether the run is asked to end, and this wait with it.
        """
        if self.capacity is None:
            return
        self.plan = self.runtime.from_main(self._wait(stop) if self.process else None)
        self.capacity = min(self.runtime.gather(self.runtime.device.available_memory))
        if self.plan is None:
            return
        self.plan = replace(self.plan, hardware=replace(self.plan.hardware, capacity=self.capacity))
        peak = f"{self.plan.verdict} (peak in {self.plan.highest.name}, {self.plan.highest.device.running})"
        if self.plan.fits:
            say(f"memory plan: {peak}")
        else:
            say(f"warning: by its memory plan this training {peak}\n    -> settings that fit: {self.fit_command}")

    @property
    def fit_command(self) -> str:
        """What finds settings that fit this device, from the effective recipe in the run's folder."""
        return f"python -m finetune {shlex.join(self._plan_arguments(self.recipe.output / 'recipe.toml'))} --fit"

    def compare(self, taken: PeakMemory) -> None:
        """Say what the steps took beside what was planned, and write both to the run's memory.json, in bytes. Collective.

        Args:
            taken: the most that this rank's steps took.
        """
        if self.capacity is None:
            return
        ranks = self.runtime.gather(taken)
        measured = PeakMemory(max(rank.allocated for rank in ranks), max(rank.reserved for rank in ranks))
        figures = {"measured": asdict(measured), "planned": None, "relative_error": None}
        line = f"the steps took {_gib(measured.allocated)} GiB allocated, {_gib(measured.reserved)} reserved"
        if self.plan:
            planned = asdict(step_peak(self.plan))
            off = {name: planned[name] / taken - 1 for name, taken in asdict(measured).items()}
            figures |= {"planned": planned, "relative_error": off}
            beside = (f"{_gib(planned[name])} ({off[name]:+.1%})" for name in ("allocated", "reserved"))
            line += f"; planned were {' and '.join(beside)}"
        say(line)
        if self.runtime.is_main:
            try:
                with atomic(self.recipe.output / MEMORY_FILE) as partial:
                    partial.write_text(json.dumps(figures, indent=1) + "\n")
            except UserError as error:  # the trained weights are still to be written
                say(f"warning: {error}")

    def out_of_memory(self, error: Exception, step: int, bucket: Bucket) -> UserError:
        """What a step's torch.OutOfMemoryError means for the user, with a snapshot of the memory where there are any.

        Args:
            step: counted from 1.
        """
        what, cure = str(error).partition("\n")[0], f"settings that fit: {self.fit_command}"
        if self.plan:
            what += f" (the plan for the steps: {_gib(step_peak(self.plan).reserved)} GiB reserved)"
            cure += ", with less for --device-memory: by their plan, these fit" if self.plan.fits else ""
        return UserError(
            what,
            cure + self._snapshot(),
            f"step {step} of bucket {bucket}, rank {self.runtime.rank}",
        )

    def _snapshot(self) -> str:
        """Write it; the words that say where it is, or why it is not. Empty if the device has none."""
        path = (self.recipe.output / f"memory_rank{self.runtime.rank}.pickle").absolute()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # rank 0 has made it on its own host
            written = self.runtime.device.snapshot(path)
        except OSError as error:  # the memory that ran out is the news, and must not be lost
            return f"\n       (no snapshot of the memory: {error})"
        return f"\n       what was in memory: {path}, to be viewed at {VIEWER}" if written else ""

    def _start(self, folder: Path) -> subprocess.Popen:
        model = self.recipe.model.model_copy(update={"path": str(self.model.absolute())})
        memory = self.recipe.memory.model_copy(update={"expandable_segments": has_expandable_segments()})
        write_recipe(self.recipe.model_copy(update={"model": model, "memory": memory}), folder / "recipe.toml")
        arguments = [*self._plan_arguments(folder / "recipe.toml"), "--all-buckets", "--json"]
        alone = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER)}
        command, environment = [sys.executable, "-c", _COMMAND, *arguments], alone | {"CUDA_VISIBLE_DEVICES": ""}
        with open(folder / "out", "w") as out, open(folder / "errors", "w") as errors:
            return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=errors)

    def _plan_arguments(self, recipe: Path) -> list[str]:
        arguments = ["plan", "--recipe", str(recipe), "--gpus", str(self.runtime.world_size)]
        if self.runtime.local_world_size != min(self.runtime.world_size, 8):  # as `plan` takes it
            arguments += ["--gpus-per-node", str(self.runtime.local_world_size)]
        if names := [name for name in GPUS if name in self.runtime.device.name]:
            arguments += ["--gpu", max(names, key=len)]
        return arguments + (["--device-memory", f"{self.capacity}B"] if self.capacity is not None else [])

    def _wait(self, stop: Callable[[], bool]) -> Plan | None:
        deadline = time.monotonic() + self.patience
        while self.process.poll() is None and time.monotonic() < deadline and not stop():
            time.sleep(0.1)
        if stop():
            return None
        if self.process.poll() is None:
            self.process.kill()
            reason = f"not made within {self.patience:g} s"
        else:
            try:
                return self._read(Path(self._files.name))
            except (OSError, ValueError) as error:
                reason = str(error)
        say(f"no memory plan ({reason}); the training goes on without")
        return None

    def _read(self, folder: Path) -> Plan:
        """The plan that was made. Raises ValueError if none was, with the reason."""
        if self.process.returncode in (_FITS, _DOES_NOT_FIT):
            return Plan.from_json(json.loads((folder / "out").read_text()))
        lines = (folder / "errors").read_text().strip().splitlines() or [f"exit status {self.process.returncode}"]
        raise ValueError(next((line for line in lines if line.startswith("error: ")), lines[-1]))


def step_peak(plan: Plan) -> PeakMemory:
    """The most that a plan's steps take, of any bucket."""
    steps = [phase.device for phase in plan.phases if phase.name.startswith("step ")]
    return PeakMemory(max(step.allocated for step in steps), max(step.reserved for step in steps))


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
