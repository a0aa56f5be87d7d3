"""How a kind of cached item is made of a clip: from which of its sources, by which components of the model."""

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
    """One kind of cached item, as a family lists it.

    Attributes:
        kind: its name in the cache, in `Item.keys` and in `Sample.encoded`: "video", "text", ...
        sources: names of what it reads of a clip, in the order in which `encode` takes them: "video", "caption", or a
            column of the manifest that holds files ("audio", "mask", "control", "image").
        variant: JSON value that tells apart encodings of the same components, part of every key.
        fingerprint: JSON values that the output depends on besides the sources, given a function that hashes a file:
            the contents of the components, and settings.
        load: loads the components to a device; returns `encode`, which takes the sources' contents (uint8 frames
            (F, H, W, 3) of a video, the text of a caption, the path of any other file) and returns tensors without a batch
            dimension.
    """

    kind: str
    sources: tuple[str, ...]
    variant: Any
    fingerprint: Callable[[FileHash], list[Any]]
    load: Callable[[torch.device], Encode]
