"""Losses by noise level and gradient norms of blocks are those of a plain computation, on any number of ranks."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import figures_of

from finetune.models.noise_range import restricted
from finetune.models.objective import FlowMatching, constant_shift, quarters_of
from finetune.recipe.schema import ObjectiveSettings

CLOSE = 1e-5  # relative


@pytest.fixture(scope="module")
def watched(parity_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict]:
    """Figures of tests/engine/watching_worker.py by number of processes."""
    folder = tmp_path_factory.mktemp("watching")
    found = {processes: figures_of("watching_worker.py", processes, folder, [parity_recipe]) for processes in (1, 2)}
    return found.__getitem__


def quarters(steps: list[dict]) -> dict[str, float]:
    """The mean loss of the samples in each quarter."""
    losses: dict[int, list[float]] = {}
    for step in steps:
        for quarter, loss in step["losses"]:
            losses.setdefault(quarter, []).append(loss)
    return {f"loss_sigma/q{quarter + 1}": sum(each) / len(each) for quarter, each in sorted(losses.items())}


@pytest.mark.parametrize("processes", [1, 2])
def test_losses_by_noise_level_are_means_over_all_samples_since_the_last_report(watched, processes: int) -> None:
    steps = watched(processes)["lora"]
    for first in (0, 2):
        reported = {name: value for name, value in steps[first + 1]["watched"].items() if name.startswith("loss")}
        assert reported == pytest.approx(quarters(steps[first : first + 2]), rel=CLOSE)
        assert not any(name.startswith("loss") for name in steps[first]["watched"])


def test_norms_of_blocks_are_those_of_a_plain_backward_pass(watched) -> None:
    for name in ("lora", "full"):
        for step in watched(1)[name]:
            reported = {key: value for key, value in step["watched"].items() if key.startswith("grad_norm")}
            assert len(reported) > 1
            assert reported == pytest.approx(step["norms"], rel=CLOSE)
            assert math.hypot(*reported.values()) == pytest.approx(step["norm"], rel=CLOSE)


@pytest.mark.parametrize("name", ["lora", "in backward", "gradients on the host"])
def test_two_ranks_report_what_one_does(watched, name: str) -> None:
    plain = watched(1)["lora" if name == "lora" else "full"]
    for one, two in zip(plain, watched(2)[name], strict=True):
        assert two["watched"] == pytest.approx(one["watched"], rel=10 * CLOSE)


def test_what_is_watched_changes_no_loss(watched) -> None:
    lora, unwatched = ([(step["loss"], step["norm"]) for step in watched(1)[name]] for name in ("lora", "not watched"))
    assert lora == unwatched


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "mode"])
@pytest.mark.parametrize("sigma_range", [None, (0.3, 0.8)])
def test_a_quarter_has_a_quarter_of_the_noise_levels_in_their_order(
    sampling: str, sigma_range: tuple[float, float] | None
) -> None:
    objective = restricted(FlowMatching(ObjectiveSettings(sigma_sampling=sampling), constant_shift(3.0)), sigma_range)
    sigma = objective.level(torch.linspace(0.0005, 0.9995, 1000), 1)
    found = quarters_of(sigma, objective, 1)
    ranks = sigma.argsort().argsort()
    assert torch.equal(found, ranks // 250)
