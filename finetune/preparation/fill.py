"""Fills the cache with the items of one kind that it lacks. Ranks share the work, and nothing is encoded twice."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from finetune.data.cache import Cache
from finetune.data.sources import Source
from finetune.models.encoder import Encode
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import Problem, UserError
from finetune.tracking.progress import ProgressLine

_ROUND = 4  # items that a rank encodes between two collectives, so that ranks wait little and errors show early
_LABELS = {"text": "encoding captions", "video": "encoding clips", "image": "reading images"}


@dataclass(frozen=True)
class Encoding:
    """One item to encode, and the sources that its encoder takes. `note` says what it is made from, for people."""

    kind: str
    key: str
    note: str
    sources: tuple[Source, ...]


def _not_finite(work: Encoding) -> Problem:
    return Problem(
        f"what is encoded of it as {work.kind} holds NaN or infinities",
        work.note,
        'set train.precision = "float32" if it was encoded in bf16, else look at the clip and the encoder\'s weights',
    )


def fill(
    work: Sequence[Encoding], kind: str, load: Callable[[], Encode], cache: Cache, runtime: Runtime
) -> dict[str, list[Problem]]:
    """Encode the items of one kind that the cache lacks. Returns the problems of those that cannot be, by key. Collective."""
    wanted = {entry.key: entry for entry in work if entry.kind == kind}
    with runtime.together():
        missing = [key for key in wanted if not cache.has(kind, key)] if runtime.is_main else []
    missing = runtime.from_main(missing)
    if not missing:
        return {}
    mine = missing[runtime.rank :: runtime.world_size]  # also among ranks that will train on the same samples
    problems: dict[str, list[Problem]] = {}
    with runtime.together():
        encode = load() if mine else None
    rounds = -(-len(missing) // (runtime.world_size * _ROUND))
    with ProgressLine(_LABELS.get(kind, f"encoding {kind}"), len(missing), enabled=runtime.is_main) as progress:
        for turn in range(rounds):
            found: dict[str, list[Problem]] = {}
            with runtime.together():
                for key in mine[turn * _ROUND : (turn + 1) * _ROUND]:
                    assert encode is not None  # loaded, since this rank has items
                    try:
                        tensors = encode(*(source.read() for source in wanted[key].sources))
                    except UserError as error:
                        found[key] = list(error.problems)
                        continue
                    if any(not bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
                        found[key] = [_not_finite(wanted[key])]
                        continue
                    cache.write(kind, key, tensors, wanted[key].note)
            for share in runtime.gather(found):
                problems |= share
            progress.update(min(len(missing), (turn + 1) * _ROUND * runtime.world_size), "")
    del encode
    gc.collect()
    runtime.device.empty_cache()
    return problems
