"""Copies that arrive as late as they may: each is made only when it is waited for, so a wait that is missing shows in the losses.

On a GPU a copy on a stream of its own usually arrives in time, with or without a wait.
"""

import dataclasses
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.checks.model import open_family
from finetune.preparation.encode import prepare
from finetune.recipe import load_recipe
from finetune.runtime.device import Device
from finetune.runtime.distributed import Runtime
from finetune.training.job import build

SETTINGS = {
    "streamed": ["memory.offload=true"],
    "streamed, one resident": ["memory.offload=true", "memory.resident_blocks=1"],
    "activations": ["memory.offload_activations=true"],
    "both": ["memory.offload=true", "memory.offload_activations=true"],
    "both, NF4": ["memory.offload=true", "memory.offload_activations=true", "memory.low_bit=nf4"],
    "both, nothing recomputed": [
        "memory.offload=true",
        "memory.offload_activations=true",
        "memory.activation_checkpointing=none",
    ],
    "optimizer's state": ["optimizer.offload=state", "train.max_grad_norm=0.05"],
    "optimizer's state and gradients": [
        "optimizer.offload=state_and_gradients",
        "train.max_grad_norm=0.05",
        "train.global_batch_size=1",
    ],
    "both, every second block recomputed": [
        "memory.offload=true",
        "memory.offload_activations=true",
        "memory.activation_checkpointing=every_n",
    ],
}
WAITS = {  # function that waits -> settings in which it does
    "fetch": "streamed",
    "_free_oldest": "activations",
    "_unpack": "activations",
    "_start": "optimizer's state",
    "_update": "optimizer's state",
    "step": "optimizer's state",
}


class LateCopies:
    """The door for copies, with copies that are made when they are waited for; and not at all if `without` waits for them."""

    def __init__(self, without: str | None) -> None:
        self.without, self.waited = without, set[str]()

    def start(self, target: Tensor, source: Tensor) -> list[Tensor]:
        target.view(torch.uint8).fill_(0x7F) if target.dim() and target.is_contiguous() else target.fill_(torch.nan)
        return [target, source]

    def wait(self, arrival: list[Tensor] | None) -> None:
        caller = sys._getframe(1).f_code.co_name
        self.waited.add(caller)
        if arrival and caller != self.without:
            target, source = arrival
            target.copy_(source)
            arrival.clear()

    finish = wait


@dataclasses.dataclass(frozen=True)
class LateDevice(Device):
    made: list[LateCopies] = dataclasses.field(default_factory=list)
    without: str | None = None

    def copies(self) -> Any:
        self.made.append(LateCopies(self.without))
        return self.made[-1]


@pytest.fixture
def losses(family_recipe: Callable[..., Path], runtime: Runtime) -> Callable[..., list[tuple[float, float]]]:
    """Losses and norms of three steps of two micro-batches."""

    def train(settings: list[str], device: Device | None = None) -> list[tuple[float, float]]:
        recipe = load_recipe(
            family_recipe("hunyuan"), ["lora.rank=4", "lora.alpha=8", "train.micro_batch_size=1", *settings]
        )
        family = open_family(recipe)
        job = build(
            recipe,
            dataclasses.replace(runtime, device=device or runtime.device),
            family,
            prepare(recipe, family, runtime),
        )
        if job.state.activations:
            job.state.activations.smallest = 1  # tiny models save nothing that is worth a copy
        batches = job.micro_batches()
        count = job.split.accumulation
        results = [job.step(step, [batches[step * count + k] for k in range(count)]) for step in range(3)]
        return [(result.loss, result.grad_norm) for result in results]

    return train


def plain(settings: list[str]) -> list[str]:
    return [key for key in settings if not key.startswith(("memory.offload", "memory.resident", "optimizer.offload"))]


@pytest.mark.parametrize("name", SETTINGS)
def test_copies_may_be_late(losses: Callable[..., list], name: str) -> None:
    settings = SETTINGS[name]
    device = LateDevice(torch.device("cpu"))
    assert losses(settings, device) == losses(plain(settings))
    needs = ("streamed", "activations") if "both" in name else (name,)
    expected = {function for function, where in WAITS.items() if any(where in need for need in needs)}
    assert expected <= set().union(*(copies.waited for copies in device.made))


@pytest.mark.parametrize("function", WAITS)
def test_each_wait_is_needed(losses: Callable[..., list], function: str) -> None:
    settings = SETTINGS[WAITS[function]]
    assert losses(settings, LateDevice(torch.device("cpu"), without=function)) != losses(plain(settings))


# Backward in another thread, as autograd has it on GPUs


@pytest.fixture
def in_another_thread(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Backward passes run in a thread of their own; lists the threads."""
    backward, threads = Tensor.backward, []

    def run(self: Tensor, *arguments: object, **keywords: object) -> None:
        failed: list[BaseException] = []

        def work() -> None:
            threads.append(threading.get_ident())
            try:
                backward(self, *arguments, **keywords)
            except BaseException as error:  # raised by the thread that waits
                failed.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]

    monkeypatch.setattr(Tensor, "backward", run)
    return threads


FULL = ["train.method=full"]
THREADED = {
    "recomputed": [],
    "nothing recomputed": ["memory.activation_checkpointing=none"],
    "selective": ["memory.activation_checkpointing=selective"],
    "every second block": ["memory.activation_checkpointing=every_n"],
    "streamed": ["memory.offload=true"],
    "activations": ["memory.offload_activations=true"],
    "NF4, streamed": ["memory.offload=true", "memory.low_bit=nf4"],
    "dropout": ["lora.dropout=0.3"],
    "full, 8 bits": [*FULL, "optimizer.name=adamw_8bit"],
    "full, in backward": [*FULL, "optimizer.in_backward=true", "train.max_grad_norm=none", "train.global_batch_size=1"],
}


@pytest.mark.parametrize("name", THREADED)
def test_backward_in_another_thread_is_the_same(
    losses: Callable[..., list], request: pytest.FixtureRequest, name: str
) -> None:
    here = losses(THREADED[name])
    threads = request.getfixturevalue("in_another_thread")
    assert losses(THREADED[name]) == here
    assert threads
    assert threading.get_ident() not in threads
