"""No copy is in a race with what is computed: whatever streams do at once, reads and writes of the same memory have an order."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from copy_order import FollowedDevice, Order
from every_family import few

from finetune.checks.model import open_family
from finetune.engine.savers.offload import ActivationOffload
from finetune.engine.weights.staging import HostCopy
from finetune.models.batch import Batch
from finetune.preparation.encode import prepare
from finetune.recipe import load_recipe
from finetune.runtime.distributed import Runtime
from finetune.training.job import build

STREAMED, SENT = ["memory.offload=true"], ["memory.offload_activations=true"]
MOMENTS, GRADIENTS = ["optimizer.offload=state"], ["optimizer.offload=state_and_gradients"]
WAITS = {
    STREAMED[0]: {"fetch"},
    SENT[0]: {"_free_oldest", "_unpack"},
    MOMENTS[0]: {"_start", "_update", "step"},
    GRADIENTS[0]: {"_start", "_update", "step", "_free_oldest"},
}
SETTINGS = {
    "plain": [],
    "streamed": STREAMED,
    "streamed, one resident": [*STREAMED, "memory.resident_blocks=1"],
    "activations": SENT,
    "both": [*STREAMED, *SENT],
    "moments": MOMENTS,
    "moments and gradients": GRADIENTS,
    "moments in 8 bits, streamed": [*MOMENTS, *STREAMED, "optimizer.name=adamw_8bit"],
    "both, NF4": [*STREAMED, *SENT, "memory.low_bit=nf4"],
    "both, nothing recomputed": [*STREAMED, *SENT, "memory.activation_checkpointing=none"],
    "both, selective": [*STREAMED, *SENT, "memory.activation_checkpointing=selective"],
    "both, every second block recomputed": [*STREAMED, *SENT, "memory.activation_checkpointing=every_n"],
}


@pytest.fixture
def trained(
    family_recipe: Callable[..., Path], runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Order]:
    """Two steps of two micro-batches in page-locked memory, and a held-out loss, followed.

    Hunyuan's tiny model has four blocks: with two, each would have a slot to itself, in which its weights stay.
    """

    def train(settings: list[str], order: Order) -> Order:
        recipe = load_recipe(
            family_recipe("hunyuan"), ["lora.rank=4", "lora.alpha=8", "train.micro_batch_size=1", *settings]
        )
        family = open_family(recipe)
        prepared = prepare(recipe, family, runtime)
        device = FollowedDevice(torch.device("cpu"), order)
        job = build(recipe, dataclasses.replace(runtime, device=device), family, prepared)
        if job.state.activations:
            job.state.activations.smallest = 1  # tiny models save nothing that is worth a copy
        batches = job.micro_batches()
        with order.followed(monkeypatch):
            job.step(0, [batches[k].pin_memory() for k in (0, 1)])
            job.heldout_loss()
            job.step(1, [batches[k].pin_memory() for k in (2, 3)])
        return order

    return train


@pytest.mark.parametrize("name", few(reversed(SETTINGS), 1))
def test_nothing_is_in_a_race(trained: Callable[..., Order], name: str) -> None:
    order = trained(SETTINGS[name], Order())
    assert order.races == []
    waits = set().union(*(WAITS.get(setting, set()) for setting in SETTINGS[name]))
    assert waits | ({"wait_stream"} if waits else set()) == order.waited


# Each order that is asked for is needed, and its absence is found

LEFT_OUT = [
    ("wait_stream", STREAMED),  # a slot is written while the block before computes with it
    ("wait_stream", SENT),  # an activation is copied out before it is computed
    ("fetch", STREAMED),
    ("_free_oldest", SENT),
    ("_unpack", SENT),
    ("wait_stream", GRADIENTS),  # a gradient is copied out before it is computed
    ("_start", MOMENTS),  # the next weight is copied to where the one before is copied from
    ("_update", MOMENTS),
    ("step", MOMENTS),
    ("_free_oldest", GRADIENTS),
]


@pytest.mark.parametrize(
    "what, settings", few(LEFT_OUT, 2), ids=[f"{what}, {where[0][7:-5]}" for what, where in LEFT_OUT]
)
def test_what_is_left_out_is_found(trained: Callable[..., Order], what: str, settings: list[str]) -> None:
    order = trained(settings, Order(without=what))
    assert what in order.waited
    assert order.races


@pytest.mark.parametrize("without", [None, "saving"])
def test_what_was_fetched_in_vain_is_kept_until_it_has_arrived(
    monkeypatch: pytest.MonkeyPatch, without: str | None
) -> None:
    order = Order(without)
    offload = ActivationOffload(FollowedDevice(torch.device("cpu"), order), smallest=1)
    with order.followed(monkeypatch):
        x = torch.rand(8, requires_grad=True)
        with offload.saving():
            unused, used = x.exp(), x.sin()
        used.sum().backward()  # fetches what `exp` has saved, ahead of a use that does not come
        del unused, used
        with offload.saving():
            pass
    assert "saving" in order.waited
    assert bool(order.races) == (without is not None)


@pytest.mark.parametrize("without", [None, "synchronize"])
def test_a_checkpoint_is_written_from_what_has_arrived(monkeypatch: pytest.MonkeyPatch, without: str | None) -> None:
    order = Order(without)
    host = HostCopy(FollowedDevice(torch.device("cpu"), order))
    with order.followed(monkeypatch):
        weights = {"a": torch.rand(64), "b": torch.rand(3, 5)}
        for _ in range(2):
            torch._foreach_mul_(list(weights.values()), 0.9)  # an update
            copied = host.of(weights)
            written = {name: copy.clone() for name, copy in copied.items()}  # by the host
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    assert bool(order.races) == (without is not None)


@pytest.mark.parametrize("reads_first", [True, False])
def test_a_batch_in_page_locked_memory_is_in_use_until_the_step_is_read(
    monkeypatch: pytest.MonkeyPatch, reads_first: bool
) -> None:
    order = Order()
    device = FollowedDevice(torch.device("cpu"), order)
    with order.followed(monkeypatch):
        batch = Batch({"x": torch.rand(8)}, {}).pin_memory()
        total = batch.to(device.torch_device).inputs["x"].sum()
        if reads_first:
            device.read(total.view(1))
        batch.inputs["x"].zero_()  # the next batch into the same memory
    assert bool(order.races) != reads_first
