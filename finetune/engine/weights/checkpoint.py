"""Checkpoints that are whole or absent: sharded with DCP, written beside, renamed when complete."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.files import disk_error

TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)
_STATE, _FACTS, _PARTIAL = "state", "trainer.json", ".partial-"
_FAILURE = (Exception, CheckpointException)  # DCP's own is a BaseException


class Checkpoints:
    """The checkpoints of one run, `step_00000100` and so on, in one folder that all ranks see."""

    def __init__(self, folder: Path, keep_last: int | None, runtime: Runtime) -> None:
        """`keep_last` is None to keep all."""
        self.folder, self.keep_last, self.runtime = folder, keep_last, runtime

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(int(path.parent.name.removeprefix("step_")) for path in self.folder.glob(f"step_*/{_FACTS}"))

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, as rank 0 sees it."""
        steps = self.steps() if self.runtime.is_main else []
        return self.runtime.from_main(steps[-1] if steps else None)

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def save(
        self, step: int, model: nn.Module, optimizer: Optimizer, facts: dict[str, Any], export: Callable[[Path], None]
    ) -> Path:
        """Write a checkpoint; a step that is already saved is left alone.

        Args:
            facts: small JSON values, returned by `facts`.
            export: called on every rank with the unfinished folder, to add files of its own.
        Raises:
            UserError: on every rank, if any could not write; older checkpoints stay.
        """
        final = self.path(step)
        if self.runtime.from_main((final / _FACTS).exists() if self.runtime.is_main else None):
            return final
        partial = self.folder / f"{_PARTIAL}{final.name}"
        state = {"model": get_model_state_dict(model, options=TRAINED_ONLY)}
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=TRAINED_ONLY)
        try:
            with self.runtime.together():
                if self.runtime.is_main:
                    self._clear(self.folder)
                    shutil.rmtree(final, ignore_errors=True)  # half copied: it has no facts
                    partial.mkdir(parents=True)
            dcp.save(state, checkpoint_id=partial / _STATE, process_group=self.runtime.control)
            export(partial)
            with self.runtime.together():
                if self.runtime.is_main:
                    made = {"step": step, "processes": self.runtime.world_size, **facts}
                    (partial / _FACTS).write_text(json.dumps(made, indent=1))
                    partial.rename(final)
                    self._prune()
        except _FAILURE as error:
            if self.runtime.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise self._explain(error, step) from error
        return final

    def facts(self, step: int) -> dict[str, Any]:
        """What was noted with a checkpoint."""
        try:
            return json.loads((self.path(step) / _FACTS).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise self._unreadable(step, error) from error

    def load(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Restore weights and optimizer state in place, on any number of ranks."""
        state = {"model": get_model_state_dict(model, options=TRAINED_ONLY)}
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=TRAINED_ONLY)
        try:
            dcp.load(state, checkpoint_id=self.path(step) / _STATE, process_group=self.runtime.control)
        except _FAILURE as error:
            raise self._unreadable(step, error) from error
        set_model_state_dict(model, state["model"], options=TRAINED_ONLY)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=TRAINED_ONLY)

    def _unreadable(self, step: int, error: BaseException) -> UserError:
        older = [known for known in self.steps() if known < step]
        then = f"the run then goes on from step {older[-1]}" if older else "the run then starts anew"
        what, cure = f"the checkpoint cannot be read ({_reason(error)})", f"remove this folder; {then}"
        if "block_size" in str(error) + _reason(error):  # torchao: a part that cuts through a block of moments
            processes = self.facts(step)["processes"]
            what = f"moments in few bits, saved by {processes} process(es), cannot be divided for {self.runtime.world_size}"
            cure = f"resume it with {processes}"
        return UserError(what, cure, str(self.path(step)))

    def _prune(self) -> None:
        """Keep the newest `keep_last`; a checkpoint loses its name before its files, so none is ever half there."""
        for step in self.steps()[: -self.keep_last] if self.keep_last else []:
            doomed = self.folder / f"{_PARTIAL}{self.path(step).name}"
            self.path(step).rename(doomed)
            shutil.rmtree(doomed)

    @staticmethod
    def _clear(folder: Path) -> None:
        for leftover in folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover)

    def _explain(self, error: BaseException, step: int) -> BaseException:
        cause = disk_error(RuntimeError(_reason(error)), self.folder)
        if cause is None or "full" not in str(cause):
            return error
        free = shutil.disk_usage(self.folder).free / 2**20
        known = self.steps()
        safe = f"step {known[-1]} is safe" if known else "no earlier checkpoint exists"
        return UserError(
            f"the disk is full ({free:.0f} MiB free): the checkpoint of step {step} was not written; {safe}",
            "free some space or lower checkpoint.keep_last, then run the same command: it goes on from there",
            str(self.folder),
        )


def _reason(error: BaseException) -> str:
    """The text of an error and of what DCP wrapped in it."""
    failures = getattr(error, "failures", None)
    if failures:
        return "; ".join(sorted({str(failure[0]) for failure in failures.values()}))
    return str(error) or type(error).__name__
