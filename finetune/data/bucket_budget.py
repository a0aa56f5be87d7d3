"""Finds training shapes of about one area for a dataset: those that crop least of its clips."""

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import accumulate

from finetune.data.buckets import fit_to_bucket
from finetune.data.decode import VideoInfo
from finetune.recipe.bucket import Area, Bucket
from finetune.runtime.errors import UserError

SizedClip = tuple[VideoInfo, bool]
IsLegal = Callable[[Bucket], bool]
_FARTHEST = 256  # frames: how far away a legal length is looked for
_EQUAL = 1e-6  # of one clip's picture: what sums of cropped shares may differ by through rounding
_NONE = (math.inf, -1)


def find_buckets(
    clips: Iterable[SizedClip],
    heldout: Iterable[SizedClip],
    area: Area,
    frames: Sequence[int],
    count: int,
    fps: float | None,
    is_legal: IsLegal,
    near: Area | None = None,
) -> dict[Bucket, int]:
    """The buckets of a dataset, each with the number of clips to train on that go to it, in the order of `_by_length`.

    At most `count` shapes are chosen, the same for every length, so that a clip never goes to a shorter bucket for the sake of its
    aspect ratio. A function of the clips' sizes and lengths alone, whatever their order. A bucket is made if a clip goes to it;
    held-out clips have no part in the choice of the shapes. Clips that are shorter than every length are passed over.

    Args:
        clips: those to train on, each with whether it is an image.
        heldout: the same of those that are held out.
        area: no shape has more pixels.
        fps: the frame rate to train at; None keeps each clip's own.
        near: as for `shapes`.
    """
    shortest = [Bucket(min(frames), *area)]
    usable, others = (Counter(clip for clip in part if _fits(*clip, shortest, fps)) for part in (clips, heldout))
    chosen = best_shapes(
        [clip.width / clip.height for clip, _ in usable.elements()], shapes(area, frames, is_legal, near), count
    )
    possible = sorted((Bucket(length, *shape) for length in set(frames) for shape in chosen), key=_by_length(area))
    found: Counter[Bucket] = Counter()
    for part, weight in ((usable, 1), (others, 0)):
        for (clip, is_image), copies in part.items() if possible else ():
            found[fit_to_bucket(clip, possible, fps, "", is_image).bucket] += weight * copies
    return {bucket: found[bucket] for bucket in possible if bucket in found}


def _fits(clip: VideoInfo, is_image: bool, buckets: Sequence[Bucket], fps: float | None) -> bool:
    try:
        fit_to_bucket(clip, buckets, fps, "", is_image)
    except UserError:
        return False
    return True


def _by_length(area: Area) -> Callable[[Bucket], tuple[int, float, int]]:
    """Sorts buckets: the longest first, of equal length the one whose aspect ratio is nearest to that of the area."""

    def key(bucket: Bucket) -> tuple[int, float, int]:
        distance = abs(math.log(bucket.width / bucket.height) - math.log(area.width / area.height))
        return -bucket.frames, round(distance, 6), bucket.height

    return key


