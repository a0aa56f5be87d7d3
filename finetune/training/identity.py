"""What a checkpoint continues besides its recipe: clips, captions and base weights, known by content and not by place."""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.checks.buckets import resolve_buckets
from finetune.checks.model import open_family
from finetune.data.cache import Cache, digest
from finetune.data.decode import FORMER_DECODER
from finetune.data.file_facts import is_named_by_content
from finetune.data.loader import Item
from finetune.models import is_outside
from finetune.models.adapters.given import frozen_identity, started_identity
from finetune.models.family import Family
from finetune.preparation.encode import Prepared
from finetune.preparation.former import Begun, Names, clips_digest
from finetune.preparation.used import check_clips
from finetune.recipe import Recipe
from finetune.recipe.experts import recipes_of_experts
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.files import read_note
from finetune.runtime.logging import say
from finetune.runtime.units import GIB

# In every checkpoint's trainer.json: the clips in their order; names and sizes of the base weights.
CLIPS, BASE = "clips", "base"
BASE_CONTENT, CLIP_LIST, DECODED_BY = "base_content", "clip_list", "decoded_by"  # which older ones lack
GIVEN = "adapters"  # which those lack that are given none
STARTED = "started_from"  # what lora.start_from was, as JSON; lacked by those without one, and by older ones
DIGITS = 8  # of each clip in CLIP_LIST
_FORMER = str(FORMER_DECODER)  # as DECODED_BY has it


def shared_identity(recipe: Recipe, family: Family, prepared: Prepared, runtime: Runtime) -> dict[str, str]:
    """The identity as rank 0 finds it, on every rank. Collective."""
    with runtime.together():
        found = prepared_identity(recipe, family, prepared) if runtime.is_main else {}
    return runtime.from_main(found)


def prepared_identity(recipe: Recipe, family: Family, prepared: Prepared) -> dict[str, str]:
    """The identity of a training on prepared clips, and by which version they were decoded."""
    found = identity(recipe, family, prepared.train, prepared.cache, prepared.former)
    return found | {DECODED_BY: str(prepared.decoder)}


def identity(recipe: Recipe, family: Family, items: Sequence[Item], cache: Cache, names: Names) -> dict[str, str]:
    """The clips and captions in their order, the base weights, and the adapters that it is given, if there are any.

    The first time, weights of a folder are read whole.
    """
    return {
        **_adapters(recipe, family, cache),
        CLIPS: clips_digest(items, family.columns, names),
        CLIP_LIST: "".join(clips_digest([item], family.columns, names)[:DIGITS] for item in items),
        BASE: _base_by_size(family),
        BASE_CONTENT: _base_content(family, cache),
    }


def _adapters(recipe: Recipe, family: Family, cache: Cache) -> dict[str, str]:
    """What tells the adapters that a training is given from others; nothing if it is given none.

    The one that it began as may be gone once there is a checkpoint: then it is what the newest checkpoint says that it was.
    """
    frozen, noted = frozen_identity(recipe.adapter, family, cache.file_hash), _newest(recipe)
    try:
        started = started_identity(recipe.adapter, family, cache.file_hash)
    except UserError:
        if STARTED in noted:
            started = json.loads(noted[STARTED])
        elif GIVEN in noted and not frozen:  # an older checkpoint, which has one digest of all
            return {GIVEN: noted[GIVEN]}
        else:
            raise
    given = [["start_from", *started]] if started else []
    given += [["frozen", *each] for each in frozen]
    return ({GIVEN: digest(given)} if given else {}) | ({STARTED: json.dumps(started)} if started else {})


def check_identity(facts: Mapping[str, Any], found: Mapping[str, str], recipe: Recipe) -> None:
    """Refuse to go on from a checkpoint, whose trainer.json has `facts`, with other clips or base weights than those it had."""
    if facts[CLIPS] != found[CLIPS]:
        raise _other(recipe, facts, _clips(recipe), _clips_that_differ(facts, found))
    if other_base(facts, found):
        raise _other(recipe, facts, "weights in model.path")
    if other_adapters(facts, found):
        raise _other(recipe, facts, "adapters in lora.start_from or lora.frozen")


