"""The cache of encoded clips and captions: one safetensors file an item, named by the hash of everything it depends on.

A file appears under its name only when it is complete and on disk (written beside, flushed, renamed), so a run that is
killed at any moment leaves either the whole item or nothing; two runs may share a cache.
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

FORMAT = 1  # part of every key: a change of meaning starts a new generation of items
_STALE_SECONDS = 24 * 3600


def digest(*parts: object) -> str:
    """A hex key of JSON-serialisable parts."""
    text = json.dumps([FORMAT, *parts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


class Cache:
    """Items under one folder, addressed by kind ("video", "text", "image") and key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = FileFacts(folder / "files.json")

    def file_hash(self, path: Path) -> str:
        """Hash of a file's bytes, from memory if the file has not changed."""
        known = self.files.get(path)
        return known["hash"] if known and "hash" in known else self.files.put(path, hash=content_hash(path))["hash"]

    def path(self, kind: str, key: str) -> Path:
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        """Whether a whole item is there. A damaged file (a copy cut short, say) is removed and counts as absent."""
        path = self.path(kind, key)
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as item:
                item.keys()
        except (SafetensorError, OSError):
            path.unlink(missing_ok=True)
            return False
        return True

    def read(self, kind: str, key: str) -> dict[str, Tensor]:
        """An item's tensors, on the CPU."""
        path = self.path(kind, key)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"the cached item cannot be read ({error})", "run the same command again: it is encoded anew", str(path)
            ) from None

    def write(self, kind: str, key: str, tensors: Mapping[str, Tensor], note: str) -> None:
        """Store an item; `note` says what it was made of, for people who look inside."""
        path = self.path(kind, key)
        with atomic(path) as partial:
            save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, partial, {"source": note})

    def sweep(self) -> None:
        """Remove what killed runs left behind: partial files of dead processes of this host, or a day old."""
        host = socket.gethostname()
        for partial in self.folder.rglob(".partial-*"):
            owner, _, pid = partial.name.removeprefix(".partial-").split("~")[0].rpartition("-")
            dead = owner == host and not Path(f"/proc/{pid}").exists()
            with suppress(FileNotFoundError):  # its writer has just given it its name
                if dead or time.time() - partial.stat().st_mtime > _STALE_SECONDS:
                    partial.unlink()


class FileFacts:
    """What was learnt about files (content hash, video sizes), remembered by path, size and modification time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict] = {}
        if path.exists():
            try:
                self.entries = json.loads(path.read_text())
            except (json.JSONDecodeError, OSError):
                self.entries = {}  # only a memory: everything in it can be learnt again

    def get(self, path: Path) -> dict | None:
        """What is known about a file as it is now."""
        stat = path.stat()
        entry = self.entries.get(str(path.resolve()))
        return entry if entry and (entry["size"], entry["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns) else None

    def put(self, path: Path, **facts: object) -> dict:
        """Remember facts about a file as it is now; returns the whole entry."""
        stat = path.stat()
        entry = {**(self.get(path) or {}), **facts, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        self.entries[str(path.resolve())] = entry
        return entry

    def save(self) -> None:
        with atomic(self.path) as partial:
            partial.write_text(json.dumps(self.entries))


def content_hash(path: Path) -> str:
    """Hash of a file's bytes; the Hub's cache already names large files by theirs."""
    resolved = path.resolve()
    if resolved.parent.name == "blobs" and len(resolved.name) == 64:
        return resolved.name
    with open(resolved, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()
