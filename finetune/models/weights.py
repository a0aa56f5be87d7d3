"""A component's weight files, read in slices, so that each rank reads only the rows it holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetune.runtime.errors import UserError

# As safetensors names them.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Weights:
    """The tensors of some safetensors files.

    Opening them reads only the headers. Slices are mapped from the file and take no memory of the process until they are
    copied.
    """

    have_values = True  # False for stand-ins, which have shapes alone

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

    def dtype(self, name: str) -> torch.dtype:
        _, opened = self._where[name]
        return _DTYPES[opened.get_slice(name).get_dtype()]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` - 1 of a tensor, in the file's dtype; a scalar is returned whole.

        Raises UserError if the file cannot be read.
        """
        file, opened = self._where[name]
        try:
            return opened.get_slice(name)[start:stop] if self.shape(name) else opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"this weight file cannot be read ({error})", "download it again", str(file)) from None
