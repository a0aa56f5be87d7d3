"""Attention without a mask where a batch needs none: a mask rules out the flash kernel, and most batches have one caption.

Text is padded to a fixed length. A loader process cuts it to the longest caption of its batch. If all captions then have the same
length, which those of one sample have, no token is left to be masked, and the blocks' attention is told so by the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from finetune.models.batch import Tensors

MARK = "text_needs_no_mask"
"""The name of the batch's input, a bool, that says so of a call of the transformer."""


class TextMask:
    """Whether the masks that a transformer makes of its text are of use in its present call, and in the call's backward pass.

    They are, unless the call is given `MARK`, which is taken out before the transformer sees it. A pipeline gives none.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.is_needed = True
        transformer.register_forward_pre_hook(self._begin, with_kwargs=True)

    def _begin(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        self.is_needed = not keywords.get(MARK, False)
        return arguments, {name: value for name, value in keywords.items() if name != MARK}


def cut(text: Tensors, keep_length: bool) -> tuple[Tensors, bool]:
    """(the text of a batch, cut to its longest caption: (B, L, D) and (B, L); whether a mask is needed).

    Args:
        text: "encoder_hidden_states" (B, T, D) and "encoder_attention_mask" (B, T), whose valid tokens come first; others are left
            alone. On the CPU, since the lengths are read.
        keep_length: leave the text as it is: compiled graphs are made for one length.
    """
    valid = text["encoder_attention_mask"].bool()
    lengths = valid.sum(1)
    longest = int(lengths.max())
    comes_first = torch.equal(valid, torch.arange(valid.shape[1]) < lengths[:, None])
    if keep_length or longest == 0 or not comes_first:
        return text, not bool(valid.all())
    names = ("encoder_hidden_states", "encoder_attention_mask")
    return {**text, **{name: text[name][:, :longest] for name in names}}, bool((lengths < longest).any())
