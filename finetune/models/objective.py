"""Flow matching: x_sigma = (1 - sigma) x0 + sigma noise, target noise - x0 (Lipman et al. 2022; Esser et al. 2024).

Everything here maps u, uniform on (0, 1), to a noise level, so that training (u random), held-out loss (u at fixed
quantiles) and tests use the same functions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.recipe.schema import Objective

Shift = Callable[[Tensor, int], Tensor]  # (sigma, tokens) -> sigma


@dataclass(frozen=True)
class FlowMatching:
    """Noise levels, noised latents, targets and weights of flow matching.

    `shift` moves sigma as the checkpoint's scheduler does at inference; it is given the number of video tokens.
    """

    settings: Objective
    shift: Shift

    def sigma(self, u: Tensor, tokens: int) -> Tensor:
        """Noise level, float32 like `u`, of any shape, for u in (0, 1)."""
        return self.shift(self._density(u), tokens)

    def noised(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(noised latents, target), both like x0 (B, C, F, H, W); sigma (B,)."""
        s = sigma.view(-1, *[1] * (x0.ndim - 1))
        return (1 - s) * x0 + s * noise, noise - x0

    def weight(self, sigma: Tensor) -> Tensor:
        """Loss weight per sample, (B,): none, or SD3's sigma^-2 and cosmap (diffusers' training_utils)."""
        if self.settings.weighting == "sigma_sqrt":
            return sigma**-2.0
        if self.settings.weighting == "cosmap":
            return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        return torch.ones_like(sigma)

    def _density(self, u: Tensor) -> Tensor:
        s = self.settings
        if s.sigma_sampling == "logit_normal":
            return torch.sigmoid(s.logit_mean + s.logit_std * torch.special.ndtri(u))
        if s.sigma_sampling == "mode":
            return 1 - u - s.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        return u


def constant_shift(s: float) -> Shift:
    """sigma' = s sigma / (1 + (s - 1) sigma)."""
    return lambda sigma, tokens: s * sigma / (1 + (s - 1) * sigma)


def scheduler_shift(config: dict) -> Shift:
    """What FlowMatchEulerDiscreteScheduler does to sigma in `set_timesteps`, from its saved config.

    Resolution-dependent ("dynamic") shifting: mu is linear in the number of tokens, s = exp(mu). `shift_terminal`
    stretches the schedule so that it ends there; its first-step value is taken in the limit of many steps.
    """
    terminal = config.get("shift_terminal") or 0.0

    def stretch(shifted: Tensor) -> Tensor:
        return 1 - (1 - shifted) * (1 - terminal)

    if not config.get("use_dynamic_shifting", False):
        fixed = constant_shift(config.get("shift", 1.0))
        return lambda sigma, tokens: stretch(fixed(sigma, tokens))
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (top - base) / (high - low)
    exponential = config.get("time_shift_type", "exponential") == "exponential"

    def shift(sigma: Tensor, tokens: int) -> Tensor:
        mu = tokens * slope + base - slope * low
        return stretch(constant_shift(math.exp(mu) if exponential else mu)(sigma, tokens))

    return shift
