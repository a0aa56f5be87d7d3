"""From a recipe to a built job: `build` then `job.step(batches)`, the same on GPUs, on CPUs and in simulation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from finetune.data.cache import digest
from finetune.data.loader import BatchSplit, Dropout, MicroBatches, open_loader, read_sample
from finetune.data.sampler import Order
from finetune.engine.ema import WeightAverage
from finetune.engine.frozen_base import FrozenBase
from finetune.engine.heldout import HeldOut, heldout_loss
from finetune.engine.optimizers import build_optimizer
from finetune.engine.optimizers.in_backward import InBackward
from finetune.engine.optimizers.offloaded import HostGradients, OffloadedOptimizer
from finetune.engine.optimizers.rates import scale_rates
from finetune.engine.parallel import parallelize, trained_parameters
from finetune.engine.parts import OptimizerState, Part, TrainedWeights, evaluating
from finetune.engine.precision import storage_dtype
from finetune.engine.savers.offload import ActivationOffload
from finetune.engine.schedule import build_schedule, set_schedule_step
from finetune.engine.step import StepResult, StepState, run_step
from finetune.engine.watching import Watching
from finetune.engine.weights.best import HeldOutRecord, ranked
from finetune.engine.weights.checkpoint import Checkpoints, Pending
from finetune.engine.weights.exporters import exporter_of
from finetune.engine.weights.exporters.exporter import Details, Exporter
from finetune.engine.weights.loading import load_weights
from finetune.engine.weights.starting import start_adapter
from finetune.models.adapters import ADAPTERS
from finetune.models.adapters.given import read_started, with_frozen
from finetune.models.adapters.reading import ReadAdapter
from finetune.models.batch import Batch
from finetune.models.family import Family
from finetune.models.objective import Objective
from finetune.models.weights import Weights
from finetune.preparation.encode import Prepared
from finetune.recipe import Recipe
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.logging import say
from finetune.training.facts import facts_of
from finetune.training.identity import BASE, CLIPS, GIVEN, check_identity, say_if_not_compared, shared_identity


@dataclass
class Job:
    """A training that is ready to run: its state, its data, its checkpoints, and what its clips and base weights are known by.

    Attributes:
        done: the step of the checkpoint that it goes on from; 0 of a new run.
    """

    recipe: Recipe
    state: StepState
    objective: Objective
    prepared: Prepared
    order: Order
    split: BatchSplit
    checkpoints: Checkpoints
    identity: dict[str, str]
    record: HeldOutRecord = field(default_factory=HeldOutRecord)
    done: int = 0

    @property
    def end(self) -> int:
        """The run's last step: the recipe's, or the one after which validation.patience is used up.

        A run that is given a smaller patience after its last measurement ends with the steps that it has made since.
        """
        return max(self.record.step, self.done) if self.is_out_of_patience else self.recipe.train.steps

    @property
    def is_out_of_patience(self) -> bool:
        """Whether the held-out loss has ended the run."""
        return self.record.is_over(self.recipe.validation.patience)

    def step(self, step: int, micro_batches: Sequence[Batch], stop: bool = False) -> StepResult:
        """One optimizer step; see `run_step`."""
        return run_step(self.state, step, micro_batches, stop)

    def batches(self, first_step: int) -> Iterator[Batch]:
        """This rank's micro-batches from a step to the end, read ahead by worker processes."""
        pin = not self.state.runtime.device.is_cpu
        last_step, workers = self.recipe.train.steps, self.recipe.data.workers
        for batch in open_loader(self.micro_batches(), first_step, last_step, workers, pin):
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def micro_batches(self) -> MicroBatches:
        """The same by index, read in this process."""
        return MicroBatches(
            self.prepared.train,
            self.order,
            self.split,
            self.prepared.cache,
            partial(self.state.family.batch, objective=self.objective),
            self.recipe.train.seed,
            Dropout(self.recipe.data.caption_dropout, self.recipe.data.image_dropout, self.prepared.unconditional_key),
            self._blank_key,
        )

    @property
    def _blank_key(self) -> str | None:
        """The key of the text without a caption, if samples need it for their targets."""
        return None if self.recipe.objective.guidance_target is None else self.prepared.unconditional_key

    def resume(self, step: int | None = None) -> int:
        """Restore the newest checkpoint that is as it was written, if there is one. Collective; returns the number of steps done.

        Args:
            step: go back to this checkpoint instead.
        Raises:
            UserError: it is damaged, or of another training.
        """
        taken = sound_checkpoint(self.checkpoints, step)
        if taken is None:
            return 0
        with self.state.runtime.together():
            facts = self.checkpoints.facts(taken)
            self._check_identity(facts)
            self.record.restore(facts)
        self.checkpoints.load(taken, self.state.parts)
        set_schedule_step(self.state.schedule, taken)
        self.done = taken
        return taken

    def _check_identity(self, facts: dict) -> None:
        if missing := {CLIPS, BASE} - facts.keys():
            raise UserError(
                f"the trainer.json of the checkpoint of step {facts['step']} lacks {', '.join(sorted(missing))}",
                "put it back from a copy, or move the checkpoint's folder away: the run then goes on from the one before",
                str(self.checkpoints.path(facts["step"])),
            )
        check_identity(facts, self.identity, self.recipe)
        say_if_not_compared(facts, self.state.family)

    def begin_save(self, step: int, aside: bool = False) -> Pending:
        """Begin the checkpoint after `step` optimizer steps, with the adapter as diffusers loads it. Collective.

        Args:
            aside: see `Checkpoints.begin`.
        """
        exporter, details = exporter_of(self.recipe.train.method), self.details(step)

        def write(folder: Path) -> None:
            if exporter.is_small:
                write_weights(self.state, exporter, folder / exporter.folder(self.state.family), details)

        facts = {**self.identity, **self.record.facts(step)}
        return self.checkpoints.begin(step, self.state.parts, facts, write, aside)

    def save(self, step: int, aside: bool = False) -> Path:
        """Begin and finish it."""
        return self.checkpoints.finish(self.begin_save(step, aside))

    def details(self, step: int) -> Details:
        """What goes with the weights of a step where they are exported in a run's own form, as they were trained."""
        return details_of(self.recipe, self.state.family, step, self.identity.get(GIVEN))

    def idle_batch(self) -> Batch:
        """The training clip that costs least, for calls that only keep ranks in step."""
        family = self.state.family
        item = min(self.prepared.train, key=lambda item: family.tokens(item.bucket))
        sample = read_sample(item, self.prepared.cache, torch.Generator(), self._blank_key)
        return family.batch([sample], self.objective)

    def heldout_loss(self) -> HeldOut | None:
        """Loss on the held-out clips, if the recipe names any. Collective."""
        if not self.prepared.heldout:
            return None
        quantiles, items = self.recipe.validation.sigmas, self.prepared.heldout
        self.state.runtime.doing("measuring the held-out loss")
        return heldout_loss(self.state, self.objective, items, self.prepared.cache, quantiles, self._blank_key)


