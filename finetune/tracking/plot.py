"""The loss curve of a run."""

import json
from pathlib import Path

from finetune.runtime.errors import UserError


def plot_losses(run: Path) -> Path:
    """Draw training and held-out loss from `run/metrics.jsonl` to `run/loss.png`; needs matplotlib (extra `plots`)."""
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError("there are no metrics of a run", "give the run's output folder", str(metrics))
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is not installed", 'in the checkout: pip install -e ".[plots]"', "plot") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    heldout = [(row["step"], row["heldout_loss"], row["heldout_zero_loss"]) for row in rows if "heldout_loss" in row]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    steps, values = zip(*losses, strict=True)
    axes.plot(steps, values, color="0.75", linewidth=0.8, label="training, each step")
    window = max(1, len(values) // 30)
    smooth = [
        sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1])
        for i in range(len(values))
    ]
    axes.plot(steps, smooth, color="tab:blue", label=f"training, mean of {window}")
    if heldout:
        at, loss, zero = zip(*heldout, strict=True)
        axes.plot(at, loss, "o-", color="tab:orange", label="held out")
        axes.plot(at, zero, "--", color="0.4", label="predicting zero, held out")
    axes.set(xlabel="optimizer step", ylabel="loss", title=str(run), ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    path = run / "loss.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