def check_before_encoding(recipe: Recipe, family: Family, cache: Cache, items: Sequence[Item], names: Names) -> None:
    """The same, of a run's newest checkpoint, as far as it is certain before clips are encoded, which may take hours.

    With data.bad_clips = "skip", clips that fail to be encoded are left out, and are not known yet: then only clips that are gone
    are refused, if the checkpoint lists its clips, which older ones do not.
    """
    facts = _newest(recipe) if items else {}
    if not {"step", CLIPS, BASE} <= facts.keys():
        return
    found = identity(recipe, family, items, cache, names)
    if recipe.data.bad_clips == "refuse":
        differ = facts[CLIPS] != found[CLIPS]
    else:
        differ = CLIP_LIST in facts and bool(_counted(facts) - _counted(found))
    if differ:
        raise _other(recipe, facts, _clips(recipe), _clips_that_differ(facts, found))
    if other_base(facts, found):
        raise _other(recipe, facts, "weights in model.path")
    if other_adapters(facts, found):
        raise _other(recipe, facts, "adapters in lora.start_from or lora.frozen")


def begun(recipes: Sequence[Recipe], family: Family) -> Begun:
    """What the checkpoints of a start's recipes, one for each expert, ask of its clips."""

    def check(cache: Cache, items: Sequence[Item], names: Names) -> None:
        for each in recipes:
            trained = family.of_expert(each.model.experts[0]) if each.model.experts else family
            check_before_encoding(each, trained, cache, items, names)

    newest = [facts for each in recipes if CLIPS in (facts := _newest(each))]
    # Of an older checkpoint than the newest, the run may have gone on with its clips decoded anew.
    if any(facts.get(DECODED_BY, _FORMER) != _FORMER for facts in newest):
        newest = []
    return Begun(frozenset(str(facts[CLIPS]) for facts in newest), check)


def check_begun_run(recipe: Recipe, runtime: Runtime) -> None:
    """Raise UserError if the output folder has a run that cannot go on with the recipe's clips and weights. Collective."""
    with runtime.together():
        family = open_family(recipe)
        is_begun = any(_newest(each) for each in recipes_of_experts(recipe, list(family.experts)))
    if runtime.from_main(is_begun):
        resolved = resolve_buckets(recipe, family, runtime)
        recipes = recipes_of_experts(resolved, list(family.experts))
        check_clips(resolved, family, begun(recipes, family), runtime)


def _newest(recipe: Recipe) -> dict[str, Any]:
    """What is in the trainer.json of the run's newest checkpoint that has one; nothing if there is none.

    A damaged one is passed over: a start of the run says so by name.
    """
    files = sorted((recipe.run_folder / "checkpoints").glob("step_*/trainer.json"), reverse=True)
    return next((facts for file in files if (facts := read_note(file))), {})


def other_base(facts: Mapping[str, Any], found: Mapping[str, str]) -> bool:
    """Whether a checkpoint was trained on other base weights, by their content if it has noted that, else by names and sizes."""
    name = BASE_CONTENT if BASE_CONTENT in facts else BASE
    return facts.get(name) != found[name]


def other_adapters(facts: Mapping[str, Any], found: Mapping[str, str]) -> bool:
    """Whether a checkpoint continues another adapter, or was trained on top of others."""
    return facts.get(GIVEN) != found.get(GIVEN)


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


def _other(recipe: Recipe, facts: Mapping[str, Any], what: str, told: str = "") -> UserError:
    return UserError(
        f"the {what} are not those that the checkpoint of step {facts['step']} was trained with{told}",
        "put them back to resume, or set `output` to a new folder for a new training",
        str(recipe.run_folder),
    )


def _clips(recipe: Recipe) -> str:
    return "clips or captions" + (", or the code of the family" if is_outside(recipe.model.family) else "")


def _clips_that_differ(facts: Mapping[str, Any], found: Mapping[str, str]) -> str:
    """How many clips were added and removed since a checkpoint, in words; empty if it has not noted them."""
    if CLIP_LIST not in facts:
        return ""
    before, now = _counted(facts), _counted(found)
    added, removed = (now - before).total(), (before - now).total()
    if not added + removed:
        return ": they are the same in another order"
    return f": {added} are new and {removed} are gone, where a changed one is both"


def _counted(facts: Mapping[str, Any]) -> Counter[str]:
    text = str(facts[CLIP_LIST])
    return Counter(text[start : start + DIGITS] for start in range(0, len(text), DIGITS))


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
