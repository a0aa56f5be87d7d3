"""The order of samples: a pure function of (seed, step), equal for any number of ranks, workers and restarts."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.recipe import Bucket
from finetune.runtime import seeds


@dataclass(frozen=True)
class StepPlan:
    """The global batch of one optimizer step: indices of its items, all of one bucket, and its epoch."""

    epoch: int
    bucket: Bucket
    items: tuple[int, ...]


class Order:
    """Shuffled epochs of same-bucket batches.

    In each epoch every item appears at least once. If the batch size does not divide the number of items in a bucket, the
    bucket's last batch is filled up with its first items of the epoch. So nothing is dropped; `repeats` counts these items.
    """

    def __init__(self, buckets: Sequence[Bucket], global_batch_size: int, seed: int) -> None:
        """`buckets[i]` is the bucket of item i."""
        self.seed, self.batch = seed, global_batch_size
        self.members: dict[Bucket, list[int]] = defaultdict(list)
        for index, bucket in enumerate(buckets):
            self.members[bucket].append(index)
        self.steps_per_epoch = sum(self._batches(bucket) for bucket in self.members)
        self._shuffled: tuple[int, list[tuple[Bucket, tuple[int, ...]]]] = (-1, [])

    def plan(self, step: int) -> StepPlan:
        """The plan of optimizer step `step`, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._shuffled[0] != epoch:
            self._shuffled = (epoch, self._shuffle(epoch))
        bucket, items = self._shuffled[1][index]
        return StepPlan(epoch, bucket, items)

    def repeats(self) -> dict[Bucket, int]:
        """Number of repeated samples in an epoch, for each bucket that has any."""
        extra = {bucket: self._batches(bucket) * self.batch - len(items) for bucket, items in self.members.items()}
        return {bucket: count for bucket, count in extra.items() if count}

    def _batches(self, bucket: Bucket) -> int:
        return -(-len(self.members[bucket]) // self.batch)

    def _shuffle(self, epoch: int) -> list[tuple[Bucket, tuple[int, ...]]]:
        batches = []
        for bucket in sorted(self.members):
            items = self.members[bucket]
            order = [items[i] for i in seeds.permutation(len(items), self.seed, "order", epoch, str(bucket)).tolist()]
            total = self._batches(bucket) * self.batch
            filled = [order[i % len(order)] for i in range(total)]
            batches += [(bucket, tuple(filled[i : i + self.batch])) for i in range(0, total, self.batch)]
        shuffle = seeds.permutation(len(batches), self.seed, "batches", epoch).tolist()
        return [batches[i] for i in shuffle]
