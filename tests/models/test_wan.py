"""Wan's conditions are its pipelines': which frames are given and how, CLIP's image embeddings, and what a dropped image leaves."""

from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close_to_scale
from full_size import CONFIGS
from PIL import Image
from recording import (
    CPU,
    PROMPT,
    Clip,
    TinyModel,
    assert_equal,
    encoded_clip,
    generate,
    generator,
    recorded,
    training_inputs,
    variant_id,
    variants,
)
from torch import Tensor

from finetune.data.loader import Sample
from finetune.data.synthetic import scene
from finetune.models.folder import ModelFolder
from finetune.models.wan import WanImageToVideo
from finetune.recipe import Bucket
from finetune.recipe.schema import ObjectiveSettings, Vae


def over(*models: tuple[str, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("model", models, ids=variant_id, indirect=True)


CONCATENATED = over(("wan_i2v", "2.1"), ("wan_i2v", "2.1-FLF2V"), ("wan_i2v", "2.2-A14B"))
WITH_CLIP = over(("wan_i2v", "2.1"), ("wan_i2v", "2.1-FLF2V"))


# Text


@over(("wan", "2.1"))
def test_text_is_512_tokens_of_which_padding_is_zeros(model: TinyModel) -> None:
    length = len(model.pipeline().tokenizer(PROMPT).input_ids)
    embeds = model.text(PROMPT)["encoder_hidden_states"]
    assert embeds.shape == (512, 32)
    assert embeds[:length].abs().sum(1).gt(0).all()
    assert not embeds[length:].any()


@over(("wan", "2.1"), ("wan_i2v", "2.1"))
def test_captions_are_cleaned_as_prompts_are(model: TinyModel) -> None:
    """Mojibake, HTML and white space: by ftfy, without which the image-to-video pipeline fails."""
    odd, plain = "a sch\u00c3\u00b6n &amp;lt;ball&amp;gt;\n\n  falls ", "a sch\u00f6n <ball> falls"
    for name, tensor in model.text(odd).items():
        assert torch.equal(tensor, model.text(plain)[name])


# What is concatenated


def conditioned(model: TinyModel, **fields: Any) -> tuple[dict[str, Tensor], Bucket]:
    """`Family.condition` of the model's clip, encoded as for training."""
    family = model.family
    encoded = encoded_clip(model, torch.float32)
    sample = Sample({**encoded, "text": {}}, model.bucket, 25.0, generator(), **fields)
    x0 = family.latents(sample.moments, generator(1))
    return family.condition(sample, x0, ObjectiveSettings()), model.bucket


@CONCATENATED
@torch.no_grad()
def test_mask_and_condition_are_what_the_pipeline_prepares(model: TinyModel) -> None:
    pipeline, clip = model.pipeline(), model.clip
    condition, (frames, height, width) = conditioned(model)
    first, last = (pipeline.video_processor.preprocess(Image.fromarray(clip[i]), height, width) for i in (0, -1))
    _, theirs = pipeline.prepare_latents(
        first,
        1,
        4,
        height,
        width,
        frames,
        torch.float32,
        CPU,
        generator(),
        last_image=last if model.family.last_image else None,
    )
    assert torch.equal(condition["channels"], theirs[0])


@CONCATENATED
def test_the_first_latent_frame_is_given_and_of_the_last_one_its_last_frame(model: TinyModel) -> None:
    condition, _ = conditioned(model)
    mask = condition["channels"][:4, :, 0, 0]  # a channel for each frame of a latent one
    expected = torch.zeros(4, 5)
    expected[:, 0] = 1
    expected[3, 4] = float(model.family.last_image)
    assert torch.equal(mask, expected)


@over(("wan_i2v", "2.2-A14B"))
def test_a14b_takes_a_last_image_as_its_pipeline_does(model: TinyModel) -> None:
    family = copy(model.family)
    family.last_image = True
    between = replace(model, family=family)
    assert family.last_image_problem(True) is None
    clip = Clip(generate(between, between.pipeline()), 2, model.text(PROMPT))
    theirs = clip.call.kwargs
    ours = training_inputs(between, clip)
    assert torch.equal(ours["hidden_states"], theirs["hidden_states"])
    assert not torch.equal(ours["hidden_states"], training_inputs(model, clip)["hidden_states"])


@CONCATENATED
def test_later_latent_frames_of_the_condition_depend_on_the_image(model: TinyModel) -> None:
    """So that all of them are cached, not the first alone."""
    encode = model.family.condition_encoder(CPU, torch.float32, Vae())
    clip, other = model.clip, scene(1, *model.bucket)[0]
    middle = clip.copy()
    middle[1:-1] = other[1:-1]
    assert not torch.equal(encode(clip)["mean"][:, 1], encode(other)["mean"][:, 1])
    assert torch.equal(encode(clip)["mean"], encode(middle)["mean"])  # and not on the frames between


# CLIP


@WITH_CLIP
@torch.no_grad()
def test_clip_sees_images_in_their_own_size(model: TinyModel) -> None:
    pipeline = model.pipeline()
    sizes = ((50, 90), (77, 41))[: 1 + model.family.last_image]
    images = [np.ascontiguousarray(scene(i, 1, *size)[0][0]) for i, size in enumerate(sizes)]
    ours = model.family.image_encoder(CPU, torch.float32)(*images)["embeds"]
    assert torch.equal(ours, pipeline.encode_image([Image.fromarray(image) for image in images], CPU))
    pixels = pipeline.image_processor(images=Image.fromarray(images[0]), return_tensors="pt").pixel_values
    assert_close_to_scale(ours[:1], pipeline.image_encoder(pixels, output_hidden_states=True).hidden_states[-2])


@over(("wan_i2v", "2.1-FLF2V"))
def test_of_two_images_the_first_precedes_the_last_clip_by_clip(model: TinyModel) -> None:
    """(2 B, tokens, D), which the transformer views as (B, 2 x tokens, D)."""
    captions = (PROMPT, "white stripes")
    clips = [Clip(recorded(model, prompt=caption), 2, model.text(caption)) for caption in captions]
    embeds = training_inputs(model, *clips)["encoder_hidden_states_image"]
    alone = clips[0].call.kwargs["encoder_hidden_states_image"]
    assert embeds.shape == (4, 17, 32)
    assert torch.equal(embeds, torch.cat([alone, alone]))
    assert not torch.equal(alone[0], alone[1])


@pytest.mark.parametrize("checkpoint, images", [("wan2.1-i2v-14b", 1), ("wan2.1-flf2v-14b", 2)])
def test_published_checkpoints_see_257_tokens_of_an_image(checkpoint: str, images: int) -> None:
    family = WanImageToVideo(ModelFolder(CONFIGS / checkpoint))
    embeds = family.example(Bucket(17, 64, 96), torch.bfloat16)["image_embeds"]["embeds"]
    assert embeds.shape == (images, 257, 1280)
    seen = family.transformer_config["pos_embed_seq_len"]
    assert seen is None or images * 257 == seen


# Without the image


@CONCATENATED
def test_a_dropped_image_is_a_condition_of_zeros(model: TinyModel) -> None:
    given, dropped = conditioned(model)[0], conditioned(model, image_dropped=True)[0]
    assert given.keys() == dropped.keys() == {"channels", *(["embeds"] if model.family.sees_clip else [])}
    for name in given:
        assert given[name].any()
        assert not dropped[name].any()


@over(("wan_i2v", "2.2-5B"))
def test_without_its_image_5b_is_text_to_video(model: TinyModel) -> None:
    text_to_video = TinyModel.open(model.folder, "wan")
    clip = Clip(generate(text_to_video, text_to_video.pipeline()), 2, model.text(PROMPT), image_dropped=True)
    ours, theirs = training_inputs(model, clip), training_inputs(text_to_video, clip)
    assert ours.pop("encoder_hidden_states_image") is None
    for name in theirs:
        assert_equal(ours[name], theirs[name], name)


# Folders


@pytest.mark.parametrize("model", variants("wan", "wan_i2v"), ids=variant_id, indirect=True)
def test_a_wan_folder_says_which_recipe_it_is_for(model: TinyModel) -> None:
    kind = {"2.1": "wan_1.3b", "2.2-5B": "wan2.2_5b", "2.2-A14B": "wan2.2_a14b"}
    image_kind = {"2.1": "wan_14b_i2v", "2.1-FLF2V": "wan_14b_flf2v"}
    variant = model.folder.name.partition("-")[2]
    of_text, of_image = kind.get(variant), image_kind.get(variant, f"{kind.get(variant)}_i2v")
    assert model.family.recipe_for(model.family.folder) == (of_image if model.family.takes_image else of_text)
