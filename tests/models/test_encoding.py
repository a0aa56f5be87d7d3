"""What is cached of a clip - text embeddings, VAE moments, image moments - is what the pipelines make of it and decode."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from closeness import assert_close_to_scale
from PIL import Image
from recording import CPU, PROMPT, Call, TinyModel, generate, generator, variant_id, variants
from torch import Tensor

from finetune.data.loader import Sample
from finetune.data.synthetic import scene
from finetune.models.cogvideox import noise_of
from finetune.models.hunyuan15 import HunyuanVideo15
from finetune.recipe import Bucket
from finetune.recipe.schema import ObjectiveSettings, Vae

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
COGVIDEOX_I2V = pytest.mark.parametrize("model", variants("cogvideox_i2v"), ids=variant_id, indirect=True)


# Text


@torch.no_grad()
def encoded_prompt(model: TinyModel, dtype: torch.dtype, caption: str) -> dict[str, Tensor]:
    """What `encode_prompt` makes of a caption, by the names of the transformer's arguments."""
    names, pipeline = ["encoder_hidden_states", "encoder_attention_mask"], model.pipeline(dtype)
    if isinstance(pipeline, diffusers.HunyuanVideoImageToVideoPipeline):  # its call decides about the image's tokens
        arguments = generate(model, pipeline, prompt=caption, steps=1).calls[0].kwargs
        return {name: arguments[name][0] for name in model.family.text_arguments}
    if isinstance(pipeline, diffusers.HunyuanVideo15Pipeline | diffusers.HunyuanVideo15ImageToVideoPipeline):
        return dict(
            zip(HunyuanVideo15.text_arguments, (each[0] for each in pipeline.encode_prompt(caption)), strict=True)
        )
    if isinstance(pipeline, diffusers.HunyuanVideoPipeline):
        outputs, names[1:1] = pipeline.encode_prompt(caption), ["pooled_projections"]
    elif type(pipeline).__name__.startswith("Wan"):  # as its __call__ does
        outputs = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=512)
    else:
        outputs = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
    return dict(zip(names, (output[0] for output in outputs if output is not None), strict=False))


def unconditional_text(model: TinyModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the pipeline gives its transformer beside the prompt's tensors when it guides without a negative prompt."""
    guidance, call = {"guidance_scale": 3.0}, 0
    if model.family.name in ("hunyuan", "hunyuan_i2v"):  # guided by a second call, if there is a negative prompt
        guidance, call = {"true_cfg_scale": 3.0, "negative_prompt": ""}, 1
    if model.family.name.startswith(("hunyuan15", "wan")):
        call = 1
    arguments = generate(model, model.pipeline(dtype), steps=2, **guidance).calls[call].kwargs
    return {name: arguments[name][0] for name in model.family.text_arguments}


def assert_text_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor.to(ours[name].dtype)), name


@DTYPES
@pytest.mark.parametrize(
    "caption",
    [PROMPT, "Übermäßig: 視頻, émigré! 🎈", "word " * 400, 'signs "HI" and “bye”, again "HI"'],
    ids=["short", "odd", "long", "quoted"],
)
def test_captions_are_encoded_as_the_pipeline_encodes_prompts(
    model: TinyModel, caption: str, dtype: torch.dtype
) -> None:
    ours = model.text(caption, dtype)
    assert_text_equal(ours, encoded_prompt(model, dtype, caption))
    assert ours.keys() == model.family.text_arguments.keys()
    assert ours["encoder_hidden_states"].dtype == dtype


@DTYPES
def test_the_empty_caption_is_the_pipelines_unconditional_input(model: TinyModel, dtype: torch.dtype) -> None:
    assert_text_equal(model.text("", dtype, with_image=False), unconditional_text(model, dtype))


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


@DTYPES
def test_examples_have_the_shapes_and_dtypes_of_what_is_cached(model: TinyModel, dtype: torch.dtype) -> None:
    """So that memory can be planned from configs alone."""
    clip = scene(0, *model.small)[0]
    sources = {"video": clip, "caption": PROMPT, "first_frame": clip[0], "last_frame": clip[-1]}
    cached = {
        encoder.kind: encoder.load(CPU)(*(sources[name] for name in encoder.sources))
        for encoder in model.family.encoders(dtype, Vae())
    }
    examples = model.family.example(model.small, dtype)
    assert {kind: shapes(tensors) for kind, tensors in examples.items()} == {
        kind: shapes(tensors) for kind, tensors in cached.items()
    }


def test_the_embeddings_depend_on_the_caption(model: TinyModel) -> None:
    for name, tensor in model.text(f'{PROMPT}, "HI"').items():
        if "mask" not in name:
            assert not torch.equal(tensor, model.text("")[name])


