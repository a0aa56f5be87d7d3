"""Noise levels of a table in the recipe are its quantiles, which numpy interpolates in its cumulative sums."""

from pathlib import Path

import numpy as np
import pytest
import torch
from recording import TinyModel, generator, variant_id, variants
from test_noise_range import flow, kolmogorov_smirnov, quantiles, random, rejected, v_prediction
from test_objectives import drawn

from finetune.models.noise_range import restricted
from finetune.models.sigma_table import table_quantiles
from finetune.recipe import load_recipe
from finetune.runtime.errors import UserError

BINS = [[1, 1], [1, 2, 4, 1], [0, 3, 0, 0, 1, 0], [0.25, 0, 0], list(range(100))]
POINTS = [
    [[0, 1], [1, 1]],
    [[0, 0], [1, 2]],
    [[0, 2], [1, 0]],
    [[0.1, 0], [0.3, 1], [0.8, 0.25], [0.95, 0]],
    [[0.2, 0], [0.3, 0], [0.4, 5], [0.5, 0], [0.6, 0], [0.7, 1], [0.8, 0], [1, 0]],
]


def name_of(table: object) -> str:
    return str(table)[:24]


def expected(table: list, u: np.ndarray) -> np.ndarray:
    """By numpy: bins' cumulative weights are straight lines, densities between points are summed over a fine grid."""
    if not isinstance(table[0], list):
        edges, cumulative = np.linspace(0, 1, len(table) + 1), np.concatenate([[0], np.cumsum(table)])
    else:
        sigma, density = np.array(table, float).T
        edges = np.unique(np.concatenate([np.linspace(sigma[0], sigma[-1], 200_001), sigma]))
        heights = np.interp(edges, sigma, density)
        cumulative = np.concatenate([[0], np.cumsum(np.diff(edges) * (heights[1:] + heights[:-1]) / 2)])
    cumulative = cumulative / cumulative[-1]
    rises = np.concatenate([[True], np.diff(cumulative) > 0])
    # At the end of a stretch without density, the next piece begins there.
    begins = np.concatenate([rises[1:], [False]])
    keep = rises | begins
    nudged = np.where(begins & ~rises, np.nextafter(cumulative, 1), cumulative)
    return np.interp(u, nudged[keep], edges[keep])


@pytest.mark.parametrize("table", [*BINS, *POINTS], ids=name_of)
def test_levels_are_the_quantiles_of_the_table(table: list) -> None:
    u = random(20_000)
    level = table_quantiles(u, table)
    assert level.dtype == torch.float32
    np.testing.assert_allclose(level.double().numpy(), expected(table, u.double().numpy()), rtol=0, atol=2e-5)
    assert (table_quantiles(u.sort().values, table).diff() >= 0).all()


@pytest.mark.parametrize("table", BINS, ids=name_of)
def test_bins_have_their_share_of_the_levels(table: list) -> None:
    level = table_quantiles(quantiles(120_000), table)
    counts = np.histogram(level.double().numpy(), bins=len(table), range=(0, 1))[0]
    np.testing.assert_allclose(counts / 120_000, np.array(table) / sum(table), atol=1e-4)


@pytest.mark.parametrize("table", [*BINS, *POINTS], ids=name_of)
def test_levels_lie_where_the_table_has_density_whatever_u_is(table: list) -> None:
    level = table_quantiles(torch.tensor([0.0, 1e-6, 0.5, 1 - 1e-6, 1.0]), table).double().numpy()
    assert np.isfinite(level).all()
    if isinstance(table[0], list):
        sigma = np.array(table, float)[:, 0]
        assert (level >= sigma.min() - 1e-7).all()
        assert (level <= sigma.max() + 1e-7).all()
    else:
        bins = np.minimum((level * len(table) * (1 - 1e-6)).astype(int), len(table) - 1)
        near = np.array([max(table[max(each - 1, 0) : each + 2]) for each in bins])
        assert (near > 0).all()


def test_a_table_of_ones_is_the_uniform_distribution() -> None:
    u = random(1000)
    for table in ([1, 1, 1], [[0, 2], [1, 2]]):
        torch.testing.assert_close(
            flow(3.0, sigma_table=table).level(u, 1), flow(3.0, sigma_sampling="uniform").level(u, 1)
        )


