"""From a recipe to a built job: `build` then `job.step(batches)`, the same on GPUs, on CPUs and in simulation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from finetune.data.cache import digest
from finetune.data.loader import BatchSplit, Dropout, MicroBatches, open_loader, read_sample
from finetune.data.sampler import Order
from finetune.engine.heldout import HeldOut, heldout_loss
from finetune.engine.optimizers import build_optimizer
from finetune.engine.optimizers.in_backward import InBackward
from finetune.engine.parallel import parallelize, trained_parameters
from finetune.engine.parts import OptimizerState, TrainedWeights
from finetune.engine.precision import storage_dtype
from finetune.engine.savers.offload import ActivationOffload
from finetune.engine.schedule import build_schedule, set_schedule_step
from finetune.engine.step import StepResult, StepState, run_step
from finetune.engine.weights.checkpoint import Checkpoints
from finetune.engine.weights.exporters import exporter_of
from finetune.engine.weights.loading import load_weights
from finetune.models import is_outside
from finetune.models.batch import Batch
from finetune.models.family import Family
from finetune.models.objective import Objective
from finetune.models.weights import Weights
from finetune.preparation.encode import Prepared
from finetune.recipe import Recipe
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError


@dataclass
class Job:
    """A training that is ready to run: its state, its data, its checkpoints."""

    recipe: Recipe
    state: StepState
    objective: Objective
    prepared: Prepared
    order: Order
    split: BatchSplit
    checkpoints: Checkpoints

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
        )

    def resume(self) -> int:
        """Restore the newest complete checkpoint, if there is one; returns the number of steps done."""
        latest = self.checkpoints.latest()
        if latest is None:
            return 0
        with self.state.runtime.together():
            self._check_identity(self.checkpoints.facts(latest))
        self.checkpoints.load(latest, self.state.parts)
        set_schedule_step(self.state.schedule, latest)
        return latest

    def identity(self) -> dict[str, str]:
        """What a checkpoint continues besides its recipe: the clips and captions in their order, and the base weights."""
        family = self.state.family
        base = family.folder.fingerprint(
            family.trained_component, lambda file: f"{file.resolve().name} {file.stat().st_size}"
        )
        # Video and text come first, as checkpoints have them that know no other kind.
        kinds = ["video", "text", *(kind for kind in self.prepared.train[0].keys if kind not in ("video", "text"))]
        clips = [[item.keys[kind] for kind in kinds] for item in self.prepared.train]
        return {"clips": digest(clips), "base": digest(base)}

    def _check_identity(self, facts: dict) -> None:
        outside = ", or the code of the family" if is_outside(self.recipe.model.family) else ""
        for key, what in (("clips", f"clips or captions{outside}"), ("base", "weights in model.path")):
            if facts[key] != self.identity()[key]:
                raise UserError(
                    f"the {what} are not those that the checkpoint of step {facts['step']} was trained with",
                    "put them back to resume, or set `output` to a new folder for a new training",
                    str(self.recipe.output),
                )

    def save(self, step: int) -> Path:
        """Checkpoint after `step` optimizer steps, with the adapter as diffusers loads it. Collective."""
        method = self.recipe.train.method

        def write(folder: Path) -> None:
            if method != "full":
                export_weights(self.state, method, folder / exporter_of(method).folder(self.state.family))

        pending = self.checkpoints.begin(step, self.state.parts, self.identity(), write)
        return self.checkpoints.finish(pending)

    def idle_batch(self) -> Batch:
        """The training clip that costs least, for calls that only keep ranks in step."""
        family = self.state.family
        item = min(self.prepared.train, key=lambda item: family.tokens(item.bucket))
        sample = read_sample(item, self.prepared.cache, torch.Generator())
        return family.batch([sample], self.objective)

    def heldout_loss(self) -> HeldOut | None:
        """Loss on the held-out clips, if the recipe names any. Collective."""
        if not self.prepared.heldout:
            return None
        quantiles = self.recipe.validation.sigmas
        return heldout_loss(self.state, self.objective, self.prepared.heldout, self.prepared.cache, quantiles)


def build_state(recipe: Recipe, runtime: Runtime, family: Family, weights: Weights) -> StepState:
    """Build the transformer, make it trainable, read its weights, and put optimizer and schedule around it. Collective.

    Args:
        weights: the pretrained transformer's; each rank reads the rows that it holds.
    """
    train, memory = recipe.train, recipe.memory
    transformer = family.build_transformer(storage_dtype(train))
    transformer = parallelize(transformer, family, train, recipe.adapter, memory, runtime)
    with runtime.together():
        load_weights(transformer, weights, runtime.device.torch_device)
    parameters = trained_parameters(transformer)
    optimizer = build_optimizer(parameters, recipe.optimizer, train.weights)
    return StepState(
        family=family,
        transformer=transformer,
        parameters=list(parameters.values()),
        optimizer=optimizer,
        parts=[TrainedWeights(transformer), OptimizerState(transformer, optimizer)],
        schedule=build_schedule(optimizer, recipe.schedule, train.steps),
        runtime=runtime,
        max_grad_norm=None if train.max_grad_norm == "none" else train.max_grad_norm,
        defer_reduction=train.method != "full",
        seed=train.seed,
        activations=ActivationOffload(runtime.device) if recipe.memory.offload_activations else None,
        in_backward=InBackward(optimizer) if recipe.optimizer.in_backward else None,
    )


def build(recipe: Recipe, runtime: Runtime, family: Family, prepared: Prepared) -> Job:
    """The training of a recipe on a prepared dataset. Collective."""
    train = recipe.train
    state = build_state(recipe, runtime, family, family.transformer_weights())
    runtime.device.reset_peak()
    return Job(
        recipe=recipe,
        state=state,
        objective=family.objective(recipe.objective),
        prepared=prepared,
        order=Order([item.bucket for item in prepared.train], train.global_batch_size, train.seed),
        split=BatchSplit(runtime.data.rank, runtime.data.size, train.global_batch_size, train.micro_batch_size),
        checkpoints=open_checkpoints(recipe, runtime),
    )


def open_checkpoints(recipe: Recipe, runtime: Runtime) -> Checkpoints:
    """The checkpoints of a recipe's run."""
    keep = None if recipe.checkpoint.keep_last == "all" else recipe.checkpoint.keep_last
    return Checkpoints(recipe.output / "checkpoints", keep, runtime)


def export_weights(state: StepState, method: str, folder: Path) -> None:
    """Write the trained weights for diffusers, and verify them. Collective."""
    exporter_of(method).write(state.transformer, state.family, folder, state.runtime)
