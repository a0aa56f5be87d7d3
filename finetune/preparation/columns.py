"""The manifest's further columns: which are read, which clips have them, and the encoder of masks, which every family has."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from finetune.data.buckets import BucketFit
from finetune.data.clip import Clip
from finetune.data.column_files import FRAME_COLUMNS, MASK, PICTURES, check_picture
from finetune.data.decode import VideoInfo
from finetune.data.masks import decode_mask
from finetune.data.sources import FRAMES, SourceFile
from finetune.models import loss_mask
from finetune.models.batch import Tensors
from finetune.models.encoder import Encoder
from finetune.models.family import Family
from finetune.recipe import Bucket
from finetune.runtime.errors import Problem, UserError
from finetune.runtime.logging import say

_MASKS = 1  # a part of cache keys: raise it when the weights that are made of an ordinary mask change


def further_columns(encoders: Iterable[Encoder]) -> list[str]:
    """What encoders read besides video and caption, and every clip must have: columns of the manifest."""
    named = chain.from_iterable(encoder.sources for encoder in encoders if not encoder.optional)
    return [name for name in dict.fromkeys(named) if name not in ("video", "caption", *FRAMES)]


def mask_encoder(family: Family) -> Encoder:
    """The encoder of masks, for clips that have one: latent pixels' weights, which need no component of the model."""
    grouping = [_MASKS, family.name, family.spatial, family.temporal, family.patch_t, family.given_frames]
    return Encoder(
        loss_mask.KIND, (MASK,), grouping, lambda _: [], lambda _: partial(encode_mask, family=family), optional=True
    )


def encode_mask(file: SourceFile, family: Family) -> Tensors:
    """The weights of a clip's latent pixels: "mask", float32 (F', H', W')."""
    levels = torch.from_numpy(decode_mask(file))  # uint8 (F or 1, H, W)
    return {loss_mask.KIND: family.latent_mask(levels, file.bucket)}


def frames_without_loss(family: Family, encoders: Iterable[Encoder]) -> Callable[[Bucket], int] | None:
    """How many frames at the start of a bucket's videos are not in the loss, whatever a mask says; None if no mask weighs it."""
    if any(encoder.kind == loss_mask.KIND for encoder in encoders):
        return partial(given_video_frames, family)
    return None


def given_video_frames(family: Family, bucket: Bucket) -> int:
    """How many frames at a video's start the family gives the model; of a single frame, which is an image to be made, none."""
    if bucket.frames == 1 or not family.given_frames:
        return 0
    return 1 + (family.given_frames - 1) * family.temporal


def optional_columns(required: Sequence[str]) -> list[str]:
    """The columns that are read of clips that have them, beside those that every clip must have."""
    return [] if MASK in required else [MASK]


def check_pictures(
    clip: Clip, shown: VideoInfo, fit: BucketFit, pictures: Mapping[str, VideoInfo], frames: int
) -> None:
    """Raise UserError if a clip's mask, control or reference does not go with it.

    Args:
        shown: the clip's size and length.
        pictures: those of each such file of the clip, by column.
        frames: how many of the clip's first frames are used, at the frame rate of training.
    """
    problems: list[Problem] = []
    for column, info in pictures.items():
        try:
            check_picture(column, clip.file(column), info, clip.path, shown, fit, frames)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError.of(problems)


def say_columns(path: Path, clips: Sequence[Clip], required: Sequence[str]) -> None:
    """Say how many clips have a mask, and which columns of pictures this training does not read."""
    masked = sum(MASK in clip.columns for clip in clips)
    if masked and MASK not in required:
        rest = "" if masked == len(clips) else "; the others count everywhere"
        say(f"{path}: the loss of {masked} of {len(clips)} clips is weighed by their masks{rest}")
    for column in FRAME_COLUMNS:
        if column not in required and any(column in clip.columns for clip in clips):
            say(f"{path}: the column {column!r} is not used: this model takes no {column} video or image")
    for column in sorted({column for clip in clips for column in clip.columns}.difference(PICTURES, required)):
        if near := difflib.get_close_matches(column, [*PICTURES, *required], n=1, cutoff=0.7):
            say(f"{path}: the column {column!r} is not read: did you mean {near[0]!r}?")
