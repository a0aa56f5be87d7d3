"""The loss curve of a run, as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, get_args

from finetune.recipe.schema import ExpertName
from finetune.runtime.errors import UserError, harmless
from finetune.runtime.files import atomic
from finetune.tracking.curves import Points, points_of, shown_range, smoothed
from finetune.tracking.drawing import BLUE, FAINT, ORANGE, RED, SOFT, drawing
from finetune.tracking.metrics import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINING, HELD_OUT, NOT_FINITE = BLUE, ORANGE, RED


def plot_losses(run: Path) -> Path:
    """Draw training and held-out loss from `run/metrics.jsonl` to `run/loss.png`; needs matplotlib (extra `plots`).

    Raises:
        UserError: there are no metrics, no losses in them, or something else; or the figure cannot be written.
    """
    metrics = run / METRICS_FILE
    if not metrics.is_file():
        experts = [str(run / name) for name in get_args(ExpertName) if (run / name / METRICS_FILE).is_file()]
        cure = f"give the folder of an expert: {' or '.join(experts)}" if experts else "give the run's output folder"
        raise UserError("there are no metrics of a run", cure, str(metrics))
    rows = read_metrics(metrics)
    (losses, gaps), (heldout, _), (zero, _) = (
        points_of(rows, name) for name in ("loss", "heldout_loss", "heldout_zero_loss")
    )
    if not (losses or gaps or heldout):
        raise UserError("there is no loss in it yet", "plot the run again once it has made a step", str(metrics))
    path = run / "loss.png"
    with drawing("plot") as pyplot:
        figure, axes = pyplot.subplots(figsize=(9, 4.8), layout="constrained")
        mean, _ = smoothed(losses)
        low, high = shown_range([losses], [mean, heldout])
        _draw_training(axes, losses, mean)
        if heldout:
            axes.plot(*zip(*heldout, strict=True), "o-", color=HELD_OUT, markersize=4.5, label="held out")
        _draw_zero(axes, zero, low, high)
        if gaps:
            axes.plot(gaps, [low] * len(gaps), "^", color=NOT_FINITE, clip_on=False, zorder=3, label="not finite")
        axes.set(xlabel="optimizer step", ylabel="loss", title=harmless(str(run)).replace("$", r"\$"), ylim=(low, high))
        axes.margins(x=0.01)
        axes.legend(loc="upper right", ncols=2)
        with atomic(path) as partial:
            figure.savefig(partial, format="png")
    return path


def _draw_training(axes: "Axes", losses: Points, mean: Points) -> None:
    """Each step's loss, and its running mean over a thirtieth of the steps. What lies outside of the picture is cut off."""
    if not losses:
        return
    window = max(1, len(losses) // 30)
    axes.plot(*zip(*losses, strict=True), color=FAINT, linewidth=0.8, label="training, each step")
    axes.plot(*zip(*mean, strict=True), color=TRAINING, label=f"training, mean of {window}")


def _draw_zero(axes: "Axes", zero: Points, low: float, high: float) -> None:
    """The loss of predicting zero: a line if it lies in the picture, else said at its edge."""
    if not zero:
        return
    value = zero[-1][1]
    label = f"predicting zero, held out ({value:.4g})"
    if low <= value <= high:
        axes.plot(*zip(*zero, strict=True), "--", color=SOFT, linewidth=1.2, label=label)
    else:
        axes.plot([], [], " ", label=f"{label}: {'above' if value > high else 'below'}")
