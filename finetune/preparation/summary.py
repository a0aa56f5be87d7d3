"""What a start says of its datasets: how many clips each bucket has, and what becomes of them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from finetune.data.manifest import describe_unused
from finetune.preparation.inspected import InspectedClip, Inspection, paths_by_content
from finetune.recipe import Bucket
from finetune.runtime.logging import listed, say
from finetune.runtime.units import counted

_COPIES_NAMED = 4  # of each file


def say_summary(path: Path, found: Inspection, buckets: Sequence[Bucket]) -> None:
    """Say in a line each how many clips every bucket has and what is lost of them, which are copies, and which files are unused."""
    clips = found.clips
    counts = Counter(entry.fit.bucket for entry in clips)
    trimmed = sum(entry.unused > 0 for entry in clips)
    cropped = sum(entry.fit.is_cropped for entry in clips)
    enlarged = sum(entry.fit.is_enlarged for entry in clips)
    shapes = ", ".join(f"{count} in {bucket}" for bucket, count in sorted(counts.items()))
    where = " at the end" if {entry.windows.starts for entry in clips} == {(0,)} else ""
    say(f"{path}: {_counted(clips)}, {shapes}; {trimmed} trimmed{where}, {cropped} cropped, {enlarged} enlarged")
    for line in (
        *_stills(clips, buckets, path),
        *_empty(counts, buckets, path),
        *_altered(clips, path),
        *_left_out(clips, path),
        *_copies(clips, path),
        *describe_unused(found.unused, path),
    ):
        say(line)


def say_shared(inspected: Sequence[Inspection]) -> None:
    """Say which clips two of the datasets to train on have in common, so that an epoch takes them for each."""
    for (number, one), (other_number, other) in combinations(enumerate(inspected), 2):
        theirs = {entry.hash: entry.clip.path for entry in other.clips}
        if both := [entry.clip.path for entry in one.clips if entry.hash in theirs]:
            which = f"{one.path} and {other.path} (sources {number + 1} and {other_number + 1} of those that are trained on)"
            are = "clips are" if len(both) > 1 else "clip is"
            cure = "move one of the folders or shorten a table to have them once; `repeats` takes clips more often"
            say(f"{which}: {len(both)} {are} in both, byte for byte, and trained on for each: {listed(both)} ({cure})")


def _counted(clips: Sequence[InspectedClip]) -> str:
    """How many clips there are, and how many of them are videos and images where there are both."""
    images = sum(entry.clip.is_image for entry in clips)
    kinds = [counted(count, kind) for count, kind in ((len(clips) - images, "video"), (images, "image"))]
    several = f" ({', '.join(kinds)})" if 0 < images < len(clips) else ""
    samples = sum(entry.samples for entry in clips)
    return (
        counted(len(clips), "clip") + several + (f" with {counted(samples, 'sample')}" if samples > len(clips) else "")
    )


def _stills(clips: Sequence[InspectedClip], buckets: Sequence[Bucket], path: Path) -> Iterator[str]:
    """Which videos are trained as single images."""
    found = [entry.clip.path for entry in clips if entry.fit.bucket.frames == 1 and not entry.clip.is_image]
    if found:
        are = "s are trained as images" if len(found) > 1 else " is trained as an image"
        has_longer = any(bucket.frames > 1 for bucket in buckets)
        why = "too short for every bucket of several frames" if has_longer else "because all buckets have one frame"
        yield f"{path}: {len(found)} video{are}, {why}: {listed(found)}"


def _empty(counts: Mapping[Bucket, int], buckets: Sequence[Bucket], path: Path) -> Iterator[str]:
    """Which buckets no clip goes to."""
    if empty := [bucket for bucket in buckets if not counts.get(bucket)]:
        yield f"{path}: no clip for {listed(empty)}"


def _altered(clips: Sequence[InspectedClip], path: Path) -> Iterator[str]:
    """What is done to the pictures of how many clips, and how many frames are shown again or left out for the frame rate."""
    changes = Counter(change for entry in clips for change in entry.info.changes)
    if changes:
        yield f"{path}: {', '.join(f'{count} {change}' for change, count in sorted(changes.items()))}"
    found = [each for entry in clips if any(each := entry.resampled)]
    if found:
        repeated, left_out = (sum(counts) for counts in zip(*found, strict=True))
        have = "clip has" if len(found) == 1 else "clips have"
        again = f"{counted(repeated, 'frame')} shown again, {left_out} left out"
        yield f"{path}: {len(found)} {have} another frame rate: {again}"


def _left_out(clips: Sequence[InspectedClip], path: Path) -> Iterator[str]:
    """Which windows are left out for their masks."""
    found = [entry for entry in clips if entry.black.starts]
    if found:
        count = sum(len(entry.black.starts) for entry in found)
        which = listed([f"{entry.clip.path} ({entry.black_seconds})" for entry in found], most=10)
        yield f"{path}: {counted(count, 'window')} left out, because nothing would count there by the clip's mask: {which}"


def _copies(clips: Sequence[InspectedClip], path: Path) -> Iterator[str]:
    """How many clips are the same file, byte for byte, as another."""
    copies = [paths for paths in paths_by_content(clips).values() if len(paths) > 1]
    if copies:
        count = sum(len(paths) - 1 for paths in copies)
        are = "clips are copies" if count > 1 else "clip is a copy"
        distinct = counted(len(paths_by_content(clips)), "distinct clip")
        cure = "more clips teach more, copies only weigh: `repeats` of [[data.sources]] does that"
        which = listed([_equal(paths) for paths in copies])
        yield f"{path}: {count} {are} of others, byte for byte, which leaves {distinct}: {which} ({cure})"


def _equal(paths: Sequence[Path]) -> str:
    """Names of copies: "a.mp4 = b.mp4 = c.mp4 and 2 more"."""
    rest = f" and {len(paths) - _COPIES_NAMED} more" if len(paths) > _COPIES_NAMED else ""
    return " = ".join(map(str, paths[:_COPIES_NAMED])) + rest
