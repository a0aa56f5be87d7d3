"""What a model is trained to predict: flow matching, or v-prediction on a discrete schedule.

An objective maps u, uniform on (0, 1), to a noise level, so that training (u random), held-out loss (u at fixed
quantiles) and tests use the same functions. A family picks one; a new objective is a class with the same four members.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from finetune.recipe.schema import ObjectiveSettings

Shift = Callable[[Tensor, int], Tensor]  # (sigma, tokens) -> sigma


class Objective(Protocol):
    """How clean latents become what the model sees and what it is asked for."""

    settings: ObjectiveSettings
    default_sampling: ClassVar[str]  # where the recipe names none

    def level(self, u: Tensor, tokens: int) -> Tensor:
        """Noise levels for u in (0, 1), shaped like it: sigma float32, or timestep int64.

        Args:
            tokens: number of video tokens, for shifts that depend on the resolution.
        """

    def noised(self, x0: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """(noised latents, target), both float32 like x0 (B, C, F, H, W); level (B,)."""

    def weight(self, level: Tensor) -> Tensor:
        """Loss weight per sample, float32 (B,)."""


@dataclass(frozen=True)
class FlowMatching:
    """x_sigma = (1 - sigma) x0 + sigma noise, target noise - x0 (Lipman et al. 2022; Esser et al. 2024).

    A level is sigma, float32 in (0, 1). `shift` moves it as the checkpoint's scheduler does at inference.
    """

    settings: ObjectiveSettings
    shift: Shift
    default_sampling: ClassVar[str] = "logit_normal"

    def level(self, u: Tensor, tokens: int) -> Tensor:
        return rescale(self.shift(density(u, self.settings, self.default_sampling), tokens), self.settings)

    def noised(self, x0: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        s = level.view(-1, *[1] * (x0.ndim - 1))
        return (1 - s) * x0 + s * noise, noise - x0

    def weight(self, level: Tensor) -> Tensor:
        """None, or SD3's sigma^-2 and cosmap (diffusers' training_utils)."""
        if self.settings.weighting == "sigma_sqrt":
            return level**-2.0
        if self.settings.weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * level + 2 * level**2))
        return torch.ones_like(level)


@dataclass(frozen=True)
class VPrediction:
    """v = sqrt(abar) noise - sqrt(1 - abar) x0 at integer timesteps (Salimans & Ho 2022), on CogVideoX's own schedule.

    A level is a timestep, int64. Plain mean squared error on v is what the model was trained with. The scheduler's
    functions take abar in the dtype of the sample, so they are called in float32.
    """

    settings: ObjectiveSettings
    scheduler: CogVideoXDDIMScheduler
    default_sampling: ClassVar[str] = "uniform"

    def level(self, u: Tensor, tokens: int) -> Tensor:
        count = self.scheduler.config.num_train_timesteps
        part = rescale(density(u, self.settings, self.default_sampling), self.settings)
        return (part * count).long().clamp(max=count - 1)

    def noised(self, x0: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        return self.scheduler.add_noise(x0, noise, level), self.scheduler.get_velocity(x0, noise, level)

    def weight(self, level: Tensor) -> Tensor:
        return torch.ones(level.shape)


def density(u: Tensor, settings: ObjectiveSettings, default: str) -> Tensor:
    """Quantiles of the recipe's distribution of noise levels on (0, 1) (Esser et al. 2024, section 3.1)."""
    name = settings.sigma_sampling or default
    if name == "logit_normal":
        return torch.sigmoid(settings.logit_mean + settings.logit_std * torch.special.ndtri(u))
    if name == "mode":
        return 1 - u - settings.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u


def rescale(level: Tensor, settings: ObjectiveSettings) -> Tensor:
    """(0, 1) onto (sigma_min, sigma_max): clamping would pile samples up at the ends."""
    if (settings.sigma_min, settings.sigma_max) == (0.0, 1.0):
        return level
    return settings.sigma_min + (settings.sigma_max - settings.sigma_min) * level


def constant_shift(s: float) -> Shift:
    """sigma' = s sigma / (1 + (s - 1) sigma)."""
    return lambda sigma, tokens: s * sigma / (1 + (s - 1) * sigma)


def recipe_shift(settings: ObjectiveSettings, scheduler: dict) -> Shift:
    """The recipe's shift, which may be the scheduler's."""
    return scheduler_shift(scheduler) if settings.shift == "scheduler" else constant_shift(settings.shift)


def scheduler_shift(saved: dict[str, Any]) -> Shift:
    """What FlowMatchEulerDiscreteScheduler does to sigma in `set_timesteps`, from its saved config.

    Resolution-dependent ("dynamic") shifting: mu is linear in the number of tokens, s = exp(mu). `shift_terminal`
    stretches the schedule so that it ends there; its first-step value is taken in the limit of many steps.
    """
    config = FlowMatchEulerDiscreteScheduler.from_config(saved).config  # with its defaults
    terminal = config.shift_terminal or 0.0

    def stretch(shifted: Tensor) -> Tensor:
        return 1 - (1 - shifted) * (1 - terminal)

    if not config.use_dynamic_shifting:
        fixed = constant_shift(config.shift)
        return lambda sigma, tokens: stretch(fixed(sigma, tokens))
    low, high = config.base_image_seq_len, config.max_image_seq_len
    base, top = config.base_shift, config.max_shift
    slope = (top - base) / (high - low)
    exponential = config.time_shift_type == "exponential"

    def shift(sigma: Tensor, tokens: int) -> Tensor:
        mu = tokens * slope + base - slope * low
        return stretch(constant_shift(math.exp(mu) if exponential else mu)(sigma, tokens))

    return shift
