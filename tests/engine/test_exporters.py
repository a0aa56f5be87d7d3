"""Forms of exported weights are a registry: a new one is a file and a line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from exports import export_weights
from torch import nn

from finetune.engine.weights import exporters
from finetune.engine.weights.exporters import EXPORTERS, exporter_of
from finetune.engine.weights.exporters.exporter import Details, Exporter, gathered
from finetune.models.family import Family
from finetune.runtime.distributed import Runtime
from finetune.training.job import Job
from finetune.training.output import Results


def test_a_form_from_outside_is_what_a_run_writes(
    build_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(transformer: nn.Module, family: Family, folder: Path, runtime: Runtime, details: Details) -> None:
        shapes = {name: list(value.shape) for name, value in gathered(transformer, trained_only=True).items()}
        folder.mkdir(parents=True)
        (folder / "shapes.json").write_text(json.dumps(shapes))

    own = {"shapes": Exporter("lora", lambda family: f"shapes_of_{family.name}", write)}
    monkeypatch.setattr(exporters, "EXPORTERS", own | EXPORTERS)
    job = build_job()
    folder = Results(job).export()
    assert folder == (job.recipe.output / "shapes_of_ltx").absolute()
    written = json.loads((folder / "shapes.json").read_text())
    trained = {name: list(each.shape) for name, each in job.state.transformer.named_parameters() if each.requires_grad}
    assert sorted(written.values()) == sorted(trained.values())


@pytest.mark.parametrize("method, settings", [("lora", []), ("full", []), ("partial", ["partial.modules=norm"])])
def test_a_run_of_each_method_has_a_form(
    build_job: Callable[..., Job], tmp_path: Path, method: str, settings: list[str]
) -> None:
    job = build_job(f"train.method={method}", *settings)
    export_weights(job.state, method, tmp_path / "out")
    assert exporter_of(method).method == method
    assert list((tmp_path / "out").glob("*.safetensors"))
