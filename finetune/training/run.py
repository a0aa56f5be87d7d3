"""The training run: prepare, build, resume, loop, export."""

import gc
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path

import torch

from finetune.checks.buckets import resolve_buckets
from finetune.checks.model import open_family
from finetune.checks.output import check_output
from finetune.checks.settings import check_cpu, check_device, check_recipe, refuse_large_model
from finetune.data.cache import Cache
from finetune.engine.attention import explained
from finetune.models.family import Family
from finetune.preparation.encode import Prepared, prepare
from finetune.recipe import RECIPE_FILE, Recipe, write_recipe
from finetune.recipe.experts import recipes_of_experts
from finetune.runtime.device import why_no_accelerator
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import LostPeer, UserError
from finetune.runtime.files import atomic
from finetune.runtime.hosts import describe, refuse_unshared
from finetune.runtime.logging import LOG_FILE, logged, say
from finetune.runtime.signals import StopRequest
from finetune.runtime.units import counted
from finetune.tracking.metrics import check_metrics
from finetune.training.identity import begun
from finetune.training.job import Job, build
from finetune.training.memory import MemoryHistory, MemoryPlan, StartPlan, compare, out_of_memory, start_no_plan
from finetune.training.not_finite import bad_update, first_bad_weight, not_finite
from finetune.training.output import Results, claim_output, ended_at, is_over, keep_recipe
from finetune.training.report import Report
from finetune.training.run_page.at_end import with_page
from finetune.training.sample_grid import write_grid
from finetune.training.samples import has_prompts, has_samples, validation_samples
from finetune.training.saving import Saving
from finetune.training.start_note import write_start_note
from finetune.training.usage import say_usage


def train(
    recipe: Recipe,
    runtime: Runtime,
    start_plan: StartPlan = start_no_plan,
    resume_step: int | None = None,
    any_size_on_cpu: bool = False,
) -> int:
    """Run a recipe to its end, or to a polite stop; returns the process's exit status.

    The same call resumes: it starts after the newest sound checkpoint in the output folder. Of a run that has made all its
    steps, it makes those results that are missing.

    Args:
        start_plan: starts a plan of the training's memory, which is made beside it.
        resume_step: go back to this checkpoint instead of the newest.
        any_size_on_cpu: whether large models are trained without a GPU, too.
    """
    with runtime.together():
        problems = check_recipe(recipe, runtime.data.size) + check_device(recipe, runtime.device)
        if problems := problems + (check_cpu(recipe) if runtime.device.is_cpu else []):
            raise UserError.of(problems)
        family = open_family(recipe)
        recipes = recipes_of_experts(recipe, list(family.experts))
        for each in recipes:
            check_output(each)
        if len(recipes) > 1 and resume_step is not None:
            cure = "name one of them: --set model.experts=" + " or ".join(family.experts)
            raise UserError("each expert has steps of its own", cure, "--resume-step")
        if runtime.device.is_cpu and not any_size_on_cpu:
            refuse_large_model(family)
    among, *hosts = describe(runtime)
    say("\n".join([f"finetune: {recipe.model.path} ({family.name}), {recipe.train.method}, {among}", *hosts]))
    if runtime.device.is_cpu:
        say(f"training on the CPU: {'--cpu' if any_size_on_cpu else why_no_accelerator()}")
    store = Cache(recipe.data.cache)
    recipe = resolve_buckets(recipe, family, runtime, store)
    recipes = recipes_of_experts(recipe, list(family.experts))
    # Once: experts are trained on the same clips.
    prepared = cache(partial(prepare, recipe, family, runtime, store, begun=begun(recipes, family)))
    with runtime.together():
        if runtime.is_main and len(recipes) > 1:
            with atomic(recipe.output / RECIPE_FILE) as partial_file:
                write_recipe(recipe, partial_file, "The recipe of the runs in this folder, one for each expert.")
    for each in recipes:
        status = _train_one(each, runtime, family, prepared, start_plan, resume_step, is_last=each is recipes[-1])
        if status:
            return status
    return 0


def _train_one(
    recipe: Recipe,
    runtime: Runtime,
    family: Family,
    prepared: Callable[[], Prepared],
    start_plan: StartPlan,
    resume_step: int | None,
    is_last: bool,
) -> int:
    """Train one transformer; returns the process's exit status.

    Args:
        prepared: prepares the clips when it is first called.
        is_last: whether no other expert is to be trained after it. Else one that has all its results is passed over before
            any weight is read.
    """
    if recipe.model.experts:
        (name,) = recipe.model.experts
        family = family.of_expert(name)
        low, high = recipe.objective.sigma_range or family.experts[name].noise_range
        say(f"the {name}-noise expert ({family.trained_component}, sigma {low:g} to {high:g}), in {recipe.run_folder}")
        clips = None if is_last else prepared()
        with runtime.together():
            over = runtime.is_main and clips is not None and is_over(recipe, family, clips)
        if runtime.from_main(over):
            say(f"it is finished: {counted(ended_at(recipe), 'step')} and all results")
            return 0
    runtime.device.record_memory()
    try:
        with start_plan(recipe, family, runtime) as plan:
            return _train(recipe, runtime, family, prepared, plan, resume_step, is_last)
    finally:
        gc.collect()  # the weights and the optimizer's state, before another expert's
        runtime.device.empty_cache()


