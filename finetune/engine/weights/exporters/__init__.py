"""Forms in which trained weights are written for other tools. A new one is one file here and one line in `EXPORTERS`."""

from finetune.engine.weights.exporters import diffusers_lora, diffusers_transformer
from finetune.engine.weights.exporters.exporter import Exporter

EXPORTERS: dict[str, Exporter] = {
    "diffusers_lora": diffusers_lora.EXPORTER,
    "diffusers_transformer": diffusers_transformer.EXPORTER,
}


def exporter_of(method: str) -> Exporter:
    """The form that a run of a `train.method` is written in: the first that is for it."""
    return next(exporter for exporter in EXPORTERS.values() if exporter.method == method)
