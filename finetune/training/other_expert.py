"""The expert that a run does not train, for its samples: as it has been trained so far, or as it was."""

from typing import Any

import torch

from finetune.checks.output import read_saved
from finetune.data.cache import Cache
from finetune.engine.companion import Companion, build_companion
from finetune.engine.ema import WeightAverage
from finetune.engine.gradients import local
from finetune.engine.parallel import trained_parameters
from finetune.engine.parts import OptimizerState, Part, TrainedWeights
from finetune.engine.weights.checkpoint import Checkpoints
from finetune.engine.weights.starting import start_adapter
from finetune.models.adapters import ADAPTERS
from finetune.models.adapters.given import moved, read_started, with_frozen
from finetune.models.family import Family
from finetune.recipe import RECIPE_FILE, Recipe
from finetune.recipe.ema import Ema
from finetune.recipe.experts import of_expert
from finetune.recipe.optimizers import Optimizer, ScheduleFreeAdamW
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.logging import say
from finetune.training.identity import is_of_base
from finetune.training.job import Job, checkpoints_folder


def add_other_expert(job: Job) -> None:
    """Have the other expert beside the trained one from now on, if the model has two and it is not there yet. Collective."""
    family = job.state.family.of_other_expert()
    if family is not None and job.state.companion is None:
        job.state.companion = _companion(job, family)


def _companion(job: Job, family: Family) -> Companion:
    """The expert that a family was opened on, from its own folder in `output`, where another machine may just be training it."""
    recipe, runtime = job.recipe, job.state.runtime
    own = _own_recipe(recipe, family, runtime)
    with Checkpoints(checkpoints_folder(own), None, runtime, verify=own.checkpoint.verify) as checkpoints:
        step = _usable_step(checkpoints, family, job.prepared.cache, runtime)
        is_averaged = own.ema.decay is not None and "samples" in recipe.ema.use
        whose = "as it was" if step is None else f"{'the average' if is_averaged else 'that'} of its step {step}"
        say(f"samples: the {family.expert}-noise expert is {whose}")
        with runtime.together():
            weights = with_frozen(family.transformer_weights(), own.adapter, family)
            started = read_started(own.adapter, family) if step is None else None

        def take_up(part: TrainedWeights) -> None:
            if step is None:
                if started is not None:
                    start_adapter(part.transformer, started)
                return
            try:
                load_weights_of(checkpoints, step, part, own.ema if is_averaged else Ema(), own.optimizer)
            except UserError as error:
                cure = "start again: the run that trains it may just have replaced this checkpoint; or leave out validation.prompts"
                raise UserError(
                    f"the other expert cannot be read ({error})", cure, str(checkpoints.path(step))
                ) from error

        return build_companion(
            job.state.transformer,
            family,
            weights,
            own.train.model_copy(update={"precision": recipe.train.precision, "float8": recipe.train.float8}),
            own.adapter,
            recipe.memory,
            runtime,
            take_up,
        )


def load_weights_of(
    checkpoints: Checkpoints, step: int, weights: TrainedWeights, ema: Ema, optimizer: Optimizer
) -> None:
    """Load the weights of a checkpoint by which its run is evaluated. Collective; raises UserError.

    Args:
        ema: with a decay, the average is loaded.
        optimizer: of that run; a schedule-free one averages by itself.
    """
    if isinstance(optimizer, ScheduleFreeAdamW):
        _load_schedule_free(checkpoints, step, weights, optimizer)
    elif ema.decay is None:
        checkpoints.load(step, [weights])
    else:
        average = WeightAverage(trained_parameters(weights.transformer), ema, checkpoints.runtime)
        checkpoints.load(step, [weights, average])
        average.put()


def _load_schedule_free(
    checkpoints: Checkpoints, step: int, weights: TrainedWeights, optimizer: ScheduleFreeAdamW
) -> None:
    """Load the average x of a schedule-free optimizer, whose gradients are taken at y = beta1 x + (1 - beta1) z.

    After Defazio et al. 2024, "The Road Less Scheduled". Of the optimizer's state only z is read, as moments would need memory.
    """
    latest = _Latest(weights)
    checkpoints.load(step, [weights, latest])
    trained = weights.state_dict()
    with torch.no_grad():
        for name, z in latest.values.items():
            local(trained[name]).lerp_(local(z), 1 - 1 / optimizer.betas[0])


class _Latest(Part):
    """The z of a schedule-free optimizer's state, by the parameter's name."""

    name = OptimizerState.name

    def __init__(self, weights: TrainedWeights) -> None:
        trained, saved = trained_parameters(weights.transformer), weights.state_dict()  # buffers are saved, too
        self.values = {name: torch.zeros_like(weight) for name, weight in saved.items() if name in trained}

    def state_dict(self) -> dict[str, Any]:
        return {"state": {name: {"z": value} for name, value in self.values.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = {name: each["z"] for name, each in state["state"].items()}


def _own_recipe(recipe: Recipe, family: Family, runtime: Runtime) -> Recipe:
    """The recipe that the other expert is trained by, which may have another method or rank. Rank 0 reads it. Collective.

    An expert that has not been trained has none of the adapters that the trained one is given.
    """
    assert family.expert is not None
    own = of_expert(recipe, family.expert)
    with runtime.together():
        saved = own.run_folder / RECIPE_FILE
        if runtime.is_main and saved.exists():
            found = read_saved(saved)
            taken = ("train", "ema", "optimizer", *ADAPTERS)
            own = own.model_copy(update={name: getattr(found, name) for name in taken})
            own = own.model_copy(update={"lora": moved(own.lora, recipe.lora, family)})
        elif runtime.is_main:
            own = own.model_copy(update={"lora": own.lora.model_copy(update={"start_from": None, "frozen": []})})
    return runtime.from_main(own)


def _usable_step(checkpoints: Checkpoints, family: Family, cache: Cache, runtime: Runtime) -> int | None:
    """The step of its newest checkpoint; None if it has none, or none of these base weights, or only damaged ones. Collective."""
    try:
        step = checkpoints.newest()
    except UserError as error:
        say(f"warning: the other expert is taken as it was, because no checkpoint of it can be used ({error})")
        return None
    if step is None:
        return None
    with runtime.together():
        try:
            is_ours = not runtime.is_main or is_of_base(checkpoints.facts(step), family, cache)
        except (OSError, ValueError):
            is_ours = False
    if runtime.from_main(is_ours):
        return step
    say(
        f"warning: {checkpoints.path(step)} is of other weights than those in model.path: the expert is taken as it was"
    )
    return None
