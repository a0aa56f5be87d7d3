"""How one kind of cached item is encoded: from which sources of a clip, and by which components of the model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.models.batch import Tensors

FileHash = Callable[[Path], str]
Encode = Callable[..., Tensors]


@dataclass(frozen=True)
class Encoder:
    """The encoder of one kind of cached item. `Family.encoders` lists those of a model.

    Attributes:
        kind: name of the kind in the cache, in `Item.keys` and in `Sample.encoded`: "video", "text", ...
        sources: names of the clip's sources that `encode` takes, in the order of its arguments: "video", "caption", or a
            column of the manifest that holds files ("audio", "mask", "control", "image").
        variant: JSON value in every cache key that tells apart different encodings by the same components.
        fingerprint: takes a function that hashes a file, and returns JSON values of everything that the output depends on
            besides the sources: the contents of the components, and settings.
        load: loads the components onto a device and returns `encode`. This takes the content of each source (uint8 frames
            (F, H, W, 3) of a video, the text of a caption, a `SourceFile` for any other) and returns tensors without a batch
            dimension.
    """

    kind: str
    sources: tuple[str, ...]
    variant: Any
    fingerprint: Callable[[FileHash], list[Any]]
    load: Callable[[torch.device], Encode]
