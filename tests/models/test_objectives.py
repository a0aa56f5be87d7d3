"""The batches that families make: noise levels, the clip in the noised latents, and what the loss counts."""

from typing import Any

import pytest
import torch
from closeness import assert_close_to_scale
from diffusers.training_utils import compute_density_for_timestep_sampling
from recording import VARIANTS, TinyModel, generator, latent_channels, unpacked, variant_id, variants
from torch import Tensor

from finetune.data.loader import Sample
from finetune.engine.weights.loading import whole_transformer
from finetune.models.batch import Batch
from finetune.recipe.schema import ObjectiveSettings

COGVIDEOX = pytest.mark.parametrize("model", variants("cogvideox", "cogvideox_i2v"), ids=variant_id, indirect=True)
GIVEN_FRAME = [*variants("ltx_i2v"), ("hunyuan_i2v", "token_replace"), ("wan_i2v", "2.2-5B")]
UNSHIFTED = {"shift": 1.0}


def samples(model: TinyModel, count: int, dtype: torch.dtype = torch.float32, **fields: Any) -> list[Sample]:
    """Clips of random latents, each the same whatever is drawn of its posterior."""
    family, bucket = model.family, model.small
    channels = latent_channels(model.pipeline())
    frames = (bucket.frames - 1) // family.temporal + 1
    made = []
    for index in range(count):
        z = torch.randn(channels, frames, *family.latent_shape(bucket)[1:], generator=generator(index))
        exact = torch.full_like(z, -torch.inf)
        moments = {"mean": z, "logvar": exact, "image_mean": z[:, :1], "image_logvar": exact[:, :1]}
        encoded = family.example(bucket, dtype) | {"video": moments, "text": model.text("a ball", dtype)}
        made.append(Sample(encoded, bucket, 25.0, generator(index), (index, count), **fields))
    return made


def drawn(model: TinyModel, count: int, **settings: Any) -> Tensor:
    """Noise levels of many samples in (0, 1): the share of noise, or CogVideoX's timestep / 1000."""
    batch = model.family.batch(samples(model, count), model.family.objective(ObjectiveSettings(**settings)))
    return level_of(model, batch)


def level_of(model: TinyModel, batch: Batch) -> Tensor:
    timestep = batch.inputs["timestep"].float()
    level = (timestep if timestep.ndim == 1 else timestep.amax(1)) / 1000
    return 1 - level if model.family.name == "mochi" else level


# Noise levels


def test_stratified_samples_share_the_noise_levels_out(model: TinyModel) -> None:
    level = drawn(model, 50, stratified=True, sigma_sampling="uniform", **UNSHIFTED)
    assert torch.equal((level * 50 + 1e-4).floor(), torch.arange(50.0))
    plain = drawn(model, 50, stratified=False, sigma_sampling="uniform", **UNSHIFTED)
    assert not torch.equal((plain * 50).floor().sort().values, torch.arange(50.0))


def test_stratified_samples_lie_anywhere_in_their_share(model: TinyModel) -> None:
    level = drawn(model, 50, stratified=True, sigma_sampling="uniform", **UNSHIFTED)
    within = level * 50 - torch.arange(50)
    assert within.min() < 0.2
    assert within.max() > 0.8


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "mode"])
def test_limits_rescale_the_noise_levels(model: TinyModel, sampling: str) -> None:
    """The same draws, closer together: no two samples that differ fall together at a limit."""
    free = drawn(model, 200, sigma_sampling=sampling)
    limited = drawn(model, 200, sigma_sampling=sampling, sigma_min=0.2, sigma_max=0.6)
    torch.testing.assert_close(limited, 0.2 + 0.4 * free, rtol=0, atol=1.01e-3)  # of (0, 1]: a timestep of CogVideoX
    assert limited.min() >= 0.2
    assert limited.max() < 0.6


@COGVIDEOX
@pytest.mark.parametrize("sampling", [None, "uniform", "logit_normal", "mode"])
def test_timesteps_are_distributed_as_diffusers_densities(model: TinyModel, sampling: str | None) -> None:
    """Uniform over all thousand if nothing is said, as CogVideoX was trained."""
    seed = generator(1)
    oracle = compute_density_for_timestep_sampling(sampling or "uniform", 100_000, 0.0, 1.0, 1.29, generator=seed)
    u = torch.rand(100_000, generator=generator(2))
    level = model.family.objective(ObjectiveSettings(sigma_sampling=sampling)).level(u, tokens=1)
    assert level.dtype == torch.int64
    points = torch.linspace(0.02, 0.98, 25)
    torch.testing.assert_close(level.float().quantile(points), 1000 * oracle.quantile(points), rtol=0, atol=6)


@COGVIDEOX
def test_every_timestep_is_drawn_and_equally_often(model: TinyModel) -> None:
    u = (torch.arange(100_000) + 0.5) / 100_000
    level = model.family.objective(ObjectiveSettings()).level(u, tokens=1)
    assert torch.equal(level.bincount(), torch.full((1000,), 100))
    assert model.family.objective(ObjectiveSettings()).level(torch.ones(1), tokens=1).item() == 999


