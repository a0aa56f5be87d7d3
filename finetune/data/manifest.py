"""Finds the clips of a dataset with their captions, whatever kind of dataset it is."""

from dataclasses import dataclass, replace
from pathlib import Path

from finetune.data.clip import VIDEO_SUFFIXES, Clip
from finetune.data.formats import FORMATS
from finetune.data.formats.format import Columns
from finetune.runtime.errors import Problem, UserError


@dataclass(frozen=True)
class Manifest:
    clips: tuple[Clip, ...]
    problems: tuple[Problem, ...] = ()
    unused: tuple[Problem, ...] = ()


def read_manifest(path: Path, video_column: str, caption_column: str, id_token: str = "") -> Manifest:
    """Find the clips of a dataset, in an order that depends on names and lines only.

    Args:
        path: a folder of videos with side-car .txt captions, a folder with `<video_column>s.txt` and
            `<caption_column>s.txt` (prompts.txt for "caption", too), a folder with metadata.csv, .json or .jsonl, or
            such a file. Paths inside are relative to the file.
        id_token: text that is put in front of every caption, followed by a space.
    Raises:
        UserError: names every missing file, missing caption and caption without a video, or an empty dataset.
    """
    if not path.exists():
        raise UserError(
            "the dataset does not exist", "set data.path to a folder of videos or a manifest file", str(path)
        )
    clips = _read(path, Columns(video_column, caption_column))
    if not clips:
        raise UserError(
            "the dataset is empty",
            f"put videos ({' '.join(sorted(VIDEO_SUFFIXES))}) with .txt captions of the same name there",
            str(path),
        )
    missing = [
        Problem("no such video file", f"{clip.path} (from {clip.where})", "mend the path or remove the line")
        for clip in clips
        if not clip.path.is_file()
    ]
    if missing:
        raise UserError.of(missing, f"{path}: {len(missing)} of {len(clips)} videos are missing:")
    if id_token:
        clips = [replace(clip, caption=f"{id_token} {clip.caption}") for clip in clips]
    return Manifest(tuple(clips))


def _read(path: Path, columns: Columns) -> list[Clip]:
    """The clips of a dataset by the first kind that recognises it."""
    for form in FORMATS.values():
        if (found := form.locate(path, columns)) is not None:
            return form.read(found, columns)
    *others, last = sorted(form.suffix for form in FORMATS.values() if form.suffix)
    raise UserError("not a manifest", f"use a folder, {', '.join(others)} or {last}", str(path))
