"""Inspects the datasets of a recipe: every clip is assigned a bucket, or refused with a reason. Nothing is encoded yet."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from finetune.data import decode
from finetune.data.buckets import BucketFit, fit_to_bucket
from finetune.data.cache import Cache, digest
from finetune.data.clip import Clip
from finetune.data.column_files import MASK, PICTURES
from finetune.data.formats.listing import file_fault
from finetune.data.manifest import describe_unused, read_manifest
from finetune.data.sources import Piece, SourceFile, file_source
from finetune.data.windows import Windows, windows_of
from finetune.preparation.columns import check_pictures, optional_columns, say_columns
from finetune.preparation.facts import read_facts, uses_of
from finetune.preparation.mask_facts import last_white_frames, seconds_of, white_windows
from finetune.recipe import Bucket, Recipe
from finetune.recipe.data import Data, DataSource
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import LostPeer, Problem, UserError
from finetune.runtime.logging import listed, say

Unweighed = Callable[[Bucket], int]


class InspectedClip(NamedTuple):
    """A clip that can be trained on, with the hash of its file, its size and duration, its bucket, and its pieces.

    `files` has the hash of each further file that the manifest names for it, by column; `pictures` the size and length of those
    that are masks, control or reference videos or images; `source` is the number of its dataset; `black` are the windows
    that are left out because nothing of them would count by the clip's mask.
    """

    clip: Clip
    hash: str
    info: decode.VideoInfo
    fit: BucketFit
    files: Mapping[str, str]
    pictures: Mapping[str, decode.VideoInfo]
    windows: Windows = Windows((0,))
    source: int = 0
    black: Windows = Windows(())

    @property
    def masks(self) -> list[SourceFile]:
        """The file of its mask for each of its windows."""
        found, info = self.files[MASK], self.pictures[MASK]
        pieces = [Piece(self.fit.bucket, self.fit.fps, start) for start in self.windows.starts]
        return [file_source(MASK, self.clip, found, info, piece, "black").read() for piece in pieces]

    @property
    def samples(self) -> int:
        """How many samples it is in an epoch that takes every clip once."""
        return 1 if self.windows.take_turns else len(self.windows.starts)

    @property
    def unused(self) -> int:
        """Frames that are in none of its pieces."""
        return self.windows.unused(self.fit)

    @property
    def black_seconds(self) -> str:
        """Where the windows lie that are left out for its mask; empty if there is none."""
        return seconds_of(self.black, self.fit)

    @property
    def resampled(self) -> decode.Resampling:
        """Frames that are shown again and left out, over all of its pieces."""
        if self.clip.is_image:
            return decode.Resampling(0, 0)
        count, fps = self.fit.bucket.frames, self.fit.fps
        each = [self.info.resampled(fps, count, start / fps) for start in self.windows.starts]
        return decode.Resampling(*map(sum, zip(*each, strict=True)))


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
    data, seed, named = recipe.data, recipe.train.seed, recipe.validation.heldout
    held = [(0, DataSource(path=named))] if named else []
    found = []
    for number, source in (*data.used_datasets, *held):
        try:
            found.append(inspect_dataset(data, source, number, seed, cache, runtime, columns, unweighed))
        except LostPeer:
            raise
        except UserError as error:  # the same on every rank
            found.append(Inspection(source.path, unreadable=list(error.problems)))
    return found


def accept(recipe: Recipe, inspected: Sequence[Inspection], columns: Sequence[str] = ()) -> Dataset:
    """The clips to train on and those held out. Raises UserError as `inspect_data` does."""
    if unreadable := [problem for each in inspected for problem in each.unreadable]:
        raise UserError.of(list(dict.fromkeys(unreadable)))
    refuse_or_skip([problem for each in inspected for problem in each.problems], recipe.data.bad_clips, "used")
    for each in inspected:
        require(each.clips, each.path)
        _report(each.path, each)
        say_columns(each.path, [entry.clip for entry in each.clips], columns)
    if recipe.validation.heldout:
        *sources, held = inspected
        split = ([clip for each in sources for clip in each.clips], held.clips)
    else:
        split = split_heldout([clip for each in inspected for clip in each.clips], recipe)
    _refuse_shared(*split)
    return Dataset(*split, inspected)


def inspect_dataset(
    data: Data,
    source: DataSource,
    number: int,
    seed: int,
    cache: Cache,
    runtime: Runtime,
    columns: Sequence[str],
    unweighed: Unweighed | None = None,
) -> Inspection:
    """Inspect one dataset. Collective; returns the same on every rank."""
    with runtime.together():
        manifest = read_manifest(source.path, **data.reading(source))
        clips, problems = _with_files(manifest.clips, columns)
        read = [*columns, *optional_columns(columns)]
        uses = uses_of(clips, read, PICTURES)
    facts = read_facts(uses, cache, runtime)

    result = Inspection(source.path, problems=[*manifest.problems, *problems], unused=list(manifest.unused))
    for clip in clips:
        try:
            info, content = facts.info(clip.path), facts.hash(clip.path)
            fit = fit_to_bucket(info, data.buckets, data.fps, str(clip.path), clip.is_image, data.area is not None)
            windows = windows_of(fit, data, seed, content)
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


def _report(path: Path, found: Inspection) -> None:
    """Say in a line each how many clips every bucket has and what is lost of them, which are copies, and which files are unused."""
    clips = found.clips
    buckets = Counter(entry.fit.bucket for entry in clips)
    trimmed = sum(entry.unused > 0 for entry in clips)
    cropped = sum(entry.fit.is_cropped for entry in clips)
    enlarged = sum(entry.fit.is_enlarged for entry in clips)
    shapes = ", ".join(f"{count} in {bucket}" for bucket, count in sorted(buckets.items()))
    where = " at the end" if {entry.windows.starts for entry in clips} == {(0,)} else ""
    say(f"{path}: {_counted(clips)}, {shapes}; {trimmed} trimmed{where}, {cropped} cropped, {enlarged} enlarged")
    for line in (
        *_altered(clips, path),
        *_left_out(clips, path),
        *_copies(clips, path),
        *describe_unused(found.unused, path),
    ):
        say(line)


def _counted(clips: Sequence[InspectedClip]) -> str:
    """How many clips there are, and how many of them are videos and images where there are both."""
    images = sum(entry.clip.is_image for entry in clips)
    kinds = [
        f"{count} {kind}{'s' if count > 1 else ''}"
        for count, kind in ((len(clips) - images, "video"), (images, "image"))
    ]
    return f"{len(clips)} clips" + (f" ({', '.join(kinds)})" if 0 < images < len(clips) else "")


def _altered(clips: Sequence[InspectedClip], path: Path) -> Iterator[str]:
    """What is done to the pictures of how many clips, and how many frames are shown again or left out for the frame rate."""
    changes = Counter(change for entry in clips for change in entry.info.changes)
    if changes:
        yield f"{path}: {', '.join(f'{count} {change}' for change, count in sorted(changes.items()))}"
    found = [each for entry in clips if any(each := entry.resampled)]
    if found:
        repeated, left_out = (sum(counts) for counts in zip(*found, strict=True))
        yield f"{path}: {len(found)} clips have another frame rate: {repeated} frames shown again, {left_out} left out"


def _left_out(clips: Sequence[InspectedClip], path: Path) -> Iterator[str]:
    """Which windows are left out for their masks."""
    found = [entry for entry in clips if entry.black.starts]
    if found:
        count = sum(len(entry.black.starts) for entry in found)
        which = listed([f"{entry.clip.path} ({entry.black_seconds})" for entry in found], most=10)
        windows = f"{count} window{'s' if count > 1 else ''}"
        yield f"{path}: {windows} left out, because nothing would count there by the clip's mask: {which}"


def paths_by_content(clips: Iterable[InspectedClip]) -> dict[str, list[Path]]:
    """The different paths of clips that are the same file, byte for byte, by the file's hash."""
    same: dict[str, list[Path]] = defaultdict(list)
    for entry in clips:
        if entry.clip.path not in same[entry.hash]:
            same[entry.hash].append(entry.clip.path)
    return same


def _copies(clips: Sequence[InspectedClip], path: Path) -> Iterator[str]:
    """How many clips are the same file, byte for byte, as another."""
    copies = [paths for paths in paths_by_content(clips).values() if len(paths) > 1]
    if copies:
        count = sum(len(paths) - 1 for paths in copies)
        are = "s are copies" if count > 1 else " is a copy"
        yield f"{path}: {count} clip{are} of others, byte for byte: {listed([' = '.join(map(str, paths)) for paths in copies])}"
