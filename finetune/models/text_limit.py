"""How many tokens of a caption a text encoder reads, and what of longer ones is lost. Only tokenizers are loaded for it.

Pipelines cut what is longer, and say so at the most in a log that nobody reads.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any, NamedTuple

_CONTENT = "{caption}"  # stands in a template for a caption
_AT_ONCE = 512  # texts tokenized in one call, whose tokens are all in memory


@dataclass(frozen=True)
class TextLimit:
    """How much of a caption one of a family's text encoders reads.

    Attributes:
        tokens: at most so many, special tokens of the tokenizer among them, those of a template not.
        tokenizer: name of the component.
        content: what is tokenized of a caption, inside the template; None if this encoder reads nothing of it.
        template: takes the tokenizer, and returns the texts in front of the content and behind it.
        dropped: tokens of the template in front, after which the pipeline begins to count.
        special_tokens: whether the tokenizer adds them; a chat template has them already.
        of: what the encoder reads, for messages.
    """

    tokens: int
    tokenizer: str = "tokenizer"
    content: Callable[[str], str | None] = str
    template: Callable[[Any], tuple[str, str]] = lambda tokenizer: ("", "")
    dropped: int = 0
    special_tokens: bool = True
    of: str = "text"


class CutText(NamedTuple):
    """A text that is longer than an encoder reads: its tokens, how many are lost, and the text of these."""

    tokens: int
    lost: int
    text: str


class CountedTexts(NamedTuple):
    """Texts as an encoder reads them, by text.

    Attributes:
        tokens: how many they have, as `TextLimit.tokens` counts them: of those that the encoder reads something of.
        cut: what is not read, of those that are longer than the limit.
    """

    tokens: dict[str, int]
    cut: dict[str, CutText]


def count_texts(limit: TextLimit, tokenizer: Any, captions: Sequence[str]) -> CountedTexts:
    """How long captions are, and what of them is not read.

    Args:
        tokenizer: the component that the limit names.
    """
    _, behind = limit.template(tokenizer)
    ending = _length(tokenizer, behind)
    if limit.special_tokens:
        ending += _special_tokens_at_end(tokenizer)
    lengths, cut = {}, {}
    for caption, ids, tokens in _tokenized(limit, tokenizer, captions):
        lengths[caption] = tokens
        if (lost := tokens - limit.tokens) > 0:
            end = len(ids) - ending
            cut[caption] = CutText(tokens, lost, tokenizer.decode(ids[end - lost : end]).strip())
    return CountedTexts(lengths, cut)


def _tokenized(limit: TextLimit, tokenizer: Any, captions: Sequence[str]) -> Iterator[tuple[str, list[int], int]]:
    """(caption, its tokens and those of the template, how many of them count)."""
    before, behind = limit.template(tokenizer)
    uncounted = limit.dropped + _length(tokenizer, behind)
    contents = {caption: content for caption in captions if (content := limit.content(caption)) is not None}
    remaining = iter(contents.items())
    while some := list(islice(remaining, _AT_ONCE)):
        texts = [f"{before}{content}{behind}" for _, content in some]
        batch = tokenizer(
            texts, add_special_tokens=limit.special_tokens, return_attention_mask=False, verbose=False
        ).input_ids
        for (caption, _), ids in zip(some, batch, strict=True):
            yield caption, ids, len(ids) - uncounted


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids) if text else 0


def chat_template(messages: Callable[[str], list[dict[str, str]]]) -> Callable[[Any], tuple[str, str]]:
    """A `TextLimit.template` by the tokenizer's own chat template. `messages` makes the conversation of a caption."""

    def template(tokenizer: Any) -> tuple[str, str]:
        text = tokenizer.apply_chat_template(messages(_CONTENT), add_generation_prompt=True, tokenize=False)
        before, _, behind = text.partition(_CONTENT)
        return before, behind

    return template


def _special_tokens_at_end(tokenizer: Any) -> int:
    """How many special tokens the tokenizer puts behind a text."""
    plain, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    starts = range(len(whole) - len(plain) + 1)
    found = (len(whole) - len(plain) - start for start in starts if whole[start : start + len(plain)] == plain)
    at_end = takewhile(set(tokenizer.all_special_ids).__contains__, reversed(whole))
    return next(found, len(list(at_end)))  # where "a" alone is tokenized in another way
