"""A part from outside is saved, restored, stepped after the update, and swapped in for evaluation; see parts_worker.py."""

from collections.abc import Callable
from pathlib import Path

import pytest
from average import Average
from parts_worker import BREAK, CONFIGURATIONS, STEPS
from processes import figures_of

from finetune.training.job import Job
from finetune.training.samples import validation_samples


@pytest.fixture(scope="module")
def figures(parity_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, dict]]:
    folder = tmp_path_factory.mktemp("parts")
    return {processes: figures_of("parts_worker.py", processes, folder, [parity_recipe]) for processes in (1, 2)}


@pytest.fixture(params=[(processes, name) for processes in (1, 2) for name in CONFIGURATIONS], ids=str)
def run(figures: dict[int, dict[str, dict]], request: pytest.FixtureRequest) -> dict:
    processes, name = request.param
    return figures[processes][name]


def test_a_part_follows_each_update(run: dict) -> None:
    """The average is the one that torch.optim.swa_utils makes of the weights after each step."""
    straight = run["straight"]
    assert straight["average"] == straight["oracle"] != straight["weights"]


def test_a_part_does_not_follow_a_step_that_made_no_update(run: dict) -> None:
    straight = run["straight"]
    assert straight["refused"]
    assert straight["updates"] == STEPS
    assert straight["average after refusal"] == straight["average"]


def test_the_heldout_loss_is_that_of_what_a_part_swaps_in(run: dict) -> None:
    straight = run["straight"]
    assert straight["heldout"] == straight["heldout of average"] != straight["heldout of weights"]


def test_a_part_is_swapped_back_after_evaluation(run: dict) -> None:
    """Where blocks stay gathered after a forward pass (zero2), the next step must gather the trained weights anew."""
    straight = run["straight"]
    assert straight["changed by evaluation"] == [False] * STEPS
    assert straight["steps"] == straight["plain steps"]


def test_a_part_is_restored_bit_for_bit(run: dict) -> None:
    interrupted = run["interrupted"]
    assert interrupted["resumed at"] == interrupted["restored updates"] == BREAK
    assert interrupted["restored average"] == interrupted["saved average"] != run["straight"]["average"]


def test_going_on_with_a_part_is_the_same_as_not_having_stopped(run: dict) -> None:
    interrupted, straight = run["interrupted"], run["straight"]
    assert interrupted["steps"] == straight["steps"]
    assert interrupted["average"] == straight["average"]


def test_a_checkpoint_without_a_part_is_refused_on_every_rank_with_a_cure(run: dict) -> None:
    assert len(set(run["missing"])) == 1
    assert "step_00000001: the checkpoint has no state of average" in run["missing"][0]
    assert "set `output` to a new folder" in run["missing"][0]


def test_a_run_without_a_part_resumes_from_a_checkpoint_with_it(run: dict) -> None:
    assert run["interrupted"]["resumed without it at"] == BREAK


def test_samples_are_made_of_what_a_part_swaps_in(build_job: Callable[..., Job]) -> None:
    job = build_job('validation.prompts=[{text = "a red ball moves", steps = 2, guidance = 1.0}]')
    average = Average(job.state.transformer)
    job.state.parts.append(average)
    inside: list[bool] = []
    job.state.transformer.register_forward_pre_hook(lambda *_: inside.append(average.inside))
    assert validation_samples(job, 0) is not None
    assert inside
    assert all(inside)
    assert not average.inside
