"""Properties of the order of samples, for any datasets, repeats and batches: complete, exact, and a function of seed and step."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from fractions import Fraction
from itertools import takewhile
from math import floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.loader import BatchSplit, Item, Variant
from finetune.data.sampler import Order, StepPlan, dealt
from finetune.recipe import Bucket

BUCKETS = (Bucket(1, 32, 32), Bucket(17, 64, 96), Bucket(17, 96, 64))
EPOCHS = 6


@dataclass(frozen=True)
class Data:
    """Items with their buckets and sources, and how often an epoch takes each source."""

    buckets: list[Bucket]
    sources: list[int]
    repeats: list[float]
    batch: int
    seed: int

    def order(self) -> Order:
        return Order(self.buckets, self.batch, self.seed, self.sources, self.repeats)

    def group(self, item: int) -> tuple[Bucket, int]:
        return self.buckets[item], self.sources[item]


@st.composite
def datasets(draw: st.DrawFn) -> Data:
    repeats = draw(st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0]), min_size=1, max_size=3))
    item = st.tuples(st.sampled_from(BUCKETS), st.integers(0, len(repeats) - 1))
    items = draw(st.lists(item, min_size=1, max_size=25).filter(lambda items: any(repeats[s] for _, s in items)))
    buckets, sources = zip(*items, strict=True)
    return Data(list(buckets), list(sources), repeats, draw(st.integers(1, 7)), draw(st.integers(0, 3)))


def epochs(data: Data, count: int = EPOCHS) -> dict[int, list[StepPlan]]:
    """The plans of the first epochs. An epoch without samples has none."""
    order, found = data.order(), defaultdict(list)
    plans = (order.plan(step) for step in range(10_000))
    for plan in takewhile(lambda plan: plan.epoch < count, plans):
        found[plan.epoch].append(plan)
    return found


def taken(plans: list[StepPlan]) -> Counter[tuple[int, int]]:
    """How often the samples, each an item and its turn, are in some plans."""
    return Counter(pair for plan in plans for pair in zip(plan.items, plan.turns, strict=True))


@settings(deadline=None)
@given(datasets())
def test_an_epoch_takes_of_each_group_exactly_its_share(data: Data) -> None:
    """Of n items at a rate f, the first e epochs take floor(e f n), whatever the batch size."""
    found, seen = epochs(data), set()
    sizes = Counter(map(data.group, range(len(data.buckets))))
    for epoch in range(EPOCHS):
        seen |= set(taken(found[epoch]))
        counts = Counter(data.group(item) for item, _ in seen)
        for group, size in sizes.items():
            rate = Fraction(str(data.repeats[group[1]]))
            assert counts[group] == floor((epoch + 1) * rate * size)


@settings(deadline=None)
@given(datasets())
def test_no_item_is_taken_two_turns_before_another_of_its_group(data: Data) -> None:
    turns: dict[int, set[int]] = {item: set() for item in range(len(data.buckets))}
    for plans in epochs(data).values():
        for item, turn in taken(plans):
            turns[item].add(turn)
    assert all(its == set(range(len(its))) for its in turns.values())
    groups = defaultdict(list)
    for item, its in turns.items():
        groups[data.group(item)].append(len(its))
    assert all(max(counts) - min(counts) <= 1 for counts in groups.values())


@settings(deadline=None)
@given(datasets())
def test_a_step_is_one_full_batch_of_one_bucket_and_only_the_last_is_filled_up(data: Data) -> None:
    for plans in epochs(data).values():
        for plan in plans:
            assert len(plan.items) == len(plan.turns) == data.batch
            assert {data.buckets[item] for item in plan.items} == {plan.bucket}
        for bucket in {plan.bucket for plan in plans}:
            counts = taken([plan for plan in plans if plan.bucket == bucket])
            assert counts.total() - len(counts) < data.batch
            assert max(counts.values()) - min(counts.values()) <= 1


@settings(deadline=None)
@given(datasets(), st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_any_step_can_be_planned_first(data: Data, steps: list[int]) -> None:
    """As a run does that is resumed there."""
    whole = data.order()
    forward = [whole.plan(step) for step in range(61)]
    resumed = data.order()
    assert [resumed.plan(step) for step in steps] == [forward[step] for step in steps]
    assert data.order().plan(steps[0]) == forward[steps[0]]


@settings(deadline=None)
@given(datasets())
def test_the_last_source_can_be_left_out_by_zero(data: Data) -> None:
    """Without a trace in the order of the others."""
    extra = Data(
        [*data.buckets, BUCKETS[0]], [*data.sources, len(data.repeats)], [*data.repeats, 0.0], data.batch, data.seed
    )
    assert epochs(extra) == epochs(data)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_ranks_share_a_global_batch_without_gap_or_overlap(world: int, micro: int, accumulation: int) -> None:
    batch = world * micro * accumulation
    splits = [BatchSplit(rank, world, batch, micro) for rank in range(world)]
    assert all(split.accumulation == accumulation for split in splits)
    positions = [place for split in splits for turn in range(accumulation) for place in split.positions(turn)]
    assert sorted(positions) == list(range(batch))


@given(st.integers(1, 9), st.integers(0, 3))
def test_all_are_dealt_before_any_comes_again(count: int, seed: int) -> None:
    for deal in range(3):
        assert sorted(dealt(count, deal * count + place, seed, "caption") for place in range(count)) == list(
            range(count)
        )


@given(st.integers(1, 4), st.integers(1, 4))
def test_every_piece_and_every_caption_has_its_turn(windows: int, captions: int) -> None:
    variants = tuple(tuple(Variant(f"{w} {c}", {}) for c in range(captions)) for w in range(windows))
    item = Item("a.mp4", BUCKETS[0], 24.0, variants)
    first = [item.variant(turn, 1, 0).caption.split() for turn in range(windows * captions)]
    assert Counter(window for window, _ in first) == {str(w): captions for w in range(windows)}
    assert Counter(caption for _, caption in first) == {str(c): windows for c in range(captions)}


def test_the_turns_of_two_clips_are_drawn_apart() -> None:
    """Or all clips would have their first caption in one epoch, and their second in the next."""
    draws = [[dealt(4, turn, 1, item, "caption") for turn in range(12)] for item in range(6)]
    assert len({tuple(draw) for draw in draws}) == 6


@pytest.mark.parametrize("repeats", [0.5, 1.0, 2.0])
def test_two_sources_of_one_bucket_meet_in_batches(repeats: float) -> None:
    data = Data([BUCKETS[0]] * 64, [0] * 32 + [1] * 32, [1.0, repeats], 4, 1)
    mixed = [len({data.sources[item] for item in plan.items}) for plan in epochs(data, 1)[0]]
    assert sum(count == 2 for count in mixed) > len(mixed) / 3
