"""The loss of a masked clip is sum(m e) / sum(m), with m the drawn mask pooled by torch to the model's latents."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from recording import VARIANTS, TinyModel, generator, latent_channels, unpacked, variant_id
from torch import Tensor
from torch.nn.functional import avg_pool3d

from finetune.data.loader import Sample
from finetune.models.batch import Batch, Term
from finetune.recipe import Bucket
from finetune.recipe.schema import ObjectiveSettings
from finetune.runtime.errors import UserError

# One of each layout, of each compression, and of each way to be given a frame.
SHORT = [
    ("ltx_i2v", "0.9.7"),
    ("cogvideox", "1.5-5B"),
    ("mochi", None),
    ("hunyuan_i2v", "token_replace"),
    ("wan_i2v", "2.2-5B"),
]

each_model = pytest.mark.parametrize(
    "model",
    [pytest.param(each, marks=() if each in SHORT else pytest.mark.full) for each in VARIANTS],
    ids=variant_id,
    indirect=True,
)


@pytest.fixture
def bucket(model: TinyModel) -> Bucket:
    return model.bucket


def compression(model: TinyModel) -> tuple[int, int]:
    """The video frames of a latent frame and the pixels of a latent pixel's side, as the pipeline has them."""
    pipeline = model.pipeline()
    if model.family.name == "mochi":
        return 6, 8
    for temporal, spatial in (
        ("vae_temporal_compression_ratio", "vae_spatial_compression_ratio"),
        ("vae_scale_factor_temporal", "vae_scale_factor_spatial"),
    ):
        if hasattr(pipeline, temporal):
            return getattr(pipeline, temporal), getattr(pipeline, spatial)
    raise LookupError(type(pipeline).__name__)


def ramp(bucket: Bucket) -> Tensor:
    """A soft mask, uint8 (F, H, W): greys that grow to the right and with time, with grain."""
    frames, _, width = (torch.arange(1, side + 1) / side for side in bucket)
    grain = torch.rand(tuple(bucket), generator=generator())
    return (255 * frames[:, None, None] * width * grain).round().to(torch.uint8)


