"""Noised latents and targets invert the pipelines' own denoising loops: schedules, schedulers, signs and layouts."""

from functools import cache

import pytest
import torch
from closeness import assert_close_to_scale
from diffusers import UniPCMultistepScheduler
from recording import Call, Generation, TinyModel, generate, generator, latent_channels, variant_id, variants
from torch import Tensor

from finetune.recipe.schema import ObjectiveSettings


@cache
def perfect(model: TinyModel, steps: int = 5) -> tuple[Generation, Tensor, Tensor]:
    """The pipeline with a transformer that answers with training's target; returns the clip and the noise, too.

    Where a clean first frame is given, the answer for it is nonsense: what training does not count, the pipeline ignores.
    """
    family, seen = model.family, []
    objective = family.objective(ObjectiveSettings())
    x0 = torch.randn(1, *latent_shape(model), generator=generator(7))

    def answer(call: Call) -> Tensor:
        seen.append(call.latents.clone())
        target = objective.noised(x0, seen[0], call.level)[1]
        target[:, :, : model.given_frames] = 1e3
        return family.target(target)

    generation = generate(model, model.pipeline(), steps=steps, answer=answer)
    return generation, x0, seen[0]


def latent_shape(model: TinyModel) -> tuple[int, ...]:
    return latent_channels(model.pipeline()), *model.family.latent_shape(model.bucket)


def test_a_perfect_prediction_inverts_to_the_clip_in_the_pipelines_own_loop(model: TinyModel) -> None:
    generation, x0, _ = perfect(model)
    given = max(model.given_frames, int(model.drops_frame))
    assert_close_to_scale(generation.frames[:, :, model.given_frames :], x0[:, :, given:])


@pytest.mark.parametrize("model", [*variants("ltx_i2v"), ("wan_i2v", "2.2-5B")], ids=variant_id, indirect=True)
def test_the_given_frame_is_kept_whatever_is_predicted_for_it(model: TinyModel) -> None:
    generation, _, noise = perfect(model)
    assert torch.equal(generation.frames[:, :, 0], noise[:, :, 0])


def test_the_pipelines_latents_on_the_way_are_trainings_noised_latents(model: TinyModel) -> None:
    generation, x0, noise = perfect(model)
    objective = model.family.objective(ObjectiveSettings())
    given = model.given_frames
    assert len(generation.calls) == 5
    for call in generation.calls:
        noised, _ = objective.noised(x0, noise, call.level)
        assert_close_to_scale(call.latents[:, :, given:], noised[:, :, given:])


def test_sampling_begins_at_the_highest_noise_level_that_training_knows(model: TinyModel) -> None:
    objective = model.family.objective(ObjectiveSettings())
    first = perfect(model)[0].calls[0].level
    highest = objective.level(torch.tensor([1.0]), model.family.tokens(model.bucket))
    assert_close_to_scale(first, highest, 2e-6)  # UniPC's is 1 - 1e-6


@pytest.mark.parametrize(
    "model", variants("hunyuan", "hunyuan15", "hunyuan_i2v", "ltx", "ltx_i2v"), ids=variant_id, indirect=True
)
def test_noised_latents_are_those_of_the_scheduler(model: TinyModel) -> None:
    """Not for Mochi: `scale_noise` with `invert_sigmas` takes noise for data."""
    scheduler = model.pipeline().scheduler
    generate(model, model.pipeline(), steps=5)  # sets it, as the pipeline does
    scheduler._begin_index = scheduler._step_index = None
    x0, noise = torch.randn(2, 5, 4, 3, 2, 2, generator=generator())
    noised, _ = model.family.objective(ObjectiveSettings()).noised(x0, noise, scheduler.sigmas[:-1])
    assert_close_to_scale(noised, scheduler.scale_noise(x0, scheduler.timesteps, noise), 1e-6)


@pytest.mark.parametrize("model", [("wan", "2.1"), ("wan", "2.2-5B")], ids=variant_id, indirect=True)
def test_noised_latents_are_those_of_unipc(model: TinyModel) -> None:
    scheduler = UniPCMultistepScheduler.from_config(model.pipeline().scheduler.config)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    x0, noise = torch.randn(2, 1, 4, 3, 2, 2, generator=generator())
    noised, _ = model.family.objective(ObjectiveSettings()).noised(x0, noise, scheduler.sigmas[2:3])
    assert_close_to_scale(noised, scheduler.add_noise(x0, noise, scheduler.timesteps[2:3]), 1e-6)


@pytest.mark.parametrize("model", variants("cogvideox", "cogvideox_i2v"), ids=variant_id, indirect=True)
def test_v_prediction_is_the_schedulers_at_every_timestep(model: TinyModel) -> None:
    scheduler = model.pipeline().scheduler
    level = torch.arange(1000)
    x0, noise = torch.randn(2, 1000, 2, 1, 2, 2, generator=generator())
    noised, target = model.family.objective(ObjectiveSettings()).noised(x0, noise, level)
    assert torch.equal(noised, scheduler.add_noise(x0, noise, level))
    assert torch.equal(target, scheduler.get_velocity(x0, noise, level))


@pytest.mark.parametrize("model", variants("cogvideox", "cogvideox_i2v"), ids=variant_id, indirect=True)
def test_v_prediction_is_exact_whatever_the_models_precision(model: TinyModel) -> None:
    """The scheduler's functions round their coefficients to the sample's dtype: in bf16 they would be off by percents."""
    alphas = model.pipeline().scheduler.alphas_cumprod.double().view(-1, 1, 1, 1, 1)
    x0, noise = torch.randn(2, 1000, 2, 1, 2, 2, generator=generator())
    noised, target = model.family.objective(ObjectiveSettings()).noised(x0, noise, torch.arange(1000))
    expected = alphas.sqrt() * x0 + (1 - alphas).sqrt() * noise, alphas.sqrt() * noise - (1 - alphas).sqrt() * x0
    assert_close_to_scale(noised.double(), expected[0], 1e-6)
    assert_close_to_scale(target.double(), expected[1], 1e-6)
    assert noised.dtype == target.dtype == torch.float32
