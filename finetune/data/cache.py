"""The cache of encoded clips and captions: one safetensors file per item, named by a hash of everything it depends on.

A file is written under a temporary name, flushed to disk, and only then renamed. So a run that is killed at any moment
leaves either a whole item or none, and several runs can share a cache. An item carries a checksum of its tensors, which is
compared whenever it is read.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune.data.file_facts import FileFacts, content_hash
from finetune.runtime.errors import UserError
from finetune.runtime.files import PARTIAL, atomic, is_abandoned
from finetune.runtime.logging import say

FORMAT = 1  # part of every key; a new number makes all older items invalid
_STALE_SECONDS = 24 * 3600
_ITEM = re.compile(r"[0-9a-f]{40}\.safetensors")
_SOURCE, _CHECKSUM = "source", "checksum"  # in an item's metadata


def digest(*parts: object) -> str:
    """Hash JSON-serialisable parts to a key of 40 hexadecimal digits."""
    text = json.dumps([FORMAT, *parts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


class DamagedItem(Exception):
    """What is wrong with an item's file."""


class StoredItem(NamedTuple):
    """An item's file in the cache, its size in bytes, and when it was written, in seconds since 1970."""

    kind: str
    key: str
    path: Path
    size: int
    written: float


_VERIFY = ("python", "-m", "finetune", "cache", "verify", "--remove", "--dir")  # the command that reads every item


class Cache:
    """Items under one folder, addressed by key and kind: "video", "text", "mask", "image", or another that a family encodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = FileFacts(folder / "files.jsonl")

    def file_hash(self, path: Path) -> str:
        """Hash of a file's bytes. It is remembered as long as the file does not change."""
        known = self.files.get(path)
        if known and "hash" in known:
            return known["hash"]
        state = self.files.state(path)
        return self.files.put(path, state, hash=content_hash(path))["hash"]

    def path(self, kind: str, key: str) -> Path:
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        """Whether the cache has an item, as far as its header and its file's length show: reading all items would take too long.

        A damaged one (such as a truncated copy) is named and removed, and counts as missing.

        Raises:
            UserError: there is an item, and it cannot be read.
        """
        path = self.path(kind, key)
        try:
            _header(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except DamagedItem as damage:
            _remove(path)  # a cache that is read-only says so when the item is written anew
            say(f"encoded anew: {path}, because {damage}")
            return False
        except OSError as error:
            raise _unreadable(path, error) from None
        return True

    def read(self, kind: str, key: str) -> dict[str, Tensor]:
        """Read an item's tensors, on the CPU, and compare their checksum.

        Raises:
            UserError: the item is damaged, and has been removed; or it cannot be read.
        """
        path = self.path(kind, key)
        try:
            return read_item(path)
        except FileNotFoundError:
            what, cure = "it is gone", "run the same command again: it is encoded anew"
        except DamagedItem as damage:
            others = f"others may be damaged, too: {shlex.join([*_VERIFY, str(self.folder)])} removes all that are"
            what, cure = str(damage), f"it is removed: run the same command again: it is encoded anew; {others}"
            if not _remove(path):
                cure = (
                    "it cannot be removed: make the cache writable or set data.cache to another folder, and remove it"
                )
        except OSError as error:
            raise _unreadable(path, error) from None
        raise UserError(f"the cached item cannot be read ({what})", cure, str(path))

    def write(self, kind: str, key: str, tensors: Mapping[str, Tensor], note: str) -> None:
        """Store an item. `note` says what it was made from, for people who inspect the file."""
        path = self.path(kind, key)
        source = note.encode("utf-8", "backslashreplace").decode()  # the name of a clip may be other bytes
        held = {name: value.contiguous().cpu() for name, value in tensors.items()}
        with atomic(path) as partial:
            save_file(held, partial, {_SOURCE: source, _CHECKSUM: checksum(held)})

    def items(self) -> Iterator[StoredItem]:
        """Every item of any kind, by kind and key. Other files are passed over."""
        for path in sorted(self.folder.glob("*/*/*.safetensors")):
            if _ITEM.fullmatch(path.name) and path.parent.name == path.name[:2]:
                with suppress(FileNotFoundError):  # removed in the meantime
                    found = path.stat()
                    yield StoredItem(path.parent.parent.name, path.stem, path, found.st_size, found.st_mtime)

    @property
    def is_writable(self) -> bool:
        """Whether items can be written, as far as permissions and the mount show."""
        folder = self.folder
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return os.access(folder, os.W_OK | os.X_OK)

    def sweep(self) -> None:
        """Remove partial files that killed runs left behind: those whose writer is known to be dead, or older than a day."""
        if not self.is_writable:
            return
        for partial in self.folder.rglob(".*"):
            if not partial.name.startswith((PARTIAL, ".mode-")):
                continue
            with suppress(OSError):  # its writer has renamed it in the meantime
                if is_abandoned(partial) or time.time() - partial.stat().st_mtime > _STALE_SECONDS:
                    partial.unlink() if partial.is_file() else shutil.rmtree(partial)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of the names, types, shapes and bytes of tensors on the CPU.

    It is to find what disks and copies damage, at a few GB/s.
    """
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode(), value)
        value = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return f"crc32:{value:08x}"


def read_item(path: Path) -> dict[str, Tensor]:
    """The tensors of an item's file. One that was written before items had a checksum is taken as it is.

    Raises:
        DamagedItem: the file is not as it was written.
        OSError: it is not there, or cannot be read.
    """
    metadata = _header(path)
    try:
        with safe_open(path, "pt") as item:
            tensors = {name: item.get_tensor(name) for name in item.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise DamagedItem(_described(str(error), metadata)) from None
    if metadata.get(_CHECKSUM, found := checksum(tensors)) != found:
        raise DamagedItem(_described("its bytes are not those that were written", metadata))
    return tensors


def has_checksum(path: Path) -> bool:
    """Whether an item was written with a checksum. Raises as `read_item`."""
    return _CHECKSUM in _header(path)


def _header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file that has the length which its header announces. Raises as `read_item`.

    Half the time that safetensors takes, which counts for the thousands of items of a start.
    """
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise DamagedItem("the file is cut off, or no safetensors file")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            metadata = {str(name): str(value) for name, value in metadata.items()}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise DamagedItem("its header is damaged") from None
    if size != end:
        raise DamagedItem(_described(f"it has {size} bytes, and was written with {end}", metadata))
    return metadata


def _described(what: str, metadata: Mapping[str, str]) -> str:
    source = metadata.get(_SOURCE)
    return f"{what}; it was made of {source!r}" if source else what


def _remove(path: Path) -> bool:
    """Remove a damaged item; returns whether it is gone."""
    with suppress(OSError):
        path.unlink(missing_ok=True)
        return True
    return False


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"the cached item cannot be read ({error.strerror or error})", "check the disk and the permissions", str(path)
    )
