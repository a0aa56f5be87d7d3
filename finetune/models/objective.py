"""Training objectives: flow matching, and v-prediction on a discrete schedule.

An objective maps u, uniform on (0, 1), to a noise level, so that training (u random), held-out loss (u at fixed
quantiles) and tests use the same functions. A family picks one; a new objective is a class with the members of `Objective`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import diffusers
import torch
from diffusers import CogVideoXDDIMScheduler
from torch import Tensor

from finetune.models.sigma_table import table_quantiles
from finetune.recipe.schema import ObjectiveSettings
from finetune.runtime.errors import UserError

Shift = Callable[[Tensor, int], Tensor]  # (sigma, tokens) -> sigma
LEAST_U = 1e-6  # u is drawn from here to 1 - LEAST_U: at 0 and 1 a level may be infinite


class Objective(Protocol):
    """How noise levels are distributed, and how clean latents become noised latents and a target."""

    @property
    def settings(self) -> ObjectiveSettings:
        """The recipe's [objective]."""

    @property
    def default_sampling(self) -> str:
        """The distribution of noise levels if the recipe names none."""

    def level(self, u: Tensor, tokens: int) -> Tensor:
        """Noise levels in the shape of u: sigma (float32) or timesteps of 1000 (int64).

        Args:
            u: quantiles of the distribution of noise levels, float32 in (0, 1).
            tokens: number of video tokens, for shifts that depend on the resolution.
        """

    def noised(self, x0: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """(noised latents, target) for noise levels (B,), both float32 in the shape of x0 (B, C, F, H, W)."""

    def weight(self, level: Tensor) -> Tensor:
        """Loss weights for noise levels (B,), float32 (B,)."""


@dataclass(frozen=True)
class FlowMatching:
    """x_sigma = (1 - sigma) x0 + sigma noise, target noise - x0 (Lipman et al. 2022; Esser et al. 2024).

    A noise level is sigma, float32 in (0, 1). `shift` maps it as the checkpoint's scheduler does at inference.
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
        """1, or SD3's weights sigma^-2 ("sigma_sqrt") and "cosmap", as in diffusers' training_utils."""
        if self.settings.weighting == "sigma_sqrt":
            return level**-2.0
        if self.settings.weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * level + 2 * level**2))
        return torch.ones_like(level)


@dataclass(frozen=True)
class VPrediction:
    """v = sqrt(abar) noise - sqrt(1 - abar) x0 at integer timesteps (Salimans & Ho 2022), on CogVideoX's own schedule.

    A noise level is a timestep, int64. Unless the recipe says so, the loss is not weighted, because the model was trained with
    the plain mean squared error on v. The scheduler casts abar to the dtype of the sample, so its functions are called with
    float32 tensors.
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
        """1, or with "min_snr" min(SNR, gamma) / (SNR + 1) (Hang et al. 2023, section 3.4), where SNR = abar / (1 - abar).

        Multiplied out, so that the last timestep, whose abar is 0, needs no division; its weight is 0.
        """
        if self.settings.weighting != "min_snr":
            return torch.ones(level.shape)
        signal = self.scheduler.alphas_cumprod[level].float()
        return torch.minimum(signal, self.settings.snr_gamma * (1 - signal))


def quarters_of(level: Tensor, objective: Objective, tokens: int) -> Tensor:
    """Which quarter of an objective's noise levels each level lies in, from 0, the least noise, to 3: int64 (B,).

    A quarter has a quarter of the samples: its ends are quantiles of the distribution of noise levels.

    Args:
        level: noise levels (B,) of the objective.
        tokens: number of video tokens of the samples.
    """
    ends = objective.level(torch.tensor([0.25, 0.5, 0.75]), tokens).sort().values  # "mode" falls with u
    return (level[:, None] >= ends).sum(1)


def density(u: Tensor, settings: ObjectiveSettings, default: str) -> Tensor:
    """The recipe's distribution of noise levels on (0, 1), at its quantiles u: a table, or as in Esser et al. 2024, section 3.1."""
    if settings.sigma_table is not None:
        return table_quantiles(u, settings.sigma_table)
    name = settings.sigma_sampling or default
    if name == "logit_normal":
        return torch.sigmoid(settings.logit_mean + settings.logit_std * torch.special.ndtri(u))
    if name == "mode":
        return 1 - u - settings.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u


def rescale(level: Tensor, settings: ObjectiveSettings) -> Tensor:
    """Map (0, 1) linearly onto (sigma_min, sigma_max). Clamping would pile samples up at the ends."""
    if (settings.sigma_min, settings.sigma_max) == (0.0, 1.0):
        return level
    return settings.sigma_min + (settings.sigma_max - settings.sigma_min) * level


# Shifts are partial calls of named functions, because an objective must be picklable for workers that are not forked.


def constant_shift(s: float) -> Shift:
    """The shift sigma' = s sigma / (1 + (s - 1) sigma) (Esser et al. 2024)."""
    return partial(_shifted, s)


def _shifted(s: float, sigma: Tensor, tokens: int) -> Tensor:
    return s * sigma / (1 + (s - 1) * sigma)


def recipe_shift(settings: ObjectiveSettings, scheduler: dict) -> Shift:
    """The shift that the recipe sets: a constant one, or that of the checkpoint's scheduler."""
    return scheduler_shift(scheduler) if settings.shift == "scheduler" else constant_shift(settings.shift)


def scheduler_shift(saved: dict[str, Any]) -> Shift:
    """The shift that the checkpoint's scheduler applies in `set_timesteps`, from its saved config: that of
    FlowMatchEulerDiscreteScheduler, or of UniPCMultistepScheduler, which calls it `flow_shift`.

    Resolution-dependent ("dynamic") shifting: mu is linear in the number of tokens, and s = exp(mu). `shift_terminal`
    stretches the schedule so that its last sigma has this value; before stretching, the last sigma is taken as 0, its
    limit for many steps.

    Raises:
        UserError: the config does not say how it shifts by resolution.
    """
    scheduler = getattr(diffusers, saved.get("_class_name", "FlowMatchEulerDiscreteScheduler"))
    config = scheduler.from_config(saved).config  # adds the defaults
    terminal = config.shift_terminal or 0.0
    if not config.use_dynamic_shifting:
        constant = config.flow_shift if "flow_shift" in config else config.shift
        return partial(_stretched, terminal, constant_shift(constant))
    if "base_shift" not in config:  # the pipeline says how, and none does so far
        what = f"{scheduler.__name__} shifts by resolution, in a way that its config does not say"
        raise UserError(what, "set objective.shift to a number", "objective.shift")
    low, high = config.base_image_seq_len, config.max_image_seq_len
    base, top = config.base_shift, config.max_shift
    exponential = config.time_shift_type == "exponential"
    return partial(_stretched, terminal, partial(_by_resolution, (top - base) / (high - low), base, low, exponential))


def _stretched(terminal: float, shift: Shift, sigma: Tensor, tokens: int) -> Tensor:
    return 1 - (1 - shift(sigma, tokens)) * (1 - terminal)


def _by_resolution(slope: float, base: float, low: int, exponential: bool, sigma: Tensor, tokens: int) -> Tensor:
    mu = tokens * slope + base - slope * low
    return _shifted(math.exp(mu) if exponential else mu, sigma, tokens)
