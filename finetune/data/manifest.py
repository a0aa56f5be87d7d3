"""Finds the clips of a dataset with their captions, whatever kind of dataset it is."""

import os
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

from finetune.data.clip import VIDEO_SUFFIXES, Clip
from finetune.data.formats import FORMATS
from finetune.data.formats.format import Columns, Manifest, normalised
from finetune.data.formats.listing import file_fault, list_files
from finetune.data.formats.tables import only_table
from finetune.runtime.errors import Problem, UserError
from finetune.runtime.logging import listed
from finetune.runtime.paths import looked_in

__all__ = ["Manifest", "describe_unused", "read_manifest"]

_REASONS = 10  # in the summary


def read_manifest(
    path: Path, video_column: str, caption_column: str, id_token: str = "", leave_out: Collection[Path] = ()
) -> Manifest:
    """Find the clips of a dataset, in an order that depends on names and lines only.

    Args:
        path: a folder of videos with captions beside them (.txt, .caption, .captions.txt, .json), a folder with
            `<video_column>s.txt` and `<caption_column>s.txt` (prompts.txt for "caption", too), a folder with metadata.csv,
            .tsv, .json, .jsonl or .parquet, or with train/ that has one, or such a file. Paths inside are relative to the file.
        id_token: text that is put in front of every caption, followed by a space.
        leave_out: folders and files inside of a dataset's folder that are no part of it, such as the run's own.
    Returns:
        The clips, the clips and rows that cannot be used, and of a folder every file that is not used, each with the reason.
    Raises:
        UserError: the dataset is missing, empty or cannot be read as a whole.
    """
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except OSError as error:
        raise UserError(f"cannot be opened ({error.strerror})", "mend data.path", str(path)) from None
    if not exists:
        raise UserError(
            f"the dataset does not exist{looked_in(path)}",
            "set data.path, or `path` in [[data.sources]], to a folder of videos or a manifest file",
            str(path),
        )
    found, manifest = _read(path, columns := Columns(video_column, caption_column, frozenset(leave_out)))
    manifest = _with_files(manifest)
    if not manifest.clips and not manifest.problems:
        raise UserError(
            "the dataset is empty",
            f"put videos ({' '.join(sorted(VIDEO_SUFFIXES))}) with .txt captions of the same name there",
            str(path),
        )
    clips = manifest.clips
    if id_token:
        clips = tuple(replace(clip, captions=tuple(f"{id_token} {text}" for text in clip.captions)) for clip in clips)
    # A folder of side-cars is listed by its own reader, which knows more of each file.
    left_over = _left_over(path, found, manifest, columns) if is_folder and found != path else []
    return replace(manifest, clips=clips, unused=(*manifest.unused, *left_over))


def describe_unused(unused: Iterable[Problem], path: Path) -> list[str]:
    """A line for each reason for which files and rows of the dataset at `path` are not used, with the first names and cure."""
    by_reason: dict[str, list[Problem]] = defaultdict(list)
    for problem in unused:
        by_reason[problem.what].append(problem)
    reasons = sorted(by_reason.items(), key=lambda item: len(item[1]), reverse=True)
    lines = []
    for what, found in reasons[:_REASONS]:
        names = listed([problem.where.removeprefix(f"{path}{os.sep}") for problem in found])
        lines.append(f"{path}: not used: {names}: {what}{f' ({found[0].cure})' if found[0].cure else ''}")
    if rest := sum(len(found) for _, found in reasons[_REASONS:]):
        lines.append(f"{path}: not used: {rest} more, for {len(reasons) - _REASONS} other reasons")
    return lines


def _read(path: Path, columns: Columns) -> tuple[Path, Manifest]:
    """The clips of a dataset by the first kind that recognises it, and the file or folder that it takes."""
    try:
        only_table(path, [form for form in FORMATS.values() if form.suffix], columns)
        kinds = ((form, found) for form in FORMATS.values() if (found := form.locate(path, columns)) is not None)
        kind = next(kinds, None)
    except OSError as error:
        raise UserError(f"cannot be opened ({error.strerror})", "mend its permissions", str(path)) from None
    if kind is not None:
        form, found = kind
        return found, form.read(found, columns)
    *others, last = sorted(form.suffix for form in FORMATS.values() if form.suffix)
    raise UserError("not a manifest", f"use a folder, {', '.join(others)} or {last}", str(path))


def _with_files(manifest: Manifest) -> Manifest:
    """The manifest without clips whose file is missing or cannot be opened; those are problems."""
    clips: list[Clip] = []
    problems = list(manifest.problems)
    names: dict[Path, dict[str, str]] = {}
    files = set(manifest.files)
    for clip in manifest.clips:
        fault = file_fault(clip.path)
        if fault and (other := _written_otherwise(clip.path, names)):
            files.add(other)
            clip, fault = replace(clip, path=other), file_fault(other)
        if fault:
            problems.append(Problem(fault[0], f"{clip.path} (from {clip.where})", fault[1]))
        else:
            clips.append(clip)
    return replace(manifest, clips=tuple(clips), problems=tuple(problems), files=frozenset(files))


def _written_otherwise(path: Path, names: dict[Path, dict[str, str]]) -> Path | None:
    """The file whose name has the same characters in another Unicode form, as macOS writes accents; None if there is none.

    Args:
        names: what is known of folders: their entries by NFC name.
    """
    if str(path).isascii():
        return None
    found = Path(path.anchor)
    for part in path.relative_to(found).parts:
        if not os.path.lexists(found / part):
            if found not in names:
                names[found] = {normalised(name): name for name in _entries(found)}
            part = names[found].get(normalised(part), "")
            if not part:
                return None
        found /= part
    return found


def _entries(folder: Path) -> Iterable[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return ()


def _left_over(path: Path, table: Path, manifest: Manifest, columns: Columns) -> list[Problem]:
    """The files in a dataset's folder that are neither used nor named yet."""
    named = {problem.where for problem in (*manifest.problems, *manifest.unused)}
    files = {os.path.normpath(file) for file in (*manifest.files, *(clip.path for clip in manifest.clips))}
    folders = {str(folder) for file in files for folder in Path(file).parents}
    listed = list_files(path, columns.leave_out)
    hidden = [
        each for each in [*listed.problems, *listed.unused] if os.path.normpath(each.where) not in files | folders
    ]
    rest = [file for file in [*listed.files, *listed.bad] if os.path.normpath(file) not in files]
    real = {os.path.realpath(file) for file in files} if rest else set()
    reasons = [
        (
            file,
            "another path of a file that is used"
            if os.path.realpath(file) in real
            else f"not in {table.relative_to(path)}",
        )
        for file in rest
    ]
    others = [*hidden, *(Problem(reason, str(file)) for file, reason in reasons)]
    return [problem for problem in others if problem.where not in named]
