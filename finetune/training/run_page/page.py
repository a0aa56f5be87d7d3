"""Writes the page of a run: one HTML file that needs no other file, no server and no network."""

import base64
import hashlib
import math
import time
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import finetune
from finetune.recipe import RECIPE_FILE
from finetune.runtime.errors import harmless
from finetune.runtime.files import atomic
from finetune.runtime.logging import LOG_FILE
from finetune.tracking.curves import points_of
from finetune.tracking.drawing import SERIES, SERIES_ON_DARK
from finetune.training.facts import trigger_words
from finetune.training.run_page.charts import Mark, charts_of
from finetune.training.run_page.gathered import RunPart, gather
from finetune.training.run_page.previews import SampleGrid, sample_grid
from finetune.training.run_page.settings import compared

PAGE_FILE = "report.html"
_TEMPLATES = Path(__file__).parent / "template"
_MEDIA_BYTES = 19 * 10**6  # of all previews, as text
_MOST_MARKS = 40
_LONGEST = 4000  # characters of one value


def write_run_page(run: Path, is_running: bool | None = None, seconds: float = 600.0) -> tuple[Path, int]:
    """Write report.html into a run's folder; returns its path and its size in bytes. Nothing else there is changed.

    Args:
        run: the run's output folder; of two experts, that which both lie in.
        is_running: see `gather`.
        seconds: after this long no further previews of samples are made.
    Raises:
        UserError: there is no run in it, or its recipe or metrics are damaged, or the page cannot be written.
    """
    text = render_run(gather(run, is_running), run, seconds).encode("utf-8", "backslashreplace")
    path = run / PAGE_FILE
    with atomic(path) as partial:
        partial.write_bytes(text)
    return path, len(text)


def render_run(parts: Sequence[RunPart], run: Path, seconds: float) -> str:
    """The page as HTML. Names and captions are escaped, and the page's policy lets no script run but its own."""
    script = (_TEMPLATES / "run.js").read_text(encoding="utf-8")
    budget, shown = _MEDIA_BYTES // len(parts), []
    for part in parts:
        shown.append(_shown(part, sample_grid(part.folder, part.recipe, run, budget, seconds / len(parts))))
    last = parts[-1]
    return _template().render(
        name=run.absolute().name,
        folder=str(run.absolute()),
        parts=shown,
        state=_state(parts),
        about=_about(last),
        note=last.note,
        devices=_devices(last),
        datasets=last.note.get("datasets") or [],
        versions=last.note.get("versions") or {},
        settings=compared(last.recipe),
        logs=[log.relative_to(run).as_posix() for part in parts if (log := part.folder / LOG_FILE).is_file()],
        recipe_text=_recipe_text(last),
        recipe_file=(last.folder / RECIPE_FILE).relative_to(run).as_posix(),
        script=next((part.script for part in reversed(parts) if part.script), ""),
        words=trigger_words(last.recipe),
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=finetune.__version__,
        style=(_TEMPLATES / "run.css").read_text(encoding="utf-8") + _palette(),
        code=script,
        code_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


@lru_cache
def _template() -> Any:
    """The page's template, compiled once in a process: that takes a tenth of a second."""
    from jinja2 import ChainableUndefined, Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=ChainableUndefined,  # notes of other versions may lack something
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "visible": lambda value: _cut(harmless(str(value))),
        "whole": harmless,
        "number": lambda value: f"{value:,}" if _is_number(value) else "?",
        "clock": lambda value: _clock(value) if _is_number(value) else "?",
        "moment": lambda value: _cut(harmless(f"{str(value)[:16].replace('T', ' ')} UTC")),
        "gib": lambda size: f"{size / 2**30:.2f} GiB",
    }
    return environment.get_template("run.html")


# What the template shows


def _shown(part: RunPart, grid: SampleGrid | None) -> dict[str, Any]:
    """What is shown of one transformer's training."""
    marks = _marks(part)
    return {
        "expert": part.expert,
        "tiles": _tiles(part),
        "alarms": _alarms(part),
        "charts": [each.drawn(marks) for each in charts_of(part.rows)],
        "starts": part.starts,
        "samples": grid,
        "memory": _memory(part),
    }


def _state(parts: Sequence[RunPart]) -> tuple[str, str]:
    """(kind, words): how far the run is."""
    running = next((part for part in parts if part.is_running), None)
    if running is not None and not running.is_finished:
        return "running", f"under way: step {running.step:,} of {running.steps:,}"
    if all(part.is_finished for part in parts):
        return "finished", "finished"
    stopped = next(part for part in parts if not part.is_finished)
    return "stopped", f"stopped after step {stopped.step:,} of {stopped.steps:,}; the same command goes on"