def build_state(
    recipe: Recipe, runtime: Runtime, family: Family, weights: Weights, started: ReadAdapter | None = None
) -> StepState:
    """Build the transformer, make it trainable, read its weights, and put optimizer and schedule around it. Collective.

    Args:
        weights: the pretrained transformer's; each rank reads the rows that it holds.
        started: the adapter that the trained one begins as.
    """
    train, memory = recipe.train, recipe.memory
    family.keeps_text_length = memory.compile
    transformer = family.build_transformer(storage_dtype(train))
    transformer = parallelize(transformer, family, train, recipe.adapter, memory, runtime)
    with runtime.together():
        load_weights(transformer, weights, runtime.device.torch_device)
        if started is not None:
            start_adapter(transformer, started)
    parameters = trained_parameters(transformer)
    optimizer, host_gradients = build_optimizer(parameters, recipe.optimizer, train.weights), None
    if recipe.adapter is not None:
        scale_rates(optimizer, parameters, partial(ADAPTERS[train.method].rate, recipe.adapter))
    if recipe.optimizer.offload == "state_and_gradients":
        host_gradients = HostGradients(list(parameters.values()), runtime.device)
    if recipe.optimizer.offload != "none":
        optimizer = OffloadedOptimizer(optimizer, runtime.device, host_gradients)
    parts: list[Part] = [TrainedWeights(transformer), OptimizerState(transformer, optimizer)]
    if recipe.ema.decay is not None:
        parts.append(WeightAverage(parameters, recipe.ema, runtime))
    return StepState(
        family=family,
        transformer=transformer,
        parameters=list(parameters.values()),
        optimizer=optimizer,
        parts=parts,
        schedule=build_schedule(optimizer, recipe.schedule, train.steps),
        runtime=runtime,
        max_grad_norm=None if train.max_grad_norm == "none" else train.max_grad_norm,
        defer_reduction=train.method == "lora",
        seed=train.seed,
        activations=ActivationOffload(runtime.device) if recipe.memory.offload_activations else None,
        in_backward=InBackward(optimizer) if recipe.optimizer.in_backward else None,
        host_gradients=host_gradients,
        base=None if recipe.objective.guidance_target is None else FrozenBase(transformer),
        watching=Watching(parameters, family.block_lists, runtime.device, recipe.tracking),
    )


