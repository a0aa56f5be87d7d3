"""The average of the weights equals diffusers' and torch's, is restored bit for bit, and stands in for them where it is to; see
ema_worker.py.
"""

import json
from collections.abc import Callable
from functools import cache as cache_calls
from pathlib import Path

import pytest
from ema_worker import BREAK, CONFIGURATIONS, STEPS
from processes import figures_of

FIRST = ["lora", "every second step", "bf16 weights, on the host"]
OTHERS = [name for name in CONFIGURATIONS if name not in FIRST]


@pytest.fixture(scope="module")
def figures(parity_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    @cache_calls
    def run(processes: int, is_first: bool) -> dict:
        folder, cases = tmp_path_factory.mktemp("ema"), FIRST if is_first else OTHERS
        return figures_of("ema_worker.py", processes, folder, [parity_recipe, json.dumps(cases)])

    return lambda processes, name: run(processes, name in FIRST)[name]


CASES = [(processes, name) for processes in (1, 2) for name in FIRST]
CASES += [
    pytest.param((processes, name), marks=pytest.mark.full)  # the same code, with weights in other places
    for processes in (1, 2)
    for name in OTHERS
]


@pytest.fixture(params=CASES, ids=str)
def run(figures: Callable[..., dict], request: pytest.FixtureRequest) -> dict:
    return figures(*request.param)


def test_the_average_is_that_of_diffusers_or_of_torch(run: dict) -> None:
    assert max(run["straight"]["furthest"]) < 1e-6
    assert run["straight"]["average"] != run["straight"]["weights"]


def test_evaluation_leaves_weights_and_average_as_they_were(run: dict) -> None:
    assert run["straight"]["changed by evaluation"] == [False] * STEPS


def test_the_training_is_the_same_whatever_the_average_is_used_for(run: dict) -> None:
    assert run["evaluated"]["raw steps"] == run["straight"]["steps"]


def test_the_heldout_loss_is_the_averages_if_it_is_to_be(run: dict) -> None:
    assert run["straight"]["heldout"] == run["evaluated"]["heldout of average"] != run["evaluated"]["raw heldout"]


def test_what_a_checkpoint_exports_is_the_average(run: dict) -> None:
    assert run["evaluated"].get("exported", True)


def test_going_on_is_the_same_as_not_having_stopped(run: dict) -> None:
    interrupted, straight = run["interrupted"], run["straight"]
    assert interrupted["resumed at"] == BREAK
    assert interrupted["restored"] == interrupted["saved"] != straight["average"]
    assert interrupted["steps"] == straight["steps"]
    assert interrupted["average"] == straight["average"]


def test_two_ranks_have_the_average_of_one(figures: Callable[..., dict]) -> None:
    one, two = (figures(processes, "lora")["straight"]["first average"] for processes in (1, 2))
    assert two == pytest.approx(one, rel=1e-3, abs=1e-6)
