"""The loss curve is drawn from what a run has written, whatever has happened to the run, or says what is missing."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from processes import Finetune

from finetune.runtime.errors import UserError
from finetune.tracking.plot import HELD_OUT, NOT_FINITE, TRAINING, plot_losses

STEPS = [{"step": step, "loss": 2 - step / 50, "lr": 1e-3} for step in range(1, 61)]
HELD_OUTS = [{"step": step, "heldout_loss": 2.1 - step / 60, "heldout_zero_loss": 2.0} for step in (0, 20, 40, 60)]

Wrote = Callable[[str], Path]


@pytest.fixture
def wrote(tmp_path: Path) -> Wrote:
    """A run's folder with a text as its metrics."""

    def write(metrics: str) -> Path:
        (tmp_path / "metrics.jsonl").write_text(metrics)
        return tmp_path

    return write


def lines(*rows: dict) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def pixels_of(image: Path, colour: str) -> int:
    """How many pixels of a PNG have a colour."""
    with Image.open(image) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"), dtype=int)
    return int((abs(pixels - np.round(255 * np.array(to_rgb(colour)))).max(axis=-1) <= 1).sum())


def test_the_picture_has_a_curve_for_training_and_one_for_the_heldout_clips(wrote: Wrote) -> None:
    image = plot_losses(wrote(lines(*STEPS, *HELD_OUTS)))
    assert image.name == "loss.png"
    assert pixels_of(image, TRAINING) > 300
    assert pixels_of(image, HELD_OUT) > 300


def test_a_run_without_heldout_clips_has_the_curve_of_training_alone(wrote: Wrote) -> None:
    image = plot_losses(wrote(lines(*STEPS)))
    assert pixels_of(image, TRAINING) > 300
    assert pixels_of(image, HELD_OUT) == 0


def test_a_run_that_has_made_no_step_has_the_heldout_loss_of_the_base_model(wrote: Wrote) -> None:
    image = plot_losses(wrote(lines(HELD_OUTS[0])))
    assert pixels_of(image, TRAINING) == 0
    assert pixels_of(image, HELD_OUT) > 10


def test_a_loss_that_is_not_finite_is_marked(wrote: Wrote) -> None:
    image = plot_losses(wrote(lines(*STEPS, {"step": 61, "loss": float("nan")})))
    assert pixels_of(image, TRAINING) > 300
    assert pixels_of(image, NOT_FINITE) > 10


def test_a_run_whose_only_loss_is_not_finite_has_a_picture(wrote: Wrote) -> None:
    assert pixels_of(plot_losses(wrote(lines({"step": 1, "loss": float("inf")}))), NOT_FINITE) > 10


def test_a_last_line_that_was_cut_is_passed_over(wrote: Wrote) -> None:
    assert pixels_of(plot_losses(wrote(lines(*STEPS) + '{"step": 61, "lo')), TRAINING) > 300


def test_zeros_that_a_crash_has_left_are_passed_over(wrote: Wrote) -> None:
    zeros = "\0" * 40
    image = plot_losses(wrote(f"{lines(*STEPS[:30])}{zeros}\n{zeros}{lines(*STEPS[30:])}{zeros}"))
    assert pixels_of(image, TRAINING) > 300


@pytest.mark.parametrize("line", ["step 4: loss 2", "[4, 2.0]", '{"loss": 2.0}', '{"step": null, "loss": 2.0}'])
def test_a_line_that_is_no_row_of_metrics_is_named(wrote: Wrote, line: str) -> None:
    run = wrote(f"{lines(*STEPS[:3])}{line}\n{lines(*STEPS[4:])}")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 4: not a row of metrics: .*\n .*remove the line"):
        plot_losses(run)


@pytest.mark.parametrize("metrics", ["", lines({"step": 0, "samples": "runs/a/samples"}), '{"step": 1, "loss'])
def test_metrics_without_a_loss_say_so(wrote: Wrote, metrics: str) -> None:
    with pytest.raises(UserError, match=r"there is no loss in it yet\n .*once it has made a step"):
        plot_losses(wrote(metrics))


def test_a_folder_without_metrics_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there are no metrics of a run\n .*give the run's output folder"):
        plot_losses(tmp_path)


def test_a_picture_that_cannot_be_written_says_so(wrote: Wrote) -> None:
    run = wrote(lines(*STEPS))
    (run / "loss.png").mkdir()
    with pytest.raises(UserError, match=r"loss\.png: cannot be written"):
        plot_losses(run)


def test_the_command_draws_it(finetune: Finetune, wrote: Wrote) -> None:
    run = wrote(lines(*STEPS))
    drawn = finetune("plot", "--run", run)
    assert drawn.returncode == 0, drawn.stderr
    assert f"wrote {run / 'loss.png'}" in drawn.stderr
    assert pixels_of(run / "loss.png", TRAINING) > 300


def test_the_command_ends_with_a_clear_error_where_there_is_nothing_to_draw(finetune: Finetune, wrote: Wrote) -> None:
    refused = finetune("plot", "--run", wrote(""))
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "Traceback" not in refused.stderr
