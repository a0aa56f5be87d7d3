"""The files of a folder and of the folders in it, each once; what is hidden or cannot be read is named."""

import os
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from finetune.data.clip import MEDIA_SUFFIXES
from finetune.data.file_fault import open_fault
from finetune.data.formats.format import name_order, normalised, text_fault
from finetune.recipe import RECIPE_FILE
from finetune.runtime.errors import Problem, UserError

_OF_THE_SYSTEM = frozenset(
    {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "@recently-snapshot"}
    | {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
)

_OF_RUNS = tuple(f"{expert}{left}" for expert in ("", "*/") for left in ("checkpoints/step_*", "starts/after_step_*"))


@dataclass
class Listing:
    """What lies in a folder.

    Attributes:
        files: regular files that can be tried, by name.
        bad: what is no regular file or has a name that cannot be used, with the reason.
        problems: folders that cannot be read.
        unused: hidden files and folders, and folders that are left out or read under another path.
    """

    files: list[Path] = field(default_factory=list)
    bad: dict[Path, Problem] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unused: list[Problem] = field(default_factory=list)


def list_files(root: Path, leave_out: Collection[Path] = ()) -> Listing:
    """List a folder. Links to folders are followed, and each real folder is read once, under its own path if that is in `root`.

    Folders of other runs in it are named and not looked into.

    Args:
        leave_out: folders and files that a run writes. They are named and not looked into, unless `root` lies in them.
    Raises:
        UserError: the folder cannot be read.
    """
    found = Listing()
    real_root = os.path.realpath(root)
    own = [real for folder in leave_out if not _contains(real := os.path.realpath(folder), real_root)]
    folders, seen = [(root, real_root)], set[str]()
    links: deque[Path] = deque()  # after all that is no link
    while folders or links:
        if folders:
            folder, real = folders.pop()
        else:
            folder = links.popleft()
            real = os.path.realpath(folder)
            if _contains(real, real_root) or _contains(real, os.path.realpath(folder.parent)):
                found.unused.append(Problem("a link to a folder that it lies in", str(folder), "remove the link"))
                continue
        if real in seen:
            found.unused.append(Problem("a folder that is read under another path", str(folder)))
            continue
        seen.add(real)
        if any(_contains(each, real) for each in own):
            found.unused.append(Problem("written by the run itself", str(folder)))
            continue
        if folder != root and _is_run(folder):
            cure = "to train on its samples, copy them elsewhere with captions"
            found.unused.append(Problem("written by another run", str(folder), cure))
            continue
        for entry in _entries(folder, root, found):
            path = folder / entry.name
            if is_hidden(entry.name):
                found.unused.append(Problem("hidden, or written by the system", str(path)))
            elif os.path.join(real, entry.name) in own and not _is_folder(entry):
                found.unused.append(Problem("written by the run itself", str(path)))
            elif not _is_folder(entry):
                _add_file(path, entry, found)
            elif entry.is_symlink():
                links.append(path)
            else:
                folders.append((path, os.path.join(real, entry.name)))
    found.files.sort(key=name_order)
    found.unused.sort(key=lambda problem: normalised(problem.where))
    return found


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or of a kind that operating systems and servers write by themselves."""
    return name.startswith(".") or name.lower() in _OF_THE_SYSTEM


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run's, or that of the runs of two experts: it has a recipe, and what starts and steps leave."""
    try:
        return (folder / RECIPE_FILE).is_file() and any(any(folder.glob(pattern)) for pattern in _OF_RUNS)
    except OSError:  # `_entries` says what is wrong with it
        return False


def file_fault(path: Path, kind: str = "video file") -> tuple[str, str] | None:
    """As `open_fault`; also of a name that is not UTF-8, which a manifest cannot have."""
    if fault := text_fault(str(path)):
        return f"the name {fault[0]}", "rename the file in ASCII or UTF-8"
    return open_fault(path, kind)


def _contains(folder: str, inner: str) -> bool:
    return inner == folder or inner.startswith(folder.rstrip("/") + "/")


def _entries(folder: Path, root: Path, found: Listing) -> list[os.DirEntry[str]]:
    """What is in a folder, by name; a problem if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: (normalised(entry.name), entry.name))
    except OSError as error:
        what, cure = f"the folder cannot be read ({error.strerror})", "mend its permissions, or remove it"
        if folder == root:
            raise UserError(what, cure, str(folder)) from None
        found.problems.append(Problem(what, str(folder), cure))
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # `_add_file` says what is wrong with it
        return False


def _add_file(path: Path, entry: os.DirEntry[str], found: Listing) -> None:
    try:
        is_file = entry.is_file()
    except OSError:
        is_file = False
    if is_file and not text_fault(str(path)):
        found.files.append(path)
        return
    what, cure = file_fault(path) or ("changed while it was looked at", "start again")
    found.bad[path] = Problem(what, str(path), cure)


def is_media(path: Path) -> bool:
    """Whether a file is a video or an image, by its suffix."""
    return path.suffix.lower() in MEDIA_SUFFIXES
