"""All weights of a model in files of limited size with an index, as diffusers names them, each compared after it is written."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from finetune.engine.weights.exporters.exporter import tidy
from finetune.runtime.errors import UserError
from finetune.runtime.files import atomic

STEM = "diffusion_pytorch_model"
SHARD = 5 * 2**30  # bytes in a file, and in memory at a time; a tensor that is larger has its own


def write_shards(
    folder: Path,
    sizes: Mapping[str, int],
    tensor: Callable[[str], Tensor],
    facts: Mapping[str, str],
    limit: int = SHARD,
) -> None:
    """Write the tensors of a model into its folder, beside its config.

    Args:
        sizes: bytes of each tensor, by name, in the order in which they are written.
        tensor: makes a tensor, contiguous and on the CPU, when its file is written.
        facts: the files' metadata.
    Raises:
        UserError: a file has not the tensors that were written.
    """
    groups = list(_groups(sizes, limit))
    places: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        suffix = "" if len(groups) == 1 else f"-{number:05d}-of-{len(groups):05d}"
        file = folder / f"{STEM}{suffix}.safetensors"
        tensors = {name: tensor(name) for name in names}
        with atomic(file) as partial:
            save_file(tensors, partial, {"format": "pt", **facts})
        tidy([file])
        _compare(file, tensors)
        places |= dict.fromkeys(names, file.name)
    index = folder / f"{STEM}.safetensors.index.json"
    for file in folder.glob(f"{STEM}*.safetensors"):  # of an earlier export
        if file.name not in places.values() and re.fullmatch(rf"{STEM}(-\d{{5}}-of-\d{{5}})?\.safetensors", file.name):
            file.unlink()
    if len(groups) == 1:
        index.unlink(missing_ok=True)
        return
    with atomic(index) as partial:
        contents = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        partial.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n")


def _groups(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """The names in their order, in groups of at most so many bytes."""
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    yield group


def _compare(file: Path, tensors: Mapping[str, Tensor]) -> None:
    with safe_open(file, "pt") as opened:
        wrong = sorted(tensors.keys() ^ set(opened.keys()))
        wrong = wrong or [name for name, tensor in tensors.items() if not _same_bits(opened.get_tensor(name), tensor)]
    if wrong:
        raise UserError(f"the exported weights differ: {', '.join(wrong[:3])}", "check the disk", str(file))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
