"""The cache of encoded clips and captions: one safetensors file per item, named by a hash of everything it depends on.

A file is written under a temporary name, flushed to disk, and only then renamed. So a run that is killed at any moment
leaves either a whole item or none, and several runs can share a cache.
"""

import hashlib
import json
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.runtime.errors import UserError
from finetune.runtime.files import atomic
from finetune.runtime.logging import say

FORMAT = 1  # part of every key; a new number makes all older items invalid
_STALE_SECONDS = 24 * 3600


def digest(*parts: object) -> str:
    """Hash JSON-serialisable parts to a key of 40 hexadecimal digits."""
    text = json.dumps([FORMAT, *parts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


class Cache:
    """Items under one folder, addressed by kind ("video", "text", "image") and key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = FileFacts(folder / "files.json")

    def file_hash(self, path: Path) -> str:
        """Hash of a file's bytes. It is remembered as long as the file does not change."""
        known = self.files.get(path)
        return known["hash"] if known and "hash" in known else self.files.put(path, hash=content_hash(path))["hash"]

    def path(self, kind: str, key: str) -> Path:
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        """Whether the cache has a complete item. A damaged file (such as a truncated copy) is removed and counts as missing."""
        path = self.path(kind, key)
        try:
            with safe_open(path, "pt") as item:
                item.keys()
        except FileNotFoundError:
            return False
        except (SafetensorError, OSError):
            with suppress(OSError):  # of a cache that is read-only; writing the item anew says so
                path.unlink()
            return False
        return True

    def read(self, kind: str, key: str) -> dict[str, Tensor]:
        """Read an item's tensors, on the CPU. Raises UserError if the file cannot be read."""
        path = self.path(kind, key)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"the cached item cannot be read ({error})", "run the same command again: it is encoded anew", str(path)
            ) from None

    def write(self, kind: str, key: str, tensors: Mapping[str, Tensor], note: str) -> None:
        """Store an item. `note` says what it was made from, for people who inspect the file."""
        path = self.path(kind, key)
        source = note.encode("utf-8", "backslashreplace").decode()  # the name of a clip may be other bytes
        with atomic(path) as partial:
            save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, partial, {"source": source})

    def sweep(self) -> None:
        """Remove partial files that killed runs left behind: those of dead processes on this host, or older than a day."""
        host = socket.gethostname()
        for partial in self.folder.rglob(".partial-*"):
            owner, _, pid = partial.name.removeprefix(".partial-").split("~")[0].rpartition("-")
            dead = owner == host and not Path(f"/proc/{pid}").exists()
            with suppress(OSError):  # its writer has renamed it in the meantime, or the cache is read-only
                if dead or time.time() - partial.stat().st_mtime > _STALE_SECONDS:
                    partial.unlink()


class FileFacts:
    """Facts about files (content hash, video size), valid while a file keeps its path, size and modification time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict] = {}
        with suppress(ValueError, OSError):  # no loss: all facts can be computed again
            known = json.loads(path.read_text())
            self.entries = known if isinstance(known, dict) else {}
        self._saved = dict(self.entries)

    def get(self, path: Path) -> dict | None:
        """The facts about a file, or None if there are none or the file has changed since."""
        stat = path.stat()
        entry = self.entries.get(str(path.resolve()))
        return entry if entry and (entry["size"], entry["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns) else None

    def put(self, path: Path, **facts: object) -> dict:
        """Store facts about a file in its present state. Returns all facts that are known about it."""
        stat = path.stat()
        entry = {**(self.get(path) or {}), **facts, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        self.entries[str(path.resolve())] = entry
        return entry

    def save(self) -> None:
        """Keep what was found since the last time. If it cannot be written, a warning says so: the next start finds it again."""
        if self.entries == self._saved:
            return
        try:
            with atomic(self.path) as partial:
                partial.write_text(json.dumps(self.entries))
            self._saved = dict(self.entries)
        except UserError as error:
            say(f"warning: what was found of the files is not kept for the next start: {error}")


def content_hash(path: Path) -> str:
    """Hash of a file's bytes. The Hub's cache names large files by their hash, which is taken as it is."""
    resolved = path.resolve()
    if resolved.parent.name == "blobs" and len(resolved.name) == 64:
        return resolved.name
    with open(resolved, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()
