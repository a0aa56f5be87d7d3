"""What a checkpoint continues besides its recipe: clips, captions and base weights, known by content and not by place."""

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from finetune.data.cache import Cache, digest
from finetune.data.file_facts import is_named_by_content
from finetune.models.family import Family
from finetune.preparation.encode import Prepared
from finetune.preparation.former import clips_digest
from finetune.runtime.distributed import Runtime
from finetune.runtime.logging import say
from finetune.runtime.units import GIB

CLIPS, BASE = (
    "clips",
    "base",
)  # in every checkpoint's trainer.json: the clips in their order; names and sizes of the base weights
BASE_CONTENT, CLIP_LIST = "base_content", "clip_list"  # which older ones lack
_DIGITS = 8  # of each clip in CLIP_LIST


def shared_identity(family: Family, prepared: Prepared, runtime: Runtime) -> dict[str, str]:
    """The identity as rank 0 finds it, on every rank. Collective."""
    with runtime.together():
        found = identity(family, prepared) if runtime.is_main else {}
    return runtime.from_main(found)


def identity(family: Family, prepared: Prepared) -> dict[str, str]:
    """The clips and captions in their order, and the base weights. The first time, weights of a folder are read whole."""
    items = prepared.train
    return {
        CLIPS: clips_digest(items, family.columns),
        CLIP_LIST: "".join(clips_digest([item], family.columns)[:_DIGITS] for item in items),
        BASE: _base_by_size(family),
        BASE_CONTENT: _base_content(family, prepared.cache),
    }


def other_clips(facts: Mapping[str, Any], family: Family, prepared: Prepared) -> bool:
    """Whether a checkpoint was trained on other clips or captions. That an earlier version decoded them counts for nothing."""
    by_any_decoder = ({}, prepared.former) if prepared.former else ({},)
    return facts.get(CLIPS) not in [clips_digest(prepared.train, family.columns, names) for names in by_any_decoder]


def other_base(facts: Mapping[str, Any], found: Mapping[str, str]) -> bool:
    """Whether a checkpoint was trained on other base weights, by their content if it has noted that, else by names and sizes."""
    name = BASE_CONTENT if BASE_CONTENT in facts else BASE
    return facts.get(name) != found[name]


def is_of_base(facts: Mapping[str, Any], family: Family, cache: Cache) -> bool:
    """The same question, the other way round, for a family's base weights."""
    name, of = (BASE_CONTENT, _base_content(family, cache)) if BASE_CONTENT in facts else (BASE, _base_by_size(family))
    return facts.get(name) == of


def say_if_not_compared(facts: Mapping[str, Any], family: Family) -> None:
    """Say that an older checkpoint's base weights were compared by name and size alone: on the Hub, names tell the content."""
    files = family.folder.weight_files(family.trained_component)
    if BASE_CONTENT not in facts and not all(is_named_by_content(file.resolve()) for file in files):
        say(
            f"the checkpoint of step {facts['step']} is of an older version, which noted only names and sizes of the base "
            "weights: that their content is the same could not be compared; the next checkpoint notes it"
        )


def clips_that_differ(facts: Mapping[str, Any], found: Mapping[str, str]) -> str:
    """How many clips were added and removed since a checkpoint, in words; empty if it has not noted them."""
    if CLIP_LIST not in facts:
        return ""
    before, now = (Counter(_parts(each[CLIP_LIST])) for each in (facts, found))
    added, removed = (now - before).total(), (before - now).total()
    if not added + removed:
        return ": they are the same in another order"
    return f": {added} are new and {removed} are gone, where a changed one is both"


def _parts(text: str) -> list[str]:
    return [text[start : start + _DIGITS] for start in range(0, len(text), _DIGITS)]


def _base_by_size(family: Family) -> str:
    """What tells the pretrained weights of the trained component from others, without reading them."""
    return digest(
        family.folder.fingerprint(family.trained_component, lambda file: f"{file.resolve().name} {file.stat().st_size}")
    )


def _base_content(family: Family, cache: Cache) -> str:
    """The same, by the content of the files, which is remembered in the cache; and the scheduler that gives noise levels."""
    start, component = time.monotonic(), family.trained_component
    weights = family.folder.fingerprint(component, cache.file_hash)
    if (seconds := time.monotonic() - start) > 1:
        size = sum(file.stat().st_size for file in family.folder.weight_files(component))
        say(f"identified the weights of {component} by their content: {size / GIB:.1f} GiB in {seconds:.1f} s, once")
    cache.files.save()
    scheduler = family.folder.config("scheduler") if family.folder.has("scheduler") else {}
    return digest(weights, {name: value for name, value in scheduler.items() if not name.startswith("_")})
