"""Noise levels of flow matching: distributions, shifts and weights are those of diffusers.

Levels lie in (0, 1], and so their tolerances are absolute.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from recording import TinyModel, generator, variant_id, variants
from torch import Tensor

from finetune.data.loader import Sample
from finetune.models.objective import FlowMatching, constant_shift, scheduler_shift
from finetune.recipe import Bucket
from finetune.recipe.schema import ObjectiveSettings

FLOW_MATCHING = pytest.mark.parametrize(
    "model", variants("hunyuan", "hunyuan15", "hunyuan_i2v", "ltx", "ltx_i2v", "mochi"), ids=variant_id, indirect=True
)


def pipeline_schedule(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int, steps: int) -> Tensor:
    """Set the scheduler as LTXPipeline does; returns the unshifted sigmas."""
    sigmas = np.linspace(1.0, 1 / steps, steps)
    config = scheduler.config
    mu = calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    return torch.from_numpy(sigmas)


SCHEDULERS = {
    "dynamic, stretched to a terminal (0.9.0, 0.9.1)": {
        "use_dynamic_shifting": True,
        "base_shift": 0.95,
        "max_shift": 2.05,
        "base_image_seq_len": 1024,
        "max_image_seq_len": 4096,
        "shift_terminal": 0.1,
    },
    "dynamic": {"use_dynamic_shifting": True, "base_shift": 0.7, "max_shift": 1.3},
    "dynamic, linear in mu": {
        "use_dynamic_shifting": True,
        "base_shift": 0.95,
        "max_shift": 2.05,
        "time_shift_type": "linear",
    },
    "none": {},
    "fixed": {"shift": 7.0},
    "fixed, stretched to a terminal": {"shift": 3.0, "shift_terminal": 0.2},
}


@pytest.mark.parametrize("tokens", [18, 1024, 2944, 6000])
@pytest.mark.parametrize("config", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_shift_is_the_schedulers_in_the_limit_of_many_steps(config: dict, tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    sigma = pipeline_schedule(scheduler, tokens, steps=1_000_000)
    shifted = scheduler_shift(dict(scheduler.config))(sigma, tokens)
    torch.testing.assert_close(shifted.float(), scheduler.sigmas[:-1], rtol=0, atol=2e-5)


@FLOW_MATCHING
def test_noise_levels_are_shifted_as_the_checkpoints_scheduler_shifts(model: TinyModel) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(model.pipeline().scheduler.config)
    tokens = model.family.tokens(model.bucket)
    sigma = pipeline_schedule(scheduler, tokens, steps=1_000_000)
    sigmas = scheduler.sigmas[:-1]
    theirs = 1 - sigmas if scheduler.config.invert_sigmas else sigmas
    objective = model.family.objective(ObjectiveSettings(sigma_sampling="uniform", shift="scheduler"))
    torch.testing.assert_close(objective.level(sigma, tokens).float(), theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("model", variants("wan", "wan_i2v"), ids=variant_id, indirect=True)
def test_noise_levels_are_shifted_as_unipc_shifts(model: TinyModel) -> None:
    """Its `flow_shift`; its schedule runs from 1 to 1/1000, its first sigma is 1e-6 less than 1."""
    scheduler = UniPCMultistepScheduler.from_config(model.pipeline().scheduler.config)
    scheduler.set_timesteps(1000)
    sigma = torch.linspace(1, 1e-3, 1001)[:-1]
    shift = scheduler.config.flow_shift
    assert shift > 1
    for settings in ({"shift": "scheduler"}, {"shift": shift}, {}):
        objective = model.family.objective(ObjectiveSettings(sigma_sampling="uniform", **settings))
        levels = objective.level(sigma, model.family.tokens(model.bucket))
        torch.testing.assert_close(levels, scheduler.sigmas[:-1], rtol=0, atol=2e-6)


@FLOW_MATCHING
def test_a_shift_of_the_recipe_replaces_the_schedulers(model: TinyModel) -> None:
    objective = model.family.objective(ObjectiveSettings(sigma_sampling="uniform", shift=7.0))
    fixed = FlowMatchEulerDiscreteScheduler(shift=7.0)
    sigma = pipeline_schedule(fixed, tokens=18, steps=50)
    torch.testing.assert_close(objective.level(sigma, 18).float(), fixed.sigmas[:-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 1.6)])
def test_logit_normal_sigmas_are_diffusers(mean: float, std: float) -> None:
    seed = generator(0)
    oracle = compute_density_for_timestep_sampling("logit_normal", 1000, mean, std, generator=seed)
    u = torch.special.ndtr(torch.randn(1000, generator=generator(0), dtype=torch.float32).double())
    ours = unshifted(ObjectiveSettings(sigma_sampling="logit_normal", logit_mean=mean, logit_std=std)).level(
        u, tokens=1
    )
    torch.testing.assert_close(ours.float(), oracle, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1.29, 0.5])
def test_mode_sigmas_are_diffusers(scale: float) -> None:
    seed = generator(0)
    oracle = compute_density_for_timestep_sampling("mode", 1000, mode_scale=scale, generator=seed)
    u = torch.rand(1000, generator=generator(0))
    ours = unshifted(ObjectiveSettings(sigma_sampling="mode", mode_scale=scale)).level(u, tokens=1)
    torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "mode"])
def test_drawn_sigmas_are_distributed_as_diffusers(tiny_ltx: Path, sampling: str) -> None:
    """Over many batches, through `Family.batch`, which draws u itself."""
    family, objective = TinyModel.open(tiny_ltx, "ltx").family, unshifted(ObjectiveSettings(sigma_sampling=sampling))
    seed = generator(1)
    oracle = compute_density_for_timestep_sampling(sampling, 100_000, 0.0, 1.0, 1.29, generator=seed)
    moments = {"mean": torch.zeros(16, 1, 1, 1), "logvar": torch.zeros(16, 1, 1, 1)}
    text = {"encoder_hidden_states": torch.zeros(1, 1)}
    samples = [Sample({"video": moments, "text": text}, Bucket(1, 32, 32), 25.0, generator(i)) for i in range(4000)]
    sigma = family.batch(samples, objective).inputs["timestep"] / 1000
    levels = torch.linspace(0.05, 0.95, 19)
    torch.testing.assert_close(sigma.quantile(levels), oracle.quantile(levels), rtol=0, atol=0.03)


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_loss_weights_are_diffusers(weighting: str) -> None:
    sigma = torch.linspace(0.01, 1, 100)
    ours = unshifted(ObjectiveSettings(weighting=weighting)).weight(sigma)
    expected = compute_loss_weighting_for_sd3(weighting, sigma)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)  # each of itself: they differ by orders of magnitude


def unshifted(settings: ObjectiveSettings) -> FlowMatching:
    return FlowMatching(settings, constant_shift(1.0))