def test_the_table_comes_before_the_shift_and_the_limits_after_it() -> None:
    objective = flow(3.0, sigma_table=[[0.5, 1], [0.6, 1]], sigma_min=0.2, sigma_max=0.6)
    sigma = 0.5 + 0.1 * quantiles(100)
    shifted = 3 * sigma / (1 + 2 * sigma)
    torch.testing.assert_close(objective.level(quantiles(100), 1), 0.2 + 0.4 * shifted, rtol=0, atol=1e-6)


def test_timesteps_of_v_prediction_follow_it() -> None:
    level = v_prediction(sigma_table=[1, 3]).level(quantiles(40_000), 1)
    counts = level.bincount(minlength=1000)
    assert counts[:500].sum() == 10_000
    assert (counts[:500] - 20).abs().max() <= 1
    assert (counts[500:] - 60).abs().max() <= 1


@pytest.mark.parametrize("sigma_range", [(0.3, 0.6), (0.0, 0.5), (0.55, 1.0)], ids=name_of)
@pytest.mark.parametrize("table", [BINS[1], BINS[2], POINTS[3], POINTS[4]], ids=name_of)
def test_a_range_selects_from_the_table(table: list, sigma_range: tuple[float, float]) -> None:
    objective = flow(3.0, sigma_table=table)
    left = rejected(objective.level(torch.rand(100_000, generator=generator(4)), 1), *sigma_range)
    ours = restricted(objective, sigma_range)
    if len(left) == 0:
        assert ours.is_empty(1)
        return
    level = ours.level(random(20_000), 1)
    assert len(rejected(level, *sigma_range)) == len(level)
    assert kolmogorov_smirnov(level, left) < 1.95


@pytest.mark.parametrize(
    "model", [variants("ltx")[0], *variants("mochi"), variants("cogvideox")[0]], ids=variant_id, indirect=True
)
def test_stratified_samples_share_the_table_out(model: TinyModel) -> None:
    """Four bins of which the second has half: of 40 samples in order, 10 to 29 lie there."""
    level = drawn(model, 40, stratified=True, sigma_table=[1, 2, 1, 0], shift=1.0)
    assert torch.equal((level * 4 + 1e-4).floor(), torch.tensor([0.0] * 10 + [1.0] * 20 + [2.0] * 10))


@pytest.mark.parametrize(
    "table, why",
    [
        ("[1]", "two entries or more"),
        ("[]", "two entries or more"),
        ("[0, 0, 0]", "weights of bins are all 0"),
        ("[1, -2]", "weights of bins should not be negative, and -2 is"),
        ('[1, "2"]', "weights of bins should be numbers, and '2' is none"),
        ("[1, true]", "should be numbers, and True is none"),
        ("[1, [0.5, 1]]", r"should be numbers, and \[0.5, 1\] is none"),
        ("[1e308, 1e308]", "too large to be summed"),
        ("[1.0, inf]", "should be numbers, and inf is none"),
        ("[[0, 1], [0.5]]", r"entry 2 should be \[sigma, density\]"),
        ("[[0, 1], [1.5, 1]]", "go from 0 or more to 1 or less"),
        ("[[0.7, 1], [0.2, 1]]", "go from 0 or more to 1 or less"),
        ("[[0, 1], [0.5, 1], [0.5, 2], [1, 1]]", "should rise, and 0.5 comes after 0.5"),
        ("[[0, 0], [1, 0]]", "densities are all 0"),
        ("[[0, 1], [1, -1]]", "densities should not be negative"),
        ('"uniform"', "valid list"),
    ],
)
def test_what_is_no_distribution_is_refused(recipe_file: Path, table: str, why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        load_recipe(recipe_file, [f"objective.sigma_table={table}"])
    assert {problem.where for problem in caught.value.problems} == {f"--set objective.sigma_table={table}"}


@pytest.mark.parametrize("table", [[1, 2.5, 0], [[0, 1], [0.5, 0], [1, 2]]], ids=name_of)
def test_a_table_is_read_as_numbers(recipe_file: Path, table: list) -> None:
    recipe = load_recipe(recipe_file, [f"objective.sigma_table={table}"])
    assert np.array_equal(recipe.objective.sigma_table, np.array(table, float))
    assert load_recipe(recipe_file, ["objective.sigma_table=none"]).objective.sigma_table is None
