"""Noise levels of a range alone are those that an objective draws anywhere, without those outside of the range."""

import math
import pickle
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from recording import TinyModel, generator, variant_id, variants
from test_objectives import samples
from torch import Tensor

from finetune.models.noise_range import Restricted, restricted
from finetune.models.objective import FlowMatching, Objective, VPrediction, constant_shift, scheduler_shift
from finetune.recipe.schema import ObjectiveSettings
from finetune.runtime.errors import UserError

TOKENS = 2944
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}
SAMPLINGS = [
    {"sigma_sampling": "uniform"},
    {"sigma_sampling": "logit_normal"},
    {"sigma_sampling": "logit_normal", "logit_mean": -0.5, "logit_std": 1.6},
    {"sigma_sampling": "mode"},
    {"sigma_sampling": "mode", "mode_scale": -1.0},
    {"sigma_sampling": "mode", "mode_scale": 2.5},  # neither falls nor rises everywhere
    {"sigma_sampling": "mode", "mode_scale": -2.5},  # and passes 1
]
RANGES = [(0.875, 1.0), (0.0, 0.875), (0.3, 0.6)]
FURTHER_RANGES = [(0.55, 0.56), (0.9, 1.0), (0.0, 0.417)]


def name_of(value: object) -> str:
    return ",".join(map(str, value.values() if isinstance(value, dict) else value))


def flow(shift: float | None = 1.0, **settings: object) -> FlowMatching:
    """Without a shift, that of a scheduler which depends on the resolution."""
    config = dict(FlowMatchEulerDiscreteScheduler(**DYNAMIC).config)
    return FlowMatching(ObjectiveSettings(**settings), constant_shift(shift) if shift else scheduler_shift(config))


def v_prediction(**settings: object) -> VPrediction:
    return VPrediction(ObjectiveSettings(**settings), CogVideoXDDIMScheduler())


def quantiles(count: int) -> Tensor:
    return (torch.arange(count) + 0.5) / count


def random(count: int) -> Tensor:
    return torch.rand(count, generator=generator(5)).clamp(1e-6, 1 - 1e-6)


def kolmogorov_smirnov(ours: Tensor, theirs: Tensor) -> float:
    """The statistic of two samples, times sqrt(n m / (n + m)): above 1.95 in one of a thousand of the same distribution."""
    one, other = ours.double().sort().values.numpy(), theirs.double().sort().values.numpy()
    everything = np.concatenate([one, other])
    share = [np.searchsorted(each, everything, side="right") / len(each) for each in (one, other)]
    return np.abs(share[0] - share[1]).max() * math.sqrt(len(one) * len(other) / len(everything))


def rejected(level: Tensor, low: float, high: float) -> Tensor:
    """The levels that lie in a range, by numpy."""
    sigma = level.numpy() if level.is_floating_point() else level.numpy() / 1000
    return level[torch.from_numpy((sigma >= low) & ((sigma < high) | ((sigma == high) & (high == 1))))]


# The density


@pytest.mark.parametrize("ranges", [RANGES, pytest.param(FURTHER_RANGES, marks=pytest.mark.full)], ids=["", "further"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0, None])
@pytest.mark.parametrize("settings", SAMPLINGS, ids=name_of)
def test_levels_are_distributed_as_those_that_rejection_leaves(
    settings: dict, shift: float | None, ranges: list[tuple[float, float]]
) -> None:
    objective = flow(shift, **settings)
    everything = objective.level(torch.rand(100_000, generator=generator(4)), TOKENS)
    for sigma_range in ranges:
        left = rejected(everything, *sigma_range)
        level = restricted(objective, sigma_range).level(random(20_000), TOKENS)
        assert level.dtype == torch.float32
        assert len(rejected(level, *sigma_range)) == len(level)
        assert kolmogorov_smirnov(level, left) < 1.95


