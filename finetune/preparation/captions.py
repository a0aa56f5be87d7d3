"""Captions and prompts that are longer than the text encoders read: they are trained on, and what is lost is said."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from finetune.models.family import Family
from finetune.models.text_limit import CountedTexts, CutText, TextLimit, count_texts
from finetune.preparation.account import CaptionLengths
from finetune.preparation.inspect import InspectedClip
from finetune.recipe import Recipe
from finetune.recipe.prompts import comments_of
from finetune.recipe.validation import Prompt
from finetune.runtime.logging import say
from finetune.runtime.units import counted

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


class CaptionCounter:
    """Counts what the text encoders of a family read of captions. Tokenizers are loaded and captions are tokenized once."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self._limits = family.text_limits()
        self._counted = [CountedTexts({}, {}) for _ in self._limits]
        self._known: set[str] = set()
        self._tokenizers: dict[str, Any] = {}

    def count(self, texts: Iterable[str]) -> list[tuple[TextLimit, CountedTexts]]:
        """For each encoder, how long all texts are that have been asked for, and what of them it does not read."""
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            self._known.update(new)
            for limit, counted in zip(self._limits, self._counted, strict=True):
                found = count_texts(limit, self._tokenizer(limit.tokenizer), new)
                counted.tokens.update(found.tokens)
                counted.cut.update(found.cut)
        return list(zip(self._limits, self._counted, strict=True))

    def _tokenizer(self, name: str) -> Any:
        if name not in self._tokenizers:
            cpu = torch.device("cpu")
            self._tokenizers[name] = self.family.transformers_component(name, cpu, torch.float32)
        return self._tokenizers[name]


def cut_captions(captions: Sequence[tuple[str, str]], counter: CaptionCounter) -> list[CutCaption]:
    """The captions that a text encoder of the family reads only in part, encoder by encoder.

    Args:
        captions: (where it is from, its text), of clips and prompts.
    """
    counted = counter.count(text for _, text in captions)
    return [
        CutCaption(where, limit, cut[text]) for limit, (_, cut) in counted for where, text in captions if text in cut
    ]


def caption_lengths(captions: Iterable[str], counter: CaptionCounter) -> list[CaptionLengths]:
    """How many tokens captions have for each of the family's text encoders."""
    texts = list(dict.fromkeys(captions))
    return [
        CaptionLengths(
            _encoder(limit), "tokens", limit.tokens, {text: tokens[text] for text in texts if text in tokens}
        )
        for limit, (tokens, _) in counter.count(texts)
    ]


def _encoder(limit: TextLimit) -> str:
    return "the second text encoder" if limit.tokenizer.endswith("_2") else "the text encoder"


def say_cut_captions(captions: Sequence[tuple[str, str]], counter: CaptionCounter) -> None:
    """Say how many captions are cut, and of the longest ones what is lost."""
    for line in _told(cut_captions(captions, counter)):
        say(line)


def say_prompt_notes(recipe: Recipe, prompts: Sequence[Prompt]) -> None:
    """Say how many prompts are without the trigger word, which captions alone are given, and what a prompts file leaves out."""
    word = recipe.data.id_token
    without = [each.text for each in prompts if not each.control and word and word not in each.text]
    if without:
        cure = "write it in them to see what it calls up, or mark them with control = true"
        say(f"the trigger word {word!r} is put before captions, not before prompts: {len(without)} without it ({cure})")
    file = recipe.validation.prompts_file
    if file is not None and (comments := comments_of(file)):
        say(f"{file}: {counted(comments, 'line')} beginning with # left out, as comments")


def _told(found: Sequence[CutCaption]) -> Iterator[str]:
    for limit, of_limit in groupby(found, key=lambda each: each.limit):
        cut = sorted(of_limit, key=lambda each: -each.cut.lost)
        number = "1 caption has" if len(cut) == 1 else f"{len(cut)} captions have"
        yield f"{number} more {limit.of} than {_encoder(limit)} reads ({limit.tokens} tokens):"
        yield from (f"    {each}" for each in cut[:_NAMED])
        if len(cut) > _NAMED:
            yield f"    and {len(cut) - _NAMED} more"
