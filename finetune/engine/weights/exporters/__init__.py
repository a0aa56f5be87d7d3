"""Forms in which trained weights are written for other tools. A new one is one file here and one line in `EXPORTERS`."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from finetune.engine.weights.exporters import (
    comfyui,
    diffusers_lora,
    diffusers_transformer,
    merged,
    partial,
    peft_folder,
)
from finetune.engine.weights.exporters.exporter import Exporter
from finetune.models.family import Family
from finetune.recipe.table import Table
from finetune.runtime.errors import Problem, UserError

EXPORTERS: dict[str, Exporter] = {
    "diffusers_lora": diffusers_lora.EXPORTER,
    "diffusers_transformer": diffusers_transformer.EXPORTER,
    "comfyui_lora": comfyui.EXPORTER,
    "peft_lora": peft_folder.EXPORTER,
    "merged_lora": merged.EXPORTER,
    "partial_transformer": partial.TRANSFORMER,
    "partial_difference": partial.DIFFERENCE,
}


def exporter_of(method: str, name: str | None = None) -> Exporter:
    """The form that a run of a `train.method` is written in.

    Args:
        name: its format, or its name in `EXPORTERS`; the first that is for the method if None.
    Raises:
        UserError: there is no form of this name for the method.
    """
    fitting = {each: exporter for each, exporter in EXPORTERS.items() if exporter.method == method}
    if name is None and fitting:
        return next(iter(fitting.values()))
    if name in fitting:
        return fitting[name]
    for exporter in fitting.values():
        if exporter.format == name:
            return exporter
    named: dict[str, str] = {}  # of forms that share a format, the first is meant by it
    for each, exporter in fitting.items():
        named[each if exporter.format in named else exporter.format] = each
    formats = ", ".join(named)
    raise UserError(f"weights of {method!r} are not written as {name!r}", f"formats are: {formats}", "--format")


def export_problems(
    method: str, formats: Sequence[str], precision: str | None, settings: Table | None
) -> Iterator[Problem]:
    """Forms that there are not for a method, or not in a precision, or not with its settings, see `Recipe.adapter`."""
    for name in formats:
        try:
            exporter = exporter_of(method, name)
        except UserError as error:
            yield from (replace(problem, where="export.formats") for problem in error.problems)
            continue
        if precision is not None and precision not in exporter.precisions:
            cure = f"take one of {', '.join(exporter.precisions)}, or leave {name!r} out"
            yield Problem(f"{name!r} is not written in {precision}", "export.precision", cure)
        if refused := exporter.refused(settings):
            yield Problem(refused[0], "export.formats", refused[1])


def unknown_forms(method: str, formats: Sequence[str], family: Family) -> Iterator[Problem]:
    """Forms that there are not for a model."""
    for name in formats:
        if refused := exporter_of(method, name).problem(family):
            what, instead = refused
            yield Problem(what, "export.formats", instead)