@pytest.mark.parametrize(
    "model",
    variants("hunyuan", "hunyuan15", "hunyuan_i2v", "ltx", "ltx_i2v", "mochi", "wan"),
    ids=variant_id,
    indirect=True,
)
def test_flow_matching_is_logit_normal_if_nothing_is_said(model: TinyModel) -> None:
    assert torch.equal(drawn(model, 20), drawn(model, 20, sigma_sampling="logit_normal"))
    assert not torch.equal(drawn(model, 20), drawn(model, 20, sigma_sampling="uniform"))


@COGVIDEOX
def test_v_prediction_weighs_all_timesteps_alike(model: TinyModel) -> None:
    weight = model.family.objective(ObjectiveSettings()).weight(torch.arange(1000))
    assert torch.equal(weight, torch.ones(1000))


# What a batch holds


def test_a_batch_is_made_of_the_clips_latents(model: TinyModel) -> None:
    """The model's own target, taken out of the noised latents as the noise level says, leaves each clip."""
    pipeline, clips = model.pipeline(), samples(model, 3)
    batch = model.family.batch(clips, model.family.objective(ObjectiveSettings()))
    noisy = unpacked(pipeline, batch.inputs["hidden_states"], model.small)
    target = unpacked(pipeline, batch.only.target, model.small)
    if model.family.name.startswith("cogvideox"):
        alpha = pipeline.scheduler.alphas_cumprod[batch.inputs["timestep"]].float().view(-1, 1, 1, 1, 1)
        x0 = alpha.sqrt() * noisy - (1 - alpha).sqrt() * target
    else:
        sign = -1 if model.family.name == "mochi" else 1
        x0 = noisy - sign * level_of(model, batch).view(-1, 1, 1, 1, 1) * target
    expected = torch.stack([model.family.latents(clip.moments, generator()) for clip in clips])
    given = model.given_frames
    assert given == 0 or torch.equal(noisy[:, :, :1], expected[:, :, :1])
    assert_close_to_scale(x0[:, :, given:], expected[:, :, given:])


def test_the_loss_is_taken_in_float32_whatever_the_models_precision(model: TinyModel) -> None:
    batch = model.family.batch(samples(model, 2, torch.bfloat16), model.family.objective(ObjectiveSettings()))
    assert batch.inputs["hidden_states"].dtype == torch.bfloat16
    assert batch.only.target.dtype == batch.only.weight.dtype == torch.float32
    output = model.family.predict(whole_transformer(model.family, torch.bfloat16), batch.inputs)["video"]
    assert output.shape == batch.only.target.shape


def test_a_batch_is_a_function_of_its_samples_generators(model: TinyModel) -> None:
    objective = model.family.objective(ObjectiveSettings())
    first, second = (model.family.batch(samples(model, 2), objective) for _ in range(2))
    other = model.family.batch(samples(model, 3)[1:], objective)
    assert torch.equal(first.only.target, second.only.target)
    assert torch.equal(first.inputs["hidden_states"], second.inputs["hidden_states"])
    assert torch.equal(first.only.target[1], other.only.target[0])  # whatever else is in the batch
    assert not torch.equal(first.only.target[0], first.only.target[1])


@pytest.mark.parametrize("model", [each for each in VARIANTS if each not in GIVEN_FRAME], ids=variant_id, indirect=True)
def test_everything_counts_where_no_frame_is_given(model: TinyModel) -> None:
    assert model.family.batch(samples(model, 2), model.family.objective(ObjectiveSettings())).only.counted is None


@pytest.mark.parametrize(
    "model", [each for each in GIVEN_FRAME if each[0] != "hunyuan_i2v"], ids=variant_id, indirect=True
)
def test_all_but_the_given_frame_counts(model: TinyModel) -> None:
    """And the given frame's tokens are at timestep 0; a sample whose image is dropped is like text-to-video."""
    with_image, dropped = samples(model, 1)[0], samples(model, 1, image_dropped=True)[0]
    batch = model.family.batch([with_image, dropped], model.family.objective(ObjectiveSettings()))
    counted = unpacked(model.pipeline(), batch.only.counted.expand_as(batch.only.target), model.small)
    expected = torch.ones_like(counted)
    expected[0, :, 0] = 0
    assert torch.equal(counted, expected)
    patch = model.family.patch
    given = 1 - expected[:, 0, :, ::patch, ::patch].flatten(1)
    timestep = batch.inputs["timestep"]
    assert torch.equal(timestep == 0, given.bool())
    assert (timestep[1] == timestep[1, 0]).all()
    assert torch.equal(batch.only.target[0], batch.only.target[1])  # the draws do not depend on it


@pytest.mark.parametrize("model", [("hunyuan_i2v", "token_replace")], ids=variant_id, indirect=True)
def test_the_frame_that_hunyuans_image_replaces_does_not_count(model: TinyModel) -> None:
    batch = model.family.batch(samples(model, 2), model.family.objective(ObjectiveSettings()))
    counted = batch.only.counted.expand_as(batch.only.target)
    expected = torch.ones_like(counted)
    expected[:, :, 0] = 0
    assert torch.equal(counted, expected)
