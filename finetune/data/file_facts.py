"""What is known of files (content hash, size of a video, why a clip is refused), remembered while they do not change.

Facts are appended to a file of JSON lines as they are found, so that an interrupted command does not begin anew, and
several processes can share the file. When lines of one file differ, the last one counts.
"""

import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple
from pathlib import Path
from typing import IO, NamedTuple

from finetune.runtime.errors import Problem, UserError
from finetune.runtime.files import NO_LOCKS, atomic, writing
from finetune.runtime.logging import is_main, say, shortened
from finetune.runtime.progress import PATIENCE, ProgressLine
from finetune.runtime.units import in_decimal_words

_SAVE_SECONDS = 1.0  # facts that are found within this time are written together
_READ_AT_ONCE = 2**23  # bytes of a file that is hashed
_REFUSED = "refused"
_SHA256 = re.compile("[0-9a-f]{64}")
_PATH = "\0"  # stands for the file's path in the stored texts of a refusal: it may be given in another form later


class FileState(NamedTuple):
    """A file as it was at one moment: its resolved path, its bytes, and the time of its last change in nanoseconds."""

    key: str
    size: int
    mtime_ns: int


class FileFacts:
    """Facts about files, each valid while the file keeps its path, size and modification time.

    Args:
        path: the file of JSON lines. Facts in a `.json` file of the same name, as older versions wrote it, are read, too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict] = {}
        self._parents: dict[str, str] = {}  # resolving each file's parents anew takes most of the time of a look-up
        self._unsaved: list[str] = []
        self._saved_at = -_SAVE_SECONDS
        self._is_kept = True
        with suppress(ValueError, OSError):  # no loss: all facts can be computed again
            known = json.loads(path.with_suffix(".json").read_text())
            known = known if isinstance(known, dict) else {}
            self.entries = {key: entry for key, entry in known.items() if isinstance(entry, dict)}
        with suppress(OSError):
            self.entries |= dict(_read(path))

    def state(self, path: Path) -> FileState:
        """A file's present state. Raises OSError if there is no such file."""
        text = os.fspath(path)
        found = os.lstat(text)
        if stat.S_ISLNK(found.st_mode):
            found, key = os.stat(text), os.path.realpath(text)
        else:
            folder, name = os.path.split(text)
            if (resolved := self._parents.get(folder)) is None:
                resolved = self._parents[folder] = os.path.realpath(folder)
            key = os.path.join(resolved, name) if name not in ("", "..") else os.path.realpath(text)
        return FileState(key, found.st_size, found.st_mtime_ns)

    def get(self, path: Path) -> dict | None:
        """The facts about a file, or None if there are none or the file has changed since."""
        return self._of(self.state(path))

    def put(self, path: Path, state: FileState | None = None, **facts: object) -> dict:
        """Store facts about a file. Returns all facts that are known about it; that it was refused is none any more.

        Args:
            state: the file's state before the facts were taken from it, so that a change in the meantime is noticed.
        """
        return self._put(state or self.state(path), _REFUSED, facts)

    def get_refusal(self, path: Path, version: str) -> list[Problem] | None:
        """Why a file cannot be used; None if it was not refused by this version of the code, or has changed since."""
        found = (self.get(path) or {}).get(_REFUSED)
        if not isinstance(found, dict) or found.get("version") != version:
            return None
        return [Problem(*(text.replace(_PATH, str(path)) for text in texts)) for texts in found["problems"]]

    def put_refusal(
        self, path: Path, version: str, problems: Sequence[Problem], state: FileState | None = None
    ) -> None:
        """Remember why a file cannot be used, while it does not change and the code has this version.

        Store only what is wrong with the file itself, not that it could not be read for the moment. `state` as for `put`.
        """
        texts = [[text.replace(str(path), _PATH) for text in astuple(problem)] for problem in problems]
        self._put(state or self.state(path), "", {_REFUSED: {"version": version, "problems": texts}})

    def save(self) -> None:
        """Write what was found since the last time. If that is not possible, a warning says so: the next start finds it again."""
        self._saved_at = time.monotonic()
        lines, self._unsaved = self._unsaved, []
        if not lines or not self._is_kept:
            return
        try:
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with _locked(self.path, "ab+") as (file, _):
                    _append(file, "".join(lines).encode())
        except UserError as error:
            self._is_kept = False
            say(f"warning: what was found of the files is not kept for the next start: {error}")

    def compact(self) -> int:
        """Rewrite the file with one line for each file that has not changed since, also while other processes add to it.

        Returns:
            how many bytes it is shorter; 0 if there is none, or its file system has no locks.
        Raises:
            UserError: it cannot be written.
        """
        with writing(self.path), suppress(FileNotFoundError), _locked(self.path, "rb+") as (file, is_held):
            lines = [_line(key, entry) for key, entry in dict(_read(self.path)).items() if _may_hold(key, entry)]
            data = "".join(lines).encode()
            before = os.fstat(file.fileno()).st_size
            if is_held and len(data) < before:
                with atomic(self.path) as partial:
                    partial.write_bytes(data)
                return before - len(data)
        return 0

    def _of(self, state: FileState) -> dict | None:
        entry = self.entries.get(state.key)
        return entry if entry and (entry.get("size"), entry.get("mtime_ns")) == state[1:] else None

    def _put(self, state: FileState, without: str, facts: dict) -> dict:
        known = {name: value for name, value in (self._of(state) or {}).items() if name != without}
        entry = {**known, **facts, "size": state.size, "mtime_ns": state.mtime_ns}
        self.entries[state.key] = entry
        self._unsaved.append(_line(state.key, entry))
        if time.monotonic() - self._saved_at >= _SAVE_SECONDS:
            self.save()
        return entry


