"""Inspects the datasets of a recipe: every clip is assigned a bucket, or refused with a reason. Nothing is encoded yet."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.data.buckets import fit_to_bucket
from finetune.data.cache import Cache, digest
from finetune.data.clip import Clip
from finetune.data.column_files import MASK, PICTURES
from finetune.data.formats.listing import file_fault
from finetune.data.manifest import read_manifest
from finetune.data.windows import Windows, windows_of
from finetune.preparation.columns import check_pictures, optional_columns, say_columns
from finetune.preparation.facts import read_facts, uses_of
from finetune.preparation.inspected import InspectedClip, Inspection
from finetune.preparation.mask_facts import last_white_frames, white_windows
from finetune.preparation.summary import say_shared, say_summary
from finetune.recipe import Bucket, Recipe
from finetune.recipe.data import Data, DataSource
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import LostPeer, Problem, UserError
from finetune.runtime.logging import listed, say

Unweighed = Callable[[Bucket], int]


@dataclass(frozen=True)
class Dataset:
    """The clips to train on and those held out, with all that was found of them."""

    train: list[InspectedClip]
    heldout: list[InspectedClip]
    inspected: Sequence[Inspection]


def inspect_data(
    recipe: Recipe, cache: Cache, runtime: Runtime, columns: Sequence[str] = (), unweighed: Unweighed | None = None
) -> Dataset:
    """Inspect every dataset of a recipe. Ranks share the reading of files. Collective; returns the same on every rank.

    Args:
        columns: columns of the manifest with further files that every clip must have.
        unweighed: how many frames at the start of a bucket's videos are not in the loss, whatever a mask says; without it, masks
            are not decoded, and black ones not found.
    Raises:
        UserError: lists clips that cannot be used, unless data.bad_clips is "skip"; or no clip is left, or a clip is trained
            on and held out.
    """
    return accept(recipe, inspect_datasets(recipe, cache, runtime, columns, unweighed), columns)


def inspect_datasets(
    recipe: Recipe, cache: Cache, runtime: Runtime, columns: Sequence[str] = (), unweighed: Unweighed | None = None
) -> list[Inspection]:
    """Inspect every dataset of a recipe, held-out clips last, whatever is wrong with them; see `inspect_data`."""
    data, named = recipe.data, recipe.validation.heldout
    held = [(0, DataSource(path=named))] if named else []
    for source in data.sources:
        if not source.repeats:
            say(f"{source.path}: repeats = 0, so it is not trained on")
    found = []
    for number, source in (*data.used_datasets, *held):
        try:
            found.append(inspect_dataset(recipe, source, number, cache, runtime, columns, unweighed))
        except LostPeer:
            raise
        except UserError as error:  # the same on every rank
            found.append(Inspection(source.path, unreadable=list(error.problems)))
    return found


def accept(recipe: Recipe, inspected: Sequence[Inspection], columns: Sequence[str] = ()) -> Dataset:
    """The clips to train on and those held out. Raises UserError as `inspect_data` does."""
    if unreadable := [problem for each in inspected for problem in each.unreadable]:
        raise UserError.of(list(dict.fromkeys(unreadable)))
    for each in inspected:
        if each.clips:
            say_summary(each.path, each, recipe.data.buckets)
            say_columns(each.path, [entry.clip for entry in each.clips], columns)
    say_shared(inspected[: len(recipe.data.used_datasets)])
    refuse_or_skip([problem for each in inspected for problem in each.problems], recipe.data.bad_clips, "used")
    for each in inspected:
        require(each.clips, each.path)
    if recipe.validation.heldout:
        *sources, held = inspected
        split = ([clip for each in sources for clip in each.clips], held.clips)
    else:
        split = split_heldout([clip for each in inspected for clip in each.clips], recipe)
    _refuse_shared(*split)
    return Dataset(*split, inspected)


def inspect_dataset(
    recipe: Recipe,
    source: DataSource,
    number: int,
    cache: Cache,
    runtime: Runtime,
    columns: Sequence[str],
    unweighed: Unweighed | None = None,
) -> Inspection:
    """Inspect one dataset. Collective; returns the same on every rank."""
    data = recipe.data
    with runtime.together():
        manifest = read_manifest(source.path, **data.reading(source), leave_out=recipe.own_paths)
        clips, problems = _with_files(manifest.clips, columns)
        read = [*columns, *optional_columns(columns)]
        uses = uses_of(clips, read, PICTURES)
    facts = read_facts(uses, cache, runtime)

    result = Inspection(source.path, problems=[*manifest.problems, *problems], unused=list(manifest.unused))
    for clip in clips:
        try:
            info, content = facts.info(clip.path), facts.hash(clip.path)
            fit = fit_to_bucket(info, data.buckets, data.fps, str(clip.path), clip.is_image, _by_area(data, clip))
            windows = windows_of(fit, data, recipe.train.seed, content)
            named = {column: clip.file(column) for column in read if column in clip.columns}
            shown = {column: facts.info(file) for column, file in named.items() if column in PICTURES}
            check_pictures(clip, info, fit, shown, max(windows.starts) + fit.bucket.frames)
            files = {column: facts.hash(file) for column, file in named.items()}
            result.clips.append(InspectedClip(clip, content, info, fit, files, shown, windows, number))
        except UserError as error:
            result.problems.extend(error.problems)
    return _without_black(result, unweighed, cache, runtime) if unweighed else result


def _without_black(found: Inspection, unweighed: Unweighed, cache: Cache, runtime: Runtime) -> Inspection:
    """What was found, without windows that nothing of would count by their masks, and clips of which none is left. Collective."""
    masks = {number: entry.masks for number, entry in enumerate(found.clips) if MASK in entry.pictures}
    seen = dict(zip(masks, last_white_frames(list(masks.values()), cache, runtime), strict=True))
    clips, problems = [], list(found.problems)
    for number, entry in enumerate(found.clips):
        try:
            if isinstance(last := seen.get(number), UserError):
                raise last
            if last:
                given = unweighed(entry.fit.bucket)
                left = white_windows(masks[number][0], last, given, entry.windows, entry.fit)
                black = tuple(start for start in entry.windows.starts if start not in left.starts)
                entry = entry._replace(windows=left, black=Windows(black))
            clips.append(entry)
        except UserError as error:
            problems.extend(error.problems)
    return replace(found, clips=clips, problems=problems)


def split_heldout(usable: Sequence[InspectedClip], recipe: Recipe) -> tuple[list[InspectedClip], list[InspectedClip]]:
    """Split clips into those to train on and those held out, by file content and seed, so that renaming changes nothing.

    Raises:
        UserError: nothing would be left to train on.
    """
    count, out, contents = (
        recipe.validation.heldout_clips,
        heldout_hashes(usable, recipe),
        {each.hash for each in usable},
    )
    if count and count >= len(contents):
        raise UserError(
            f"{count} of {len(contents)} clips would be held out, and none trained on",
            f"set it to at most {len(contents) - 1}",
            "validation.heldout_clips",
        )
    held = [entry for entry in usable if entry.hash in out]
    if held:
        say(f"held out: {listed([entry.clip.path for entry in held], most=None)}")
    return [entry for entry in usable if entry.hash not in out], held


def heldout_hashes(usable: Iterable[InspectedClip], recipe: Recipe) -> set[str]:
    """The files, by content, that `validation.heldout_clips` takes out of the clips to train on."""
    hashes = sorted({entry.hash for entry in usable}, key=lambda each: digest("heldout", recipe.train.seed, each))
    return set(hashes[: recipe.validation.heldout_clips])


def refuse_or_skip(problems: Sequence[Problem], policy: str, verb: str) -> None:
    """Raise UserError for clips that cannot be used, or with the policy "skip" say which are left out."""
    if problems and policy == "refuse":
        hint = 'or data.bad_clips = "skip" goes on without it'
        problems = [replace(problem, cure=f"{problem.cure}; {hint}") for problem in problems]
        raise UserError.of(problems, f"{len(problems)} clips cannot be {verb}:")
    for problem in problems:
        say(f"skipped {Problem(problem.what, problem.where)}")


def require(found: Sequence, path: Path) -> None:
    """Raise UserError if no clip of a dataset is left."""
    if not found:
        raise UserError("not one usable clip is left", "add clips that can be decoded and fill a bucket", str(path))


def _refuse_shared(train: Sequence[InspectedClip], heldout: Sequence[InspectedClip]) -> None:
    trained = {entry.hash: entry.clip.path for entry in train}
    if both := [
        Problem(
            f"this held-out clip is trained on, too, as {trained[entry.hash]}",
            str(entry.clip.path),
            "take it out of validation.heldout or of the clips to train on",
        )
        for entry in heldout
        if entry.hash in trained
    ]:
        raise UserError.of(both, f"{len(both)} clips are both held out and trained on:")


def _with_files(clips: Sequence[Clip], columns: Sequence[str]) -> tuple[list[Clip], list[Problem]]:
    """The clips that name a file in each of the columns, and no missing one in an optional one; what is wrong with the others."""
    whole, problems = [], []
    for clip in clips:
        named = [*columns, *(column for column in optional_columns(columns) if column in clip.columns)]
        lacking = [problem for column in named if (problem := _lacks(clip, column))]
        problems += lacking
        whole += [] if lacking else [clip]
    return whole, problems


def _lacks(clip: Clip, column: str) -> Problem | None:
    if column not in clip.columns:
        cure = f"add a column {column!r} with the path of its file"
        return Problem(f"the clip has no {column!r}, which this model is trained on", clip.where, cure)
    fault = file_fault(clip.file(column), "file")
    return Problem(fault[0], f"{clip.file(column)} (from {clip.where})", fault[1]) if fault else None


def _by_area(data: Data, clip: Clip) -> bool:
    """Whether a clip without a bucket needs another length in data.frames: else the buckets were not found, but given beside it."""
    return data.area is not None and not (clip.is_image and 1 in data.frames)
