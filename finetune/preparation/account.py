"""What becomes of every file of the datasets: used, cut, held out, refused, or not used and why. Plain values, for a page."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from finetune.data.decode import Resampling
from finetune.preparation.inspect import heldout_hashes
from finetune.preparation.inspected import InspectedClip, Inspection, paths_by_content
from finetune.recipe import Bucket, Recipe
from finetune.runtime.errors import Problem
from finetune.runtime.units import counted


@dataclass(frozen=True)
class ClipAccount:
    """A clip that can be trained on.

    Attributes:
        name: path relative to its dataset's folder; so are `copies`, the other clips with the same bytes.
        dataset: number of its dataset in `Account.datasets`.
    """

    entry: InspectedClip
    name: str
    dataset: int
    copies: tuple[str, ...]
    is_heldout: bool

    @property
    def captions(self) -> tuple[str, ...]:
        return self.entry.clip.captions

    @property
    def bucket(self) -> Bucket:
        return self.entry.fit.bucket

    @property
    def seconds(self) -> float:
        """How long it is; of an image, 0."""
        return 0.0 if self.entry.clip.is_image else self.entry.info.duration

    @property
    def used_spans(self) -> list[tuple[int, int]]:
        """(first frame, number of frames) of what lies in a window, at the frame rate of training."""
        return self.entry.windows.spans(self.bucket.frames)

    @cached_property
    def unused(self) -> int:
        """Frames that are in no window, at the frame rate of training."""
        return self.entry.unused

    @cached_property
    def resampled(self) -> Resampling:
        """Frames of its windows that show the same picture as the one before, and that are not shown within them."""
        return self.entry.resampled


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
    used = [source for _, source in recipe.data.used_datasets]
    trained = inspected[: len(used)]
    out = set() if named else heldout_hashes((entry for each in trained for entry in each.clips), recipe)
    same = paths_by_content(entry for each in inspected for entry in each.clips)
    names: dict[Path, str] = {}
    for each in inspected:
        for entry in each.clips:
            names.setdefault(entry.clip.path, relative_name(entry.clip.path, each.path))
    clips = [
        ClipAccount(
            entry,
            name=names[entry.clip.path],
            dataset=number,
            copies=tuple(names[path] for path in same[entry.hash] if path != entry.clip.path),
            is_heldout=number >= len(used) or entry.hash in out,
        )
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
        copies=tuple(tuple(names[path] for path in paths) for paths in same.values() if len(paths) > 1),
        captions=tuple(lengths) or (_words(clips),),
        problems=tuple(problems),
    )


def relative_name(path: Path, dataset: Path) -> str:
    """A clip's path relative to its dataset, or as it is if it lies elsewhere."""
    folder = dataset if dataset.is_dir() else dataset.parent
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _settings(recipe: Recipe) -> tuple[tuple[str, str], ...]:
    data = recipe.data
    window = {"random": f'"random", {counted(data.windows, "window")}', "all": f'"all", overlap {data.overlap:g}'}
    return (
        ("model.family", recipe.model.family),
        ("data.fps", "each clip's own" if data.fps is None else f"{data.fps:g}"),
        ("data.window", window.get(data.window, f'"{data.window}"')),
        ("data.bad_clips", f'"{data.bad_clips}"'),
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
        samples = [repeats[clip.dataset] * clip.entry.samples for clip in of]
        yield BucketAccount(
            bucket,
            len(of),
            sum(samples),
            tokens(bucket) if tokens else None,
            sum(clip.unused > 0 for clip in of),
            sum(clip.entry.fit.is_cropped for clip in of),
            sum(clip.entry.fit.is_enlarged for clip in of),
        )


def _words(clips: Iterable[ClipAccount]) -> CaptionLengths:
    texts = {caption for clip in clips for caption in clip.captions}
    return CaptionLengths("captions", "words", None, {text: len(text.split()) for text in texts})