def _train(
    recipe: Recipe,
    runtime: Runtime,
    family: Family,
    prepare_once: Callable[[], Prepared],
    plan: MemoryPlan,
    resume_step: int | None,
    is_last: bool,
) -> int:
    """The training of a recipe that is known to be sound."""
    runtime.doing("preparing the clips")
    prepared = prepare_once()
    with runtime.together():
        lock = claim_output(recipe) if runtime.is_main else nullcontext()
    with lock, logged(recipe.run_folder / LOG_FILE) if runtime.is_main else nullcontext(), ExitStack() as stack:
        refuse_unshared(runtime, recipe.run_folder)
        runtime.doing("loading the weights")
        job = build(recipe, runtime, family, prepared)
        stack.enter_context(job.checkpoints)
        if resume_step is not None:
            say(f"going back to step {resume_step}; leave --resume-step out to go on from the newest checkpoint again")
        done = job.resume(resume_step)
        if done > recipe.train.steps:
            raise UserError(
                f"this run is already at step {done}, past train.steps = {recipe.train.steps}",
                "raise train.steps, go back with --resume-step N, or write an earlier state: "
                "python -m finetune export --recipe R --step N --out DIR",
                str(recipe.run_folder),
            )
        if resume_step is None and done < recipe.train.steps and _is_finished(job):
            return 0  # the checkpoint of the last step is damaged, but nothing is missing that it would be needed for
        with runtime.together():
            if runtime.is_main:
                check_metrics(recipe.run_folder, done)
        job.checkpoints.set_aside_after(done)
        kept = Path()
        with runtime.together():
            if runtime.is_main:
                kept = keep_recipe(recipe, done)
        write_start_note(job, kept)
        return with_page(recipe, runtime, lambda: _go_on(job, done, plan, is_last))


def _is_finished(job: Job) -> bool:
    """Whether the run has made all its steps and all results, and says so. Collective."""
    steps = job.end
    if not job.state.runtime.from_main(steps in job.checkpoints.steps()) or not Results(job).are_complete():
        return False
    cure, why = "raise train.steps to go on", ""
    if job.is_out_of_patience:
        cure = "raise validation.patience, or remove it, to go on"
        why = f" (the held-out loss was measured {counted(job.record.misses, 'time')} without a new least one)"
    say(
        f"this run is finished: {counted(steps, 'step')}{why}, and all results are in {job.recipe.run_folder}; {cure}",
        is_result=True,
    )
    return True


def _go_on(job: Job, done: int, plan: MemoryPlan, is_last: bool) -> int:
    """Train from step `done` to the end, and make the results; returns the process's exit status.

    Args:
        is_last: whether this start trains no other expert after this one. Else a stop that came too late for this one is obeyed
            before the other begins.
    """
    recipe, results = job.recipe, Results(job)
    steps = job.end
    if done == steps and _is_finished(job):
        return 0
    if done < steps:
        results.forget(done)
    elif job.is_out_of_patience:
        _say_out_of_patience(job)
    with StopRequest() as stop, Report(job, done) as report, _attention_explained(recipe):
        stopped = run(job, done, report, stop, plan)
        if not stopped:
            is_trained, steps = done < steps, job.end
            job.state.runtime.doing("exporting")
            exported = results.export()
            if recipe.validation.samples_at_end and (is_trained or not has_samples(job, steps)):
                # After the weights are safe: samples need the most memory.
                samples = validation_samples(job, steps, lambda: stop.requested)
                report.samples(steps, samples)
                stopped = samples is None and has_prompts(job)  # the next start makes them
            if is_trained and not stopped and (grid := write_grid(job)):
                say(f"the samples of all steps: {grid}")
    if stopped:
        signal_ = stop.signal or signal.SIGTERM  # another rank may have been asked first
        say(f"stopped by {signal_.name}; the same command goes on from step {max(job.checkpoints.steps(), default=0)}")
        return 128 + signal_
    say_usage(job, exported)
    _say_best(job)
    (asked,) = job.state.runtime.any(stop.requested)
    if asked and not is_last:
        signal_ = stop.signal or signal.SIGTERM
        say(f"stopped by {signal_.name}; the same command goes on with the other expert")
        return 128 + signal_
    return 0


