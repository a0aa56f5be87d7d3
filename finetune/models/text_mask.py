"""Attention without a mask where a batch needs none: a mask rules out the flash kernel, and most batches have one caption.

Text is padded to a fixed length. A loader process cuts it to the longest caption of its batch. If all captions then have the same
length, which those of one sample have, no token is left to be masked, and the blocks' attention is told so by the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from finetune.models.batch import Tensors

Masks = Literal["never", "padding", "cross"]
"""Where the attention of a family's blocks has a mask in training: nowhere; where text is padded, and is attended to beside the
video; or in attention to text alone, whose length is a multiple of 128.
"""

MARK = "text_needs_no_mask"
"""The name of the batch's input, a bool, that `call` takes out before the transformer is called."""

_BY_TOKEN = ("encoder_hidden_states", "encoder_attention_mask")  # tensors of text with a row for each token


class TextMask:
    """Whether the masks that a transformer makes of its text are of use in its present call, and in the call's backward pass.

    They are, unless the call was announced as one without masked tokens: a pipeline that calls the transformer announces nothing.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self.is_needed = True
        self._next_is_needed = True
        transformer.register_forward_pre_hook(self._begin)

    def announce(self, is_needed: bool) -> None:
        """Say it of the next call."""
        self._next_is_needed = is_needed

    def _begin(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.is_needed, self._next_is_needed = self._next_is_needed, True


def why_masked(masks: Masks, micro_batch_size: int, keeps_length: bool) -> str | None:
    """Why a training has attention with masks; None if it has none.

    Args:
        keeps_length: whether padded text keeps its full length.
    """
    if masks == "padding" and keeps_length:
        return "compiled blocks take padded captions, which are masked"
    if masks == "padding" and micro_batch_size > 1:
        return "captions of a micro-batch that differ in length are padded and masked"
    return "attention to captions always has a mask" if masks == "cross" else None


def stacked(texts: Sequence[Tensors]) -> Tensors:
    """Texts of several samples with the batch first. Those with fewer tokens than another are padded with masked ones."""
    longest = max((len(text[name]) for text in texts for name in _BY_TOKEN if name in text), default=0)
    batches = [padded({name: tensor[None] for name, tensor in text.items()}, longest) for text in texts]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def padded(text: Tensors, length: int) -> Tensors:
    """The text of a batch with masked tokens at its end, until there are `length`; see `cut`. Other tensors are left alone."""
    longer = {}
    for name in _BY_TOKEN:
        if name in text and (missing := length - text[name].shape[1]):
            longer[name] = pad(text[name], (0, 0) * (text[name].ndim - 2) + (0, missing))
    return {**text, **longer}


def cut(text: Tensors, keep_length: bool, names: tuple[str, str] = _BY_TOKEN) -> tuple[Tensors, bool]:
    """(the text of a batch, cut to its longest caption, whether a mask is needed).

    Args:
        text: tokens (B, T, D) and their mask (B, T), whose valid tokens come first; others are left alone. On the CPU, since the
            lengths are read.
        keep_length: leave the text as it is: compiled graphs are made for one length.
        names: of the tokens and of their mask.
    """
    valid = text[names[1]].bool()
    lengths = valid.sum(1)
    longest = int(lengths.max())
    comes_first = torch.equal(valid, torch.arange(valid.shape[1]) < lengths[:, None])
    if keep_length or longest == 0 or not comes_first:
        return text, not bool(valid.all())
    return {**text, **{name: text[name][:, :longest] for name in names}}, bool((lengths < longest).any())


def call(transformer: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The transformer's output for a batch's inputs, without masks if it needs none and was adapted to go without."""
    arguments = dict(inputs)
    needs_none = arguments.pop(MARK, False)
    if isinstance(text_mask := getattr(transformer, "text_mask", None), TextMask):
        text_mask.announce(not needs_none)
    return transformer(**arguments, return_dict=False)[0]
