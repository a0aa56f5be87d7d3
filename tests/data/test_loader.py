"""Batches: the same samples, bit for bit, for every number of ranks, of workers, and after every restart."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetune.checks.model import open_family
from finetune.data.loader import BatchSplit, Dropout, MicroBatches, open_loader
from finetune.data.sampler import Order
from finetune.models.batch import Batch
from finetune.models.family import Family
from finetune.models.ltx import pack
from finetune.preparation.encode import Prepared, prepare
from finetune.recipe import Recipe

STEPS = 9  # more than two epochs
WHOLE = BatchSplit(rank=0, size=1, global_batch=4, micro=4)


@pytest.fixture(scope="module")
def recipe(clips: Path, tmp_path_factory: pytest.TempPathFactory, make_recipe) -> Recipe:
    return make_recipe(clips, tmp_path_factory.mktemp("cache"), "data.caption_dropout=0.3")


@pytest.fixture(scope="module")
def family(recipe: Recipe) -> Family:
    return open_family(recipe)


@pytest.fixture(scope="module")
def prepared(recipe: Recipe, family: Family, runtime) -> Prepared:
    """Twelve real clips in three buckets, encoded by the tiny LTX pipeline."""
    return prepare(recipe, family, runtime)


@pytest.fixture(scope="module")
def open_batches(recipe: Recipe, family: Family, prepared: Prepared):
    """The micro-batches of one rank."""

    def build(split: BatchSplit, seed: int = 42, dropout: float = recipe.data.caption_dropout) -> MicroBatches:
        order = Order([item.bucket for item in prepared.train], split.global_batch, seed)
        assemble = partial(family.batch, objective=family.training_objective(recipe.objective))
        drop = Dropout(dropout, 0.0, prepared.unconditional_key)
        return MicroBatches(prepared.train, order, split, prepared.cache, assemble, seed, drop)

    return build


def rows(batch: Batch) -> list[dict[str, Tensor]]:
    """A batch sample by sample: every tensor that has one row a sample."""
    named = {
        "target": batch.only.target,
        "weight": batch.only.weight,
        "seconds": batch.inputs["rope_interpolation_scale"][0],
    }
    named |= {name: value for name, value in batch.inputs.items() if isinstance(value, Tensor)}
    return [{name: value[index] for name, value in named.items()} for index in range(len(batch.only.target))]


def step_rows(ranks: Sequence[MicroBatches], step: int) -> list[dict[str, Tensor]]:
    """The samples of a step over all ranks, by their position in the global batch."""
    found = {}
    for batches in ranks:
        for turn in range(batches.split.accumulation):
            batch = batches[step * batches.split.accumulation + turn]
            found |= dict(zip(batches.split.positions(turn), rows(batch), strict=True))
    return [found[position] for position in sorted(found)]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("world, micro", [(1, 2), (1, 1), (2, 2), (2, 1), (4, 1)])
def test_ranks_together_see_what_one_rank_sees(open_batches, world: int, micro: int) -> None:
    alone = [open_batches(WHOLE)]
    ranks = [open_batches(BatchSplit(rank, world, 4, micro)) for rank in range(world)]
    for step in range(STEPS):
        expected, found = step_rows(alone, step), step_rows(ranks, step)
        assert len(found) == 4
        assert all(map(same, found, expected))


@pytest.mark.parametrize("first", [1, 4, 8])
def test_starting_at_a_step_is_skipping_those_before_it(open_batches, first: int) -> None:
    split = BatchSplit(rank=1, size=2, global_batch=4, micro=1)
    all_steps = list(open_loader(open_batches(split), 0, STEPS, workers=0, pin_memory=False))
    resumed = list(open_loader(open_batches(split), first, STEPS, workers=0, pin_memory=False))
    assert len(resumed) == 2 * (STEPS - first)
    for found, expected in zip(resumed, all_steps[2 * first :], strict=True):
        assert all(map(same, rows(found), rows(expected)))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_load_what_the_process_itself_would(open_batches, workers: int) -> None:
    batches = open_batches(BatchSplit(rank=0, size=2, global_batch=4, micro=2))
    loaded = list(open_loader(batches, 2, STEPS, workers=workers, pin_memory=False))
    assert len(loaded) == STEPS - 2
    for step, found in enumerate(loaded, start=2):
        assert all(map(same, rows(found), rows(batches[step])))


def test_a_batch_holds_the_clips_of_its_plan(open_batches, prepared: Prepared, family: Family) -> None:
    """From noised latents and velocity the clean ones follow, and they lie next to the cached mean of the clip."""
    batches = open_batches(WHOLE)
    means = {}
    for index, item in enumerate(prepared.train):
        mean = prepared.cache.read("video", item.keys["video"])["mean"]
        means[index] = pack(((mean - family.mean) * family.scaling_factor / family.std)[None])[0]
    for step in range(STEPS):
        for planned, row in zip(batches.order.plan(step).items, rows(batches[step]), strict=True):
            clean = row["hidden_states"] - row["timestep"] / 1000 * row["target"]
            near = {i: (clean - mean).norm().item() for i, mean in means.items() if mean.shape == clean.shape}
            assert min(near, key=near.__getitem__) == planned
            assert row["seconds"].item() == pytest.approx(family.temporal / prepared.train[planned].fps)


def test_a_batch_holds_the_captions_of_its_plan(open_batches, prepared: Prepared) -> None:
    batches = open_batches(WHOLE, dropout=0.0)
    for step in range(STEPS):
        for planned, row in zip(batches.order.plan(step).items, rows(batches[step]), strict=True):
            text = prepared.cache.read("text", prepared.train[planned].keys["text"])
            assert torch.equal(row["encoder_hidden_states"], text["encoder_hidden_states"])
            assert torch.equal(row["encoder_attention_mask"], text["encoder_attention_mask"])


def test_noise_and_sigma_are_new_in_every_step_and_at_every_position(open_batches) -> None:
    batches = open_batches(WHOLE)
    every = [row for step in range(STEPS) for row in step_rows([batches], step)]
    assert len({row["timestep"].item() for row in every}) == len(every)


def test_an_item_that_is_repeated_in_a_step_gets_noise_of_its_own(open_batches) -> None:
    """The square bucket has one clip, so a batch of four is four times that clip."""
    batches = open_batches(WHOLE)
    step = next(step for step in range(STEPS) if len(set(batches.order.plan(step).items)) == 1)
    targets = [row["target"] for row in step_rows([batches], step)]
    assert not any(torch.equal(targets[0], other) for other in targets[1:])


def test_a_seed_gives_its_own_noise(open_batches) -> None:
    one, other = (rows(open_batches(WHOLE, seed=seed)[0])[0]["timestep"].item() for seed in (1, 2))
    assert one != other


@pytest.mark.parametrize("dropout, low, high", [(0.0, 0, 0), (0.3, 0.15, 0.45), (1.0, 1, 1)])
def test_dropped_captions_become_the_unconditional_prompt(
    open_batches, prepared: Prepared, dropout: float, low: float, high: float
) -> None:
    batches = open_batches(WHOLE, dropout=dropout)
    empty = prepared.cache.read("text", prepared.unconditional_key)["encoder_hidden_states"]
    dropped = [torch.equal(row["encoder_hidden_states"], empty) for step in range(30) for row in rows(batches[step])]
    assert low <= sum(dropped) / len(dropped) <= high


def test_dropping_captions_changes_nothing_else(open_batches) -> None:
    with_captions, without = (rows(open_batches(WHOLE, dropout=dropout)[0]) for dropout in (0.0, 1.0))
    for left, right in zip(with_captions, without, strict=True):
        assert torch.equal(left["hidden_states"], right["hidden_states"])
        assert torch.equal(left["target"], right["target"])