def run(job: Job, done: int, report: Report, stop: StopRequest, plan: MemoryPlan) -> bool:
    """Train from step `done` to the recipe's last; returns whether the run was asked to end before it."""
    recipe, validation, runtime = job.recipe, job.recipe.validation, job.state.runtime
    batches, saving, history = job.batches(done), Saving(job, report), MemoryHistory(runtime.device)
    if done == 0:
        _measure(job, 0, report)
    is_late = 0 < done < job.end and _due(validation.samples_every, done) and not has_samples(job, done)
    if (done == 0 and validation.samples_at_start) or is_late:  # a stop came before them
        samples = validation_samples(job, done, lambda: stop.requested)
        report.samples(done, samples)
        if samples is None and has_prompts(job):  # stopped again
            return True
    for step in range(done, job.end):
        plan.poll()
        saving.poll()
        runtime.doing(f"waiting for the clips of step {step + 1}")
        waiting = time.monotonic()
        micro_batches = [next(batches) for _ in range(job.split.accumulation)]
        waited = time.monotonic() - waiting
        runtime.doing(f"in step {step + 1}", is_limited=True)
        history.before_step(job.order.plan(step).bucket)
        try:
            result = job.step(step, micro_batches, stop=stop.requested or saving.has_failed)
        except torch.OutOfMemoryError as error:  # of one rank, amid collectives: the others end with its process
            raise out_of_memory(error, step + 1, job.order.plan(step).bucket, plan, recipe, runtime) from error
        runtime.doing(f"after step {step + 1}")
        report.step(step + 1, result, micro_batches[0], waited)
        if not result.updated:
            saving.finish()
            raise not_finite(job, step, result, micro_batches)
        is_last = step + 1 == recipe.train.steps
        is_stopped = result.stop and not is_last
        is_best = False
        with _saved_if_it_fails(saving, job, step + 1):
            if is_last or _due(validation.every, step + 1):
                is_best = _measure(job, step + 1, report)
        if not is_last and job.is_out_of_patience:
            _say_out_of_patience(job)
            is_last, is_stopped = True, False
        if is_last:  # before its checkpoint, after which a new start could not measure it
            compare(plan, report.memory, recipe, runtime)
        if is_last or is_best or result.stop or _due(recipe.checkpoint.every, step + 1):
            _save(saving, job, step + 1)
        if not is_last and not is_stopped and _due(validation.samples_every, step + 1):
            with _saved_if_it_fails(saving, job, step + 1):
                samples = validation_samples(job, step + 1, lambda: stop.requested)
                report.samples(step + 1, samples)
            if samples is None and has_prompts(job):  # a stop: the next start makes them
                _save(saving, job, step + 1)
                is_stopped = True
        if is_stopped:
            saving.finish()
            return True
        if is_last:
            break
    saving.finish()
    return False


def _measure(job: Job, step: int, report: Report) -> bool:
    """Measure and report the held-out loss, if there is one; returns whether the step is among the best. Collective."""
    figures = job.heldout_loss()
    report.heldout(step, figures)
    return figures is not None and job.record.note(step, figures.loss)


def _say_out_of_patience(job: Job) -> None:
    misses = job.record.misses
    say(f"held-out loss: no new least one in {misses} measurements, so the run ends (validation.patience)")


def _say_best(job: Job) -> None:
    """Name the checkpoint of the least held-out loss, where such checkpoints are kept and it is not the last step's."""
    for loss, step in job.record.least[:1] if job.recipe.checkpoint.keep_best else []:
        if step != job.end:
            how = f"python -m finetune export --recipe {job.recipe.output}/recipe.toml --step best --out DIR"
            say(f"the held-out loss was least after step {step} ({loss:.4f}); those weights: {how}")


@contextmanager
def _attention_explained(recipe: Recipe) -> Iterator[None]:
    """Name the setting where the kernel that was chosen for attention cannot take what the model gives it."""
    try:
        yield
    except RuntimeError as error:
        if told := explained(error, recipe.memory.attention):
            raise told from error
        raise


@contextmanager
def _saved_if_it_fails(saving: Saving, job: Job, step: int) -> Iterator[None]:
    """An evaluation that fails, on all ranks, does not cost the steps since the last checkpoint."""
    try:
        yield
    except LostPeer:  # a checkpoint is written by all ranks
        raise
    except UserError:
        _save(saving, job, step)
        saving.finish()
        raise


def _save(saving: Saving, job: Job, step: int) -> None:
    """Begin a checkpoint, but not of weights that an update has spoilt: nothing could go on from them. Collective."""
    if name := first_bad_weight(job):
        saving.finish()
        raise bad_update(job, step, name)
    saving.begin(step)


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
