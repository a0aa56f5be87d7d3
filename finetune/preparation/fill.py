"""Fills the cache with the items of one kind that it lacks. Ranks share the work, and nothing is encoded twice.

Hosts whose cache is a folder of their own fill it by themselves: then each item is encoded once on each.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune.data.cache import Cache
from finetune.data.sources import Source
from finetune.models.batch import Tensors
from finetune.models.encoder import Encode
from finetune.runtime.device import Arrival, Copies
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import Problem, UserError
from finetune.runtime.hosts import sharing
from finetune.runtime.progress import ProgressLine
from finetune.runtime.shared_work import SharedWork, shared_work

_LABELS = {
    "text": "encoding captions",
    "video": "encoding clips",
    "image": "reading images",
    "mask": "encoding masks",
}


@dataclass(frozen=True)
class Encoding:
    """One item to encode, and the sources that its encoder takes. `note` says what it is made from, for people.

    `former` is its key by an earlier version of the decoder, if that was another.
    """

    kind: str
    key: str
    note: str
    sources: tuple[Source, ...]
    former: str | None = None


def fill(
    work: Sequence[Encoding], kind: str, load: Callable[[], Encode], cache: Cache, runtime: Runtime
) -> dict[str, list[Problem]]:
    """Encode the items of one kind that the cache lacks. Collective.

    While a rank encodes an item, it reads the next one, and fetches, checks and writes the last one. Each takes its next item when
    it is free.

    Returns:
        the problems of items that cannot be encoded, by key. All that share an item, such as copies of a clip, are named.
    """
    wanted: dict[str, list[Encoding]] = {}
    for entry in work:
        if entry.kind == kind:
            wanted.setdefault(entry.key, []).append(entry)
    with suppress(OSError):  # what cannot be written is told below, if anything is missing
        cache.folder.mkdir(parents=True, exist_ok=True)
    groups = sharing(runtime, cache.folder)
    first = next(ranks[0] for ranks in groups if runtime.rank in ranks)  # of those that see this cache
    with runtime.together():
        missing = [key for key in wanted if not cache.has(kind, key)] if runtime.rank == first else []
        if missing and not cache.is_writable:
            what = f"{len(missing)} items are not in it, and it cannot be written"
            raise UserError(
                what, "mend its permissions or mount, or set data.cache to another folder", str(cache.folder)
            )
    of_groups = [runtime.from_rank(ranks[0], missing) for ranks in groups]
    if not any(of_groups):
        return {}
    missing = next(keys for ranks, keys in zip(groups, of_groups, strict=True) if ranks[0] == first)
    label = _LABELS.get(kind, f"encoding {kind}")
    runtime.doing(label)
    found: dict[str, list[Problem]] = {}
    with ProgressLine(label, len(missing), enabled=runtime.is_main and bool(missing)) as progress:
        text = ""
        copies = runtime.device.copies()
        with shared_work(runtime, len(missing), groups) as shared:
            for item, problems in _encode_share([wanted[key] for key in missing], shared, load, cache, copies):
                if problems:
                    found[item.key] = problems
                done, failed = shared.done(bool(problems))
                text = f"({failed} cannot be used)" if failed else ""
                progress.update(done, text)
        if progress.done < len(missing):  # others had the last ones
            progress.update(len(missing), text)
    gc.collect()  # the encoder
    runtime.device.empty_cache()
    shares = runtime.gather(found)
    return {key: share[key] for key in wanted for share in shares if key in share}


def _encode_share(
    items: Sequence[Sequence[Encoding]], shared: SharedWork, load: Callable[[], Encode], cache: Cache, copies: Copies
) -> Iterator[tuple[Encoding, list[Problem]]]:
    """Encode what this rank takes of the items; yields each with its problems, empty if it is written.

    At most two clips are decoded at a time: one that is encoded, and one that is read ahead. What at most two items are encoded to
    is in memory: of one that is written, and of one that waits for it. On a GPU an item may still be computed when the next
    one's encoder is called: the thread that writes waits for it.

    Args:
        items: each with all that share it.
    """
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:

        def read_next() -> tuple[Sequence[Encoding], Future] | None:
            number = shared.take()
            return None if number is None else (items[number], reader.submit(_read, items[number][0]))

        coming = read_next()
        written: tuple[Sequence[Encoding], Future[list[Problem]]] | None = None
        encode = load() if coming else None
        while coming and encode:
            alike, content = coming
            content = content.result()
            coming = read_next()
            tensors = _encode(encode, content)
            del content
            if not isinstance(tensors, dict):
                yield alike[0], _named(tensors, alike)
                continue
            computed = copies.computed()
            if written:
                yield _outcome(*written)
            written = alike, writer.submit(_write, cache, alike[0], tensors, copies, computed)
            del tensors
        if written:
            yield _outcome(*written)


def _read(item: Encoding) -> list[Any] | UserError:
    """The content of an item's sources, or why it cannot be read."""
    try:
        return [source.read() for source in item.sources]
    except UserError as error:
        return error


def _encode(encode: Encode, content: list[Any] | UserError) -> Tensors | Sequence[Problem]:
    """What an item's content is encoded to, contiguous on the encoder's device, or why there is nothing.

    A copy, since the next call may overwrite what an encoder returns, as CUDA graphs do.
    """
    if isinstance(content, UserError):
        return content.problems
    try:
        tensors = encode(*content)
    except UserError as error:
        return error.problems
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def _write(cache: Cache, item: Encoding, tensors: Tensors, copies: Copies, computed: Arrival) -> list[Problem]:
    """Write an item that is finite, or return why it is not written. Beside the encoder, which need not wait for it.

    Args:
        computed: the event behind the work that computes the tensors.
    """
    held = {name: copies.fetch(tensor, computed) for name, tensor in tensors.items()}
    if any(not bool(torch.isfinite(tensor).all()) for tensor in held.values()):
        return [_not_finite(item)]
    cache.write(item.kind, item.key, held, item.note)
    return []


def _outcome(alike: Sequence[Encoding], written: Future[list[Problem]]) -> tuple[Encoding, list[Problem]]:
    """An item and its problems, as soon as it is written. Raises what writing it has raised."""
    return alike[0], _named(written.result(), alike)


def _named(problems: Sequence[Problem], copies: Sequence[Encoding]) -> list[Problem]:
    """The problems of an item, each of all that share it."""
    read = copies[0].note
    return list(
        dict.fromkeys(
            replace(problem, where=item.note) if problem.where == read else problem
            for item in copies
            for problem in problems
        )
    )


def _not_finite(item: Encoding) -> Problem:
    return Problem(
        f"what is encoded of it as {item.kind} holds NaN or infinities",
        item.note,
        'set train.precision = "float32" if it was encoded in bf16, else look at the clip and the encoder\'s weights',
    )
