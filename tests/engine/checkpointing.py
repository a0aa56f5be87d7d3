"""Trainings whose checkpoints are looked at: their steps, and all that a checkpoint must hold of them."""

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from finetune.engine.step import StepResult
from finetune.training.job import Job


def run(job: Job, first: int, last: int, save_each: int | None = None) -> list[StepResult]:
    """Steps first .. last - 1, as the trainer makes them."""
    batches = iter(job.batches(first))
    results = []
    for step in range(first, last):
        results.append(job.step(step, [next(batches) for _ in range(job.split.accumulation)]))
        if save_each and (step + 1) % save_each == 0:
            job.save(step + 1)
    return results


def state_of(job: Job) -> dict[str, Tensor]:
    """Every trained weight and every tensor of the optimizer."""
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    state = dict(get_model_state_dict(job.state.transformer, options=options))
    moments = get_optimizer_state_dict(job.state.transformer, job.state.optimizer, options=options)["state"]
    return state | {f"{name}.{key}": value for name, entry in moments.items() for key, value in entry.items()}


def assert_same_state(first: Job, second: Job) -> None:
    ours, theirs = state_of(first), state_of(second)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
