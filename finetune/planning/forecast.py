"""The memory plan of a running training: the `plan` command makes it in a process beside it, and rank 0 prints it when done."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from finetune.models.family import Family
from finetune.planning import DOES_NOT_FIT
from finetune.planning.plan import Plan
from finetune.planning.plan_cache import keep_plan, parse_plan, plan_file, read_plan
from finetune.recipe import Recipe, write_recipe
from finetune.runtime.device import PeakMemory, has_expandable_segments
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.gpus import known_gpu
from finetune.runtime.logging import say
from finetune.training.memory import fit_command, gpu_arguments

_PROGRAM = (sys.executable, "-m", "finetune")
_LAUNCHER = ("MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


class Forecast:
    """The `MemoryPlan` of a training on GPUs. Entering the context starts it on rank 0; leaving it ends its process.

    Rank 0 alone makes, reads and tells the plan: nothing here is collective, so no GPU waits for it. Whether the training fits
    is judged by the free memory of rank 0's GPU. A plan never stops a training: what goes wrong with it is said in a line.
    """

    def __init__(self, recipe: Recipe, family: Family, runtime: Runtime) -> None:
        self.recipe, self.family, self.runtime = recipe, family, runtime
        self.plan: Plan | None = None
        self.process: PlanProcess | None = None
        gpu = known_gpu(runtime.device.name)
        self._gpu = ["--gpu", gpu.name] if gpu else []

    def __enter__(self) -> "Forecast":
        if self.runtime.is_main:
            try:
                self._begin()
            except Exception as error:  # whatever it is, the training goes on: this rank is alone here
                _say_none(error)
        return self

    def __exit__(self, *error: object) -> None:
        if self.process is not None:
            self.process.end()

    def poll(self) -> None:
        """Tell the plan once its process has made it, and keep it for the next start; see `MemoryPlan`."""
        if self.process is None or self.process.is_running:
            return
        process, self.process = self.process, None
        try:
            plan = process.result()
        except (OSError, ValueError) as error:
            _say_none(error)
            return
        finally:
            process.end()
        self._tell(plan)
        try:
            keep_plan(self._kept, plan)
        except UserError as error:
            say(f"warning: the memory plan is not kept for the next start: {error}")

    @property
    def step_peak(self) -> PeakMemory | None:
        """See `MemoryPlan`."""
        return self.plan.step_peak if self.plan else None

    @property
    def fits(self) -> bool | None:
        """See `MemoryPlan`."""
        return self.plan.fits if self.plan else None

    @property
    def fit_command(self) -> str:
        """See `MemoryPlan`."""
        return fit_command(self.recipe, self.runtime, *self._gpu)

    def _begin(self) -> None:
        """Tell the plan that an earlier start has kept, or start the process that makes it."""
        memory = self.recipe.memory.model_copy(update={"expandable_segments": has_expandable_segments()})
        recipe = self.recipe.model_copy(update={"memory": memory})
        device = self.runtime.device  # `layout = "auto"` divides by all of its memory, not by what is free
        arguments = [*gpu_arguments(self.runtime, device.total_memory), *self._gpu]
        self._kept = plan_file(recipe, self.family, arguments, device.name)
        if plan := read_plan(self._kept):
            self._tell(plan)
        else:
            self.process = PlanProcess(recipe, self.family.folder.path, arguments)

    def _tell(self, plan: Plan) -> None:
        self.plan = plan.with_capacity(self.runtime.device.available_memory)
        peak = f"{self.plan.verdict} (peak in {self.plan.highest.name}, {self.plan.highest.device.running})"
        if self.plan.fits:
            say(f"memory plan: {peak}")
        else:
            say(f"warning: by its memory plan this training {peak}\n    -> settings that fit: {self.fit_command}")


class PlanProcess:
    """`plan` of a recipe in a process of its own, which sees no GPU, and ends when this process does."""

    def __init__(self, recipe: Recipe, model: Path, arguments: list[str]) -> None:
        """
        Args:
            model: the local folder of the recipe's model.
            arguments: of `plan`, but for its recipe.
        Raises:
            OSError: it cannot be started.
        """
        self._files = tempfile.TemporaryDirectory(prefix="finetune-plan-", ignore_cleanup_errors=True)
        self._folder = Path(self._files.name)
        file = self._folder / "recipe.toml"
        at_model = recipe.model.model_copy(update={"path": str(model.absolute())})
        write_recipe(recipe.model_copy(update={"model": at_model}), file)
        command = ["plan", "--recipe", str(file), *arguments, "--all-buckets", "--json", "--end-with-parent"]
        alone = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER)}
        with open(self._folder / "out", "w") as out, open(self._folder / "errors", "w") as errors:
            self.process = subprocess.Popen(
                [*_PROGRAM, *command],
                env=alone | {"CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
            )

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def result(self) -> Plan:
        """The plan that the ended process has made. Raises ValueError if it has made none, with the reason, or OSError."""
        if self.process.returncode in (0, DOES_NOT_FIT):
            return parse_plan((self._folder / "out").read_text())
        lines = (self._folder / "errors").read_text().strip().splitlines()
        lines = lines or [f"exit status {self.process.returncode}"]
        raise ValueError(next((line for line in lines if line.startswith("error: ")), lines[-1]))

    def end(self) -> None:
        """End the process if it runs, and remove its files."""
        if self.is_running:
            self.process.kill()
            self.process.wait()
        self._files.cleanup()


def _say_none(reason: Exception) -> None:
    say(f"no memory plan ({reason}); the training goes on without")
