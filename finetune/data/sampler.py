"""The order of samples: a pure function of (seed, step), equal for any number of ranks, workers and restarts."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, lcm

from finetune.recipe import Bucket
from finetune.runtime import seeds


@dataclass(frozen=True)
class StepPlan:
    """The global batch of one optimizer step: indices of its items, all of one bucket, and its epoch.

    Attributes:
        turns: for each item, how often the training has taken it before; what is drawn of its windows and captions follows from it.
    """

    epoch: int
    bucket: Bucket
    items: tuple[int, ...]
    turns: tuple[int, ...]


class Order:
    """Shuffled epochs of same-bucket batches.

    The items of each source and bucket form an endless stream, one permutation of them after another. An epoch takes `repeats`
    times their number from it, so that after any epoch the counts of two items of a stream differ by at most one. Where the
    batch size does not divide what an epoch takes of a bucket, the last batch is filled up with the bucket's first items of
    the epoch. So nothing is dropped; `fill_ups` counts these items.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        global_batch_size: int,
        seed: int,
        sources: Sequence[int] | None = None,
        repeats: Sequence[float] = (1.0,),
    ) -> None:
        """`buckets[i]` is the bucket of item i, `sources[i]` its source, 0 if not given; `repeats` has a number for each source."""
        self.seed, self.batch = seed, global_batch_size
        groups: dict[Bucket, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for index, bucket in enumerate(buckets):
            source = sources[index] if sources else 0
            if repeats[source]:
                groups[bucket][source].append(index)
        # In a fixed sequence, and with exact fractions: sums of floats would differ between epochs.
        self._groups = {bucket: dict(sorted(groups[bucket].items())) for bucket in sorted(groups)}
        self._rates = [Fraction(str(rate)) for rate in repeats]
        shares = [self._share(source, items) for group in self._groups.values() for source, items in group.items()]
        self._period = lcm(*(share.denominator for share in shares))
        self._starts = [0]  # first steps of the epochs of a period, as far as they are known
        self._shuffled: tuple[int, list[tuple[Bucket, tuple[tuple[int, int], ...]]]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch; with fractions among the repeats, of one that takes as much of every bucket as any."""
        return sum(-(-total // self.batch) for total in self._totals().values())

    def plan(self, step: int) -> StepPlan:
        """The plan of optimizer step `step`, counted from 0."""
        epoch, index = self._locate(step)
        if self._shuffled[0] != epoch:
            self._shuffled = (epoch, self._shuffle(epoch))
        bucket, taken = self._shuffled[1][index]
        return StepPlan(epoch, bucket, tuple(item for item, _ in taken), tuple(turn for _, turn in taken))

    def fill_ups(self) -> dict[Bucket, int]:
        """Number of samples in an epoch that fill up last batches, for each bucket that has any."""
        extra = {bucket: -total % self.batch for bucket, total in self._totals().items()}
        return {bucket: count for bucket, count in extra.items() if count}

    def _share(self, source: int, items: Sequence[int]) -> Fraction:
        """Number of samples that an epoch takes of a group, in the mean."""
        return self._rates[source] * len(items)

    def _totals(self) -> dict[Bucket, int]:
        """Number of samples that an epoch takes of each bucket at most."""
        return {
            bucket: sum(ceil(self._share(source, items)) for source, items in group.items())
            for bucket, group in self._groups.items()
        }

    def _taken(self, source: int, items: Sequence[int], epoch: int) -> range:
        """What an epoch takes of a group's stream."""
        share = self._share(source, items)
        return range(floor(epoch * share), floor((epoch + 1) * share))

    def _steps(self, epoch: int) -> int:
        counts = [
            sum(len(self._taken(source, items, epoch)) for source, items in group.items())
            for group in self._groups.values()
        ]
        return sum(-(-count // self.batch) for count in counts)

    def _locate(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and the step's place in it. What epochs take repeats after a period."""
        while len(self._starts) <= self._period and self._starts[-1] <= step:
            self._starts.append(self._starts[-1] + self._steps(len(self._starts) - 1))
        periods, within = 0, step
        if len(self._starts) > self._period:
            periods, within = divmod(step, self._starts[-1])
        epoch = bisect_right(self._starts, within) - 1
        return periods * self._period + epoch, within - self._starts[epoch]

    def _shuffle(self, epoch: int) -> list[tuple[Bucket, tuple[tuple[int, int], ...]]]:
        batches = []
        for bucket, group in self._groups.items():
            taken = [pair for source, items in group.items() for pair in self._stream(bucket, source, items, epoch)]
            if len(group) > 1:
                mixed = seeds.permutation(len(taken), self.seed, "mix", epoch, str(bucket)).tolist()
                taken = [taken[i] for i in mixed]
            total = -(-len(taken) // self.batch) * self.batch
            filled = [taken[i % len(taken)] for i in range(total)]
            batches += [(bucket, tuple(filled[i : i + self.batch])) for i in range(0, total, self.batch)]
        shuffle = seeds.permutation(len(batches), self.seed, "batches", epoch).tolist()
        return [batches[i] for i in shuffle]

    def _stream(self, bucket: Bucket, source: int, items: Sequence[int], epoch: int) -> Iterator[tuple[int, int]]:
        """(item, its turn) of what an epoch takes of a group."""
        turn, permuted = -1, []
        for place in self._taken(source, items, epoch):
            if place // len(items) != turn:
                turn = place // len(items)
                name = (self.seed, "order", turn, str(bucket), *((source,) if source else ()))
                permuted = seeds.permutation(len(items), *name).tolist()
            yield items[permuted[place % len(items)]], turn


def dealt(count: int, turn: int, *purpose: int | str) -> int:
    """Which of `count` things is taken at a turn: all of them once, in an order seeded by `purpose`, before any comes again."""
    if count == 1:
        return 0
    deal, place = divmod(turn, count)
    return int(seeds.permutation(count, *purpose, deal)[place])
