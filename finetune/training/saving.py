"""The checkpoint that a run is writing: begun between two steps, written behind the next ones, finished before another."""

import time

from finetune.engine.weights.checkpoint import Pending
from finetune.training.job import Job
from finetune.training.report import Report


class Saving:
    """Saves the checkpoints of a run, one at a time, and reports each once it is written."""

    def __init__(self, job: Job, report: Report) -> None:
        self.job, self.report = job, report
        self._pending: Pending | None = None  # until `finish`, which all ranks call together
        self._is_reported = False

    @property
    def has_failed(self) -> bool:
        """Whether this rank could not write the checkpoint that is pending; `finish` raises why, on all ranks."""
        return self._pending is not None and self._pending.has_failed

    def begin(self, step: int) -> None:
        """Finish the checkpoint before, and begin that of `step` steps. Collective; raises UserError if either is not written."""
        start = time.monotonic()
        self.job.state.runtime.doing(f"saving the checkpoint of step {step}")
        self.finish()
        self._pending, self._is_reported = self.job.begin_save(step), False
        self.report.waited_to_save(step, time.monotonic() - start)
        self.poll()

    def poll(self) -> None:
        """Report the pending checkpoint if it is written, on rank 0. This waits for nothing."""
        pending = self._pending
        if pending and not self._is_reported and pending.is_written and not pending.has_failed:
            self._is_reported = True
            self.report.saved(pending)

    def finish(self) -> None:
        """Wait until the pending checkpoint is written. Collective; raises UserError if it cannot be."""
        if self._pending:
            self.job.state.runtime.doing(f"saving the checkpoint of step {self._pending.step}")
            self.job.checkpoints.finish(self._pending)
            self.poll()
        self._pending = None
