"""Files that are whole or absent, folders that one run holds at a time, and disks that are full."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

from finetune.runtime.errors import UserError
from finetune.runtime.logging import say

HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # what flock(2) and NFS say of a lock that another process has
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre mounted without flock, NFS without its lock service

NO_MODES = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # vfat, some of SMB and FUSE: files have the mode of their mount
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # file systems that sync no folders: some of FUSE, SMB

FULL = "the disk is full"
MAKE_ROOM = "free some space (see df -h and df -i)"  # a disk with room may hold as many files as it can
_REFUSALS = {
    errno.EROFS: ("is on a file system that is read-only", "mount it for writing, or name another folder"),
    errno.EFBIG: (
        "has more bytes than a file may have here",
        "name a folder on another file system, or look at `ulimit -f`",
    ),
}
PARTIAL = ".partial-"
_KEPT_OF_NAME = 40  # characters of a file's name in the name of its partial file, which may have 255 bytes


def read_note(file: Path) -> dict[str, Any]:
    """What is noted in a JSON file; nothing if there is none, or it is damaged."""
    try:
        noted = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write to; on leaving, its bytes are on disk and carry the final name, or nothing does.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    end = path.name[-_KEPT_OF_NAME:]  # with the suffix, by which libraries choose a format
    partial = path.parent / f"{PARTIAL}{_process_table()}-{os.getpid()}~{end}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        give_usual_mode(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except Exception as error:
        raise disk_error(error, path) or error from None
    finally:
        with suppress(OSError):
            partial.unlink()


def is_abandoned(partial: Path) -> bool:
    """Whether the process that writes a partial file of `atomic` is known to be dead.

    Of processes on other hosts and in other containers nothing is known, whatever their host's name is.
    """
    table, _, process = partial.name.removeprefix(PARTIAL).split("~")[0].rpartition("-")
    if table != _process_table() or not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # of another user, say
        pass
    return False


def _process_table() -> str:
    """Names the processes among which a process id means one and the same: those of a running kernel and a PID namespace of it.

    Not the host's name: containers may share one.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        text = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # a sandbox: nothing can be said of its processes
        text = os.urandom(16).hex()
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk, or a folder that cannot be written, into a UserError that says so."""
    try:
        yield
    except Exception as error:
        raise disk_error(error, path) or error from None


def disk_error(error: BaseException, path: Path) -> UserError | None:
    """What a failed write means for the user; None if the error says so itself, or is about something else."""
    if isinstance(error, UserError):
        return None
    reason = str(error)
    if shortage := no_room(error):
        return UserError(shortage, f"{MAKE_ROOM}, then run the same command: it goes on where it stopped", str(path))
    for number, (what, cure) in _REFUSALS.items():
        if _is(number, error):
            return UserError(what, cure, str(path))
    if isinstance(error, OSError) or "I/O error" in reason:
        return UserError(f"cannot be written ({reason})", "check the folder and its permissions", str(path))
    return None


def no_room(error: BaseException) -> str | None:
    """Of what there is too little for a write, in words; None if it has failed for another reason."""
    if _is(errno.EDQUOT, error):
        return "your quota of this disk is used up"
    return FULL if _is(errno.ENOSPC, error) else None


def _is(number: int, error: BaseException) -> bool:
    """Whether an error, or the text that a library has made of one, has a number of the system."""
    told = str(error)
    return getattr(error, "errno", None) == number or os.strerror(number) in told or f"os error {number})" in told


def give_usual_mode(file: Path) -> None:
    """Give a file the permissions that a new one gets here; libraries that write by way of a temporary file leave it 0600."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".mode-") as folder:
        new = Path(folder) / "new"
        new.touch()
        try:
            os.chmod(file, new.stat().st_mode)
        except OSError as error:
            if error.errno not in NO_MODES:
                raise


def sync_folder(folder: Path, deep: bool = True) -> None:
    """Wait until a folder's entries are on disk, and with `deep` all that is in it. Raises OSError."""
    for path in [*(folder.rglob("*") if deep else ()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if not (path.is_dir() and error.errno in NO_FOLDER_SYNC):
                raise
        finally:
            os.close(handle)


def move_folder(folder: Path, target: Path) -> None:
    """Give a folder another name. Where the file system cannot (another disk, a lower layer of overlayfs) it is copied, and is
    whole under the new name or not there. Raises OSError.
    """
    try:
        folder.rename(target)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    partial = free_name(target.with_name(f".partial-{target.name}"))
    try:
        shutil.copytree(folder, partial, symlinks=True)
        sync_folder(partial)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    remove_folder(folder)


def remove_folder(folder: Path) -> None:
    """Remove a folder with all that is in it; what cannot be removed is left there, with a warning."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        say(f"warning: {folder} cannot be removed ({error}): remove it by hand")


def free_name(path: Path) -> Path:
    """The path, or if there is something, the first that is free with -2, -3 and so on behind its name."""
    names = chain([path.name], (f"{path.name}-{number}" for number in count(2)))
    return next(free for name in names if not os.path.lexists(free := path.with_name(name)))


def is_held(folder: Path) -> bool:
    """Whether a process holds a folder by a `FolderLock`, as far as its file system tells."""
    try:
        file = (folder / ".lock").open("rb")
    except OSError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in HELD
    return False


class FolderLock:
    """Holds a folder until its `with` block or the process ends; two runs in one folder would delete each other's files."""

    def __init__(self, folder: Path) -> None:
        """Lock the folder. On a file system without locks, warn and go on without one.

        Raises:
            UserError: another process holds the folder, or it cannot be locked for another reason.
        """
        path = folder / ".lock"
        with writing(path):
            self.file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                raise self._held(folder) from None
            if error.errno not in NO_LOCKS:
                raise UserError(
                    f"the folder cannot be locked ({error})",
                    "check its file system, or set `output` to a folder on another one",
                    str(path),
                ) from error
            say(f"warning: {folder} is on a file system without locks ({error.strerror}): start no second run in it")
        with writing(path):
            self.file.truncate(0)
            self.file.write(f"{os.getpid()} on {socket.gethostname()}".encode())

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # on a file system without locks
            fcntl.flock(self.file, fcntl.LOCK_UN)  # closing would leave it to processes that have inherited the file
        self.file.close()

    def _held(self, folder: Path) -> UserError:
        self.file.seek(0)
        holder = self.file.read().decode(errors="replace").strip() or "unknown"
        return UserError(
            f"another run is using this folder (process {holder})",
            "wait for it or end it, or set `output` to another folder",
            str(folder),
        )


def fresh_folder(folder: Path) -> Path:
    """The folder if there is nothing in it, or the first of folder_2, folder_3, ... that is so: nothing is written over."""
    for candidate in chain([folder], (folder.with_name(f"{folder.name}_{number}") for number in count(2))):
        if not candidate.exists() or (candidate.is_dir() and not any(candidate.iterdir())):
            return candidate
    raise AssertionError("there is always another number")
