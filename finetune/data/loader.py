"""Reads cached items and assembles them into the micro-batches of each step, in worker processes.

Micro-batch k of a rank is a pure function of k, so the number of workers changes nothing, and a run that resumes at
step n simply starts to read there.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from finetune.data.cache import Cache
from finetune.data.sampler import Order, StepPlan, dealt
from finetune.recipe import Bucket
from finetune.runtime import seeds
from finetune.runtime.errors import UserError
from finetune.runtime.signals import end_with_parent, leave_group


@dataclass(frozen=True)
class Variant:
    """One of the ways in which a clip is trained: a piece of it with one of its captions.

    Attributes:
        keys: kind -> key in the cache.
        text_alone: key of its text without the image that the text is encoded with, for samples without; None if it has none.
    """

    caption: str
    keys: Mapping[str, str]
    text_alone: str | None = None


@dataclass(frozen=True)
class Item:
    """A clip that is ready for training: its source, and the keys of what was encoded from it.

    Attributes:
        fps: frame rate that it is trained at.
        windows: the pieces of the clip that take turns, each with a variant for every caption.
        columns: the manifest's values for the clip besides video and caption, by column.
        source: number of the dataset that it comes from.
    """

    path: Path
    bucket: Bucket
    fps: float
    windows: tuple[tuple[Variant, ...], ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    source: int = 0

    @property
    def caption(self) -> str:
        """Its first caption."""
        return self.windows[0][0].caption

    @property
    def keys(self) -> Mapping[str, str]:
        """The keys of its first piece with its first caption, as validation takes it."""
        return self.windows[0][0].keys

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Every piece with every caption."""
        return tuple(chain.from_iterable(self.windows))

    def variant(self, turn: int, *purpose: int | str) -> Variant:
        """What is trained of it when it is taken for the `turn`-th time, counted from 0; `purpose` seeds the draw."""
        window = self.windows[dealt(len(self.windows), turn, *purpose, "window")]
        return window[dealt(len(window), turn, *purpose, "caption")]

    @property
    def all_keys(self) -> list[str]:
        """The keys of all that is cached for it, of any kind."""
        return [key for each in self.variants for key in (*each.keys.values(), *filter(None, [each.text_alone]))]


@dataclass(frozen=True)
class Sample:
    """One sample of a step.

    Attributes:
        encoded: the cached tensors by kind, without a batch dimension.
        fps: frame rate of the clip.
        generator: CPU generator of all random draws for this sample.
        stratum: (position in the global batch, size of the global batch), for stratified noise levels.
        image_dropped: whether it is trained without its condition image.
        columns: the manifest's values besides video and caption, by column.
        blank: the text without a caption, for targets with guidance; else None.
    """

    encoded: Mapping[str, dict[str, Tensor]]
    bucket: Bucket
    fps: float
    generator: torch.Generator
    stratum: tuple[int, int] = (0, 1)
    image_dropped: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    blank: dict[str, Tensor] | None = None

    @property
    def moments(self) -> dict[str, Tensor]:
        """Moments of the video's posterior, as the VAE returns them: the cached item "video"."""
        return self.encoded["video"]

    @property
    def text(self) -> dict[str, Tensor]:
        """The encoded caption: the cached item "text"."""
        return self.encoded["text"]


@dataclass(frozen=True)
class Dropout:
    """Probabilities of training a sample without its caption or its image.

    A dropped caption is replaced by the cached text `unconditional_key`.
    """

    caption: float
    image: float
    unconditional_key: str


@dataclass(frozen=True)
class BatchSplit:
    """How a global batch is spread: each data rank, number `rank` of `size`, takes `micro` samples at a time, `accumulation`
    times.
    """

    rank: int
    size: int
    global_batch: int
    micro: int

    @property
    def accumulation(self) -> int:
        return self.global_batch // (self.size * self.micro)

    def positions(self, micro_step: int) -> range:
        """Positions in the global batch that this rank takes at an accumulation step."""
        start = (micro_step * self.size + self.rank) * self.micro
        return range(start, start + self.micro)