@pytest.mark.parametrize("model", variants("mochi"), ids=variant_id, indirect=True)
def test_mochis_zeroed_empty_prompt_is_kept(model: TinyModel, tmp_path: Path) -> None:
    """With `force_zeros_for_empty_prompt` the empty caption is zero ids and an all-false mask."""
    folder = Path(shutil.copytree(model.folder, tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": True}))
    zeroing = TinyModel.open(folder, "mochi")
    assert zeroing.pipeline().config.force_zeros_for_empty_prompt
    assert_text_equal(zeroing.text(""), unconditional_text(zeroing, torch.float32))
    assert_text_equal(zeroing.text(PROMPT), encoded_prompt(zeroing, torch.float32, PROMPT))
    assert not zeroing.text("")["encoder_attention_mask"].any()
    assert model.text("")["encoder_attention_mask"].any()


# Video


def as_video(frames: np.ndarray) -> Tensor:
    """uint8 (F, H, W, 3) -> (1, 3, F, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1


def decoded_by_pipeline(model: TinyModel, latents: Tensor, bucket: Bucket) -> Tensor:
    """Have the pipeline generate latents (C, F, H, W), and decode them; video (1, F, 3, H, W) in [0, 1]."""
    objective, noise = model.family.objective(ObjectiveSettings()), []
    if model.drops_frame:
        bucket = bucket._replace(frames=bucket.frames - model.family.temporal)

    def answer(call: Call) -> Tensor:
        noise.append(call.latents.clone())
        return model.family.target(objective.noised(latents[None], noise[0], call.level)[1])

    return generate(model, model.pipeline(), bucket, steps=2, answer=answer, output_type="pt").frames


def test_latents_decode_to_what_a_posterior_sample_decodes_to(model: TinyModel) -> None:
    """Through the pipeline's own scheduler, denormalisation, VAE, and for CogVideoX 1.5 its dropping of padding."""
    pipeline, bucket = model.pipeline(), model.small
    clip = scene(0, *bucket)[0]
    moments = model.family.video_encoder(CPU, torch.float32, Vae())(clip)
    video = decoded_by_pipeline(model, model.family.latents(moments, generator(5)), bucket)
    with torch.no_grad():
        z = pipeline.vae.encode(as_video(clip)).latent_dist.sample(generator(5))
        if model.given_frames:  # which the pipeline makes itself
            image = pipeline.vae.encode(as_video(clip[:1])).latent_dist
            is_drawn = model.family.name == "ltx_i2v"
            z[:, :, :1] = image.sample(image_generator(model, bucket)) if is_drawn else image.mode()
        timed = pipeline.vae.config.get(
            "timestep_conditioning", False
        )  # the pipeline decodes at 0 if it is told nothing
        expected = pipeline.vae.decode(z, *([torch.zeros(1)] if timed else []), return_dict=False)[0]
    dropped = 4 if model.drops_frame else 0
    expected = pipeline.video_processor.postprocess_video(expected[:, :, dropped:], output_type="pt")
    assert video.shape == (1, bucket.frames - dropped, 3, bucket.height, bucket.width)
    assert expected.std() > 1e-3
    assert_close_to_scale(video, expected)


@DTYPES
def test_frames_reach_the_vae_as_diffusers_prepares_them(model: TinyModel, dtype: torch.dtype) -> None:
    clip = model.shortest_clip
    moments = model.family.video_encoder(CPU, dtype, Vae())(clip)
    pipeline = model.pipeline(dtype)
    video = pipeline.video_processor.preprocess_video([Image.fromarray(frame) for frame in clip]).to(pipeline.vae.dtype)
    video = video.contiguous()  # convolutions in bf16 round differently by how their input lies in memory
    with torch.no_grad():
        posterior = pipeline.vae.encode(video).latent_dist
    assert torch.equal(moments["mean"], posterior.mean[0])
    assert torch.equal(moments["logvar"], posterior.logvar[0])


def test_latents_have_about_unit_variance_and_the_bucket_shape(model: TinyModel) -> None:
    moments = model.family.video_encoder(CPU, torch.float32, Vae())(model.clip)
    latents = model.family.latents(moments, generator())
    assert latents.dtype == torch.float32
    assert tuple(latents.shape[1:]) == model.family.latent_shape(model.bucket)
    assert 0.3 < latents.square().mean().sqrt() < 3


def test_tiling_reaches_the_vae(model: TinyModel) -> None:
    assert model.family.load_vae(torch.float32, tiling=True).use_tiling
    assert not model.family.load_vae(torch.float32, tiling=False).use_tiling


# Condition images


@COGVIDEOX_I2V
def test_image_latents_are_the_pipelines(model: TinyModel) -> None:
    """A posterior sample, scaled, and zeros for the later frames; 1.5 has it on the frame that it pads with."""
    pipeline, family = model.pipeline(), model.family
    _, height, width = model.bucket
    image = pipeline.video_processor.preprocess(Image.fromarray(model.clip[0]), height=height, width=width)
    padded = (family.latent_shape(model.bucket)[0] - 1) * family.temporal + 1  # as the pipeline's __call__ counts
    channels = pipeline.vae.config.latent_channels
    with torch.no_grad():
        _, theirs = pipeline.prepare_latents(image, 1, channels, padded, height, width, torch.float32, CPU, generator())
    moments = family.video_encoder(CPU, torch.float32, Vae())(model.clip)
    sample = Sample({"video": moments, "text": {}}, model.bucket, 25.0, generator())
    x0 = family.latents(moments, generator(1))
    ours = family.condition(sample, x0, ObjectiveSettings())["image"]
    assert ours.shape == x0.shape
    assert torch.equal(ours, theirs[0].transpose(0, 1))


@COGVIDEOX_I2V
def test_each_use_of_a_condition_image_draws_another_posterior_sample(model: TinyModel) -> None:
    image = {"image_mean": torch.zeros(8, 1, 8, 12), "image_logvar": torch.full((8, 1, 8, 12), 2.0)}
    x0 = torch.zeros(8, 5, 8, 12)
    draws = torch.stack(
        [
            model.family.condition(
                Sample({"video": image, "text": {}}, model.bucket, 25.0, generator(seed)), x0, ObjectiveSettings()
            )["image"]
            for seed in range(200)
        ]
    )
    scale = model.family.scaling_factor
    scale = 1 / scale if model.pipeline().vae.config.invert_scale_latents else scale
    torch.testing.assert_close(draws[:, :, 0].std(0).mean(), torch.tensor(scale * np.e), rtol=0.01, atol=0)


@COGVIDEOX_I2V
def test_image_noise_is_added_before_the_vae_and_differs_from_clip_to_clip(model: TinyModel) -> None:
    encode = model.family.video_encoder(CPU, torch.float32, Vae(image_noise=True))
    clip = model.shortest_clip
    plain = model.family.video_encoder(CPU, torch.float32, Vae())(clip)
    noisy, again = encode(clip), encode(clip)
    image = as_video(clip[:1])
    with torch.no_grad():
        posterior = model.pipeline().vae.encode(image + noise_of(image)).latent_dist
    assert torch.equal(noisy["image_mean"], posterior.mean[0])
    assert torch.equal(noisy["image_mean"], again["image_mean"])
    assert not torch.equal(noisy["image_mean"], plain["image_mean"])
    assert torch.equal(noisy["mean"], plain["mean"])  # the clip itself stays clean


def test_image_noise_is_as_strong_as_cogvideox_was_trained_with() -> None:
    """Its strength is log-normal: the logarithm has mean -3 and standard deviation 0.5."""
    images = torch.rand(1000, 1, 3, 1, 32, 32, generator=generator())
    strengths = torch.stack([noise_of(image).std() for image in images]).log()
    torch.testing.assert_close(strengths.mean(), torch.tensor(-3.0), rtol=0, atol=0.06)
    torch.testing.assert_close(strengths.std(), torch.tensor(0.5), rtol=0, atol=0.05)


@pytest.mark.parametrize("model", variants("ltx_i2v"), ids=variant_id, indirect=True)
def test_the_clips_first_latent_frame_is_the_pipelines_image(model: TinyModel) -> None:
    """Its VAE is causal: the first frame alone gives the moments of the clip's first latent frame."""
    encode, family = model.family.video_encoder(CPU, torch.float32, Vae()), model.family
    clip, image = encode(model.clip), encode(model.clip[:1])
    for name in ("mean", "logvar"):
        assert_close_to_scale(clip[name][:, :1], image[name], name=name)
    given = generate(model, model.pipeline()).calls[0].latents[0, :, :1]
    assert torch.equal(family.latents(image, image_generator(model, model.bucket)), given)


def image_generator(model: TinyModel, bucket: Bucket) -> torch.Generator:
    """The generator of `generate` as LTX's pipelines draw the image's posterior with it: the condition pipeline noise first."""
    drawn = generator()
    if model.family.pipeline_class == "LTXConditionPipeline":
        channels = model.pipeline().vae.config.latent_channels
        torch.randn(1, channels, *model.family.latent_shape(bucket), generator=drawn)
    return drawn
