"""Fills the cache with the items of one kind that it lacks. Ranks share the work, and nothing is encoded twice."""

import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from finetune.data.cache import Cache
from finetune.data.sources import Source
from finetune.models.encoder import Encode
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import Problem, UserError
from finetune.runtime.shared_work import SharedWork, shared_work
from finetune.tracking.progress import ProgressLine

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

    While a rank encodes an item, it reads the next one and writes the last one. Each takes its next item when it is free.

    Returns:
        the problems of items that cannot be encoded, by key. All that share an item, such as copies of a clip, are named.
    """
    wanted: dict[str, list[Encoding]] = {}
    for entry in work:
        if entry.kind == kind:
            wanted.setdefault(entry.key, []).append(entry)
    with runtime.together():
        missing = [key for key in wanted if not cache.has(kind, key)] if runtime.is_main else []
        if missing and not cache.is_writable:
            what = f"{len(missing)} items are not in it, and it cannot be written"
            raise UserError(
                what, "mend its permissions or mount, or set data.cache to another folder", str(cache.folder)
            )
    missing = runtime.from_main(missing)
    if not missing:
        return {}
    label = _LABELS.get(kind, f"encoding {kind}")
    runtime.doing(label)
    found: dict[str, list[Problem]] = {}
    with ProgressLine(label, len(missing), enabled=runtime.is_main) as progress:
        text = ""
        with shared_work(runtime, len(missing)) as shared:
            for item, problems in _encode_share([wanted[key] for key in missing], shared, load, cache):
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
    return {key: share[key] for key in missing for share in shares if key in share}


def _encode_share(
    items: Sequence[Sequence[Encoding]], shared: SharedWork, load: Callable[[], Encode], cache: Cache
) -> Iterator[tuple[Encoding, list[Problem]]]:
    """Encode what this rank takes of the items; yields each with its problems, empty if it is encoded.

    At most two clips are decoded at a time: one that is encoded, and one that is read ahead.

    Args:
        items: each with all that share it.
    """
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:

        def read_next() -> tuple[Sequence[Encoding], Future] | None:
            number = shared.take()
            return None if number is None else (items[number], reader.submit(_read, items[number][0]))

        coming, written = read_next(), None
        encode = load() if coming else None
        while coming and encode:
            copies, content = coming
            content = content.result()
            coming = read_next()
            tensors = _encode(encode, copies[0], content)
            del content
            if isinstance(tensors, dict):
                if written:
                    written.result()
                written = writer.submit(cache.write, copies[0].kind, copies[0].key, tensors, copies[0].note)
                yield copies[0], []
            else:
                yield copies[0], _named(tensors, copies)
        if written:
            written.result()


def _read(item: Encoding) -> list[Any] | UserError:
    """The content of an item's sources, or why it cannot be read."""
    try:
        return [source.read() for source in item.sources]
    except UserError as error:
        return error


def _encode(encode: Encode, item: Encoding, content: list[Any] | UserError) -> dict[str, Tensor] | Sequence[Problem]:
    """The tensors of an item, on the CPU, or why there are none."""
    if isinstance(content, UserError):
        return content.problems
    try:
        tensors = encode(*content)
    except UserError as error:
        return error.problems
    if any(not bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        return [_not_finite(item)]
    return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}


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