def build(recipe: Recipe, runtime: Runtime, family: Family, prepared: Prepared) -> Job:
    """The training of a recipe on a prepared dataset. Collective."""
    train, checkpoints = recipe.train, open_checkpoints(recipe, runtime)
    begins = runtime.from_main(not checkpoints.steps())  # else a checkpoint has what became of lora.start_from
    with runtime.together():
        weights = with_frozen(family.transformer_weights(), recipe.adapter, family)
        started = read_started(recipe.adapter, family) if begins else None
    state = build_state(recipe, runtime, family, weights, started)
    runtime.device.reset_peak()
    return Job(
        recipe=recipe,
        state=state,
        objective=family.training_objective(recipe.objective),
        prepared=prepared,
        order=order_of(recipe, prepared),
        split=BatchSplit(runtime.data.rank, runtime.data.size, train.global_batch_size, train.micro_batch_size),
        checkpoints=checkpoints,
        identity=shared_identity(recipe, family, prepared, runtime),
        record=HeldOutRecord(recipe.checkpoint.keep_best, _measured_by(recipe, prepared)),
    )


def _measured_by(recipe: Recipe, prepared: Prepared) -> str:
    """A digest of what held-out losses are measured by: losses by another one are not compared with them.

    The order of the clips is part of it: the noise of each depends on its place, see `heldout_loss`.
    """
    averaged = recipe.ema.decay is not None and "heldout" in recipe.ema.use
    return digest([[sorted(item.keys.items()) for item in prepared.heldout], recipe.validation.sigmas, averaged])


def order_of(recipe: Recipe, prepared: Prepared) -> Order:
    """The order in which a recipe's training takes its clips."""
    return Order(
        [item.bucket for item in prepared.train],
        recipe.train.global_batch_size,
        recipe.train.seed,
        [item.source for item in prepared.train],
        [source.repeats for source in recipe.data.datasets],
    )


def open_checkpoints(recipe: Recipe, runtime: Runtime) -> Checkpoints:
    """The checkpoints of a recipe's run. Collective."""
    settings = recipe.checkpoint
    keep = None if settings.keep_last == "all" else settings.keep_last
    return Checkpoints(
        checkpoints_folder(recipe), keep, runtime, is_background(recipe), settings.verify, settings.keep_best
    )


def checkpoints_folder(recipe: Recipe) -> Path:
    return recipe.run_folder / "checkpoints"


def is_background(recipe: Recipe) -> bool:
    """Whether checkpoints are written from a copy in host memory. What is trained and offloaded is there already, and there may be
    no room for it twice.
    """
    is_offloaded = recipe.memory.offload or recipe.optimizer.offload != "none"
    return recipe.checkpoint.background and not (is_offloaded and recipe.train.method == "full")


def sound_checkpoint(checkpoints: Checkpoints, step: int | Literal["best"] | None = None) -> int | None:
    """The step of the newest checkpoint that is as it was written; None if there are no checkpoints. Collective.

    Args:
        step: take this one, or the one with the least held-out loss.
    Raises:
        UserError: it is damaged, or there is none of that step; or all are damaged.
    """
    if step is None:
        return checkpoints.newest()
    if step == "best":
        best = checkpoints.runtime.from_main(ranked(checkpoints.steps(), checkpoints.facts))
        if not best:
            cure = "name a step, or train with checkpoint.keep_best and validation.every"
            raise UserError(
                "no checkpoint was saved where the held-out loss was measured", cure, str(checkpoints.folder)
            )
        step = best[0]
        say(f"the best checkpoint by held-out loss is that of step {step}")
    known = checkpoints.runtime.from_main(checkpoints.steps())
    if step not in known:
        cure = f"steps are: {', '.join(map(str, known)) or 'none'}"
        if checkpoints.path_aside(step).is_dir():
            cure += f"; that of step {step} was set aside: move {checkpoints.path_aside(step)} back to use it"
        raise UserError(f"there is no checkpoint of step {step}", cure, str(checkpoints.folder))
    if wrong := checkpoints.damage(step):
        raise UserError(
            f"the checkpoint is damaged ({'; '.join(wrong[:3])})", "name another step", str(checkpoints.path(step))
        )
    return step


def details_of(
    recipe: Recipe, family: Family, step: int, adapters: str | None, precision: str | None = None
) -> Details:
    """What goes with the weights that a recipe has trained for so many steps, in a precision, or as they were trained.

    Args:
        adapters: see `facts_of`; among the facts of a checkpoint as `GIVEN`.
    """

    def base() -> Weights:
        return with_frozen(family.transformer_weights(), recipe.adapter, family)

    return Details(precision, facts_of(recipe, family, step, adapters), base)


def write_weights(state: StepState, exporter: Exporter, folder: Path, details: Details | None = None) -> None:
    """Write the weights as they are evaluated, an average say, in any form, and verify them. Collective."""
    with evaluating(state.parts, "export"):
        exporter.write(state.transformer, state.family, folder, state.runtime, details or Details())
