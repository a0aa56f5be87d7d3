"""Reads DCP's files without running code that they may contain: a checkpoint may come from somebody else.

DCP pickles its table of contents, and reads it, and values that are no tensors, with pickle's whole freedom. Here the table
may name the classes that DCP writes into it, and values are read as torch.load reads weights.
"""

import pathlib
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, filesystem, metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.planner import ReadItem

_PATHS = {"PosixPath": pathlib.PurePosixPath, "WindowsPath": pathlib.PureWindowsPath}


class SafeReader(FileSystemReader):
    """DCP's reader. Raises pickle.UnpicklingError for a table of contents that names anything but DCP's classes."""

    def read_metadata(self, *arguments: Any, **keywords: Any) -> metadata.Metadata:
        with open(pathlib.Path(self.path) / ".metadata", "rb") as file:
            contents: metadata.Metadata = _Unpickler(file).load()
        contents.storage_meta = contents.storage_meta or metadata.StorageMeta()
        contents.storage_meta.load_id = self.load_id
        return contents


class SafePlanner(DefaultLoadPlanner):
    """DCP's planner, for values that torch.load admits with `weights_only`: numbers, texts, tensors, and collections of them."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        place = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, place, torch.load(value, weights_only=True))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch":
            found = getattr(torch, name, None)
            if found is torch.Size or isinstance(found, torch.dtype):
                return found
        elif module == metadata.__name__:
            found = getattr(metadata, name, None)
            if isinstance(found, type) and found.__module__ == module:
                return found
        elif (module, name) == (filesystem.__name__, "_StorageInfo"):
            return filesystem._StorageInfo
        elif (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        elif module.partition(".")[0] == "pathlib" and name in _PATHS:
            return _PATHS[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint")