def content_hash(path: Path) -> str:
    """Hash of a file's bytes. The Hub's cache names large files by their hash, which is taken as it is."""
    resolved = path.resolve()
    if is_named_by_content(resolved):
        return resolved.name
    digest = hashlib.blake2b(digest_size=20)
    with open(resolved, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        buffer = memoryview(bytearray(max(1, min(size, _READ_AT_ONCE))))
        line = ProgressLine(f"hashing {shortened(path.name)}", size, 0, is_main(), in_decimal_words, PATIENCE)
        with line:
            done = 0
            while read := file.readinto(buffer):
                digest.update(buffer[:read])
                done += read
                if done < size:  # what ends at once says nothing
                    line.update(done, "")
    return digest.hexdigest()


def is_named_by_content(resolved: Path) -> bool:
    """Whether a file is a large one of the Hub's cache, which has its SHA-256 as its name."""
    return resolved.parent.name == "blobs" and _SHA256.fullmatch(resolved.name) is not None


def _line(key: str, entry: dict) -> str:
    return json.dumps({"path": key, **entry}) + "\n"


def _read(path: Path) -> Iterator[tuple[str, dict]]:
    """The entries of a file of JSON lines; what a killed process left of a line is passed over."""
    for line in path.read_bytes().split(b"\n"):
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(key := entry.pop("path", None), str):
                yield key, entry


def _may_hold(key: str, entry: dict) -> bool:
    """Whether a file is as it was; also if its folder is not there, which may be on a disk that is not mounted now."""
    try:
        found = os.stat(key)
    except OSError:
        return not os.path.isdir(os.path.dirname(key))
    return (entry.get("size"), entry.get("mtime_ns")) == (found.st_size, found.st_mtime_ns)


@contextmanager
def _locked(path: Path, mode: str) -> Iterator[tuple[IO[bytes], bool]]:
    """The file open and locked, and whether it is: without locks, a line that another process has written into is passed over."""
    while True:
        with open(path, mode, buffering=0) as file:
            is_held = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                is_held = False
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):  # not replaced while it was waited for
                yield file, is_held
                return


def _append(file: IO[bytes], data: bytes) -> None:
    """Append whole lines in one write, to a locked file."""
    if size := file.seek(0, os.SEEK_END):
        file.seek(size - 1)
        if file.read(1) != b"\n":  # what a killed process left of its last line
            data = b"\n" + data
    file.write(data)
