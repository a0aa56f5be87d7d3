"""A plan as a picture: what a GPU's memory holds over time, phase by phase."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.runtime.errors import UserError, harmless
from finetune.runtime.files import atomic
from finetune.runtime.units import GIB
from finetune.tracking.drawing import BLUE, FAINT, GREEN, ORANGE, PURPLE, RED, SOFT, TEXT, check_matplotlib, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Timeline = list[tuple[int, dict[str, int]]]

# From what lives longest, at the bottom, to what comes and goes: (title, the categories that it has, colour).
_KINDS = (
    ("frozen weights", ("frozen weights", "transformers not in use", "load"), "#9db7e4"),
    ("trained weights", ("trained weights", "average"), BLUE),
    ("optimizer state", ("optimizer state",), PURPLE),
    ("gradients", ("gradients",), GREEN),
    ("activations", ("activations",), ORANGE),
    ("backward pass", ("backward pass", "update"), "#f0c38d"),
    ("encoders and VAE", ("text encoder", "VAE", "encoding"), "#8fcdb6"),
    ("generating", ("generating", "gathering"), "#cdb5e2"),
    ("other", (), FAINT),
)
_SHOWN_UP_TO = 3  # times the highest peak: a GPU's memory beyond that is told and not drawn


@dataclass(frozen=True)
class Pictured:
    """What a picture says besides the timelines.

    Attributes:
        title: which training it is of.
        peaks: bytes reserved at most in each phase, by its name.
        capacity: bytes that torch can have of the GPU; None if no GPU is named.
        gpu: whose memory that is, in words.
    """

    title: str
    peaks: Mapping[str, int]
    capacity: int | None
    gpu: str


def check_plot(file: Path) -> None:
    """Raises UserError if no picture can be drawn there."""
    check_matplotlib("--plot")
    if not file.absolute().parent.is_dir():
        raise UserError("no such folder", "make it first", str(file.absolute().parent))
    if file.suffix.lower() != ".png":
        raise UserError(f"{file.name} is no name of a PNG", "end it with .png", "--plot")


def plot_timelines(timelines: Mapping[str, Timeline], told: Pictured, file: Path) -> None:
    """Draw each phase's memory by kind, operation by operation; needs matplotlib (extra `plots`).

    Args:
        timelines: `Trace.timeline` by name of the phase.
    """
    timelines = {phase: moments for phase, moments in timelines.items() if moments}
    highest = max((told.peaks.get(phase, 0) for phase in timelines), default=1) or 1
    unit, name = (GIB, "GiB") if highest >= GIB // 10 else (2**20, "MiB")
    is_near = told.capacity is not None and told.capacity <= _SHOWN_UP_TO * highest
    top = max(highest, told.capacity or 0) if is_near else highest
    with drawing("--plot") as pyplot:
        figure, axes = pyplot.subplots(
            1,
            len(timelines),
            sharey=True,
            squeeze=False,
            figsize=(max(7.5, 1.9 * len(timelines) + 1), 5),
            layout="constrained",
        )
        handles: dict[str, Any] = {}
        for panel, (phase, moments) in zip(axes[0], timelines.items(), strict=True):
            handles |= _draw_phase(panel, moments, unit)
            peak = told.peaks.get(phase, 0)
            panel.axhline(peak / unit, color=TEXT, linewidth=0.8)
            panel.annotate(
                f"{peak / unit:.{_digits(peak / unit)}f}",
                (0.5, peak / unit),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                weight="bold",
            )
            if is_near and told.capacity is not None:
                handles["the GPU's memory"] = panel.axhline(
                    told.capacity / unit, color=RED, linestyle="--", linewidth=1.4
                )
            panel.set_title(_broken(phase), fontsize=9, weight="normal", loc="center", color=SOFT)
            panel.set(xticks=[], ylim=(0, top / unit * 1.1))
            panel.grid(axis="x", visible=False)
        axes[0][0].set_ylabel(name)
        memory = (
            ""
            if told.capacity is None
            else f"; {told.gpu}: {told.capacity / GIB:.1f} GiB" + ("" if is_near else " (far above the picture)")
        )
        figure.suptitle(
            f"Planned memory of a GPU: {harmless(told.title)}\nreserved at most, by phase{memory}".replace("$", r"\$"),
            fontsize=11,
            x=0.01,
            ha="left",
        )
        order = [title for title, *_ in _KINDS]
        shown = sorted(handles, key=lambda each: order.index(each) if each in order else len(order))
        figure.legend([handles[each] for each in shown], shown, loc="outside lower center", ncols=5)
        with atomic(file) as partial:
            figure.savefig(partial, format="png")


def _draw_phase(panel: "Axes", moments: Timeline, unit: int) -> dict[str, Any]:
    """Draw what is in memory, the kinds one on the other, and what is reserved; returns what stands for them in a legend."""
    named = {category for _, categories, _ in _KINDS for category in categories}
    handles, at = {}, range(len(moments))
    below = [0.0] * len(moments)
    for title, categories, colour in _KINDS:
        sizes = [
            sum(size for name, size in found.items() if (name in categories if categories else name not in named))
            for _, found in moments
        ]
        if not any(sizes):
            continue
        above = [low + size / unit for low, size in zip(below, sizes, strict=True)]
        handles[title] = panel.fill_between(at, below, above, color=colour, linewidth=0)
        below = above
    (line,) = panel.plot(at, [reserved / unit for reserved, _ in moments], color=SOFT, linewidth=0.9)
    panel.margins(x=0)
    return {**handles, "reserved by the allocator": line}


def _digits(value: float) -> int:
    return 1 if value >= 10 else 2


def _broken(phase: str) -> str:
    """A phase's name with its shape in a line of its own."""
    words, _, last = phase.rpartition(" ")
    return f"{words}\n{last}" if words and "x" in last and last[0].isdigit() else f"{phase}\n"
