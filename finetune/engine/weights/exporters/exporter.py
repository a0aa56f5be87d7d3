"""What a form of exported weights has to say, and the gathering of sharded weights that all forms begin with."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from finetune.models.family import Family
from finetune.runtime.distributed import Runtime
from finetune.runtime.files import give_usual_mode


@dataclass(frozen=True)
class Exporter:
    """A form in which trained weights are written for other tools.

    Attributes:
        method: the `train.method` whose weights it writes.
        folder: the name of its folder in the run's output, of a family.
        write: given (transformer, family, folder, runtime), writes and verifies. All ranks take part; raises UserError if
            what was written differs from what was trained.
        usage: given (base, dtype, parts), the lines of Python that make `pipe` of the base model, as arguments of the pipeline's
            `from_pretrained`, and of each (family, folder) of the parts, weights in `dtype`; none if no line is known.
        title: what it writes of a family, as the end of a run says it.
        is_small: whether each checkpoint has it, too, so that it can be used before the run's end.
    """

    method: str
    folder: Callable[[Family], str]
    write: Callable[[nn.Module, Family, Path, Runtime], None]
    usage: Callable[[str, str, Sequence[tuple[Family, Path]]], list[str]] = lambda base, dtype, parts: []
    title: Callable[[Family], str] = lambda family: "adapter"
    is_small: bool = True


def tidy(files: Iterable[Path]) -> None:
    """Give exported files the permissions that new files get, and the metadata of safetensors files a fixed order.

    safetensors writes metadata in an order that varies from save to save: the same weights would be other bytes each time.

    Args:
        files: those that were exported. A user may export into a folder with files of their own, which stay as they are.
    """
    for file in files:
        give_usual_mode(file)
        if file.suffix == ".safetensors":
            _sort_metadata(file)


def _sort_metadata(file: Path) -> None:
    """In place, since sorted it is as long. The format: 8 bytes of the header's length, the header as JSON, tensors."""
    with file.open("rb+") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        metadata = header.pop("__metadata__", {})
        ordered = {"__metadata__": dict(sorted(metadata.items())), **header} if metadata else header
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise ValueError(f"{file}: the sorted header is longer than the one that was written")
        opened.seek(8)
        opened.write(text.ljust(length))


def gathered(transformer: nn.Module, trained_only: bool) -> dict[str, Tensor]:
    """The weights whole, in rank 0's host memory. All ranks take part."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    whole: Any = get_model_state_dict(
        transformer, options=options
    )  # of tensors alone: transformers have no other state
    return whole
