"""Captions and prompts that are longer than the text encoders read: they are trained on, and what is lost is said."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from finetune.models.family import Family
from finetune.models.text_limit import CutText, TextLimit, count_tokens, cut_texts
from finetune.preparation.account import CaptionLengths
from finetune.preparation.inspect import InspectedClip
from finetune.recipe.schema import Prompt
from finetune.runtime.logging import say

_NAMED = 3  # captions of an encoder that are named
_SHOWN = 60  # characters of what is lost


class CutCaption(NamedTuple):
    """A caption that an encoder reads in part: where it is from, the encoder's limit, and what is lost."""

    where: str
    limit: TextLimit
    cut: CutText

    def __str__(self) -> str:
        text = " ".join(self.cut.text.split())
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
        return f"{self.where}: {self.cut.tokens} tokens, its last {self.cut.lost} are lost: {shown!r}"


def captions_of(clips: Iterable[InspectedClip]) -> list[tuple[str, str]]:
    """(path of the clip, caption)."""
    return [(str(each.clip.path), caption) for each in clips for caption in each.clip.captions]


def prompt_texts(prompts: Iterable[Prompt]) -> list[tuple[str, str]]:
    """(what it is, text) of validation prompts and their negative prompts."""
    texts = [text for prompt in prompts for text in (prompt.text, prompt.negative)]
    return [("a validation prompt", text) for text in dict.fromkeys(texts)]


def cut_captions(captions: Sequence[tuple[str, str]], family: Family) -> list[CutCaption]:
    """The captions that a text encoder of the family reads only in part, encoder by encoder.

    Args:
        captions: (where it is from, its text), of clips and prompts.
    """
    found = []
    for limit in family.text_limits():
        tokenizer = family.transformers_component(limit.tokenizer, torch.device("cpu"), torch.float32)
        cut = cut_texts(limit, tokenizer, [text for _, text in captions])
        found += [CutCaption(where, limit, cut[text]) for where, text in captions if text in cut]
    return found


def caption_lengths(captions: Iterable[str], family: Family) -> list[CaptionLengths]:
    """How many tokens captions have for each of the family's text encoders."""
    texts, found = list(dict.fromkeys(captions)), []
    for limit in family.text_limits():
        tokenizer = family.transformers_component(limit.tokenizer, torch.device("cpu"), torch.float32)
        lengths = count_tokens(limit, tokenizer, texts)
        found.append(CaptionLengths(_encoder(limit), "tokens", limit.tokens, lengths))
    return found


def _encoder(limit: TextLimit) -> str:
    return "the second text encoder" if limit.tokenizer.endswith("_2") else "the text encoder"


def say_cut_captions(captions: Sequence[tuple[str, str]], family: Family) -> None:
    """Say how many captions are cut, and of the longest ones what is lost."""
    for line in _told(cut_captions(captions, family)):
        say(line)


def _told(found: Sequence[CutCaption]) -> Iterator[str]:
    for limit, of_limit in groupby(found, key=lambda each: each.limit):
        cut = sorted(of_limit, key=lambda each: -each.cut.lost)
        number = "1 caption has" if len(cut) == 1 else f"{len(cut)} captions have"
        yield f"{number} more {limit.of} than {_encoder(limit)} reads ({limit.tokens} tokens):"
        yield from (f"    {each}" for each in cut[:_NAMED])
        if len(cut) > _NAMED:
            yield f"    and {len(cut) - _NAMED} more"