def read_sample(item: Item, cache: Cache, generator: torch.Generator, blank_key: str | None = None) -> Sample:
    """Read an item's first piece and caption without dropout, for validation.

    Args:
        blank_key: of the text without a caption, for targets with guidance.
    """
    encoded = {kind: cache.read(kind, key) for kind, key in item.keys.items()}
    blank = None if blank_key is None else cache.read("text", blank_key)
    return Sample(encoded, item.bucket, item.fps, generator, columns=item.columns, blank=blank)


class MicroBatches(Dataset):
    """The micro-batches of this rank; the index is step x accumulation + accumulation step.

    Args:
        assemble: turns samples of one bucket into what the step consumes.
        blank_key: of the text without a caption, for targets with guidance.
    """

    def __init__(
        self,
        items: Sequence[Item],
        order: Order,
        split: BatchSplit,
        cache: Cache,
        assemble: Callable[[list[Sample]], Any],
        seed: int,
        dropout: Dropout,
        blank_key: str | None = None,
    ) -> None:
        self.items, self.order, self.split, self.cache = items, order, split, cache
        self.assemble, self.seed, self.dropout, self.blank_key = assemble, seed, dropout, blank_key

    def __getitem__(self, k: int) -> Any:
        step, micro_step = divmod(k, self.split.accumulation)
        plan = self.order.plan(step)
        try:
            samples = [self._sample(step, position, plan) for position in self.split.positions(micro_step)]
            return self.assemble(samples)
        except UserError as error:
            return error  # raised by the consumer: exceptions of a worker arrive as text

    def _sample(self, step: int, position: int, plan: StepPlan) -> Sample:
        number = plan.items[position]
        item = self.items[number]
        variant = item.variant(plan.turns[position], self.seed, number)
        generator = seeds.generator(self.seed, "sample", step, position)
        dropped = torch.rand((), generator=generator).item() < self.dropout.caption
        drawn = torch.rand((), generator=seeds.generator(self.seed, "image", step, position)).item()
        image_dropped = drawn < self.dropout.image
        text = variant.text_alone if image_dropped and variant.text_alone else variant.keys["text"]
        keys = {**variant.keys, "text": self.dropout.unconditional_key if dropped else text}
        return Sample(
            encoded={kind: self.cache.read(kind, key) for kind, key in keys.items()},
            bucket=item.bucket,
            fps=item.fps,
            generator=generator,
            stratum=(position, self.split.global_batch),
            image_dropped=image_dropped,
            columns=item.columns,
            blank=None if self.blank_key is None else self.cache.read("text", self.blank_key),
        )


class _Range(torch.utils.data.Sampler):
    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __iter__(self):
        return iter(range(self.start, self.stop))

    def __len__(self) -> int:
        return self.stop - self.start


def _init_worker(parent: int | None, _: int) -> None:
    """For a new loader process: a killed parent takes it along. Blocked in a full pipe, it would else hold the run's lock and the
    connections to other ranks for ever.
    """
    end_with_parent(parent)
    leave_group()
    torch.set_num_threads(1)


def open_loader(
    batches: MicroBatches, first_step: int, last_step: int, workers: int, pin_memory: bool
) -> Iterator[Any]:
    """Yield the micro-batches of steps first_step .. last_step - 1, in order.

    What worker processes have read is taken over by a thread while the step computes: of torch's, which moves it to page-locked
    memory, or of our own.
    """
    # Here, because commands that load nothing need not wait for its import.
    from torchdata.stateful_dataloader import StatefulDataLoader

    accumulation = batches.split.accumulation
    parent = os.getpid() if torch.multiprocessing.get_start_method() == "fork" else None
    loader = StatefulDataLoader(
        batches,
        batch_size=None,
        sampler=_Range(first_step * accumulation, last_step * accumulation),
        num_workers=workers,
        worker_init_fn=partial(_init_worker, parent),
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
    )
    started = iter(loader)  # by this thread, with which the processes end
    return _one_ahead(started) if workers and not pin_memory else started


def _one_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same, each taken while the one before it is used."""
    with ThreadPoolExecutor(1, "batches") as reader:
        coming = reader.submit(next, batches, _END)
        while (batch := coming.result()) is not _END:
            coming = reader.submit(next, batches, _END)
            yield batch


_END = object()
