"""HunyuanVideo image-to-video beside its pipeline: the image in the text and in the latents, with and without it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from closeness import assert_close_to_scale
from PIL import Image
from recording import CPU, PROMPT, TinyModel, generate, generator, variant_id, variants

from finetune.checks.model import open_family
from finetune.data.loader import Sample
from finetune.data.synthetic import scene
from finetune.models import text_mask
from finetune.models.batch import Tensors
from finetune.preparation.encode import prepare
from finetune.recipe import load_recipe
from finetune.recipe.schema import ObjectiveSettings, Vae
from finetune.runtime.errors import UserError
from finetune.training.job import Job

LATENT_CONCAT, TOKEN_REPLACE = variants("hunyuan_i2v")
both = pytest.mark.parametrize("model", [LATENT_CONCAT, TOKEN_REPLACE], ids=variant_id, indirect=True)
token_replace = pytest.mark.parametrize("model", [TOKEN_REPLACE], ids=variant_id, indirect=True)


def sample(model: TinyModel, text: Tensors) -> Sample:
    moments = model.family.video_encoder(CPU, torch.float32, Vae())(model.clip)
    return Sample({"video": moments, "text": text}, model.bucket, 25.0, generator())


@both
def test_text_depends_on_the_image(model: TinyModel) -> None:
    encode = model.family.text_encoder(CPU, torch.float32)
    embeds = [encode(PROMPT, scene(index, 1, 64, 96)[0][0])["encoder_hidden_states"] for index in (0, 1)]
    assert not torch.equal(*embeds)


@both
def test_text_is_encoded_of_an_image_in_its_own_size(model: TinyModel) -> None:
    """As the pipeline is given it: CLIP's processor scales and crops it itself."""
    frame = scene(1, 1, 90, 250)[0][0]
    ours = model.family.text_encoder(CPU, torch.float32)(PROMPT, frame)
    theirs = generate(model, model.pipeline(), steps=1, image=Image.fromarray(frame)).calls[0].kwargs
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name][0]), name


@both
def test_the_images_token_in_a_caption_is_refused(model: TinyModel) -> None:
    with pytest.raises(UserError, match="<image>"):
        model.family.text_encoder(CPU, torch.float32)("an <image> of a ball", None)


@both
def test_the_image_in_the_latents_is_the_pipelines(model: TinyModel) -> None:
    """That of the frame alone: the clip's first latent frame is another, since the VAE's norms span time."""
    pipeline, (_, height, width) = model.pipeline(), model.bucket
    image = pipeline.video_processor.preprocess(Image.fromarray(model.clip[0]), height=height, width=width)
    with torch.no_grad():
        _, theirs = pipeline.prepare_latents(image, 1, 4, height, width, 17, torch.float32, CPU, generator())
    clip = sample(model, {})
    x0 = model.family.latents(clip.moments, generator())
    ours = model.family.condition(clip, x0, ObjectiveSettings())["image"]
    assert torch.equal(ours, theirs[0, :, :1])
    assert (ours - x0[:, :1]).norm() > 0.02 * ours.norm()


@token_replace
def test_texts_with_and_without_an_image_share_a_batch(model: TinyModel) -> None:
    """The black image has twice as many tokens; the shorter text is padded, and predictions are those of each alone."""
    family, texts = model.family, [model.text(PROMPT), model.text("white stripes", with_image=False)]
    lengths = [len(text["encoder_hidden_states"]) for text in texts]
    assert lengths == [144 + 252, 288 + 252]
    objective, u = family.objective(ObjectiveSettings()), torch.tensor([0.3, 0.7])
    together = family.batch([sample(model, text) for text in texts], objective, u)
    assert together.inputs[text_mask.MARK] is False
    with torch.no_grad():
        found = family.predict(model.pipeline().transformer, together.inputs)["video"]
        for index, text in enumerate(texts):
            alone = family.batch([sample(model, text)], objective, u[index, None])
            expected = family.predict(model.pipeline().transformer, alone.inputs)["video"]
            assert_close_to_scale(found[index, None], expected)


@both
def test_compiled_graphs_are_given_text_of_one_length(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.family, "keeps_text_length", True)
    objective = model.family.objective(ObjectiveSettings())
    for with_image in (True, False):
        batch = model.family.batch([sample(model, model.text(PROMPT, with_image=with_image))], objective)
        assert batch.inputs["encoder_hidden_states"].shape[1] == 540
        assert batch.inputs["encoder_attention_mask"].shape[1] == 540


@both
def test_a_sample_without_its_image_has_a_black_one_in_its_text(
    build_job: Callable[..., Job], family_recipe: Callable[..., Path], model: TinyModel
) -> None:
    """As the pipeline encodes a negative prompt; the image's latents stay, as in the pipeline's call for that."""
    kind = model.family.kind
    dropped, whole = (
        build_job(
            f"data.image_dropout={share}", "data.caption_dropout=0", recipe_file=family_recipe("hunyuan_i2v", kind)
        )
        for share in (1.0, 0.0)
    )
    without, with_image = (job.micro_batches()._sample(0, 0, job.order.plan(0)) for job in (dropped, whole))
    item = dropped.prepared.train[dropped.order.plan(0).items[0]]
    guided = {"true_cfg_scale": 3.0, "negative_prompt": item.caption}
    negative = generate(model, model.pipeline(), steps=1, **guided).calls[1].kwargs
    for name, tensor in without.text.items():
        assert torch.equal(tensor, negative[name][0]), name
    assert not torch.equal(without.text["encoder_hidden_states"][0], with_image.text["encoder_hidden_states"][0])
    assert torch.equal(without.moments["image_mean"], with_image.moments["image_mean"])


def test_the_two_kinds_share_no_text_in_the_cache(
    family_recipe: Callable[..., Path], runtime, tiny_model: Callable[..., Path]
) -> None:
    """They take other tokens of the image; encoders may be the same files."""
    keys = []
    for kind in (LATENT_CONCAT, TOKEN_REPLACE):
        recipe = load_recipe(family_recipe(*kind), [])
        keys.append({item.keys["text"] for item in prepare(recipe, open_family(recipe), runtime).train})
    assert keys[0].isdisjoint(keys[1])