def right_half(bucket: Bucket) -> Tensor:
    mask = torch.zeros(*bucket, dtype=torch.uint8)
    mask[..., bucket.width // 2 :] = 255
    return mask


def pooled(model: TinyModel, bucket: Bucket, mask: Tensor) -> Tensor:
    """What each latent pixel counts, float32 (1, F', H', W')."""
    temporal, side = compression(model)
    frames = mask.float()[None, None] / 255
    parts = [avg_pool3d(frames[:, :, :1], (1, side, side))]
    if bucket.frames > 1:
        parts.append(avg_pool3d(frames[:, :, 1:], (temporal, side, side)))
    weights = torch.cat(parts, 2)[0]
    if "1.5-5B" in model.folder.name:  # a copy of the first frame is put in front of an odd number of frames
        weights = torch.cat([weights[:, :1]] * (weights.shape[1] % 2) + [weights], 1)
    weights = weights.clone()
    weights[:, : model.given_frames] = 0
    return weights


def sample(model: TinyModel, bucket: Bucket, mask: Tensor | None, index: int = 0, **fields: Any) -> Sample:
    family = model.family
    channels = latent_channels(model.pipeline())
    temporal, side = compression(model)
    shape = (bucket.frames - 1) // temporal + 1, bucket.height // side, bucket.width // side
    z = torch.randn(channels, *shape, generator=generator(index))
    exact = torch.full_like(z, -torch.inf)
    moments = {"mean": z, "logvar": exact, "image_mean": z[:, :1], "image_logvar": exact[:, :1]}
    encoded = family.example(bucket, torch.float32) | {"video": moments}
    if mask is not None:
        encoded["mask"] = {"mask": family.latent_mask(mask, bucket)}
    return Sample(encoded, bucket, 25.0, generator(index), (0, 1), **fields)


def batch_of(model: TinyModel, *samples: Sample) -> Batch:
    return model.family.batch(list(samples), model.family.objective(ObjectiveSettings()))


def video(model: TinyModel, bucket: Bucket, packed: Tensor) -> Tensor:
    """What has the layout of the model's output as (B, C, F, H, W)."""
    if packed.ndim == 3:  # LTX's tokens
        temporal, side = compression(model)
        shape = (bucket.frames - 1) // temporal + 1, bucket.height // side, bucket.width // side
        return model.pipeline()._unpack_latents(packed, *shape).float()
    return unpacked(model.pipeline(), packed, bucket)


def by_hand(model: TinyModel, bucket: Bucket, term: Term, prediction: Tensor, weights: Tensor, index: int) -> Tensor:
    errors = video(model, bucket, (prediction - term.target) ** 2)[index]
    weights = weights.expand_as(errors)
    return term.weight[index] * (weights.double() * errors).sum() / weights.double().sum()


def draw(term: Term) -> Tensor:
    return torch.randn(term.target.shape, generator=generator(9))


@each_model
@pytest.mark.parametrize("mask", [ramp, right_half])
def test_the_loss_is_the_weighted_mean_over_the_mask(
    model: TinyModel, bucket: Bucket, mask: Callable[[Bucket], Tensor]
) -> None:
    """Of clips with a mask; one without a mask in the same batch counts everywhere."""
    term = batch_of(model, sample(model, bucket, mask(bucket)), sample(model, bucket, None, 1)).only
    prediction = draw(term)
    whole = pooled(model, bucket, torch.full(tuple(bucket), 255))
    expected = [
        by_hand(model, bucket, term, prediction, weights, index)
        for index, weights in enumerate([pooled(model, bucket, mask(bucket)), whole])
    ]
    torch.testing.assert_close(term.losses(prediction).double(), torch.stack(expected), rtol=1e-5, atol=0)
    assert abs(expected[0] / by_hand(model, bucket, term, prediction, whole, 0) - 1) > 1e-4


@each_model
@pytest.mark.parametrize("level", [255, 128, 9])
def test_a_mask_of_one_grey_changes_nothing(model: TinyModel, bucket: Bucket, level: int) -> None:
    mask = torch.full(tuple(bucket), level, dtype=torch.uint8)
    masked, plain = (batch_of(model, sample(model, bucket, each)).only for each in (mask, None))
    assert torch.equal(masked.target, plain.target)
    prediction = draw(plain)
    torch.testing.assert_close(masked.losses(prediction), plain.losses(prediction), rtol=1e-6, atol=0)


@each_model
def test_what_is_black_has_no_gradient(model: TinyModel, bucket: Bucket) -> None:
    term = batch_of(model, sample(model, bucket, right_half(bucket))).only
    prediction = draw(term).requires_grad_()
    term.losses(prediction).sum().backward()
    gradient = video(model, bucket, prediction.grad)[0]
    black = (pooled(model, bucket, right_half(bucket)) == 0).expand_as(gradient)
    assert black.any()
    assert not gradient[black].any()
    assert gradient[~black].all()


@pytest.mark.parametrize("model", [("mochi", None)], ids=variant_id, indirect=True)
def test_an_image_holds_for_all_frames(model: TinyModel, bucket: Bucket) -> None:
    image = ramp(bucket._replace(frames=1))
    repeated = model.family.latent_mask(image.expand(*bucket), bucket)
    torch.testing.assert_close(model.family.latent_mask(image, bucket), repeated, rtol=1e-6, atol=0)


@pytest.mark.parametrize("model", [("ltx_i2v", "0.9.7"), ("wan_i2v", "2.2-5B")], ids=variant_id, indirect=True)
def test_white_in_the_given_frame_alone_is_no_question(model: TinyModel, bucket: Bucket) -> None:
    """Without its image, the first frame is asked for like the others."""
    mask = torch.zeros(*bucket, dtype=torch.uint8)
    mask[0] = 255
    with pytest.raises(UserError, match="white only where the model is given the clip"):
        batch_of(model, sample(model, bucket, mask))
    term = batch_of(model, sample(model, bucket, mask, image_dropped=True)).only
    prediction = draw(term)
    errors = video(model, bucket, (prediction - term.target) ** 2)[0, :, 0]
    torch.testing.assert_close(term.losses(prediction)[0], term.weight[0] * errors.mean(), rtol=1e-5, atol=0)


@each_model
def test_given_frames_are_those_that_are_not_counted(model: TinyModel, bucket: Bucket) -> None:
    """Preparation refuses masks by `given_frames`; the loss leaves out what `counted` says."""
    term = batch_of(model, sample(model, bucket, None)).only
    counted = torch.ones_like(term.target) if term.counted is None else term.counted.expand_as(term.target)
    frames = video(model, bucket, counted)[0].amin((0, 2, 3))
    assert model.family.given_frames == int((frames == 0).sum())
    assert not frames[: model.family.given_frames].any()


@pytest.mark.parametrize("total", [0.25, 0.5, 3.0])
def test_fractions_that_add_up_to_little_are_not_taken_for_one(total: float) -> None:
    counted = torch.zeros(1, 4)
    counted[0, :2] = torch.tensor([total / 4, 3 * total / 4])
    term = Term(torch.zeros(1, 4), torch.ones(1), counted)
    loss = term.losses(torch.tensor([[1.0, 2.0, 50.0, 50.0]]))
    torch.testing.assert_close(loss, torch.tensor([(1 + 3 * 4) / 4]))
    assert not replace(term, counted=torch.zeros(1, 4)).losses(torch.ones(1, 4)).any()
