"""Inspects the datasets of a recipe: every clip is assigned a bucket, or refused with a reason. Nothing is encoded yet."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from finetune.data import decode
from finetune.data.buckets import BucketFit, fit_to_bucket
from finetune.data.cache import Cache, content_hash, digest
from finetune.data.clip import Clip
from finetune.data.manifest import read_manifest
from finetune.data.windows import Windows, windows_of
from finetune.recipe import Recipe
from finetune.recipe.data import Data, DataSource
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import Problem, UserError
from finetune.runtime.logging import say

_NAMED = 3  # files that a line names of many


class InspectedClip(NamedTuple):
    """A clip that can be trained on, with the hash of its file, its size and duration, its bucket, and its pieces.

    `files` has the hash of each further file that the manifest names for it, by column; `source` is the number of its dataset.
    """

    clip: Clip
    hash: str
    info: decode.VideoInfo
    fit: BucketFit
    files: Mapping[str, str]
    windows: Windows = Windows((0,))
    source: int = 0


@dataclass(frozen=True)
class Inspection:
    """What was found of a dataset.

    Attributes:
        path: its folder or manifest.
        clips: those that can be trained on.
        problems: why others cannot.
        unused: files of the dataset's folder that are no clips, each with the reason.
        unreadable: why nothing of it can be read, which no policy skips.
    """

    path: Path
    clips: list[InspectedClip] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    unused: list[Problem] = field(default_factory=list)
    unreadable: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class Dataset:
    """The clips to train on and those held out, with all that was found of them."""

    train: list[InspectedClip]
    heldout: list[InspectedClip]
    inspected: Sequence[Inspection]


def inspect_data(recipe: Recipe, cache: Cache, runtime: Runtime, columns: Sequence[str] = ()) -> Dataset:
    """Inspect every dataset of a recipe. Ranks share the reading of files. Collective; returns the same on every rank.

    Args:
        columns: columns of the manifest with further files that every clip must have.
    Raises:
        UserError: lists clips that cannot be used, unless data.bad_clips is "skip"; or no clip is left, or a clip is trained
            on and held out.
    """
    return accept(recipe, inspect_datasets(recipe, cache, runtime, columns))


def inspect_datasets(recipe: Recipe, cache: Cache, runtime: Runtime, columns: Sequence[str] = ()) -> list[Inspection]:
    """Inspect every dataset of a recipe, held-out clips last, whatever is wrong with them; see `inspect_data`."""
    data, seed, named = recipe.data, recipe.train.seed, recipe.validation.heldout
    sources = [(number, source) for number, source in enumerate(data.datasets) if source.repeats]
    held = [(0, DataSource(path=named))] if named else []
    found = []
    for number, source in (*sources, *held):
        try:
            found.append(_inspect(data, source, number, seed, cache, runtime, columns))
        except UserError as error:  # the same on every rank
            found.append(Inspection(source.path, unreadable=list(error.problems)))
    return found


def accept(recipe: Recipe, inspected: Sequence[Inspection]) -> Dataset:
    """The clips to train on and those held out. Raises UserError as `inspect_data` does."""
    if unreadable := [problem for each in inspected for problem in each.unreadable]:
        raise UserError.of(list(dict.fromkeys(unreadable)))
    refuse_or_skip([problem for each in inspected for problem in each.problems], recipe.data.bad_clips, "used")
    for each in inspected:
        require(each.clips, each.path)
        _report(each.path, each)
    if recipe.validation.heldout:
        *sources, held = inspected
        split = ([clip for each in sources for clip in each.clips], held.clips)
    else:
        split = split_heldout([clip for each in inspected for clip in each.clips], recipe)
    _refuse_shared(*split)
    return Dataset(*split, inspected)


def _inspect(
    data: Data, source: DataSource, number: int, seed: int, cache: Cache, runtime: Runtime, columns: Sequence[str]
) -> Inspection:
    """Inspect one dataset. Collective; returns the same on every rank."""
    with runtime.together():
        manifest = read_manifest(source.path, **data.reading(source))
        clips, problems = _with_files(manifest.clips, columns)
        further = {clip.file(column) for clip in clips for column in columns}
        videos = {clip.path for clip in clips}
        # All ranks share this work, also those that will train on the same samples.
        mine = {
            file: _facts(file, cache, file in videos)
            for file in sorted(videos | further)[runtime.rank :: runtime.world_size]
        }
    facts: dict[Path, dict | UserError] = {}
    for share in runtime.gather(mine):
        facts |= share
    cache.files.entries |= {str(p.resolve()): entry for p, entry in facts.items() if isinstance(entry, dict)}
    with runtime.together():
        if runtime.is_main:
            cache.files.save()

    result = Inspection(source.path, problems=[*manifest.problems, *problems], unused=list(manifest.unused))
    for clip in clips:
        try:
            entry = _known(facts, clip.path)
            info = decode.VideoInfo(entry["height"], entry["width"], entry["frames"], entry["duration"])
            fit = fit_to_bucket(info, data.buckets, data.fps, str(clip.path))
            files = {column: _known(facts, clip.file(column))["hash"] for column in columns}
            windows = windows_of(fit, data, seed, entry["hash"])
            result.clips.append(InspectedClip(clip, entry["hash"], info, fit, files, windows, number))
        except UserError as error:
            result.problems.extend(error.problems)
    return result


def _known(facts: Mapping[Path, dict | UserError], file: Path) -> dict:
    """What is known of a file. Raises the UserError that its inspection has ended with."""
    found = facts[file]
    if isinstance(found, UserError):
        raise found
    return found


def split_heldout(usable: Sequence[InspectedClip], recipe: Recipe) -> tuple[list[InspectedClip], list[InspectedClip]]:
    """Split clips into those to train on and those held out, by file content and seed, so that renaming changes nothing.

    Raises:
        UserError: nothing would be left to train on.
    """
    count, out, contents = recipe.validation.heldout_clips, heldout_hashes(usable, recipe), {each.hash for each in usable}
    if count and count >= len(contents):
        raise UserError(
            f"{count} of {len(contents)} clips would be held out, and none trained on",
            f"set it to at most {len(contents) - 1}",
            "validation.heldout_clips",
        )
    held = [entry for entry in usable if entry.hash in out]
    if held:
        say(f"held out: {', '.join(str(entry.clip.path) for entry in held)}")
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
        say(f"skipped {problem.where}: {problem.what}")


def require(found: Sequence, path: Path) -> None:
    """Raise UserError if no clip of a dataset is left."""
    if not found:
        raise UserError("not one usable clip is left", "add clips that can be decoded and fill a bucket", str(path))


def _refuse_shared(train: Sequence[InspectedClip], heldout: Sequence[InspectedClip]) -> None:
    trained = {entry.hash: entry.clip.path for entry in train}
    if both := [
        Problem(f"this held-out clip is trained on, too, as {trained[entry.hash]}", str(entry.clip.path))
        for entry in heldout
        if entry.hash in trained
    ]:
        raise UserError.of(both, "validation.heldout and data.path share clips; take them out of one:")


def _with_files(clips: Sequence[Clip], columns: Sequence[str]) -> tuple[list[Clip], list[Problem]]:
    """The clips that name a file in each of the columns, and what is wrong with the others."""
    whole, problems = [], []
    for clip in clips:
        lacking = [problem for column in columns if (problem := _lacks(clip, column))]
        problems += lacking
        whole += [] if lacking else [clip]
    return whole, problems


def _lacks(clip: Clip, column: str) -> Problem | None:
    if column not in clip.columns:
        cure = f"add a column {column!r} with the path of its file"
        return Problem(f"the clip has no {column!r}, which this model is trained on", clip.where, cure)
    if not clip.file(column).is_file():
        return Problem("no such file", f"{clip.file(column)} (from {clip.where})", "mend the path")
    return None


def _facts(file: Path, cache: Cache, is_video: bool) -> dict | UserError:
    """A file's hash, and the `VideoInfo` fields of a video, remembered as long as the file does not change.

    Returns what is wrong with a file that is no video it can be trained on.
    """
    try:
        known = cache.files.get(file)
        if known is None or (is_video and "frames" not in known):
            facts = asdict(decode.probe(file)) if is_video else {}
            known = cache.files.put(file, hash=content_hash(file), **facts)
        return known
    except UserError as error:
        return error


def _report(path: Path, found: Inspection) -> None:
    """Say in a line each how many clips every bucket has and what is lost of them, which are copies, and which files are unused."""
    clips = found.clips
    buckets = Counter(str(entry.fit.bucket) for entry in clips)
    trimmed = sum(entry.windows.unused(entry.fit) > 0 for entry in clips)
    cropped = sum(entry.fit.cropped > 0.02 for entry in clips)
    enlarged = sum(entry.fit.enlarged > 1.0 for entry in clips)
    shapes = ", ".join(f"{count} in {bucket}" for bucket, count in sorted(buckets.items()))
    where = " at the end" if {entry.windows.starts for entry in clips} == {(0,)} else ""
    say(f"{path}: {len(clips)} clips, {shapes}; {trimmed} trimmed{where}, {cropped} cropped, {enlarged} enlarged")
    for line in (*_copies(clips), *_unused(found.unused)):
        say(f"{path}: {line}")


def _copies(clips: Sequence[InspectedClip]) -> Iterator[str]:
    """How many clips are the same file, byte for byte, as another."""
    same: dict[str, list[Path]] = defaultdict(list)
    for entry in clips:
        if entry.clip.path not in same[entry.hash]:
            same[entry.hash].append(entry.clip.path)
    copies = [paths for paths in same.values() if len(paths) > 1]
    if copies:
        count = sum(len(paths) - 1 for paths in copies)
        are = "s are copies" if count > 1 else " is a copy"
        yield f"{count} clip{are} of others, byte for byte: {_some([' = '.join(map(str, paths)) for paths in copies])}"


def _unused(files: Sequence[Problem]) -> Iterator[str]:
    """Which files of the folder are not used, by the reason."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for each in files:
        reasons[each.what].append(each.where)
    for reason, names in reasons.items():
        yield f"not used, {reason}: {_some(names)}"


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
