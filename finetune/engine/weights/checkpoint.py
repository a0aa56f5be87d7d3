"""Checkpoints that are whole or absent: sharded with DCP, written beside, renamed when complete."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from finetune.engine.parts import Part
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.files import disk_error

_STATE, _FACTS, _PARTIAL = "state", "trainer.json", ".partial-"
_FAILURE = (Exception, CheckpointException)  # DCP's own is a BaseException
_FIRST_PARTS = ("model", "optimizer")  # of checkpoints that were written before they named their parts


@dataclass(frozen=True)
class Pending:
    """A checkpoint that was begun. `facts` will be noted with it; they are None if the step was saved before."""

    step: int
    facts: dict[str, Any] | None


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

    def begin(self, step: int, parts: Sequence[Part], facts: dict[str, Any], export: Callable[[Path], None]) -> Pending:
        """Write the state of all parts to a folder that is no checkpoint until `finish`. A step that is saved is left alone.

        The state is that of now, whatever is trained before `finish`: so a writer may go on behind the next steps, though
        today's has written all when this returns. One checkpoint is pending at a time; the next `begin` clears an
        unfinished one away.

        Args:
            facts: small JSON values, returned by `facts`.
            export: called on every rank with the unfinished folder, to add files of its own; fails on all ranks or on none.
        Raises:
            UserError: on every rank, if any could not write; older checkpoints stay.
        """
        final, partial = self.path(step), self._partial(step)
        if self.runtime.from_main((final / _FACTS).exists() if self.runtime.is_main else None):
            return Pending(step, None)
        state = {part.name: part.state_dict() for part in parts}
        with self._whole_or_absent(step):
            with self.runtime.together():
                if self.runtime.is_main:
                    self._clear(self.folder)
                    shutil.rmtree(final, ignore_errors=True)  # half copied: it has no facts
                    partial.mkdir(parents=True)
            dcp.save(state, checkpoint_id=partial / _STATE, process_group=self.runtime.control)
            export(partial)
        names = [part.name for part in parts]
        return Pending(step, {"step": step, "processes": self.runtime.world_size, "parts": names, **facts})

    def finish(self, pending: Pending) -> Path:
        """Make a begun checkpoint one that a run resumes from, and remove the oldest; returns its folder. Raises as `begin`."""
        final, partial = self.path(pending.step), self._partial(pending.step)
        if pending.facts is None:
            return final
        with self._whole_or_absent(pending.step), self.runtime.together():
            if self.runtime.is_main:
                (partial / _FACTS).write_text(json.dumps(pending.facts, indent=1))
                partial.rename(final)
                self._prune()
        return final

    def _partial(self, step: int) -> Path:
        """Where a checkpoint lies while it is written or removed."""
        return self.folder / f"{_PARTIAL}{self.path(step).name}"

    @contextmanager
    def _whole_or_absent(self, step: int) -> Iterator[None]:
        """If the block fails, what was written of the checkpoint is removed, and a full disk is explained."""
        try:
            yield
        except _FAILURE as error:
            if self.runtime.is_main:
                shutil.rmtree(self._partial(step), ignore_errors=True)
            raise self._explain(error, step) from error

    def facts(self, step: int) -> dict[str, Any]:
        """What was noted with a checkpoint."""
        try:
            return json.loads((self.path(step) / _FACTS).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise self._unreadable(step, error) from error

    def load(self, step: int, parts: Sequence[Part]) -> None:
        """Restore all parts in place, on any number of ranks. Other state that the checkpoint holds is left there.

        Raises:
            UserError: the checkpoint cannot be read, or does not hold one of the parts. A part is not started anew in the
                middle of a run: the run would not be the one that was never interrupted.
        """
        with self.runtime.together():
            self._check_parts(step, parts)
        state = {part.name: part.state_dict() for part in parts}
        try:
            dcp.load(state, checkpoint_id=self.path(step) / _STATE, process_group=self.runtime.control)
        except _FAILURE as error:
            raise self._unreadable(step, error) from error
        for part in parts:
            part.load_state_dict(state[part.name])

    def _check_parts(self, step: int, parts: Sequence[Part]) -> None:
        saved = self.facts(step).get("parts", _FIRST_PARTS)
        if missing := [part.name for part in parts if part.name not in saved]:
            raise UserError(
                f"the checkpoint has no state of {', '.join(missing)}: the run that saved it had no such part",
                "resume with the settings that the run was started with, or set `output` to a new folder for a new training",
                str(self.path(step)),
            )

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
            doomed = self._partial(step)
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
