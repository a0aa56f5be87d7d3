"""In training the transformer is called as the pipeline calls it, for the same latents, noise level, caption and image."""

from typing import Any

import pytest
import torch
from closeness import FLOAT32, assert_close_to_scale
from recording import (
    PROMPT,
    Call,
    Clip,
    TinyModel,
    adapted,
    assert_equal,
    generate,
    hooks,
    recorded,
    training_inputs,
    variant_id,
    variants,
)

from finetune.models.text_mask import MARK

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])


def both_calls(model: TinyModel, dtype: torch.dtype, index: int) -> tuple[dict[str, Any], Call]:
    """Training's arguments, and the pipeline's call at a step."""
    clip = Clip(recorded(model, dtype, fps=29.97), index, model.text(PROMPT, dtype), 29.97)
    return training_inputs(model, clip), clip.call


@DTYPES
@pytest.mark.parametrize("index", [0, 2], ids=["first step", "third step"])
def test_every_argument_is_the_pipelines(model: TinyModel, dtype: torch.dtype, index: int) -> None:
    ours, call = both_calls(model, dtype, index)
    theirs = dict(call.kwargs)
    assert call.args == ()
    assert theirs.pop("attention_kwargs") is None
    assert theirs.pop("return_dict") is False
    if MARK in ours:  # text without its padding
        assert ours.pop(MARK) is True
        for mask in [name for name in theirs if name.startswith("encoder_attention_mask")]:
            length = int(theirs[mask].bool().sum())  # in bf16 301 would be 300
            assert length < theirs[mask].shape[1]
            for name in (mask, mask.replace("attention_mask", "hidden_states")):
                theirs[name] = theirs[name][:, :length]
        assert theirs["encoder_attention_mask"].shape[1] > 0
    if ours.get("image_embeds", 0) is None:  # zeros tell HunyuanVideo-1.5 that there is no image
        assert not theirs.pop("image_embeds").any()
        del ours["image_embeds"]
    assert ours.keys() == theirs.keys()
    if "rope_interpolation_scale" in ours:  # each sample of a batch has its own: compared by what is made of it
        rope = model.pipeline(dtype).transformer.rope
        sizes = ("hidden_states", "num_frames", "height", "width", "rope_interpolation_scale")
        assert_equal(*(rope(*(arguments[name] for name in sizes)) for arguments in (ours, theirs)), "rope")
        del ours["rope_interpolation_scale"], theirs["rope_interpolation_scale"]
    if (
        model.family.name in ("hunyuan", "hunyuan_i2v")
        and (dtype, index) == (torch.bfloat16, 2)
        and not model.replaces_frame
    ):
        ours["timestep"] = ours["timestep"].to(dtype)  # its pipeline keeps latents and timestep in float32 for one step
    if model.cuts_timesteps:
        exact, cut = ours["timestep"], theirs["timestep"]
        assert exact.dtype == torch.float32
        assert torch.equal(exact.floor(), cut.float())
        ours["timestep"] = cut
    for name in ours:
        assert_equal(ours[name], theirs[name], name)


def with_timesteps_of(model: TinyModel, inputs: dict[str, Any], *calls: Call) -> dict[str, Any]:
    """Training's arguments, with the calls' timesteps if the pipeline's scheduler cuts them to integers."""
    return inputs | ({"timestep": torch.cat([c.kwargs["timestep"] for c in calls])} if model.cuts_timesteps else {})


@DTYPES
def test_the_prediction_is_the_pipelines(model: TinyModel, dtype: torch.dtype) -> None:
    ours, call = both_calls(model, dtype, index=2 if dtype == torch.float32 else 0)
    ours = with_timesteps_of(model, ours, call)
    with torch.no_grad():
        prediction = model.family.predict(adapted(model, dtype, call.component), ours)["video"]
    if MARK in ours:  # text without its padding, in attention without a mask
        assert_close_to_scale(prediction, call.output, FLOAT32 if dtype == torch.float32 else 0.02)
    else:
        assert torch.equal(prediction, call.output)


def test_a_batch_of_different_clips_is_the_same_as_each_alone(model: TinyModel) -> None:
    """With captions of different lengths, and other frame rates and noise levels."""
    captions, rates = (PROMPT, "white stripes"), (12.0, 50.0)
    clips = [
        Clip(recorded(model, prompt=caption, fps=fps), index, model.text(caption), fps)
        for index, caption, fps in zip((2, 3), captions, rates, strict=True)
    ]
    calls = [clip.call for clip in clips]
    (component,) = {call.component for call in calls}
    inputs = with_timesteps_of(model, training_inputs(model, *clips), *calls)
    with torch.no_grad():
        prediction = model.family.predict(adapted(model, component=component), inputs)["video"]
    assert_close_to_scale(prediction, torch.cat([call.output for call in calls]))


def test_tokens_are_what_the_transformer_attends_over(model: TinyModel) -> None:
    seen: list[int] = []

    def before(block: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append((kwargs.get("hidden_states") if not args else args[0]).shape[1])

    transformer = model.pipeline().transformer
    with hooks(getattr(transformer, model.family.block_lists[0])[0], before, lambda *_: None):
        generate(model, model.pipeline(), steps=2)
    assert set(seen) == {model.family.tokens(model.bucket)}


# Without the condition image


@pytest.mark.parametrize("model", variants("cogvideox_i2v"), ids=variant_id, indirect=True)
def test_a_dropped_image_is_zeros_in_cogvideox(model: TinyModel) -> None:
    clip = Clip(recorded(model), 2, model.text(PROMPT))
    given = training_inputs(model, clip)
    clip.image_dropped = True
    dropped = training_inputs(model, clip)
    channels = model.pipeline().vae.config.latent_channels
    assert given["hidden_states"][:, :, channels:].any()
    assert not dropped["hidden_states"][:, :, channels:].any()
    assert torch.equal(dropped["hidden_states"][:, :, :channels], given["hidden_states"][:, :, :channels])


@pytest.mark.parametrize("model", variants("ltx_i2v"), ids=variant_id, indirect=True)
def test_without_its_image_ltx_is_text_to_video(model: TinyModel) -> None:
    """Every token has the timestep of the noise, as in the text-to-video pipeline of the same parts."""
    text_to_video = TinyModel.open(model.folder, "ltx")
    generation = generate(text_to_video, text_to_video.pipeline())
    clip = Clip(generation, 2, model.text(PROMPT), image_dropped=True)
    ours, theirs = training_inputs(model, clip), training_inputs(text_to_video, clip)
    tokens = model.family.tokens(model.bucket)
    assert torch.equal(ours.pop("timestep"), theirs.pop("timestep").view(1, 1).expand(1, tokens))
    for name in ours:
        assert_equal(ours[name], theirs[name], name)
    with torch.no_grad():
        inputs = training_inputs(model, clip)
        prediction = model.family.predict(model.pipeline().transformer, inputs)["video"]
    assert_close_to_scale(prediction, clip.call.output)
