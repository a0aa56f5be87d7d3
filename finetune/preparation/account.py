"""What becomes of every file of the datasets: used, cut, held out, refused, or not used and why. Plain values, for a page."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from finetune.preparation.inspect import InspectedClip, Inspection, heldout_hashes
from finetune.recipe import Bucket, Recipe
from finetune.runtime.errors import Problem

CROPPED, ENLARGED = 0.02, 1.0  # as `check` counts them: share of the picture above which, and factor above which


@dataclass(frozen=True)
class ClipAccount:
    """A clip that can be trained on.

    Attributes:
        name: path relative to its dataset's folder; so are `copies`, the other clips with the same bytes.
        dataset: number of its dataset in `Account.datasets`.
        height: rows as players show it, before it is fitted into the bucket; so are `width`, `frames` and `seconds`.
        fps: frame rate of training.
        available: frames that the clip has at this rate.
        starts: first frame of each window, at this rate.
        unused: frames that are in no window.
        cropped: share of the picture outside the bucket; `enlarged` is the factor by which the picture is scaled.
        repeated: frames of its windows that show the same picture as the one before; `left_out` are not shown within them.
        changes: what else is done to its picture, in words.
        columns: further pictures that belong to it, such as its mask.
    """

    entry: InspectedClip
    name: str
    dataset: int
    captions: tuple[str, ...]
    height: int
    width: int
    frames: int
    seconds: float
    bucket: Bucket
    fps: float
    available: int
    starts: tuple[int, ...]
    unused: int
    cropped: float
    enlarged: float
    repeated: int
    left_out: int
    changes: tuple[str, ...]
    columns: tuple[str, ...]
    copies: tuple[str, ...]
    is_heldout: bool

    @property
    def used_spans(self) -> list[tuple[int, int]]:
        """(first frame, number of frames) of what lies in a window, overlapping windows joined."""
        spans: list[tuple[int, int]] = []
        for start in self.starts:
            if spans and start <= sum(spans[-1]):
                spans[-1] = (spans[-1][0], start + self.bucket.frames - spans[-1][0])
            else:
                spans.append((start, self.bucket.frames))
        return spans

    @property
    def is_image(self) -> bool:
        return self.entry.clip.is_image


@dataclass(frozen=True)
class BucketAccount:
    """What is trained in a bucket. `samples` is of one epoch; `tokens` of one sample, None if the model could not be opened."""

    bucket: Bucket
    clips: int
    samples: float
    tokens: int | None
    trimmed: int
    cropped: int
    enlarged: int


@dataclass(frozen=True)
class DatasetAccount:
    """A dataset: how many of its clips are used, and what is wrong with the rest.

    Attributes:
        refused: clips that cannot be used.
        unused: files that are no clips.
        unreadable: why nothing of it can be used.
        left_out: whether `repeats` is 0, so that it has not been looked at.
    """

    path: Path
    repeats: float
    clips: int = 0
    refused: tuple[Problem, ...] = ()
    unused: tuple[Problem, ...] = ()
    unreadable: tuple[Problem, ...] = ()
    is_heldout: bool = False
    left_out: bool = False


class CaptionLengths(NamedTuple):
    """How long the captions are for one of the text encoders.

    Attributes:
        unit: what is counted: "tokens" or "words".
        limit: how many the encoder reads; None if that is not known.
        lengths: by caption.
    """

    encoder: str
    unit: str
    limit: int | None
    lengths: Mapping[str, int]

    def cut(self, caption: str) -> int:
        """How much of a caption the encoder does not read."""
        return 0 if self.limit is None else max(0, self.lengths.get(caption, 0) - self.limit)


@dataclass(frozen=True)
class Account:
    """Everything a page about the datasets shows.

    Attributes:
        settings: (key of the recipe, value) that decide how clips are read.
        problems: what is wrong besides single clips.
    """

    settings: tuple[tuple[str, str], ...]
    datasets: tuple[DatasetAccount, ...]
    buckets: tuple[BucketAccount, ...]
    clips: tuple[ClipAccount, ...]
    copies: tuple[tuple[str, ...], ...]
    captions: tuple[CaptionLengths, ...]
    problems: tuple[Problem, ...] = ()

    def cut(self, clip: ClipAccount) -> int:
        """How many tokens of a clip's captions no encoder or not every encoder reads, of the caption that loses most."""
        return max((each.cut(caption) for each in self.captions for caption in clip.captions), default=0)


