"""Reports a training while it runs, on rank 0: progress line, trackers, held-out loss, samples."""

import time

from finetune.engine.heldout import HeldOut
from finetune.engine.optimizers import figures
from finetune.engine.step import StepResult
from finetune.engine.weights.checkpoint import Pending
from finetune.models.batch import Batch
from finetune.recipe import Bucket
from finetune.recipe.load import recipe_values
from finetune.runtime.device import PeakMemory
from finetune.runtime.gpus import known_gpu
from finetune.runtime.logging import say
from finetune.runtime.progress import ProgressLine
from finetune.runtime.units import GIB, counted
from finetune.tracking.trackers import Tracker, open_trackers
from finetune.training.job import Job
from finetune.training.samples import Samples
from finetune.training.utilisation import Utilisation


class Report:
    """Prints the figures of each step and passes them to the trackers. Ranks other than 0 report nothing.

    `memory` is the peak memory of this rank over all steps.
    """

    def __init__(self, job: Job, done: int) -> None:
        """`done`: number of the step after which the run resumes; 0 for a new run."""
        self.job, self.done = job, done
        self.enabled = job.state.runtime.is_main
        self.trackers: list[Tracker] = []
        self.memory = PeakMemory(0, 0)
        gpu = known_gpu(job.state.runtime.device.name) if self.enabled else None
        self.utilisation = Utilisation(job.recipe, job.state.family, gpu)
        self.last_step, self._buckets = done, set[Bucket]()
        self.last = time.monotonic()
        self._took: dict[str, float] = {}  # seconds of the last held-out loss, and of the last samples

    def __enter__(self) -> "Report":
        recipe, job = self.job.recipe, self.job
        if self.enabled:
            if fill_ups := job.order.fill_ups():
                each = ", ".join(f"{count} of {bucket}" for bucket, count in fill_ups.items())
                say(f"samples repeated in each epoch, to fill the last batch of a bucket: {each}")
            trained = sum(parameter.numel() for parameter in job.state.parameters)
            start = f"resuming after step {self.done}" if self.done else "starting"
            say(
                f"{start}: {counted(recipe.train.steps, 'step')}, {job.order.steps_per_epoch} an epoch; global batch "
                f"{job.split.global_batch} = {counted(job.split.size, 'rank')} x {counted(job.split.micro, 'sample')} x "
                f"{job.split.accumulation} accumulation; {trained:,} trained parameters"
            )
        with job.state.runtime.together():
            if self.enabled:
                tracking = recipe.tracking
                if recipe.run_folder != recipe.output:  # that of an expert
                    name = f"{tracking.name or recipe.output.name}-{recipe.run_folder.name}"
                    tracking = tracking.model_copy(update={"name": name})
                self.trackers = open_trackers(tracking, recipe.run_folder, recipe_values(recipe), self.done)
        self.progress = ProgressLine("step", recipe.train.steps, self.done, self.enabled)
        self.restart_clock()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.progress.close()
        for tracker in self.trackers:
            tracker.close(failed=kind is not None)

    def restart_clock(self, what: str | None = None) -> None:
        """Restart the timer, so that other work is not counted in the next step: `what` it was, if it comes again."""
        now = time.monotonic()
        if what is not None:
            self._took[what] = now - self.last
        self.last = now

    def _still_due(self, step: int) -> float:
        """Seconds that held-out losses and samples will take until the end, by how long the last ones took."""
        validation, end = self.job.recipe.validation, self.job.recipe.train.steps
        every = {"held-out": validation.every, "samples": validation.samples_every}
        return sum(seconds * _times_due(every[what], step, end) for what, seconds in self._took.items())

    def step(self, step: int, result: StepResult, batch: Batch, waited: float) -> None:
        """Report the optimizer step number `step`, counted from 1.

        Args:
            batch: one of its micro-batches.
            waited: seconds that this rank has waited for its clips.
        """
        self.last_step = step
        memory = self.job.state.runtime.device.memory()
        self.memory = PeakMemory(
            max(memory.allocated, self.memory.allocated), max(memory.reserved, self.memory.reserved)
        )
        if not self.enabled:
            return
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        samples, plan = self.job.split.global_batch / seconds, self.job.order.plan(step - 1)
        is_new = plan.bucket not in self._buckets
        self._buckets.add(plan.bucket)
        self._log(
            step,
            {
                "loss": result.loss,
                **_by_term("loss", result.losses),
                "grad_norm": result.grad_norm,
                "lr": result.lr,
                **figures(self.job.state.optimizer),
                "epoch": plan.epoch,
                "seconds_per_step": seconds,
                "samples_per_second": samples,
                "data_wait_seconds": waited,
                **self.utilisation.metrics(plan.bucket, batch, self.job.split.accumulation, seconds),
                "peak_memory_allocated_gib": memory.allocated / GIB,
                "peak_memory_reserved_gib": memory.reserved / GIB,
                **result.watched,
            },
        )
        if is_new:
            self.restart_clock()  # the FLOPs of its bucket were counted
        self.progress.update(
            step,
            f"loss {result.loss:.4f}  norm {result.grad_norm:.3f}  {seconds:.2f} s/step  "
            f"{samples:.1f} samples/s  {memory.reserved / GIB:.2f} GiB",
            seconds,
            self._still_due(step),
        )

    def heldout(self, step: int, measured: HeldOut | None) -> None:
        """Report the held-out loss after `step` steps; step 0 is the base model."""
        if self.enabled and measured is not None:
            line, metrics = f"held-out loss after step {step}: {_in_words(measured)}", _heldout_metrics(measured)
            if measured.outside is not None:
                line += f"; outside of the trained noise levels: {_in_words(measured.outside)}"
                metrics |= _heldout_metrics(measured.outside, "_outside")
            say(line)
            self._log(step, metrics)
        self.restart_clock("held-out" if measured is not None else None)

    def samples(self, step: int, samples: Samples | None) -> None:
        """Report videos of the validation prompts after `step` steps; step 0 is the base model."""
        if self.enabled and samples is not None:
            say(f"samples after step {step}: {counted(len(samples.videos), 'video')} in {samples.sheet.parent}")
            if samples.control_change is not None:
                say(
                    f"the LoRA changes a pixel of the control prompts by {samples.control_change:.2g} of 255 on average"
                )
                self._log(step, {"control_change": samples.control_change})
            for tracker in self.trackers:
                tracker.log_videos(step, samples.videos, samples.sheet)
        self.restart_clock("samples" if samples is not None else None)

    def waited_to_save(self, step: int, seconds: float) -> None:
        """Report how long the training waited for the checkpoint of `step` to be begun."""
        if self.enabled:
            self._log(step, {"checkpoint_wait_seconds": seconds})
        self.restart_clock()

    def saved(self, checkpoint: Pending) -> None:
        """Report that a checkpoint is written."""
        if self.enabled:
            took = f" (in {checkpoint.seconds:.1f} s)" if checkpoint.seconds else ""
            say(f"saved {checkpoint.folder}{took}")
            if checkpoint.seconds:  # in the row of the newest step: services take no earlier one
                self._log(max(self.last_step, checkpoint.step), {"checkpoint_seconds": checkpoint.seconds})

    def _log(self, step: int, values: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(step, values)


def _times_due(every: int | None, step: int, end: int) -> int:
    """How often something is done after `step`: each `every` steps and at the end, or at the end alone."""
    if step >= end:
        return 0
    return 1 if every is None else end // every - step // every + bool(end % every)


def _in_words(figures: HeldOut) -> str:
    return f"{figures.loss:.4f} (predicting zero: {figures.zero_loss:.4f})"


def _heldout_metrics(figures: HeldOut, ending: str = "") -> dict[str, float]:
    loss, zero = f"heldout_loss{ending}", f"heldout_zero_loss{ending}"
    totals = {loss: figures.loss, zero: figures.zero_loss}
    by_sigma = {f"heldout_loss_sigma{ending}/q{quarter + 1}": each for quarter, each in figures.by_quarter.items()}
    return totals | _by_term(loss, figures.losses) | _by_term(zero, figures.zero_losses) | by_sigma


def _by_term(name: str, figures: dict[str, float]) -> dict[str, float]:
    """Metrics of each loss term, such as "loss/audio". Empty if there is only one term, which equals the total."""
    return {f"{name}/{term}": value for term, value in figures.items()} if len(figures) > 1 else {}
