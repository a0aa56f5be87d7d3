"""A single frame is an image: each model that can be trained on images encodes and sees it as diffusers does."""

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from closeness import assert_close_to_scale
from PIL import Image
from recording import CPU, PROMPT, Call, TinyModel, adapted, generate, generator, stacked, variant_id, variants
from torch import Tensor

from finetune.data.loader import Sample
from finetune.data.synthetic import scene
from finetune.models import text_mask
from finetune.recipe import Bucket
from finetune.recipe.schema import ObjectiveSettings, Vae

ONE = Bucket(1, 64, 96)
TEXT_TO_VIDEO = variants("cogvideox", "hunyuan", "hunyuan15", "ltx", "mochi", "wan")
GIVEN_BY_TOKENS = [*variants("ltx_i2v"), ("wan_i2v", "2.2-5B")]  # which need not be given a frame
BY_DEFAULT = [  # one of each way to give timesteps and positions
    ("cogvideox", "1.5-5B"),
    ("hunyuan", None),
    ("hunyuan15", None),
    ("ltx", "0.9.0"),
    ("ltx_i2v", "0.9.7"),
    ("mochi", None),
    ("wan_i2v", "2.2-5B"),
]
TRAINED = pytest.mark.parametrize(
    "model",
    [
        pytest.param(each, marks=() if each in BY_DEFAULT else pytest.mark.full, id=variant_id(each))
        for each in (*TEXT_TO_VIDEO, *GIVEN_BY_TOKENS)
    ],
    indirect=True,
)
WAN_5B = pytest.mark.parametrize("model", [("wan", "2.2-5B"), ("wan_i2v", "2.2-5B")], ids=variant_id, indirect=True)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=["float32", "bf16"]
)


def image_of(model: TinyModel, dtype: torch.dtype = torch.float32, index: int = 0) -> dict[str, Tensor]:
    """The moments of an image, by the family's encoder."""
    return model.family.video_encoder(CPU, dtype, Vae())(scene(index, *ONE)[0])


def as_text_to_video(model: TinyModel) -> TinyModel:
    """The family whose pipeline makes an image of a text alone."""
    return TinyModel.open(model.folder, model.family.name.removesuffix("_i2v"))