def shapes(area: Area, frames: Iterable[int], is_legal: IsLegal, near: Area | None = None) -> list[Area]:
    """The shapes, legal in every length, that have no more pixels than the area, but would if both sides were a step longer.

    These are the multiples that the curve of all shapes of exactly this area passes next to. A step is the least change of a side
    that leaves the area's own shape legal. The model may limit a side; shapes at the limit may then be smaller than others.

    Args:
        near: a legal shape, where the area's own is not legal: it then takes its place for the steps.
    """
    lengths, near = sorted(set(frames)), near or area

    pixels = area.height * area.width

    @cache
    def takes(height: int, width: int) -> bool:
        return all(is_legal(Bucket(length, height, width)) for length in lengths)

    def grows(height: int, width: int) -> bool:
        return min(down, across) > 0 and height * width <= pixels and takes(height, width)

    down = _step(near.height, lambda height: takes(height, near.width))
    across = _step(near.width, lambda width: takes(near.height, width))
    found = []
    for height in _multiples(near.height, down, pixels):
        for width in reversed(_multiples(near.width, across, pixels // height)):
            if grows(height + down, width + across):
                break  # and so do all that are narrower
            if takes(height, width):
                found.append(Area(height, width))
    return found


def own_shape(area: Area, frames: Iterable[int], is_legal: IsLegal, near: Area) -> Area | None:
    """The shape that stands for an area: the area's own if it is legal, else the nearest of `shapes`; None if there is none.

    Args:
        near: as for `shapes`.
    """
    lengths = sorted(set(frames))
    if all(is_legal(Bucket(length, *area)) for length in lengths):
        return area

    def distance(shape: Area) -> tuple[float, int]:
        off = abs(math.log(shape.height / area.height)) + abs(math.log(shape.width / area.width))
        return round(off, 6), shape.height

    return min(shapes(area, lengths, is_legal, near), key=distance, default=None)


def _step(side: int, is_legal: Callable[[int], bool]) -> int:
    """The least change of a legal side that is legal, in pixels; 0 if no other length of it is."""
    return next((step for step in range(1, side + 1) if is_legal(side + step) or is_legal(side - step)), 0)


def _multiples(side: int, step: int, most: int) -> Sequence[int]:
    """All lengths, from the shortest to `most`, that differ by whole steps from a side."""
    if not step:
        return [side] if side <= most else []
    return range(side % step or step, most + 1, step)


def best_shapes(aspects: Iterable[float], possible: Iterable[Area], count: int) -> list[Area]:
    """The shapes, at most `count`, that crop least of clips of these aspect ratios, width / height; no more than that takes.

    A clip goes to the shape of the nearest ratio, and loses the share 1 - min(a / b, b / a) of its picture. The sum of these
    shares is the least that there is: dynamic programming over the shapes, in the order of their ratios.
    """
    clips, ordered = sorted(aspects), sorted(possible, key=_aspect)
    if not clips or not ordered:
        return []
    ratios = [_aspect(shape) for shape in ordered]
    first = max(
        0, bisect_right(ratios, clips[0]) - 1
    )  # those outside serve no clip better than the first one outside does
    last = bisect_left(ratios, clips[-1])
    ordered, cropped = ordered[first : last + 1], _Cropped(clips, ratios[first : last + 1])
    every = range(len(ordered))
    gaps = [[cropped.between(left, right) for left in range(right)] for right in every]
    costs = [
        cropped.narrower(shape, 0) for shape in every
    ]  # of all clips up to a shape, which is the last of those chosen
    before: list[list[int]] = [[-1 for _ in every]]
    ends: list[tuple[float, int]] = []  # for every number of shapes: the least cost, and the last shape
    for _ in range(min(count, len(ordered))):
        ends.append(min((costs[shape] + cropped.wider(shape, len(clips)), shape) for shape in every))
        steps = [min([(costs[left] + gaps[right][left], left) for left in range(right)] or [_NONE]) for right in every]
        costs = [cost for cost, _ in steps]
        before.append([left for _, left in steps])
    least = min(cost for cost, _ in ends)
    number = next(index for index, (cost, _) in enumerate(ends) if cost <= least + _EQUAL)
    chosen, shape = [], ends[number][1]
    for level in range(number, -1, -1):
        chosen.append(ordered[shape])
        shape = before[level][shape]
    return chosen[::-1]


class _Cropped:
    """What shapes crop of clips: sums of shares of pictures, from sums over the sorted aspect ratios."""

    def __init__(self, clips: Sequence[float], ratios: Sequence[float]) -> None:
        """Both are ascending: the ratios of the clips, and those of the shapes."""
        self.clips, self.ratios = clips, ratios
        self._sums = list(accumulate(clips, initial=0.0))
        self._inverse_sums = list(accumulate((1 / aspect for aspect in clips), initial=0.0))
        self._place = [bisect_left(clips, ratio) for ratio in ratios]

    def narrower(self, shape: int, begin: int) -> float:
        """What a shape crops of the clips from number `begin` up to its own ratio."""
        end = self._place[shape]
        return end - begin - (self._sums[end] - self._sums[begin]) / self.ratios[shape]

    def wider(self, shape: int, end: int) -> float:
        """What a shape crops of the clips from its own ratio up to number `end`."""
        begin = self._place[shape]
        return end - begin - (self._inverse_sums[end] - self._inverse_sums[begin]) * self.ratios[shape]

    def between(self, left: int, right: int) -> float:
        """What two shapes crop of the clips between them, if there is no other between them."""
        middle = math.sqrt(self.ratios[left] * self.ratios[right])
        split = bisect_left(self.clips, middle, self._place[left], self._place[right])
        return self.wider(left, split) + self.narrower(right, split)


def _aspect(shape: Area) -> float:
    return shape.width / shape.height


def near_lengths(bucket: Bucket, is_legal: IsLegal) -> list[int]:
    """The nearest legal lengths of a bucket that is not legal: one that is shorter and one that is longer, if there are any."""
    shorter = range(bucket.frames - 1, max(0, bucket.frames - _FARTHEST), -1)
    longer = range(bucket.frames + 1, bucket.frames + _FARTHEST)
    near = (next((n for n in part if is_legal(bucket._replace(frames=n))), None) for part in (shorter, longer))
    return [length for length in near if length]
