"""How one kind of cached item is encoded: from which sources of a clip, and by which components of the model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from finetune.models.batch import Tensors

FileHash = Callable[[Path], str]
Encode = Callable[..., Tensors]


@dataclass(frozen=True)
class Encoder:
    """The encoder of one kind of cached item. `Family.encoders` lists those of a model.

    Attributes:
        kind: name of the kind in the cache, in `Item.keys` and in `Sample.encoded`: "video", "text", ...
        sources: names of the clip's sources that `encode` takes, in the order of its arguments: "video", "caption",
            "first_frame", "last_frame", or a column of the manifest that holds files ("audio", "control"). A kind of
            captions and frames alone is encoded of prompts, too, whose images take the frames' place.
        variant: JSON value in every cache key that tells apart different encodings by the same components.
        fingerprint: takes a function that hashes a file, and returns JSON values of everything that the output depends on
            besides the sources: the contents of the components, and settings.
        load: loads the components onto a device and returns `encode`. This takes the content of each source (uint8 frames
            (F, H, W, 3) of a video, the text of a caption, uint8 pixels (H, W, 3) of a frame or of an image in its own size,
            uint8 frames (F, H, W, 3) of a "control" or "reference" video, with F = 1 of an image, and a `SourceFile` for any
            other column) and returns tensors without a batch dimension. Text without its image, which
            unconditional and negative prompts have, is encoded of a caption and None.
        optional: whether clips may lack the sources: such a clip has no item of this kind, nor has a sample of it.
    """

    kind: str
    sources: tuple[str, ...]
    variant: Any
    fingerprint: Callable[[FileHash], list[Any]]
    load: Callable[[torch.device], Encode]
    optional: bool = False


class EncodedImage(nn.Module):
    """Stands for an image encoder in a pipeline that is given images whose embeddings (images, tokens, D) are known: pipelines do
    not take both. Whichever of its hidden states a pipeline asks for, it gets these.
    """

    def __init__(self, embeds: Tensor) -> None:
        super().__init__()
        self.embeds = nn.Parameter(embeds, requires_grad=False)  # pipelines ask the parameters for their dtype
        self.device = embeds.device

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.embeds, hidden_states=[self.embeds, self.embeds])
