"""The order of samples: complete, of one bucket a step, and a pure function of seed and step."""

from collections import Counter
from itertools import pairwise

import pytest

from finetune.data.loader import BatchSplit
from finetune.data.sampler import Order, StepPlan
from finetune.recipe import Bucket

WIDE, TALL, LONG = Bucket(17, 64, 96), Bucket(17, 96, 64), Bucket(25, 64, 96)

DATASETS = {
    "divides": ([WIDE] * 8 + [TALL] * 4, 4),
    "remainders": ([WIDE] * 7 + [TALL] * 5 + [LONG], 4),
    "fewer than a batch": ([WIDE] * 3, 8),
    "one": ([WIDE], 5),
    "interleaved": ([WIDE, TALL, LONG] * 11, 2),
}


@pytest.fixture(params=DATASETS, ids=lambda name: name.replace(" ", "_"))
def dataset(request) -> tuple[list[Bucket], int]:
    """Buckets of the items, and a global batch size."""
    return DATASETS[request.param]


def epoch(order: Order, number: int) -> list[StepPlan]:
    return [order.plan(number * order.steps_per_epoch + step) for step in range(order.steps_per_epoch)]


@pytest.mark.parametrize("number", [0, 1, 7])
def test_every_item_appears_in_every_epoch(dataset, number: int) -> None:
    buckets, batch = dataset
    plans = epoch(Order(buckets, batch, seed=1), number)
    assert {item for plan in plans for item in plan.items} == set(range(len(buckets)))
    assert {plan.epoch for plan in plans} == {number}


def test_a_step_is_one_full_batch_of_one_bucket(dataset) -> None:
    buckets, batch = dataset
    for plan in epoch(Order(buckets, batch, seed=1), 0):
        assert len(plan.items) == batch
        assert {buckets[item] for item in plan.items} == {plan.bucket}


def test_samples_that_fill_up_batches_are_counted_bucket_by_bucket(dataset) -> None:
    buckets, batch = dataset
    order = Order(buckets, batch, seed=1)
    seen = Counter(buckets[item] for plan in epoch(order, 0) for item in plan.items)
    extra = {bucket: seen[bucket] - count for bucket, count in Counter(buckets).items()}
    assert order.fill_ups() == {bucket: count for bucket, count in extra.items() if count}


def test_a_bucket_that_the_batch_divides_repeats_nothing() -> None:
    assert Order([WIDE] * 8 + [TALL] * 4, 4, seed=1).fill_ups() == {}


def test_no_item_is_repeated_before_all_others_of_its_bucket(dataset) -> None:
    buckets, batch = dataset
    seen = Counter(item for plan in epoch(Order(buckets, batch, seed=1), 0) for item in plan.items)
    for bucket in set(buckets):
        counts = {seen[item] for item, its in enumerate(buckets) if its == bucket}
        assert max(counts) - min(counts) <= 1


def test_a_plan_depends_on_seed_and_step_alone(dataset) -> None:
    buckets, batch = dataset
    forward = [Order(buckets, batch, seed=3).plan(step) for step in range(40)]
    order = Order(buckets, batch, seed=3)
    assert [order.plan(step) for step in reversed(range(40))] == forward[::-1]


def test_clips_meet_other_clips_in_each_epoch() -> None:
    order = Order([WIDE] * 16, 4, seed=1)
    batches = [{frozenset(plan.items) for plan in epoch(order, number)} for number in range(5)]
    assert all(one.isdisjoint(other) for one, other in pairwise(batches))


def test_buckets_come_in_another_sequence_in_each_epoch() -> None:
    order = Order([Bucket(1, 32, 32 * width) for width in range(1, 17)], 1, seed=1)
    sequences = {tuple(plan.bucket for plan in epoch(order, number)) for number in range(5)}
    assert len(sequences) == 5


def test_batches_of_different_buckets_are_mixed() -> None:
    plans = epoch(Order([WIDE] * 32 + [TALL] * 32, 2, seed=1), 0)
    assert {plan.bucket for plan in plans[:16]} == {WIDE, TALL}


def test_seeds_give_different_orders() -> None:
    orders = {tuple(plan.items for plan in epoch(Order([WIDE] * 16, 4, seed), 0)) for seed in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize("batch, world, micro", [(8, 1, 1), (8, 1, 8), (8, 2, 4), (8, 2, 1), (8, 4, 2), (12, 2, 3)])
def test_ranks_share_a_global_batch_without_gap_or_overlap(batch: int, world: int, micro: int) -> None:
    layouts = [BatchSplit(rank, world, batch, micro) for rank in range(world)]
    taken = [p for layout in layouts for turn in range(layout.accumulation) for p in layout.positions(turn)]
    assert sorted(taken) == list(range(batch))
