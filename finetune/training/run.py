"""The training run: prepare, build, resume, loop, export."""

import signal
from pathlib import Path

import torch

from finetune.checks.model import open_family
from finetune.checks.output import check_output
from finetune.checks.settings import check_device, check_recipe
from finetune.engine.step import StepResult
from finetune.engine.weights.exporters import exporter_of
from finetune.models.family import Family
from finetune.preparation.encode import prepare
from finetune.recipe import Recipe, load_recipe, write_recipe
from finetune.recipe.load import changes
from finetune.runtime.distributed import Runtime, describe
from finetune.runtime.errors import UserError
from finetune.runtime.files import FolderLock, atomic, writing
from finetune.runtime.logging import say
from finetune.runtime.signals import StopRequest
from finetune.training.job import Job, build, export_weights
from finetune.training.memory import MemoryPlan, StartPlan, compare, out_of_memory, start_no_plan
from finetune.training.report import Report
from finetune.training.samples import has_samples, validation_samples
from finetune.training.usage import say_usage


def train(recipe: Recipe, runtime: Runtime, start_plan: StartPlan = start_no_plan) -> int:
    """Run a recipe to its end, or to a polite stop; returns the process's exit status.

    The same call resumes: it starts after the newest complete checkpoint in the output folder.

    Args:
        start_plan: starts a plan of the training's memory, which is made beside it.
    """
    with runtime.together():
        if problems := check_recipe(recipe, runtime.data.size) + check_device(recipe, runtime.device):
            raise UserError.of(problems)
        check_output(recipe)
        family = open_family(recipe)
    say(f"finetune: {recipe.model.path} ({family.name}), {recipe.train.method}, {describe(runtime)}")
    runtime.device.record_memory()
    with start_plan(recipe, family, runtime) as plan:
        return _train(recipe, runtime, family, plan)


def _train(recipe: Recipe, runtime: Runtime, family: Family, plan: MemoryPlan) -> int:
    """The training of a recipe that is known to be sound."""
    prepared = prepare(recipe, family, runtime)
    with runtime.together():
        lock = _claim_output(recipe) if runtime.is_main else None
    job = build(recipe, runtime, family, prepared)
    done = job.resume()
    if done > recipe.train.steps:
        raise UserError(
            f"this run is already at step {done}, past train.steps = {recipe.train.steps}",
            f"raise train.steps, or write an earlier state with: python -m finetune export --step N ({job.checkpoints.folder})",
            str(recipe.output),
        )
    with StopRequest() as stop, Report(job, done) as report:
        stopped = run(job, done, report, stop, plan)
        if done < recipe.train.steps:
            compare(plan, report.memory, recipe, runtime)
        if not stopped:
            exported = export(job)
            if done < recipe.train.steps:  # after the weights are safe: samples need the most memory
                report.samples(recipe.train.steps, validation_samples(job, recipe.train.steps, lambda: stop.requested))
    if stopped:
        signal_ = stop.signal or signal.SIGTERM  # another rank may have been asked first
        say(f"stopped by {signal_.name}; the same command goes on from the newest checkpoint")
        return 128 + signal_
    say_usage(job, exported)
    del lock
    return 0


def _claim_output(recipe: Recipe) -> FolderLock:
    """Lock the output folder, and write the effective recipe; say what has changed since its last start."""
    saved = recipe.output / "recipe.toml"
    with writing(recipe.output):
        recipe.output.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(recipe.output)
    if saved.exists():
        for change in changes(recipe, load_recipe(saved)):
            say(f"changed since the last start: {change}")
    with atomic(saved) as partial:
        write_recipe(recipe, partial)
    return lock


def run(job: Job, done: int, report: Report, stop: StopRequest, plan: MemoryPlan) -> bool:
    """Train from step `done` to the recipe's last; returns whether the run was asked to end before it."""
    recipe, validation, runtime = job.recipe, job.recipe.validation, job.state.runtime
    batches = job.batches(done)
    if done == 0:
        report.heldout(0, job.heldout_loss())
    if done == 0 or (_due(validation.samples_every, done) and not has_samples(job, done)):  # a stop came before them
        report.samples(done, validation_samples(job, done, lambda: stop.requested))
    for step in range(done, recipe.train.steps):
        plan.poll()
        micro_batches = [next(batches) for _ in range(job.split.accumulation)]
        try:
            result = job.step(step, micro_batches, stop=stop.requested)
        except torch.OutOfMemoryError as error:  # of one rank, amid collectives: the others end with its process
            raise out_of_memory(error, step + 1, job.order.plan(step).bucket, plan, recipe, runtime) from error
        report.step(step + 1, result)
        if not result.updated:
            kept = job.save(step) if step and not job.state.in_backward else None
            raise _not_finite(job, step, result, kept)
        is_last = step + 1 == recipe.train.steps
        if is_last or _due(validation.every, step + 1):
            report.heldout(step + 1, job.heldout_loss())
        if is_last or result.stop or _due(recipe.checkpoint.every, step + 1):
            report.saved(job.save(step + 1))
        if result.stop and not is_last:
            return True
        if not is_last and _due(validation.samples_every, step + 1):
            report.samples(step + 1, validation_samples(job, step + 1, lambda: stop.requested))
    return False


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def export(job: Job) -> Path:
    """Write the trained weights; returns their folder."""
    exporter = exporter_of(job.recipe.train.method)
    folder = (job.recipe.output / exporter.folder(job.state.family)).absolute()
    with writing(folder):
        export_weights(job.state, job.recipe.train.method, folder)
    return folder


def _not_finite(job: Job, step: int, result: StepResult, kept: Path | None) -> UserError:
    """The error for a step whose loss or norm is not finite, with the clips that were in it.

    With in_backward, parameters have already changed; the newest checkpoint is the last good state.

    Args:
        kept: the checkpoint of the weights before the step, if one was written.
    """
    made = "no update was made"
    saved = f"; the weights before it are kept in {kept}" if kept else ""
    if job.state.in_backward:
        made = "it was part of the update (optimizer.in_backward); the run goes on from its newest checkpoint"
    clips: list[Path] = [job.prepared.train[index].path for index in job.order.plan(step).items]
    return UserError(
        f"loss {result.loss}, gradient norm {result.grad_norm} in step {step + 1}: {made}{saved}",
        "lower optimizer.lr or train.max_grad_norm, then run the same command; if it comes back, look at the step's "
        f"clips: {', '.join(sorted({str(clip) for clip in clips}))}",
    )
