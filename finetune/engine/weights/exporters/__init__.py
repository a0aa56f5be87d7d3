"""Forms in which trained weights are written for other tools. A new one is one file here and one line in `EXPORTERS`."""

from finetune.engine.weights.exporters import diffusers_lora, diffusers_transformer, partial
from finetune.engine.weights.exporters.exporter import Exporter
from finetune.runtime.errors import UserError

EXPORTERS: dict[str, Exporter] = {
    "diffusers_lora": diffusers_lora.EXPORTER,
    "diffusers_transformer": diffusers_transformer.EXPORTER,
    "partial_transformer": partial.TRANSFORMER,
    "partial_difference": partial.DIFFERENCE,
}


def exporter_of(method: str, name: str | None = None) -> Exporter:
    """The form that a run of a `train.method` is written in.

    Args:
        name: in `EXPORTERS`; the first that is for the method if None.
    Raises:
        UserError: there is no form of this name for the method.
    """
    fitting = {each: exporter for each, exporter in EXPORTERS.items() if exporter.method == method}
    if name is None and fitting:
        return next(iter(fitting.values()))
    if name is None or name not in fitting:
        raise UserError(
            f"weights of {method!r} are not written as {name!r}", f"formats are: {', '.join(fitting)}", "--format"
        )
    return fitting[name]
