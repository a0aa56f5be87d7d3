"""A component's weights, read by the slice: a rank takes the rows that it holds, and nothing is read twice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetune.runtime.errors import UserError


class Weights:
    """The tensors of some safetensors files. Opening reads headers alone; what is read is mapped from the file, and is
    no memory of the process until it is copied.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Raises UserError if a file is damaged."""
        self._where: dict[str, tuple[Path, Any]] = {}
        for file in files:
            try:
                opened = safe_open(file, "pt")
                self._where |= dict.fromkeys(opened.keys(), (file, opened))
            except (SafetensorError, OSError) as error:
                raise UserError(f"this weight file is damaged ({error})", "download it again", str(file)) from None

    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> torch.Size:
        _, opened = self._where[name]
        return torch.Size(opened.get_slice(name).get_shape())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor, in the file's dtype; all of it if it has no rows."""
        file, opened = self._where[name]
        try:
            return opened.get_slice(name)[start:stop] if self.shape(name) else opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"this weight file cannot be read ({error})", "download it again", str(file)) from None
