"""Frozen blocks that visit the device: two places in turn, in the right order, forwards and backwards."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from every_family import Model, every_transformer, every_transformer_with
from exports import export_weights

from finetune.engine.savers.streaming import Streamed, Streamer
from finetune.training.job import Job

CHECKPOINTING = ["none", "full", "every_n", "selective"]
ALL_STREAMED = [(mode, 0) for mode in CHECKPOINTING]
ONE_RESIDENT = [(mode, 1) for mode in CHECKPOINTING if mode != "full"]


@pytest.fixture
def make_job(build_job: Callable[..., Job], family_recipe: Callable[..., Path]) -> Callable[..., Job]:
    def make(model: Model, *overrides: str) -> Job:
        return build_job("lora.rank=4", "lora.alpha=8", *overrides, recipe_file=family_recipe(*model))

    return make


def train(job: Job, steps: int = 3) -> list[tuple[float, float]]:
    results = [job.step(step, [job.micro_batches()[step]]) for step in range(steps)]
    return [(result.loss, result.grad_norm) for result in results]


def streamed_blocks(job: Job) -> list[Streamed]:
    return [module for module in job.state.transformer.modules() if isinstance(module, Streamed)]


@every_transformer_with("checkpointing, resident", [("full", 1)], [*ALL_STREAMED, *ONE_RESIDENT])
def test_streamed_blocks_train_as_resident_ones(
    make_job: Callable[..., Job], model: Model, checkpointing: str, resident: int
) -> None:
    mode = f"memory.activation_checkpointing={checkpointing}"
    plain = train(make_job(model, mode))
    job = make_job(model, mode, "memory.offload=true", f"memory.resident_blocks={resident}")
    blocks = sum(len(getattr(job.state.transformer, name)) for name in job.state.family.block_lists)
    assert len(streamed_blocks(job)) == blocks - resident
    assert train(job) == plain


@every_transformer_with("kind", ["int8"], ["float8", "nf4"])
def test_low_bit_blocks_are_streamed_as_they_are_stored(make_job: Callable[..., Job], model: Model, kind: str) -> None:
    low = f"memory.low_bit={kind}"
    plain = train(make_job(model, low))
    job, whole = make_job(model, low, "memory.offload=true"), make_job(model, "memory.offload=true")
    assert train(job) == plain
    small, large = (sum(h.nbytes for h in streamer_of(job).hosts) for job in (job, whole))
    assert small < 0.9 * large  # tiny layers that 64 does not divide stay as they are with nf4


def streamer_of(job: Job) -> Streamer:
    return streamed_blocks(job)[0].streamer


def deep(make_job: Callable[..., Job], *overrides: str) -> Job:
    return make_job(("hunyuan", None), "memory.offload=true", *overrides)  # two kinds of blocks


def test_the_device_holds_two_blocks_and_what_is_resident(make_job: Callable[..., Job]) -> None:
    job = deep(make_job)
    streamer = streamer_of(job)
    assert len(streamer.slots) == 2
    assert {slot.memory.numel() for slot in streamer.slots} == {max(host.numel() for host in streamer.hosts)}
    storages = {slot.memory.untyped_storage().data_ptr() for slot in streamer.slots}
    for streamed in streamed_blocks(job):
        frozen = [p for p in streamed.parameters() if not p.requires_grad]
        assert {p.untyped_storage().data_ptr() for p in frozen} <= storages
        assert set(frozen) == {parameter for parameter, _ in streamed.host_copies()}


def test_a_block_is_copied_once_a_pass_and_not_again_where_the_pass_turns(make_job: Callable[..., Job]) -> None:
    job = deep(make_job)
    streamer, copied = streamer_of(job), []
    for index, host in enumerate(streamer.hosts):
        streamer.hosts[index] = Watched(host, index, copied)
    blocks = len(streamer.hosts)
    assert blocks >= 4
    train(job, 1)
    there, back = list(range(blocks)), list(range(blocks))[::-1]
    assert copied == there + back[2:]  # the last two are still there


class Watched:
    """Host memory that notes when it is copied."""

    def __init__(self, host: torch.Tensor, index: int, copied: list[int]) -> None:
        self.host, self.index, self.copied = host, index, copied

    def __len__(self) -> int:
        return len(self.host)

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        for argument in arguments:
            if isinstance(argument, cls):
                argument.copied.append(argument.index)
        return function(*(a.host if isinstance(a, cls) else a for a in arguments), **(keywords or {}))


def test_no_block_is_in_a_place_before_its_turn(make_job: Callable[..., Job]) -> None:
    """A copy that came too early would overwrite what the block before still needs: fill the places with NaN to see it."""
    job = deep(make_job)
    expected = train(deep(make_job))
    for slot in streamer_of(job).slots:
        slot.memory.fill_(255)
    assert train(job) == expected


@every_transformer
def test_checkpoints_and_exports_are_those_of_resident_blocks(
    make_job: Callable[..., Job], model: Model, tmp_path: Path
) -> None:
    runs = {}
    for name, overrides in {"plain": [], "streamed": ["memory.offload=true"]}.items():
        job = make_job(model, f"output={tmp_path / name}", *overrides)
        train(job, 2)
        job.save(2)
        export_weights(job.state, job.recipe.train.method, tmp_path / name / "lora")  # verifies itself
        resumed = make_job(model, f"output={tmp_path / name}", *overrides)
        assert resumed.resume() == 2
        runs[name] = (resumed.step(2, [resumed.micro_batches()[2]]).loss, resumed.heldout_loss())
    assert runs["plain"] == runs["streamed"]
