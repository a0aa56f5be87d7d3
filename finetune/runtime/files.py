"""Files that are whole or absent, folders that one run holds at a time, and disks that are full."""

import errno
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path

from finetune.runtime.errors import UserError
from finetune.runtime.logging import say

HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # what flock(2) and NFS say of a lock that another process has
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre mounted without flock, NFS without its lock service

NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # file systems that sync no folders: some of FUSE, SMB


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write to; on leaving, its bytes are on disk and carry the final name, or nothing does.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    partial = path.parent / f".partial-{socket.gethostname()}-{os.getpid()}~{path.name}"
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
        if partial.exists():
            partial.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk, or a folder that cannot be written, into a UserError that says so."""
    try:
        yield
    except Exception as error:
        raise disk_error(error, path) or error from None


def disk_error(error: BaseException, path: Path) -> UserError | None:
    """What a failed write means for the user; None if the error is about something else."""
    reason = str(error)
    if is_full(error):
        return UserError(
            "the disk is full", "free some space, then run the same command: it goes on where it stopped", str(path)
        )
    if isinstance(error, OSError) or "I/O error" in reason:
        return UserError(f"cannot be written ({reason})", "check the folder and its permissions", str(path))
    return None


def is_full(error: BaseException) -> bool:
    """Whether a write failed because the disk, or the user's share of it, is full; by its text, if another error has wrapped it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(sign in str(error) for sign in ("No space left", "os error 28", "Disk quota exceeded"))


def give_usual_mode(file: Path) -> None:
    """Give a file the permissions that a new one gets here; libraries that write by way of a temporary file leave it 0600."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".mode-") as folder:
        new = Path(folder) / "new"
        new.touch()
        os.chmod(file, new.stat().st_mode)


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


class FolderLock:
    """Holds a folder until its `with` block or the process ends; two runs in one folder would delete each other's files."""

    def __init__(self, folder: Path) -> None:
        """Lock the folder. On a file system without locks, warn and go on without one.

        Raises:
            UserError: another process holds the folder, or it cannot be locked for another reason.
        """
        path = folder / ".lock"
        with writing(path):
            self.file = path.open("a+")
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
        self.file.truncate(0)
        self.file.write(f"{os.getpid()} on {socket.gethostname()}")
        self.file.flush()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # on a file system without locks
            fcntl.flock(self.file, fcntl.LOCK_UN)  # closing would leave it to processes that have inherited the file
        self.file.close()

    def _held(self, folder: Path) -> UserError:
        self.file.seek(0)
        holder = self.file.read().strip() or "unknown"
        return UserError(
            f"another run is using this folder (process {holder})",
            "wait for it or end it, or set `output` to another folder",
            str(folder),
        )
