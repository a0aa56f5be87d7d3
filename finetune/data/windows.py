"""Which pieces of a clip that is longer than its bucket are trained on."""

from dataclasses import dataclass

import torch

from finetune.data.buckets import BucketFit
from finetune.recipe.data import Data
from finetune.runtime import seeds


@dataclass(frozen=True)
class Windows:
    """Pieces of a clip, by the first frame of each at the frame rate of training.

    Attributes:
        starts: ascending.
        take_turns: whether they are alternatives, of which a sample takes one, or samples of their own.
    """

    starts: tuple[int, ...]
    take_turns: bool = True

    def spans(self, frames: int) -> list[tuple[int, int]]:
        """(first frame, number of frames) of what lies in one of them or several, which have `frames` frames each."""
        spans: list[tuple[int, int]] = []
        for start in self.starts:
            if spans and start <= sum(spans[-1]):
                spans[-1] = (spans[-1][0], start + frames - spans[-1][0])
            else:
                spans.append((start, frames))
        return spans

    def unused(self, fit: BucketFit) -> int:
        """Number of the clip's frames that are in none of them."""
        used = sum(count for _, count in self.spans(fit.bucket.frames))
        return max(0, fit.frames_available - used)


def windows_of(fit: BucketFit, data: Data, seed: int, content_hash: str) -> Windows:
    """The windows of a clip, as `data.window` says; a function of the seed and the content of the clip's file."""
    spare = max(0, fit.trimmed)
    if data.window == "centre":
        return Windows((spare // 2,))
    if data.window == "all":
        stride = max(1, round(fit.bucket.frames * (1 - data.overlap)))
        return Windows(tuple(range(0, spare + 1, stride)), take_turns=False)
    if data.window == "random":
        generator = seeds.generator(seed, "windows", content_hash, str(fit.bucket))
        drawn = torch.randperm(spare + 1, generator=generator)[: data.windows]
        return Windows(tuple(sorted(drawn.tolist())))
    return Windows((0,))
