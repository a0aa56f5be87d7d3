"""Clips that an earlier version of the decoder has decoded: a run that began with them goes on with them."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from finetune.data.cache import Cache, digest
from finetune.data.loader import Item, Variant
from finetune.preparation.fill import Encoding
from finetune.runtime.distributed import Runtime
from finetune.runtime.logging import say

Names = Mapping[str, str]
"""Keys of cached items -> their keys by the earlier decoder."""


@dataclass(frozen=True)
class Begun:
    """What a run's checkpoints ask of its clips.

    Attributes:
        earlier: digests of the clips that checkpoints were trained with, decoded by an earlier version.
        check: takes the cache, what is to be trained on and its former names on rank 0, before anything is encoded; raises
            UserError if the run cannot go on with it.
    """

    earlier: frozenset[str] = frozenset()
    check: Callable[[Cache, Sequence[Item], Names], None] = lambda cache, items, names: None


NOT_BEGUN = Begun()


def former_names(work: Iterable[Encoding]) -> dict[str, str]:
    """The keys of items that an earlier decoder would have named otherwise."""
    return {each.key: each.former for each in work if each.former}


def clips_digest(items: Sequence[Item], columns: Sequence[str], names: Names) -> str:
    """What tells the clips and captions of a training, in their order, from others, whatever version has decoded them.

    Args:
        columns: columns of the manifest that reach the batch without being encoded.
    """
    # Video and text come first, as checkpoints have them that know no other kind. A clip may lack a kind, such as a mask.
    kinds = dict.fromkeys(["video", "text", *(kind for item in items for kind in item.keys)])
    clips = [
        [names.get(key, key) if (key := each.keys.get(kind)) else None for each in item.variants for kind in kinds]
        for item in items
    ]
    rest = [[item.columns.get(name, "") for name in columns] for item in items] if columns else []
    # Of one dataset, checkpoints have none; of several, a clip's decides in which order it is drawn.
    sources = [[item.source for item in items]] if any(item.source for item in items) else []
    return digest([*clips, *rest, *sources])


def keeps_former(
    work: Sequence[Encoding],
    items: Sequence[Item],
    columns: Sequence[str],
    earlier: Collection[str],
    cache: Cache,
    runtime: Runtime,
) -> bool:
    """Whether a run that began with clips of the earlier decoder goes on with them, which all have to be in the cache. Collective.

    Else the items that are encoded anew are counted in a line.

    Args:
        earlier: digests of the clips that the run's checkpoints were trained with.
    """
    keeps = False
    with runtime.together():
        if runtime.is_main and (names := former_names(work)):
            old = {each.former: each for each in work if each.former}
            there = {key for key, each in old.items() if cache.has(each.kind, key)}
            has_begun = bool(earlier) and clips_digest(items, columns, names) in earlier
            keeps = has_begun and len(there) == len(old)
            anew = {key for key in there if not cache.has(old[key].kind, old[key].key)}
            if keeps:
                say("this run goes on with its clips as an earlier version decoded them; a new run decodes them anew")
            elif has_begun:
                say(
                    "this run began with its clips as an earlier version decoded them, and "
                    f"{len(old) - len(there)} of these {len(old)} items are not in the cache any more: it goes on with all "
                    "of them decoded anew, with slightly lighter colours and some frames at other times"
                )
            elif anew:
                say(
                    f"{len(anew)} cached items are encoded anew: an earlier version decoded their clips with slightly "
                    "darker colours, and some frames at other times"
                )
    return runtime.from_main(keeps)


def as_begun(item: Item, names: Names, fps: float) -> Item:
    """An item with the keys and the frame rate that it had with the earlier decoder."""
    windows = tuple(tuple(_variant(each, names) for each in window) for window in item.windows)
    return replace(item, windows=windows, fps=fps)


def _variant(variant: Variant, names: Names) -> Variant:
    return replace(variant, keys={kind: names.get(key, key) for kind, key in variant.keys.items()})
