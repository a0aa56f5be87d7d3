"""Which checkpoints are best by held-out loss, and how long there has been no better one.

All of it is noted among a checkpoint's facts, so a run that resumes decides as the run that was never interrupted.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from finetune.runtime.logging import say

LOSS, RECORD = (
    "heldout_loss",
    "heldout_record",
)  # facts of a checkpoint: its own loss, and those that the run had seen by then


@dataclass
class HeldOutRecord:
    """The held-out losses that a run has measured.

    Attributes:
        least: (loss, step), ascending, of the `keep` least after a step, or of the least at least; of equal ones the earlier first.
        best: the least loss so far, which may be the base model's; None before a finite one.
        misses: measurements since then.
        loss, step: the last measurement; None and 0 before the first.
        measured_by: a digest of what losses are measured by, such as the held-out clips. Others are not compared with them.
    """

    keep: int = 1
    measured_by: str = ""
    least: list[tuple[float, int]] = field(default_factory=list)
    best: float | None = None
    misses: int = 0
    loss: float | None = None
    step: int = 0

    def note(self, step: int, loss: float) -> bool:
        """Take a measurement down. Returns whether its step is among the `keep` least; a loss that is not finite is not."""
        self.loss, self.step = loss, step
        is_new = math.isfinite(loss) and (self.best is None or loss < self.best)
        self.best, self.misses = (loss, 0) if is_new else (self.best, self.misses + 1)
        if step and math.isfinite(loss):
            self.least = sorted([*self.least, (loss, step)])[: max(self.keep, 1)]
        return self.keep > 0 and (loss, step) in self.least

    def is_over(self, patience: int | None) -> bool:
        """Whether there has been no new least loss for so many measurements."""
        return patience is not None and self.misses >= patience

    def facts(self, step: int) -> dict[str, Any]:
        """What a checkpoint of a step notes; nothing before the first measurement."""
        if self.loss is None:
            return {}
        record = {
            "least": [list(each) for each in self.least],
            "best": self.best,
            "misses": self.misses,
            "measured_by": self.measured_by,
        }
        record |= {"step": self.step, "loss": self.loss}
        measured = self.step == step and math.isfinite(self.loss)
        return {RECORD: record} | ({LOSS: self.loss} if measured else {})

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Take up what `facts` gave. A checkpoint without begins a new record, and so does one of other measurements."""
        new: dict[str, Any] = {"least": [], "best": None, "misses": 0, "step": 0, "loss": None}
        record = facts.get(RECORD, new)
        if self.measured_by and record.get("measured_by", self.measured_by) != self.measured_by:
            say(
                "held-out losses are measured otherwise from here on (clips, sigmas, average): which is best begins anew"
            )
            record = new
        self.least = [(float(loss), int(step)) for loss, step in record["least"]][: max(self.keep, 1)]
        self.best, self.misses = record["best"], record["misses"]
        self.step, self.loss = record["step"], record["loss"]


def ranked(steps: Sequence[int], facts: Callable[[int], Mapping[str, Any]]) -> list[int]:
    """Steps of the checkpoints that note a loss, the least first; of equal ones, the earlier. Losses that were measured otherwise
    than the newest are left out.

    Args:
        facts: of a checkpoint by its step; raises OSError or ValueError.
    """
    losses, measured_by = {}, {}
    for step in steps:
        with suppress(OSError, ValueError):
            if LOSS in (noted := facts(step)):
                losses[step], measured_by[step] = noted[LOSS], noted.get(RECORD, {}).get("measured_by")
    newest = measured_by[max(losses)] if losses else None
    losses = {
        step: loss for step, loss in losses.items() if measured_by[step] in (None, newest)
    }  # older ones note none
    return sorted(losses, key=lambda step: (losses[step], step))