def account_of(
    recipe: Recipe,
    inspected: Sequence[Inspection],
    tokens: Callable[[Bucket], int] | None = None,
    lengths: Sequence[CaptionLengths] = (),
    problems: Sequence[Problem] = (),
) -> Account:
    """Account for every file of the datasets.

    Args:
        inspected: as `inspect_datasets` returns them, the held-out dataset last if the recipe names one.
        tokens: of one sample in a bucket.
        lengths: of the captions, for each text encoder; without it words are counted.
        problems: what is wrong besides single clips.
    """
    named = recipe.validation.heldout is not None
    used = [source for source in recipe.data.datasets if source.repeats]
    trained = inspected[: len(used)]
    out = set() if named else heldout_hashes((entry for each in trained for entry in each.clips), recipe)
    names: dict[str, dict[Path, str]] = defaultdict(dict)  # content -> names of the files with it
    for each in inspected:
        for entry in each.clips:
            names[entry.hash].setdefault(entry.clip.path, relative_name(entry.clip.path, each.path))
    clips = [
        _clip(entry, number, names, is_heldout=number >= len(used) or entry.hash in out)
        for number, each in enumerate(inspected)
        for entry in each.clips
    ]
    repeats = [source.repeats for source in used] + [1.0] * named
    datasets = [_dataset(each, repeats[number], number >= len(used)) for number, each in enumerate(inspected)]
    datasets += [DatasetAccount(each.path, 0.0, left_out=True) for each in recipe.data.datasets if not each.repeats]
    return Account(
        settings=_settings(recipe),
        datasets=tuple(datasets),
        buckets=tuple(_buckets(recipe.data.buckets, clips, repeats, tokens)),
        clips=tuple(clips),
        copies=tuple(tuple(same.values()) for same in names.values() if len(same) > 1),
        captions=tuple(lengths) or (_words(clips),),
        problems=tuple(problems),
    )


def relative_name(path: Path, dataset: Path) -> str:
    """A clip's path relative to its dataset, or as it is if it lies elsewhere."""
    folder = dataset if dataset.is_dir() else dataset.parent
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _settings(recipe: Recipe) -> tuple[tuple[str, str], ...]:
    data = recipe.data
    window = {"random": f'"random", {data.windows} windows', "all": f'"all", overlap {data.overlap:g}'}
    return (
        ("model.family", recipe.model.family),
        ("data.fps", "each clip's own" if data.fps is None else f"{data.fps:g}"),
        ("data.window", window.get(data.window, f'"{data.window}"')),
        ("data.bad_clips", f'"{data.bad_clips}"'),
    )


def _clip(entry: InspectedClip, number: int, names: Mapping[str, dict[Path, str]], is_heldout: bool) -> ClipAccount:
    clip, info, fit, windows = entry.clip, entry.info, entry.fit, entry.windows
    resampled = [info.resampled(fit.fps, fit.bucket.frames, start / fit.fps) for start in windows.starts]
    same = names[entry.hash]
    return ClipAccount(
        entry=entry,
        name=same[clip.path],
        dataset=number,
        captions=clip.captions,
        height=info.height,
        width=info.width,
        frames=info.frames,
        seconds=0.0 if clip.is_image else info.duration,
        bucket=fit.bucket,
        fps=fit.fps,
        available=fit.frames_available,
        starts=windows.starts,
        unused=windows.unused(fit),
        cropped=fit.cropped,
        enlarged=fit.enlarged,
        repeated=sum(each.repeated for each in resampled),
        left_out=sum(each.left_out for each in resampled),
        changes=info.changes,
        columns=tuple(entry.pictures),
        copies=tuple(name for path, name in same.items() if path != clip.path),
        is_heldout=is_heldout,
    )


def _dataset(found: Inspection, repeats: float, is_heldout: bool) -> DatasetAccount:
    return DatasetAccount(
        path=found.path,
        repeats=repeats,
        clips=len(found.clips),
        refused=tuple(found.problems),
        unused=tuple(found.unused),
        unreadable=tuple(found.unreadable),
        is_heldout=is_heldout,
    )


def _buckets(
    buckets: Iterable[Bucket],
    clips: Sequence[ClipAccount],
    repeats: Sequence[float],
    tokens: Callable[[Bucket], int] | None,
) -> Iterable[BucketAccount]:
    """What is trained in each bucket, buckets without a clip among them; held-out clips are not counted."""
    trained = [clip for clip in clips if not clip.is_heldout]
    for bucket in dict.fromkeys(buckets):
        of = [clip for clip in trained if clip.bucket == bucket]
        samples = [repeats[clip.dataset] * (1 if clip.entry.windows.take_turns else len(clip.starts)) for clip in of]
        yield BucketAccount(
            bucket,
            len(of),
            sum(samples),
            tokens(bucket) if tokens else None,
            sum(clip.unused > 0 for clip in of),
            sum(clip.cropped > CROPPED for clip in of),
            sum(clip.enlarged > ENLARGED for clip in of),
        )


def _words(clips: Iterable[ClipAccount]) -> CaptionLengths:
    texts = {caption for clip in clips for caption in clip.captions}
    return CaptionLengths("captions", "words", None, {text: len(text.split()) for text in texts})