def _tiles(part: RunPart) -> list[tuple[str, str]]:
    """(value, label) of what is asked first."""
    rows = part.rows
    heldout, _ = points_of(rows, "heldout_loss")
    losses, _ = points_of(rows, "loss")
    seconds, _ = points_of(rows, "seconds_per_step")
    found = [(f"{part.step:,} / {part.steps:,}", "steps")]
    if heldout:
        found.append((f"{heldout[0][1]:.4g} → {heldout[-1][1]:.4g}", "held-out loss, first → last"))
        best = min(heldout, key=lambda point: point[1])
        if best[0] != heldout[-1][0]:
            found.append((f"{best[1]:.4g}", f"least held-out loss, step {best[0]:,}"))
    if losses:
        recent = [value for _, value in losses[-max(1, len(losses) // 30) :]]
        found.append(
            (
                f"{sum(recent) / len(recent):.4g}",
                f"training loss, mean of {len(recent)}" if len(recent) > 1 else "training loss",
            )
        )
    if seconds:
        ordered = sorted(value for _, value in seconds)
        found.append((f"{ordered[len(ordered) // 2]:.3g} s", "a step, median"))
        found.append((_clock(sum(ordered)), "in steps"))
    if peak := _peak(rows):
        found.append((f"{peak:.2f} GiB", "most memory reserved"))
    return found


def _alarms(part: RunPart) -> list[str]:
    """What is wrong with the figures, in sentences."""
    found = []
    for name, title in (
        ("loss", "The training loss"),
        ("heldout_loss", "The held-out loss"),
        ("grad_norm", "The gradient norm"),
    ):
        _, gaps = points_of(part.rows, name)
        if gaps:
            first = f"first at step {gaps[0]:,}" if len(gaps) > 1 else f"at step {gaps[0]:,}"
            found.append(f"{title} is not finite {first}; --resume-step N goes back to a checkpoint before it.")
    heldout, _ = points_of(part.rows, "heldout_loss")
    if len(heldout) > 1 and heldout[-1][1] > heldout[0][1]:
        found.append(
            "The held-out loss is higher than at the start: too many steps for these clips, or too high a learning rate."
        )
    return found


def _marks(part: RunPart) -> list[Mark]:
    """Where it was started again, and what that changed; of very many, the latest."""
    marks = [
        Mark(start.step, "; ".join(start.changes) or "started again", bool(start.changes))
        for start in part.starts
        if start.step
    ]
    return marks[-_MOST_MARKS:]


def _memory(part: RunPart) -> dict[str, Any]:
    """Planned and measured memory of the steps; what metrics tell where there is no more."""
    names = [(_title(name), name) for name in ("allocated", "reserved")]
    measured, planned = part.memory.get("measured") or {}, part.memory.get("planned") or {}
    errors = part.memory.get("relative_error") or {}
    rows = [
        (title, _number_or_none(planned.get(name)), measured[name], _number_or_none(errors.get(name)))
        for title, name in names
        if _is_number(measured.get(name))
    ]
    total = next(
        (device.get("memory_gib") for device in part.note.get("devices") or [] if device.get("memory_gib")), None
    )
    return {"rows": rows, "peak": _peak(part.rows), "total": total}


def _peak(rows: Sequence[dict[str, Any]]) -> float | None:
    values, _ = points_of(rows, "peak_memory_reserved_gib")
    return max((value for _, value in values), default=None)


def _about(part: RunPart) -> list[tuple[str, str]]:
    """(what, value) of the training in a few words."""
    recipe, note = part.recipe, part.note
    model = note.get("model") or {}
    method = {"lora": "LoRA", "full": "full finetuning", "partial": "finetuning of some weights"}[recipe.train.method]
    adapter = recipe.adapter.model_dump() if recipe.adapter is not None else {}
    rank = f", rank {adapter['rank']}, alpha {adapter['alpha']:g}" if {"rank", "alpha"} <= adapter.keys() else ""
    optimizer = recipe.optimizer.model_dump()
    rate = f", lr {optimizer['lr']:g}" if isinstance(optimizer.get("lr"), float) else ""
    found = [
        ("base model", str(model.get("base_model") or recipe.model.path)),
        ("family", str(note.get("title") or recipe.model.family)),
        ("method", method + rank),
        ("optimizer", f"{optimizer.get('name', '')}{rate}, {recipe.schedule.name}"),
        ("samples of a step", str(recipe.train.global_batch_size)),
        ("shapes", ", ".join(map(str, recipe.data.stated_buckets))),
    ]
    clips = note.get("clips")
    if isinstance(clips, dict) and {"trained", "heldout"} <= clips.keys():
        held = f", {clips['heldout']} held out" if clips["heldout"] else ""
        found.append(("clips", f"{clips['trained']} trained on{held}"))
    if model.get("base_license"):
        found.append(("base model's licence", str(model["base_license"])))
    if words := trigger_words(recipe):
        found.append(("trigger word", ", ".join(words)))
    return found


def _devices(part: RunPart) -> list[str]:
    """The devices of each host in a line, such as "4 × NVIDIA H100 80GB HBM3 (79.1 GiB) on node0"."""
    counted: Counter[str] = Counter()
    for device in part.note.get("devices") or []:
        memory = f" ({device['memory_gib']} GiB)" if device.get("memory_gib") else ""
        counted[f"{device.get('name', '?')}{memory} on {device.get('host', '?')}"] += 1
    return [f"{count} × {text}" for text, count in counted.items()]


def _recipe_text(part: RunPart) -> str:
    try:
        return (part.folder / RECIPE_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# Texts and numbers


def _palette() -> str:
    """The curves' colours, as the pictures have them."""
    light = "".join(f"--c{place}:{colour};" for place, colour in enumerate(SERIES))
    dark = "".join(f"--c{place}:{colour};" for place, colour in enumerate(SERIES_ON_DARK))
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _number_or_none(value: Any) -> float | None:
    return value if _is_number(value) else None


def _title(name: str) -> str:
    return name.capitalize()


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"


def _clock(seconds: float) -> str:
    """A duration."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{int(seconds // 60)}:{int(seconds % 60):02d} min"
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d} h"
