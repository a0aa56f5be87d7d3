"""The held-out loss measures, and disturbs nothing; see parity_worker.py for the configurations."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune.training.job import Job

Figures = dict[int, dict[str, dict[str, list[float]]]]


@pytest.mark.parametrize("configuration", ["lora", "lora, accumulated", "full", "full, accumulated"])
def test_heldout_loss_is_the_same_for_one_and_two_processes(parity: Figures, configuration: str) -> None:
    """Nine evaluations: with two processes, one of them makes a call that is not counted."""
    assert parity[2][configuration]["heldout"] == pytest.approx(parity[1][configuration]["heldout"], rel=1e-5)
    assert parity[2][configuration]["heldout_zero"] == pytest.approx(parity[1][configuration]["heldout_zero"], rel=1e-6)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("figure", ["loss", "grad_norm"])
def test_measuring_the_heldout_loss_does_not_change_training(parity: Figures, processes: int, figure: str) -> None:
    """Bit for bit, with dropout: neither random states nor the training mode may be left changed."""
    figures = parity[processes]
    assert figures["lora, dropout, validated"][figure] == figures["lora, dropout"][figure]


def test_heldout_loss_falls_when_the_model_learns(parity: Figures) -> None:
    before, after = parity[1]["full"]["heldout"]
    assert after < before


def test_measuring_twice_gives_the_same_figure(build_job: Callable[..., Job], heldout: Path) -> None:
    """Nothing in it is random, dropout least of all, in which an adapter shows once it is trained."""
    job = build_job(f"validation.heldout={heldout}", "lora.dropout=0.5", "optimizer.lr=1e-2")
    job.step(0, [job.micro_batches()[0], job.micro_batches()[1]])
    assert job.heldout_loss() == job.heldout_loss()


def test_the_figure_of_predicting_zero_is_the_mean_square_of_the_target(
    build_job: Callable[..., Job], heldout: Path
) -> None:
    """A model that predicts zero scores it: with the last layer's weights and biases at zero, both figures agree."""
    job = build_job(f"validation.heldout={heldout}", "train.method=full")
    with torch.no_grad():
        for parameter in job.state.transformer.proj_out.parameters():
            parameter.zero_()
    figures = job.heldout_loss()
    assert figures.loss == pytest.approx(figures.zero_loss)


def test_without_heldout_clips_there_is_no_figure(build_job: Callable[..., Job]) -> None:
    assert build_job().heldout_loss() is None
