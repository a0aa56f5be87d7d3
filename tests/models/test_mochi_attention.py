"""Mochi's attention for a whole padded batch is diffusers' own, which goes through the samples one by one."""

import copy

import pytest
import torch
from closeness import assert_close_to_scale
from diffusers.models.attention_processor import MochiAttention, MochiAttnProcessor2_0
from recording import PROMPT, TinyModel, generator, stacked, variant_id, variants
from torch import Tensor

from finetune.engine.weights.loading import whole_transformer
from finetune.models.mochi import MaskedAttention

VIDEO, TEXT, HEADS, SIZE, WIDTH, TEXT_WIDTH = 12, 9, 3, 8, 20, 14
MASKS = {
    "different captions": [5, 9, 1],
    "one caption without a token": [4, 0],
    "no caption has a token": [0, 0],
    "full": [9, 9],
}


def attention(last: bool) -> MochiAttention:
    torch.manual_seed(0)
    return MochiAttention(
        query_dim=WIDTH,
        added_kv_proj_dim=TEXT_WIDTH,
        processor=MochiAttnProcessor2_0(),
        heads=HEADS,
        dim_head=SIZE,
        added_proj_bias=True,
        out_dim=HEADS * SIZE,
        out_context_dim=TEXT_WIDTH,
        context_pre_only=last,
    )


def results(
    module: MochiAttention, mask: Tensor, rotary: bool, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Outputs, and gradients of inputs and weights, for the same random inputs and output gradients."""
    module = module.to(dtype)
    drawn = generator()
    video = torch.randn(len(mask), VIDEO, WIDTH, generator=drawn).to(dtype).requires_grad_()
    text = torch.randn(len(mask), TEXT, TEXT_WIDTH, generator=drawn).to(dtype).requires_grad_()
    angles = torch.randn(VIDEO, HEADS, SIZE // 2, generator=drawn)
    tables = {"image_rotary_emb": (angles.cos(), angles.sin())} if rotary else {}
    outputs = module(video, encoder_hidden_states=text, attention_mask=mask, **tables)
    loss = sum((output * torch.randn(output.shape, generator=drawn).to(dtype)).sum() for output in outputs)
    loss.backward()
    weights = {name: each.grad for name, each in module.named_parameters()}
    return {"video": outputs[0], "text": outputs[1], "d video": video.grad, "d text": text.grad, **weights}


@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "plain"])
@pytest.mark.parametrize("last", [False, True], ids=["inner block", "last block"])
@pytest.mark.parametrize("lengths", MASKS.values(), ids=MASKS.keys())
def test_outputs_and_gradients_are_diffusers(lengths: list[int], last: bool, rotary: bool) -> None:
    mask = torch.arange(TEXT) < torch.tensor(lengths)[:, None]
    theirs = attention(last)
    ours = copy.deepcopy(theirs)
    ours.processor = MaskedAttention()
    expected, got = results(theirs, mask, rotary), results(ours, mask, rotary)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert_equal_but_for_rounding(got[name], value, name)


def assert_equal_but_for_rounding(ours: Tensor | None, theirs: Tensor | None, name: str) -> None:
    """But for rounding; where nothing flows back, torch's gradient may be None or zero."""
    if ours is None or theirs is None:
        assert all(each is None or not each.any() for each in (ours, theirs)), name
    else:
        assert_close_to_scale(ours, theirs, name=name)


def test_what_stands_in_padded_tokens_changes_nothing() -> None:
    module = attention(last=False)
    module.processor = MaskedAttention()
    mask = torch.arange(TEXT) < torch.tensor([3, 0])[:, None]
    video, text = torch.randn(2, VIDEO, WIDTH), torch.randn(2, TEXT, TEXT_WIDTH)
    other = torch.where(mask[..., None], text, 1e3)
    for ours, theirs in zip(module(video, text, mask), module(video, other, mask), strict=True):
        assert_close_to_scale(ours, theirs)


@pytest.mark.parametrize("model", variants("mochi"), ids=variant_id, indirect=True)
def test_the_trained_transformer_is_the_pipelines_in_outputs_and_gradients(model: TinyModel) -> None:
    """For a batch of a long, a short and an empty caption, the empty one without a single valid token."""
    theirs = copy.deepcopy(model.pipeline().transformer)
    ours = whole_transformer(model.family, torch.float32)
    texts = stacked([model.text(caption) for caption in (PROMPT * 3, "a ball", "")])
    texts["encoder_attention_mask"][2] = False
    latents = torch.randn(3, 12, 2, 4, 6, generator=generator())
    inputs = model.family.inputs(latents, torch.tensor([0.1, 0.5, 0.9]), texts, {}, [])
    outputs = []
    for transformer in (ours, theirs):
        outputs.append(model.family.predict(transformer, inputs)["video"])
        outputs[-1].square().sum().backward()
    assert_equal_but_for_rounding(*outputs, "output")
    parameters = zip(ours.named_parameters(), theirs.parameters(), strict=True)
    for (name, mine), other in parameters:
        assert_equal_but_for_rounding(mine.grad, other.grad, name)
    assert all(isinstance(block.attn1.processor, MaskedAttention) for block in ours.transformer_blocks)