@pytest.mark.parametrize("settings", [{}, *SAMPLINGS[1:5]], ids=name_of)
@pytest.mark.parametrize("sigma_range", [(0.875, 1.0), (0.1234, 0.25)], ids=name_of)
def test_timesteps_are_distributed_as_those_that_rejection_leaves(
    settings: dict, sigma_range: tuple[float, float]
) -> None:
    objective = v_prediction(**settings)
    left = rejected(objective.level(torch.rand(100_000, generator=generator(4)), 1), *sigma_range)
    level = restricted(objective, sigma_range).level(random(20_000), 1)
    assert level.dtype == torch.int64
    assert len(rejected(level, *sigma_range)) == len(level)
    assert kolmogorov_smirnov(level, left) < 1.95


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "mode"])
def test_levels_are_those_of_diffusers_density_in_the_range(sampling: str) -> None:
    sigma = compute_density_for_timestep_sampling(sampling, 100_000, 0.0, 1.0, 1.29, generator=generator(6))
    oracle = rejected(3 * sigma / (1 + 2 * sigma), 0.875, 1.0)
    level = restricted(flow(3.0, sigma_sampling=sampling), (0.875, 1.0)).level(random(20_000), 1)
    assert kolmogorov_smirnov(level, oracle) < 1.95


@pytest.mark.parametrize("shift, least", [(1.0, 0.875), (3.0, 0.7), (12.0, 0.875 / 2.375)])
def test_a_uniform_u_is_spread_over_what_the_shift_maps_into_the_range(shift: float, least: float) -> None:
    """sigma = s u / (1 + (s - 1) u) = 7/8 at u = 7 / (7 + s): 0.7 with a shift of 3, 0.3684 with one of 12."""
    assert least == pytest.approx(7 / (7 + shift))
    part = quantiles(1000).double()
    for sigma_range, u in (((0.875, 1.0), least + (1 - least) * part), ((0.0, 0.875), least * part)):
        level = restricted(flow(shift, sigma_sampling="uniform"), sigma_range).level(part.float(), 1)
        torch.testing.assert_close(level.double(), shift * u / (1 + (shift - 1) * u), rtol=0, atol=3e-7)


def test_limits_rescale_the_levels_before_the_range_selects_among_them() -> None:
    """Uniform over 0.2 to 0.6; those from 0.5 on are the upper quarter."""
    objective = restricted(flow(sigma_sampling="uniform", sigma_min=0.2, sigma_max=0.6), (0.5, 0.9))
    torch.testing.assert_close(objective.level(quantiles(100), 1), 0.5 + 0.1 * quantiles(100), rtol=0, atol=1e-6)


