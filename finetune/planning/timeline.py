"""A plan as a picture: what a GPU's memory holds over time, phase by phase."""

from importlib.util import find_spec
from pathlib import Path

from finetune.runtime.errors import UserError
from finetune.runtime.files import atomic
from finetune.runtime.units import GIB

Timeline = list[tuple[int, dict[str, int]]]


def check_plot(file: Path) -> None:
    """Raises UserError if no picture can be drawn there."""
    if find_spec("matplotlib") is None:
        raise UserError("matplotlib is not installed", 'in the checkout: pip install -e ".[plots]"', "--plot")
    if not file.absolute().parent.is_dir():
        raise UserError("no such folder", "make it first", str(file.absolute().parent))
    if file.suffix.lower() != ".png":
        raise UserError(f"{file.name} is no name of a PNG", "end it with .png", "--plot")


def plot_timelines(timelines: dict[str, Timeline], capacity: int | None, file: Path) -> None:
    """Draw each phase's memory by category, operation by operation; needs matplotlib (extra `plots`).

    Args:
        timelines: `Trace.timeline` by name of the phase.
        capacity: bytes of the GPU's memory, drawn as a line; None for no line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timelines = {phase: moments for phase, moments in timelines.items() if moments}
    names = sorted({name for moments in timelines.values() for _, sizes in moments for name in sizes})
    figure, axes = pyplot.subplots(
        1, len(timelines), sharey=True, squeeze=False, figsize=(2.4 * len(timelines) + 2, 4.5), layout="constrained"
    )
    colours = [pyplot.get_cmap("tab20")(number % 20) for number in range(len(names))]
    for place, (phase, moments) in enumerate(timelines.items()):
        panel, at = axes[0][place], range(len(moments))
        stacks = [[sizes.get(name, 0) / GIB for _, sizes in moments] for name in names]
        panel.stackplot(at, stacks, labels=names, colors=colours)
        panel.plot(
            at, [reserved / GIB for reserved, _ in moments], color="black", linewidth=0.5, alpha=0.7, label="reserved"
        )
        if capacity is not None:
            panel.axhline(capacity / GIB, color="black", linestyle="--", label="the GPU's")
        panel.set_title(phase, fontsize=8)
        panel.set_xticks([])
    axes[0][0].set_ylabel("GiB")
    figure.suptitle("What is in a GPU's memory, operation by operation", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=7)
    with atomic(file) as partial:
        figure.savefig(partial, dpi=110)
    pyplot.close(figure)
