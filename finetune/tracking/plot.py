"""The loss curve of a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from finetune.recipe.schema import ExpertName
from finetune.runtime.errors import UserError
from finetune.runtime.files import atomic
from finetune.tracking.metrics import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    heldout = [(row["step"], row["heldout_loss"], row["heldout_zero_loss"]) for row in rows if "heldout_loss" in row]
    if not losses and not heldout:
        raise UserError("there is no loss in it yet", "plot the run again once it has made a step", str(metrics))
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is not installed", 'in the checkout: pip install -e ".[plots]"', "plot") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if losses:
        _draw_training(axes, losses)
    if heldout:
        at, loss, zero = zip(*heldout, strict=True)
        axes.plot(at, loss, "o-", color="tab:orange", label="held out")
        axes.plot(at, zero, "--", color="0.4", label="predicting zero, held out")
    axes.set(xlabel="optimizer step", ylabel="loss", title=str(run), ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    path = run / "loss.png"
    with atomic(path) as partial:
        figure.savefig(partial, dpi=110)
    pyplot.close(figure)
    return path


def _draw_training(axes: "Axes", losses: list[tuple[int, Any]]) -> None:
    """Each step's loss, and its running mean over a thirtieth of the steps."""
    steps, values = zip(*losses, strict=True)
    window = max(1, len(values) // 30)
    recent = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    axes.plot(steps, values, color="0.75", linewidth=0.8, label="training, each step")
    axes.plot(steps, [sum(each) / len(each) for each in recent], color="tab:blue", label=f"training, mean of {window}")
