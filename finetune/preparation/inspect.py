"""Inspects a dataset: every clip is assigned a bucket, or refused with a reason. Nothing is encoded yet."""

from collections import Counter
from collections.abc import Sequence
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
    """A clip that can be trained on, with the hash of its file, its size and duration, and its bucket."""

    clip: Clip
    hash: str
    info: decode.VideoInfo
    fit: BucketFit


def inspect_clips(data: Data, path: Path, cache: Cache, runtime: Runtime) -> list[InspectedClip]:
    """Inspect a dataset. Ranks share the reading of files. Collective; returns the same on every rank.

    Args:
        path: `data.path`, or another dataset read by the same rules.
    Raises:
        UserError: lists clips that cannot be used, unless data.bad_clips is "skip"; or no clip is left.
    """
    with runtime.together():
        clips = read_manifest(path, data.video_column, data.caption_column, data.id_token)
        paths = sorted({clip.path for clip in clips})
        # All ranks share this work, also those that will train on the same samples.
        mine = {video: _inspect(video, cache) for video in paths[runtime.rank :: runtime.world_size]}
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
            entry = facts[clip.path]
            if isinstance(entry, UserError):
                raise entry
            info = decode.VideoInfo(entry["height"], entry["width"], entry["frames"], entry["duration"])
            usable.append(
                InspectedClip(clip, entry["hash"], info, fit_to_bucket(info, data.buckets, data.fps, str(clip.path)))
            )
        except UserError as error:
            problems += error.problems
    refuse_or_skip(problems, data.bad_clips, "used")
    require(usable, path)
    _report(path, usable)
    return usable


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


def refuse_or_skip(problems: Sequence[Problem], policy: str, verb: str) -> set[str]:
    """Raise UserError for clips that cannot be used, or with the policy "skip" say which are left out and return their paths."""
    if problems and policy == "refuse":
        hint = 'or data.bad_clips = "skip" goes on without it'
        problems = [replace(problem, cure=f"{problem.cure}; {hint}") for problem in problems]
        raise UserError.of(problems, f"{len(problems)} clips cannot be {verb}:")
    for problem in problems:
        say(f"skipped {problem.where}: {problem.what}")
    return {problem.where for problem in problems}


def require(found: Sequence, path: Path) -> None:
    """Raise UserError if no clip of a dataset is left."""
    if not found:
        raise UserError("not one usable clip is left", "add clips that can be decoded and fill a bucket", str(path))


def _inspect(video: Path, cache: Cache) -> dict | UserError:
    """A file's hash and `VideoInfo` fields, remembered as long as the file does not change; or what is wrong with it."""
    try:
        known = cache.files.get(video)
        if known is None or "frames" not in known:
            known = cache.files.put(video, hash=content_hash(video), **asdict(decode.probe(video)))
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
