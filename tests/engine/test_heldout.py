"""The held-out loss measures, and disturbs nothing; see parity_worker.py for the configurations."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finetune.engine.heldout import HeldOut
from finetune.tracking.metrics import read_metrics
from finetune.training.job import Job
from finetune.training.report import Report

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


UNIFORM = ["objective.sigma_sampling=uniform", "objective.shift=1", "validation.sigmas=2"]


def test_the_loss_is_measured_in_the_range_of_noise_levels_and_outside(
    build_job: Callable[..., Job], heldout: Path
) -> None:
    """At the levels that uniform ones have over half of the range, and with the noise that they have."""

    def measured(*overrides: str) -> HeldOut:
        return build_job(f"validation.heldout={heldout}", *UNIFORM, *overrides).heldout_loss()

    figures = measured("objective.sigma_range=0.5,1")
    above, below = measured("objective.sigma_min=0.5"), measured("objective.sigma_max=0.5")
    assert figures.losses == pytest.approx(above.losses)
    assert figures.zero_losses == pytest.approx(above.zero_losses)
    assert figures.outside.losses == pytest.approx(below.losses)
    assert figures.outside.zero_losses == pytest.approx(below.zero_losses)
    assert above.loss != pytest.approx(below.loss)
    assert above.outside is None


def test_a_range_of_all_there_is_has_no_second_figures(build_job: Callable[..., Job], heldout: Path) -> None:
    job = build_job(f"validation.heldout={heldout}", *UNIFORM, "objective.sigma_max=0.5", "objective.sigma_range=0,0.6")
    assert job.heldout_loss().outside is None


def test_both_figures_are_told(
    build_job: Callable[..., Job], heldout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"output={tmp_path}", f"validation.heldout={heldout}", *UNIFORM]
    job = build_job(*settings, "objective.sigma_range=0.5,1")
    figures = job.heldout_loss()
    with Report(job, 0) as report:
        report.heldout(3, figures)
        report.heldout(4, replace(figures, outside=None))
    one = f"{figures.loss:.4f} (predicting zero: {figures.zero_loss:.4f})"
    two = f"{figures.outside.loss:.4f} (predicting zero: {figures.outside.zero_loss:.4f})"
    said = capsys.readouterr()
    lines = (said.out + said.err).splitlines()
    assert f"held-out loss after step 3: {one}; outside of the trained noise levels: {two}" in lines
    assert f"held-out loss after step 4: {one}" in lines
    with_range, without = read_metrics(tmp_path / "metrics.jsonl")
    plain = {"heldout_loss": figures.loss, "heldout_zero_loss": figures.zero_loss}
    outside = {"heldout_loss_outside": figures.outside.loss, "heldout_zero_loss_outside": figures.outside.zero_loss}
    assert with_range.items() >= (plain | outside).items()
    assert without.items() >= plain.items()
    assert not without.keys() & outside.keys()


def test_without_heldout_clips_there_is_no_figure(build_job: Callable[..., Job]) -> None:
    assert build_job().heldout_loss() is None
