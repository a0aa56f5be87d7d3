"""Inspects a dataset: every clip is assigned a bucket, or refused with a reason. Nothing is encoded yet."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from finetune.data import decode
from finetune.data.buckets import BucketFit, fit_to_bucket
from finetune.data.cache import Cache, content_hash, digest
from finetune.data.clip import Clip
from finetune.data.manifest import read_manifest
from finetune.recipe import Recipe
from finetune.recipe.schema import Data
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import Problem, UserError
from finetune.runtime.logging import say


class InspectedClip(NamedTuple):
    """A clip that can be trained on, with the hash of its file, its size and duration, and its bucket.

    `files` has the hash of each further file that the manifest names for it, by column.
    """

    clip: Clip
    hash: str
    info: decode.VideoInfo
    fit: BucketFit
    files: Mapping[str, str]


def inspect_clips(
    data: Data, path: Path, cache: Cache, runtime: Runtime, columns: Sequence[str] = ()
) -> list[InspectedClip]:
    """Inspect a dataset. Ranks share the reading of files. Collective; returns the same on every rank.

    Args:
        path: `data.path`, or another dataset read by the same rules.
        columns: columns of the manifest with further files that every clip must have.
    Raises:
        UserError: lists clips that cannot be used, unless data.bad_clips is "skip"; or no clip is left.
    """
    with runtime.together():
        clips = read_manifest(path, data.video_column, data.caption_column, data.id_token)
        videos = {clip.path for clip in clips}
        paths = sorted(videos | _further_files(clips, columns))
        # All ranks share this work, also those that will train on the same samples.
        mine = {file: _inspect(file, cache, file in videos) for file in paths[runtime.rank :: runtime.world_size]}
    facts: dict[Path, dict | UserError] = {}
    for share in runtime.gather(mine):
        facts |= share
    cache.files.entries |= {str(p.resolve()): entry for p, entry in facts.items() if isinstance(entry, dict)}
    with runtime.together():
        if runtime.is_main:
            cache.files.save()

    usable: list[InspectedClip] = []
    problems: list[Problem] = []
    for clip in clips:
        try:
            entry = _known(facts, clip.path)
            info = decode.VideoInfo.of(entry)
            assert info  # as _inspect has made sure
            fit = fit_to_bucket(info, data.buckets, data.fps, str(clip.path))
            files = {column: _known(facts, clip.file(column))["hash"] for column in columns}
            usable.append(InspectedClip(clip, entry["hash"], info, fit, files))
        except UserError as error:
            problems += error.problems
    refuse_or_skip(problems, data.bad_clips, "used")
    require(usable, path)
    _report(path, usable)
    return usable


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
    count, seed = recipe.validation.heldout_clips, recipe.train.seed
    hashes = sorted({entry.hash for entry in usable}, key=lambda content: digest("heldout", seed, content))
    if count and count >= len(hashes):
        raise UserError(
            f"{count} of {len(hashes)} clips would be held out, and none trained on",
            f"set it to at most {len(hashes) - 1}",
            "validation.heldout_clips",
        )
    out = set(hashes[:count])
    held = [entry for entry in usable if entry.hash in out]
    if held:
        say(f"held out: {', '.join(str(entry.clip.path) for entry in held)}")
    return [entry for entry in usable if entry.hash not in out], held


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


def _further_files(clips: Sequence[Clip], columns: Sequence[str]) -> set[Path]:
    """The files that clips name in columns. Raises UserError for those that are not there."""
    problems: list[Problem] = []
    for clip, column in ((clip, column) for clip in clips for column in columns):
        if column not in clip.columns:
            cure = f"add a column {column!r} with the path of its file"
            problems.append(Problem(f"the clip has no {column!r}, which this model is trained on", clip.where, cure))
        elif not clip.file(column).is_file():
            problems.append(Problem("no such file", f"{clip.file(column)} (from {clip.where})", "mend the path"))
    if problems:
        raise UserError.of(problems)
    return {clip.file(column) for clip in clips for column in columns}


def _inspect(file: Path, cache: Cache, is_video: bool) -> dict | UserError:
    """A file's hash, and the `VideoInfo` fields of a video, remembered as long as the file does not change.

    Returns what is wrong with a file that is no video it can be trained on.
    """
    try:
        known = cache.files.get(file)
        if known is None or (is_video and decode.VideoInfo.of(known) is None):
            facts = asdict(decode.probe(file)) if is_video else {}
            known = cache.files.put(file, hash=content_hash(file), **facts)
        return known
    except UserError as error:
        return error


def _report(path: Path, usable: Sequence[InspectedClip]) -> None:
    """Say in one line how many clips each bucket has, and how many are trimmed, cropped and enlarged."""
    buckets = Counter(str(entry.fit.bucket) for entry in usable)
    trimmed = sum(entry.fit.trimmed > 0 for entry in usable)
    cropped = sum(entry.fit.cropped > 0.02 for entry in usable)
    enlarged = sum(entry.fit.enlarged > 1.0 for entry in usable)
    shapes = ", ".join(f"{count} in {bucket}" for bucket, count in sorted(buckets.items()))
    say(f"{path}: {len(usable)} clips, {shapes}; {trimmed} trimmed at the end, {cropped} cropped, {enlarged} enlarged")