def text_of(model: TinyModel, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return model.text(PROMPT, dtype)


@TRAINED
def test_a_bucket_of_one_frame_is_legal(model: TinyModel) -> None:
    assert model.family.bucket_problem(ONE) is None
    assert model.family.vae_shape(ONE)[0] == 1


@TRAINED
@DTYPES
@torch.no_grad()
def test_an_image_is_encoded_as_diffusers_does(model: TinyModel, dtype: torch.dtype) -> None:
    moments, pipeline = image_of(model, dtype), as_text_to_video(model).pipeline(dtype)
    image = Image.fromarray(scene(0, *ONE)[0][0])
    pixels = pipeline.video_processor.preprocess_video([image]).to(pipeline.vae.dtype).contiguous()
    posterior = pipeline.vae.encode(pixels).latent_dist
    assert tuple(moments["mean"].shape[1:]) == model.family.vae_shape(ONE)
    for name, theirs in (("mean", posterior.mean[0]), ("logvar", posterior.logvar[0])):
        assert torch.equal(moments[name], theirs)


@TRAINED
@torch.no_grad()
def test_examples_of_one_frame_have_the_shapes_of_what_is_cached(model: TinyModel) -> None:
    example = model.family.example(ONE, torch.float32)["video"]
    assert {name: tensor.shape for name, tensor in example.items()} == {
        name: tensor.shape for name, tensor in image_of(model).items()
    }


@TRAINED
@DTYPES
def test_the_prediction_is_that_of_the_pipeline_for_one_frame(model: TinyModel, dtype: torch.dtype) -> None:
    """Of the same noised latents: with its timesteps, positions and frame rate."""
    oracle = as_text_to_video(model)
    calls = generate(oracle, oracle.pipeline(dtype), ONE, fps=29.97).calls
    call: Call = calls[2 if dtype == torch.float32 else 0]
    sample = Sample({"video": image_of(model, dtype), "text": text_of(model, dtype)}, ONE, 29.97, generator())
    condition = model.family.condition(sample, torch.randn(call.latents.shape[1:]), ObjectiveSettings(guidance=4.58))
    text = text_mask.stacked([sample.text])
    inputs = model.family.inputs(call.latents.clone(), call.level, text, stacked([condition]), [sample])
    if model.cuts_timesteps:
        shape = inputs["timestep"].shape
        inputs["timestep"] = (
            call.kwargs["timestep"].reshape(1, -1).expand(shape) if len(shape) == 2 else (call.kwargs["timestep"])
        )
    with torch.no_grad():
        prediction = model.family.predict(adapted(model, dtype, call.component), inputs)["video"]
    assert_close_to_scale(prediction, call.output, 1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("model", variants("ltx"), ids=variant_id, indirect=True)
@torch.no_grad()
def test_the_frame_rate_of_an_image_changes_nothing(model: TinyModel) -> None:
    """Its only frame is shown at 0 seconds, whatever follows."""
    batches = []
    for fps in (25.0, 1000.0):
        sample = Sample({"video": image_of(model), "text": text_of(model)}, ONE, fps, generator())
        batches.append(model.family.batch([sample], model.family.objective(ObjectiveSettings())))
    slow, fast = (model.family.predict(adapted(model), batch.inputs)["video"] for batch in batches)
    assert torch.equal(slow, fast)


# The loss


def plain_loss(model: TinyModel, moments: dict[str, Tensor], text: Tensor, seed: int, sigma: Tensor) -> Tensor:
    """The loss of one sample by diffusers' transformer and the formulas of the paper, with a timestep for the whole of it."""
    transformer = diffusers.WanTransformer3DModel.from_pretrained(model.folder, subfolder="transformer")
    config, drawn = model.pipeline().vae.config, generator(seed)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    z = moments["mean"] + (moments["logvar"] / 2).exp() * torch.randn(moments["mean"].shape, generator=drawn)
    x0 = (z - mean) / std
    noise = torch.randn(x0.shape, generator=drawn)
    noisy = (1 - sigma) * x0 + sigma * noise
    output = transformer(noisy[None], timestep=1000 * sigma[None], encoder_hidden_states=text[None], return_dict=False)
    return (output[0][0] - (noise - x0)).square().mean()


def image_batch(model: TinyModel, *seeds: int) -> tuple[Any, list[dict[str, Tensor]]]:
    """A batch of images, and the moments of each."""
    moments = [image_of(model, index=seed) for seed in seeds]
    samples = [
        Sample({"video": each, "text": text_of(model)}, ONE, 1000.0, generator(seed))
        for each, seed in zip(moments, seeds, strict=True)
    ]
    return model.family.batch(samples, model.family.objective(ObjectiveSettings())), moments


@WAN_5B
@torch.no_grad()
def test_the_loss_of_images_is_that_of_a_plain_computation(model: TinyModel) -> None:
    """Every token has the sample's timestep, and every one counts, also where videos are given their first frame."""
    batch, moments = image_batch(model, 1, 2)
    losses = batch.losses(model.family.predict(adapted(model), batch.inputs))["video"]
    timestep = batch.inputs["timestep"]
    assert timestep.shape == (2, model.family.tokens(ONE))
    assert (timestep == timestep[:, :1]).all()
    text = text_of(model)["encoder_hidden_states"]
    expected = [
        plain_loss(model, each, text, seed, timestep[place, 0] / 1000)
        for place, (each, seed) in enumerate(zip(moments, (1, 2), strict=True))
    ]
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-5, atol=0)
    assert losses.min() > 0


@pytest.mark.parametrize("model", GIVEN_BY_TOKENS, ids=variant_id, indirect=True)
@torch.no_grad()
def test_images_beside_videos_leave_the_videos_their_given_frame(model: TinyModel) -> None:
    images, _ = image_batch(model, 1)
    moments = model.family.video_encoder(CPU, torch.float32, Vae())(model.clip)
    sample = Sample({"video": moments, "text": text_of(model)}, model.bucket, 25.0, generator(3))
    video = model.family.batch([sample], model.family.objective(ObjectiveSettings()))
    first = model.family.tokens(model.bucket) // model.family.latent_shape(model.bucket)[0]
    assert not video.inputs["timestep"][0, :first].any()
    assert (video.inputs["timestep"][0, first:] > 0).all()
    assert (images.inputs["timestep"] > 0).all()
    assert images.only.counted.all()
    alone = replace(sample, image_dropped=True)
    dropped = model.family.batch([replace(alone, generator=generator(3))], model.family.objective(ObjectiveSettings()))
    assert (dropped.inputs["timestep"] > 0).all()  # as an image is: nothing is given
