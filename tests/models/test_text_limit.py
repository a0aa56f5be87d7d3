"""What of a caption the text encoders read, and what is lost: seen by what changes an embedding, and by what diffusers says."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import diffusers
import pytest
import torch
from recording import CPU, TinyModel, variant_id, variants

from finetune.models.text_limit import CutText, TextLimit, _special_tokens_at_end, count_texts

WORDS = ["red", "ball", "moves"]  # a token each
_TENSORS = {"hunyuan": "pooled_projections", "hunyuan_i2v": "pooled_projections"}  # of the second encoder


def lost(model: TinyModel, limit: TextLimit, caption: str) -> CutText | None:
    tokenizer = model.family.transformers_component(limit.tokenizer, CPU, torch.float32)
    return count_texts(limit, tokenizer, [caption]).cut.get(caption)


def of_length(count: int, last: bool, limit: TextLimit) -> str:
    """A caption of so many tokens: words, or letters for the second tokenizers. Its last one is one or another."""
    if limit.tokenizer == "tokenizer":
        return " ".join([*(WORDS[k % 3] for k in range(count - 1)), "ball" if last else "wall"])
    letters = "x" * (count - 1) + "yz"[last]
    return f'"{letters}"' if "quotes" in limit.of else letters


def is_read(model: TinyModel, limit: TextLimit, count: int) -> bool:
    """Whether the last token of a caption changes what its encoder says."""
    name = "encoder_hidden_states"
    if limit.tokenizer == "tokenizer_2":
        name = _TENSORS.get(model.family.name, "encoder_hidden_states_2")
    one, other = (model.text(of_length(count, last, limit))[name] for last in (False, True))
    return not torch.equal(one, other)


def longest_whole(model: TinyModel, limit: TextLimit) -> int:
    """The most tokens of which nothing is said to be lost."""
    low, high = 1, 2000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if lost(model, limit, of_length(middle, True, limit)) else (middle, high)
    return low


def test_what_is_said_to_be_lost_changes_no_embedding_and_what_is_before_it_does(model: TinyModel) -> None:
    limits = model.family.text_limits()
    assert [limit.tokenizer for limit in limits] == [
        name for name in model.family.text_components if name.startswith("tokenizer")
    ]
    for limit in limits:
        count = longest_whole(model, limit)
        assert 5 < count < 1001
        assert is_read(model, limit, count)
        assert not is_read(model, limit, count + 1)
        cut = lost(model, limit, of_length(count + 1, True, limit))
        assert cut is not None
        assert (cut.tokens, cut.lost) == (limit.tokens + 1, 1)


@contextmanager
def diffusers_warnings() -> Iterator[list[str]]:
    said: list[str] = []
    logger, handler = logging.getLogger("diffusers"), logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        yield said
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


@pytest.mark.parametrize(
    "model",
    [*variants("cogvideox"), *variants("ltx"), *variants("mochi"), *variants("hunyuan")],
    ids=variant_id,
    indirect=True,
)
@torch.no_grad()
def test_the_text_that_is_lost_is_the_one_that_diffusers_warns_of(model: TinyModel) -> None:
    limit = model.family.text_limits()[-1]
    caption = "a red ball, the camera follows it " * 50
    cut = lost(model, limit, caption)
    with diffusers_warnings() as said:
        pipeline = model.pipeline()
        arguments = (
            {} if isinstance(pipeline, diffusers.HunyuanVideoPipeline) else {"do_classifier_free_guidance": False}
        )
        pipeline.encode_prompt(caption, **arguments)
    (warning,) = [line for line in said if "truncated" in line]
    assert cut is not None
    assert f"{limit.tokens} tokens: {[cut.text]}" in warning.replace("[' ", "['")


@pytest.mark.parametrize("model", variants("wan"), ids=variant_id, indirect=True)
def test_wans_captions_are_counted_as_they_are_cleaned(model: TinyModel) -> None:
    (limit,) = model.family.text_limits()
    caption = "red &amp;amp; ball   " * 255
    tokens = len(model.pipeline().tokenizer("red & ball " * 255).input_ids)
    found = lost(model, limit, caption)
    assert (found.tokens if found else None) == (tokens if tokens > 512 else None)
    assert tokens > 512


@pytest.mark.parametrize("model", [*variants("ltx"), *variants("hunyuan15")], ids=variant_id, indirect=True)
def test_empty_captions_and_none_at_all_lose_nothing(model: TinyModel) -> None:
    for limit in model.family.text_limits():
        tokenizer = model.family.transformers_component(limit.tokenizer, CPU, torch.float32)
        assert count_texts(limit, tokenizer, [""]).cut == count_texts(limit, tokenizer, []).cut == {}


class Merging:
    """A tokenizer that makes another token of "a" where special tokens stand around it."""

    all_special_ids = (1, 2)

    def __call__(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[1, 8, 2, 2] if add_special_tokens else [7])


def test_special_tokens_at_the_end_are_counted_by_their_numbers_where_a_text_changes_with_them() -> None:
    assert _special_tokens_at_end(Merging()) == 2