@dataclass(frozen=True)
class Wave:
    """Somebody's objective, whose levels rise and fall three times."""

    settings: ObjectiveSettings
    default_sampling: ClassVar[str] = "uniform"

    def level(self, u: Tensor, tokens: int) -> Tensor:
        return 0.5 - 0.4 * torch.cos(6 * math.pi * u)

    def noised(self, x0: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        return x0 + level.view(-1, 1) * noise, noise

    def weight(self, level: Tensor) -> Tensor:
        return level**2


@pytest.mark.parametrize("sigma_range", [(0.2, 0.3), (0.7, 1.0), (0.0, 0.15), (0.0, 0.999)], ids=name_of)
def test_any_objective_can_be_restricted(sigma_range: tuple[float, float]) -> None:
    objective = Wave(ObjectiveSettings(guidance=3.0))
    ours = restricted(objective, sigma_range)
    left = rejected(objective.level(torch.rand(100_000, generator=generator(4)), 1), *sigma_range)
    level = ours.level(random(20_000), 1)
    assert len(rejected(level, *sigma_range)) == len(level)
    assert kolmogorov_smirnov(level, left) < 1.95


def test_all_but_the_levels_is_the_objectives_own() -> None:
    objective = Wave(ObjectiveSettings(guidance=3.0))
    ours = restricted(objective, (0.2, 0.3))
    assert ours.settings is objective.settings
    assert ours.default_sampling == "uniform"
    x0, noise, level = torch.randn(2, 4), torch.randn(2, 4), torch.tensor([0.21, 0.29])
    for one, other in zip(ours.noised(x0, noise, level), objective.noised(x0, noise, level), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(ours.weight(level), objective.weight(level))


# The limits


@pytest.mark.parametrize("settings", SAMPLINGS, ids=name_of)
@pytest.mark.parametrize("shift", [1.0, pytest.param(5.0, marks=pytest.mark.full), None])
def test_no_level_lies_past_a_limit_by_one_ulp(settings: dict, shift: float | None) -> None:
    """Every u near the ends: levels below the limit and levels from it on have nothing in common."""
    ends = torch.cat([torch.arange(1, 3000) * 2.0**-24, 1 - torch.arange(1, 3000) * 2.0**-24, quantiles(5000)])
    u = torch.cat([ends, torch.zeros(1), torch.ones(1)])
    for limit in (0.875, 0.9, 0.417, 0.5, 0.223456):
        edge = torch.tensor(limit)
        below, above = (restricted(flow(shift, **settings), ends) for ends in ((0.0, limit), (limit, 1.0)))
        levels = below.level(u, TOKENS), above.level(u, TOKENS)
        assert levels[0].max() <= torch.nextafter(edge, torch.tensor(0.0))
        assert levels[1].min() >= edge
        for level in levels:
            assert (level - edge).abs().min() < 1e-5  # they reach up to it


def test_no_level_is_nearer_to_the_ends_than_a_training_ever_draws() -> None:
    """At 0, SD3's weights are infinite."""
    objective = flow(sigma_sampling="uniform", weighting="sigma_sqrt")
    for sigma_range in ((0.0, 0.01), (0.99, 1.0)):
        level = restricted(objective, sigma_range).level(torch.tensor([0.0, 1e-6, 1 - 1e-6, 1.0]), 1)
        assert level.min() >= 1e-6
        assert level.max() <= 1 - 1e-6


def test_the_limits_of_a_range_are_included_and_excluded() -> None:
    ours, edge = restricted(flow(sigma_sampling="uniform"), (0.25, 0.75)), torch.tensor([0.25, 0.75])
    assert ours.contains(edge).tolist() == [True, False]
    assert ours.contains(torch.nextafter(edge, torch.zeros(2))).tolist() == [False, True]
    assert ours.outside().contains(edge).tolist() == [False, True]
    up_to_one = restricted(flow(sigma_sampling="uniform"), (0.25, 1.0))
    assert up_to_one.contains(torch.ones(1)).item()
    assert not up_to_one.outside().contains(torch.ones(1)).item()


def test_a_range_of_integer_timesteps_has_each_of_them_equally_often() -> None:
    """From 875 on, 125 timesteps; 0.9 is not 0.9 in binary, and 900 belongs to what begins there."""
    high = restricted(v_prediction(), (0.875, 1.0)).level(quantiles(125_000), 1)
    assert torch.equal(high.bincount(), torch.cat([torch.zeros(875), torch.full((125,), 1000)]).long())
    below = restricted(v_prediction(), (0.0, 0.9)).level(quantiles(90_000), 1)
    assert torch.equal(below.bincount(), torch.full((900,), 100))
    one = restricted(v_prediction(), (0.4995, 0.5005)).level(quantiles(10), 1)
    assert one.tolist() == [500] * 10


def test_a_range_may_be_narrower_than_anything() -> None:
    level = restricted(flow(3.0, sigma_sampling="logit_normal"), (0.5, 0.500001)).level(quantiles(1000), 1)
    assert level.min() >= 0.5
    assert level.max() < 0.500001
    assert len(level.unique()) > 10


# Draws and quantiles


def test_quantiles_keep_their_order() -> None:
    objective = flow(3.0, sigma_sampling="uniform")
    assert (restricted(objective, (0.3, 0.6)).level(quantiles(10_000), 1).diff() > 0).all()
    falling = flow(3.0, sigma_sampling="mode")
    assert (restricted(falling, (0.3, 0.6)).level(quantiles(1000), 1).diff() < 0).all()


@pytest.mark.parametrize(
    "model", [variants("ltx")[0], *variants("mochi"), variants("cogvideox")[0]], ids=variant_id, indirect=True
)
def test_stratified_samples_share_the_range_out(model: TinyModel) -> None:
    """Of uniform levels in [0.5, 1], each fiftieth has one sample, anywhere in it."""
    settings = ObjectiveSettings(stratified=True, sigma_sampling="uniform", shift=1.0, sigma_range=[0.5, 1.0])
    seen: list[Tensor] = []
    ours = model.family.training_objective(settings)

    class Watched(Restricted):
        def level(self, u: Tensor, tokens: int) -> Tensor:
            seen.append(super().level(u, tokens))
            return seen[-1]

    model.family.batch(samples(model, 50), Watched(ours.objective, ours.sigma_range))
    level = seen[0] if seen[0].is_floating_point() else (seen[0] + 0.5) / 1000
    place = (level - 0.5) * 100
    assert torch.equal(place.floor(), torch.arange(50.0))
    within = place - place.floor()
    assert within.min() < 0.3
    assert within.max() > 0.7


def test_the_levels_depend_on_the_number_of_tokens_as_the_objectives_do() -> None:
    objective, sigma_range = flow(None, sigma_sampling="uniform"), (0.6, 0.8)
    ours = restricted(objective, sigma_range)
    for tokens in (6000, 1024, 6000):
        left = rejected(objective.level(quantiles(100_000), tokens), *sigma_range)
        torch.testing.assert_close(ours.level(quantiles(len(left)), tokens), left, rtol=0, atol=1e-5)


def test_a_restricted_objective_is_the_same_in_another_process() -> None:
    ours = restricted(flow(None, sigma_sampling="mode"), (0.3, 0.6))
    fresh = pickle.loads(pickle.dumps(ours))
    level = ours.level(random(100), TOKENS)
    used = pickle.loads(pickle.dumps(ours))
    for other in (fresh, used):
        assert torch.equal(other.level(random(100), TOKENS), level)
        assert other.sigma_range == ours.sigma_range
    assert torch.equal(ours.level(random(100)[:1], TOKENS), level[:1])  # whatever else is in the batch


# All but the range


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=name_of)
@pytest.mark.parametrize("sigma_range", [(0.875, 1.0), (0.0, 0.875), (0.3, 0.6)], ids=name_of)
def test_the_levels_outside_are_those_that_the_range_leaves(sampling: dict, sigma_range: tuple[float, float]) -> None:
    objective = flow(3.0, **sampling)
    everything = objective.level(torch.rand(100_000, generator=generator(4)), 1)
    left = everything[~torch.isin(everything, rejected(everything, *sigma_range))]
    outside = restricted(objective, sigma_range).outside()
    level = outside.level(random(20_000), 1)
    assert outside.contains(level).all()
    assert len(rejected(level, *sigma_range)) == 0
    assert kolmogorov_smirnov(level, left) < 1.95


def test_there_is_no_outside_of_everything() -> None:
    uniform = flow(sigma_sampling="uniform", sigma_min=0.2, sigma_max=0.6)
    assert restricted(uniform, (0.1, 0.7)).outside() is None
    assert restricted(uniform, (0.1, 0.5)).outside() is not None
    assert restricted(uniform, None) is uniform
    assert restricted(uniform, [0.0, 1.0]) is uniform


def test_a_range_without_levels_is_an_error_that_names_those_there_are() -> None:
    objective: Objective = restricted(flow(3.0, sigma_sampling="uniform", sigma_min=0.2, sigma_max=0.6), (0.7, 1.0))
    with pytest.raises(UserError, match=r"no noise level in \[0.7, 1.0\]: .* from 0.2000 to 0.6000"):
        objective.level(quantiles(3), 1)


@pytest.mark.parametrize("model", variants("ltx")[:1], ids=variant_id, indirect=True)
def test_the_recipes_range_goes_before_the_checkpoints(model: TinyModel) -> None:
    class Expert(type(model.family)):
        noise_range = (0.875, 1.0)

    expert = Expert(model.family.folder)
    assert isinstance(model.family.training_objective(ObjectiveSettings()), FlowMatching)
    assert expert.training_objective(ObjectiveSettings()).sigma_range == (0.875, 1.0)
    assert expert.training_objective(ObjectiveSettings(sigma_range=[0.1, 0.2])).sigma_range == (0.1, 0.2)
    assert isinstance(expert.training_objective(ObjectiveSettings(sigma_range=[0.0, 1.0])), FlowMatching)
