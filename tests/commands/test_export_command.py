"""The command that exports a checkpoint: in the run's own form, or another that is named."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.commands import export
from finetune.engine.weights.exporters import EXPORTERS, diffusers_lora
from finetune.engine.weights.exporters.exporter import Details
from finetune.recipe import load_recipe
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.training.job import Job


@pytest.fixture
def run(build_job: Callable[..., Job], recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Export the only checkpoint of a run, in this process."""
    job = build_job()
    job.step(0, [job.micro_batches()[index] for index in range(job.split.accumulation)])
    job.save(1)
    monkeypatch.setattr(export, "with_runtime", lambda recipe, body: body(job.state.runtime))

    def command(*arguments: str) -> None:
        parser = argparse.ArgumentParser()
        export.add_arguments(parser)
        export.run(parser.parse_args(["--recipe", str(recipe_file), *arguments]))

    return command


def test_a_second_form_is_written_where_it_is_named(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(transformer, family, folder: Path, runtime: Runtime, details: Details) -> None:
        folder.mkdir()
        (folder / "other").write_text(family.name)

    monkeypatch.setitem(EXPORTERS, "other", type(diffusers_lora.EXPORTER)("lora", lambda family: "other", write))
    run("--out", str(tmp_path / "first"))
    run("--out", str(tmp_path / "second"), "--format", "other")
    assert [file.name for file in (tmp_path / "first").iterdir()] == [diffusers_lora.LORA_FILE]
    assert (tmp_path / "second" / "other").read_text() == "ltx"


def test_a_form_that_is_not_for_the_method_lists_those_that_are(run: Callable[..., None], tmp_path: Path) -> None:
    named = r"(?s)not written as 'diffusers_transformer'.*formats are: diffusers, comfyui, peft, merged"
    with pytest.raises(UserError, match=named):
        run("--out", str(tmp_path / "out"), "--format", "diffusers_transformer")
    assert not (tmp_path / "out").exists()


def test_the_optimizers_state_is_not_needed(run: Callable[..., None], recipe_file: Path, tmp_path: Path) -> None:
    """Moments would need memory, and those in few bits the number of ranks that saved them."""
    file = load_recipe(recipe_file).output / "checkpoints" / "step_00000001" / "trainer.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({**facts, "parts": ["model"]}))
    run("--out", str(tmp_path / "out"))
    assert (tmp_path / "out" / diffusers_lora.LORA_FILE).is_file()
