"""The training run: prepare, build, resume, loop, export."""

import signal
from pathlib import Path

from finetune.check import check_output, check_recipe, open_family
from finetune.engine.export import LORA_FILE
from finetune.engine.step import StepResult
from finetune.job import Job, build
from finetune.prepare import prepare
from finetune.recipe import Recipe, load_recipe, write_recipe
from finetune.recipe.load import changes
from finetune.report import Report
from finetune.runtime.distributed import Runtime, describe
from finetune.runtime.errors import UserError
from finetune.runtime.files import FolderLock, atomic, writing
from finetune.runtime.logging import say
from finetune.runtime.signals import StopRequest


def train(recipe: Recipe, runtime: Runtime) -> int:
    """Run a recipe to its end, or to a polite stop; returns the process's exit status.

    The same call resumes: it starts after the newest complete checkpoint in the output folder.
    """
    with runtime.together():
        if problems := check_recipe(recipe, runtime.world_size):
            raise UserError.of(problems)
        check_output(recipe)
        family = open_family(recipe)
    say(f"finetune: {recipe.model.path} ({family.name}), {recipe.train.method}, {describe(runtime)}")
    prepared = prepare(recipe, family, runtime)
    with runtime.together():
        lock = _claim_output(recipe) if runtime.is_main else None
    job = build(recipe, runtime, family, prepared)
    done = job.resume()
    with Report(job, done) as report:
        stopped = run(job, done, report)
    if stopped is not None:
        say(f"stopped by {stopped.name}; the same command goes on from the checkpoint")
        return 128 + stopped
    status = finish(job)
    del lock
    return status


def _claim_output(recipe: Recipe) -> FolderLock:
    """Lock the output folder, and write the effective recipe; say what has changed since the run began."""
    saved = recipe.output / "recipe.toml"
    with writing(recipe.output):
        recipe.output.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(recipe.output)
    if saved.exists():
        for change in changes(recipe, load_recipe(saved)):
            say(f"changed since the run began: {change}")
    with atomic(saved) as partial:
        write_recipe(recipe, partial)
    return lock


def run(job: Job, done: int, report: Report) -> signal.Signals | None:
    """Train from step `done` to the recipe's last; returns the signal that ended the run early, or None."""
    stop = StopRequest()
    recipe = job.recipe
    batches = job.batches(done)
    if done == 0:
        report.heldout(0, job.heldout_loss())
    for step in range(done, recipe.train.steps):
        micro_batches = [next(batches) for _ in range(job.layout.accumulation)]
        result = job.step(step, micro_batches, stop=stop.requested)
        report.step(step + 1, result)
        if not result.updated:
            raise _not_finite(job, step, result)
        is_last = step + 1 == recipe.train.steps
        if is_last or (recipe.validation.every and (step + 1) % recipe.validation.every == 0):
            report.heldout(step + 1, job.heldout_loss())
        if is_last or result.stop or (step + 1) % recipe.checkpoint.every == 0:
            report.saved(job.save(step + 1))
        if result.stop and not is_last:
            return stop.signal or signal.SIGTERM  # another rank may have been asked first
    return None


def finish(job: Job) -> int:
    """Export the trained weights, and say where they lie and how to use them."""
    lora = job.recipe.train.method == "lora"
    folder = (job.recipe.output / ("lora" if lora else "transformer")).absolute()
    with writing(folder):
        job.export(folder)
    say(f"\ndone. The {'LoRA' if lora else 'transformer'} lies in {folder}\nUse it with diffusers:\n")
    pipeline, model = job.state.family.pipeline_class, job.recipe.model.path
    dtype = "torch.bfloat16" if job.recipe.train.precision == "bf16" else "torch.float32"
    if job.recipe.model.revision != "main":
        model += f'", revision="{job.recipe.model.revision}'
    if lora:
        say(f'    pipe = diffusers.{pipeline}.from_pretrained("{model}", torch_dtype={dtype})')
        say(f'    pipe.load_lora_weights("{folder}", weight_name="{LORA_FILE}")')
    else:
        transformer = job.state.family.transformer_class
        say(f'    transformer = diffusers.{transformer}.from_pretrained("{folder}", torch_dtype={dtype})')
        say(f'    pipe = diffusers.{pipeline}.from_pretrained("{model}", transformer=transformer, torch_dtype={dtype})')
    say('    video = pipe("your prompt").frames[0]')
    return 0


def _not_finite(job: Job, step: int, result: StepResult) -> UserError:
    """The parameters are as they were before the step: keep them, and say what was in it."""
    saved = f"; the weights before it are kept in {job.save(step)}" if step else ""
    clips: list[Path] = [job.prepared.train[index].path for index in job.order.plan(step).items]
    return UserError(
        f"loss {result.loss}, gradient norm {result.grad_norm} in step {step + 1}: no update was made{saved}",
        "lower optimizer.lr or train.max_grad_norm, then run the same command; if it comes back, look at the step's "
        f"clips: {', '.join(sorted({str(clip) for clip in clips}))}",
    )
