"""A run is finished when all its results are there; started again it makes what is missing, and only that."""

import json
import shutil
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from trainings import checkpoints, rows

from finetune.checks.model import open_family
from finetune.data.cache import Cache
from finetune.data.manifest import read_manifest
from finetune.engine.step import StepResult, run_step
from finetune.preparation.encode import prepare
from finetune.recipe import load_recipe
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.logging import LOG_FILE
from finetune.training.job import Job
from finetune.training.run import train
from finetune.training.samples import validation_samples

STEPS = 4
SETTINGS = [
    f"train.steps={STEPS}",
    "checkpoint.every=2",
    "checkpoint.keep_last=all",
    'validation.prompts=[{text = "a ball", shape = "17x64x96", steps = 2}]',
]
Files = dict[Path, int]


@pytest.fixture
def start(recipe_file: Path, runtime: Runtime, capsys) -> Callable[..., str]:
    """Start the run, as `python -m finetune --recipe` does; returns what it says."""

    def run(*overrides: str, resume_step: int | None = None) -> str:
        capsys.readouterr()
        assert train(load_recipe(recipe_file, [*SETTINGS, *overrides]), runtime, resume_step=resume_step) == 0
        return capsys.readouterr().err

    return run


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small_recipe: Callable[[Path], Path], runtime: Runtime) -> Path:
    """The folder of a run that is finished, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    assert train(load_recipe(small_recipe(folder), SETTINGS), runtime) == 0
    return folder / "run"


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """The folder of a test's own run that is finished."""
    output = Path(shutil.copytree(finished, tmp_path / "run"))
    for recipe in (output / "recipe.toml", *(output / "starts").iterdir()):
        recipe.write_text(recipe.read_text().replace(str(finished), str(output)))
    return output


def test_a_run_that_writes_into_its_dataset_reads_nothing_of_its_own(output: Path, recipe_file: Path) -> None:
    (output / LOG_FILE).write_text("12:00:00 starting")  # of the command; else a caption without a video
    shutil.copytree(load_recipe(recipe_file).data.path, output, dirs_exist_ok=True)
    recipe = load_recipe(recipe_file, [*SETTINGS, f"output={output}", f"data.path={output}"])
    found = read_manifest(output, "video", "caption", leave_out=recipe.own_paths)
    assert found.problems == ()
    assert {clip.path.parent for clip in found.clips} == {output}
    assert {each.what for each in found.unused} <= {"written by the run itself", "hidden, or written by the system"}
    assert {each.where for each in found.unused} >= {
        str(output / name) for name in (LOG_FILE, "samples", "checkpoints")
    }


def written(folder: Path) -> Files:
    """When each file of results and checkpoints was written, in nanoseconds."""
    return {
        file: file.stat().st_mtime_ns
        for part in ("lora", "samples", "checkpoints")
        for file in (folder / part).rglob("*")
        if file.is_file()
    }


def test_a_finished_run_is_said_to_be_and_nothing_of_it_is_made_again(start: Callable[..., str], output: Path) -> None:
    before = written(output)
    said = start()
    assert f"this run is finished: {STEPS} steps, and all results are in {output}; raise train.steps to go on" in said
    assert written(output) == before


@pytest.mark.parametrize("part", ["lora", f"samples/step_{STEPS:08d}", f"samples/step_{STEPS:08d}/contact_sheet.png"])
def test_only_what_is_missing_is_made(start: Callable[..., str], output: Path, part: str) -> None:
    before, missing = written(output), output / part
    lost = {file for file in before if file == missing or missing in file.parents}
    shutil.rmtree(missing) if missing.is_dir() else missing.unlink()
    start()
    after = written(output)
    assert after.keys() == before.keys()
    again = {file for file in before if after[file] != before[file]}
    assert lost <= again
    of_samples = {file for file in before if f"step_{STEPS:08d}" in str(file.parent) or file.name == "grid.png"}
    assert again <= (lost if part == "lora" else of_samples)
    assert not any("checkpoints" in str(file) for file in again)


@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:100])])
def test_an_exported_file_that_is_lost_or_cut_short_is_written_again(
    start: Callable[..., str], output: Path, spoil: Callable[[Path], object]
) -> None:
    file = output / "lora" / "pytorch_lora_weights.safetensors"
    before = file.read_bytes()
    spoil(file)
    start()
    assert file.read_bytes() == before


def test_a_stop_between_the_last_step_and_the_export_leaves_the_rest_to_the_next_start(
    start: Callable[..., str], output: Path
) -> None:
    """The adapter of an end of fewer steps is there, and is not taken for this end's."""
    shutil.copytree(output, output.with_name("copy"))
    start("train.steps=6")
    shutil.copytree(output.with_name("copy") / "lora", output / "lora", dirs_exist_ok=True)
    shutil.copy(output.with_name("copy") / "results.json", output / "results.json")
    shutil.rmtree(output / "samples" / "step_00000006")
    start("train.steps=6")
    exported, saved = adapter(output / "lora"), adapter(output / "checkpoints" / "step_00000006" / "lora")
    assert all(torch.equal(exported[name], saved[name]) for name in saved)
    assert (output / "samples" / "step_00000006" / "contact_sheet.png").is_file()


def test_a_finished_run_is_not_trained_again_for_a_damaged_checkpoint(start: Callable[..., str], output: Path) -> None:
    flip(output / "checkpoints" / f"step_{STEPS:08d}" / "state" / "__0_0.distcp")
    before = written(output)
    said = start()
    assert f"the checkpoint of step {STEPS} is damaged" in said
    assert f"this run is finished: {STEPS} steps" in said
    assert written(output) == before
    shutil.rmtree(output / "lora")
    assert "the run goes on from step 2" in start()
    assert checkpoints(output) == [2, STEPS]


def test_more_steps_go_on(start: Callable[..., str], output: Path) -> None:
    assert f"resuming after step {STEPS}: " in start("train.steps=6")
    assert [row["step"] for row in rows(output)] == [1, 2, 3, 4, 5, 6]
    assert checkpoints(output) == [2, 4, 6]


def test_going_back_and_on_again_exports_what_was_trained_then(start: Callable[..., str], output: Path) -> None:
    """At the same last step: the adapter of the first time must not be taken for this one's."""
    before = adapter(output / "lora")
    start("optimizer.lr=1e-2", resume_step=2)
    after, saved = adapter(output / "lora"), adapter(output / "checkpoints" / f"step_{STEPS:08d}" / "lora")
    assert all(torch.equal(after[name], saved[name]) for name in saved)
    assert not all(torch.equal(after[name], before[name]) for name in before)


def test_a_change_of_what_the_average_stands_in_for_exports_again(start: Callable[..., str], tmp_path: Path) -> None:
    averaged = ["ema.decay=0.5", "validation.prompts=[]"]
    start(*averaged)
    average = adapter(tmp_path / "run" / "lora")
    start(*averaged, 'ema.use=["samples"]')
    trained = adapter(tmp_path / "run" / "lora")
    assert not all(torch.equal(trained[name], average[name]) for name in trained)
    assert f"this run is finished: {STEPS} steps" in start(*averaged, 'ema.use=["samples"]')
    start(*averaged)
    again = adapter(tmp_path / "run" / "lora")
    assert all(torch.equal(again[name], average[name]) for name in average)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


# The recipes of its starts


def test_a_recipe_that_is_gone_is_said_and_one_that_is_damaged_is_named(
    start: Callable[..., str], output: Path
) -> None:
    (output / "recipe.toml").unlink()
    assert "recipe.toml is gone, so settings that have changed" in start("train.steps=6")
    (output / "recipe.toml").write_text("")
    with pytest.raises(UserError, match="the run's own copy of its recipe is damaged"):
        start("train.steps=7")


def steps_of(file: Path) -> int:
    return tomllib.loads(file.read_text())["train"]["steps"]


def test_each_start_that_goes_ahead_keeps_its_recipe(start: Callable[..., str], output: Path) -> None:
    start("train.steps=6")
    start("train.steps=5", resume_step=2)
    kept = {file.name: steps_of(file) for file in (output / "starts").glob("*.toml")}
    assert kept == {"after_step_00000000.toml": 4, "after_step_00000004.toml": 6, "after_step_00000002.toml": 5}
    assert steps_of(output / "recipe.toml") == 5


def test_an_end_writes_the_page_of_the_run_with_what_its_starts_have_noted(
    start: Callable[..., str], output: Path
) -> None:
    (output / "report.html").unlink()
    said = start("train.steps=5")
    assert f"the page of the run: {output / 'report.html'}" in said
    page = (output / "report.html").read_text()
    noted = json.loads((output / "starts" / "after_step_00000004.json").read_text())
    assert noted["clips"] == {"trained": 12, "heldout": noted["clips"]["heldout"]}
    assert noted["datasets"][0]["clips"] >= 12
    assert "5 / 5" in page
    assert "train.steps: 4 → 5" in page
    assert "from_pretrained" in (output / "use.py").read_text()
    assert "from_pretrained" in page


def test_a_page_that_cannot_be_written_fails_no_run(start: Callable[..., str], output: Path) -> None:
    (output / "report.html").unlink()
    (output / "report.html").mkdir()
    said = start("train.steps=5")
    assert "warning: the page of the run is not written" in said
    assert (output / "results.json").is_file()


@pytest.mark.parametrize(
    "change, refusal",
    [
        ("train.steps=3", "already at step 4"),
        ("lora.rank=8", "another recipe"),
        ("train.global_batch_size=3", "cannot be split"),
    ],
)
def test_a_start_that_is_refused_leaves_the_runs_recipe_as_it_was(
    recipe_file: Path, runtime: Runtime, output: Path, change: str, refusal: str
) -> None:
    before, starts = (output / "recipe.toml").read_bytes(), sorted((output / "starts").iterdir())
    with pytest.raises(UserError, match=refusal):
        train(load_recipe(recipe_file, [*SETTINGS, change]), runtime)
    assert (output / "recipe.toml").read_bytes() == before
    assert sorted((output / "starts").iterdir()) == starts


def test_a_start_that_is_refused_for_other_clips_leaves_the_runs_recipe_as_it_was(
    recipe_file: Path, runtime: Runtime, output: Path, clips: Path, tmp_path: Path
) -> None:
    fewer = Path(shutil.copytree(clips, tmp_path / "fewer"))
    sorted(fewer.glob("*.txt"))[0].write_text("another caption")
    before = (output / "recipe.toml").read_bytes()
    text = recipe_file.read_text().replace(str(clips), str(fewer))
    recipe_file.write_text(text)
    with pytest.raises(UserError, match=r"another recipe|clips or captions are not those"):
        train(load_recipe(recipe_file, [*SETTINGS, "train.steps=9"]), runtime)
    assert (output / "recipe.toml").read_bytes() == before


def test_a_start_that_cannot_read_the_metrics_changes_nothing(
    recipe_file: Path, runtime: Runtime, output: Path
) -> None:
    """Neither the recipe, nor the checkpoints after the one that it was to go back to."""
    with (output / "metrics.jsonl").open("a") as file:
        file.write("a line of something else\n")
    before, kept = (output / "recipe.toml").read_bytes(), checkpoints(output)
    with pytest.raises(UserError, match="not a row of metrics"):
        train(load_recipe(recipe_file, [*SETTINGS, "train.steps=9"]), runtime, resume_step=2)
    assert (output / "recipe.toml").read_bytes() == before
    assert checkpoints(output) == kept


# Evaluations that fail, or are stopped


def test_a_held_out_loss_that_fails_costs_no_step(recipe_file: Path, runtime: Runtime, tmp_path: Path) -> None:
    cache = tmp_path / "own_cache"
    settings = [f"data.cache={cache}", "validation.heldout_clips=1", "validation.every=3", "checkpoint.every=100"]
    recipe = load_recipe(recipe_file, settings)
    heldout = prepare(recipe, open_family(recipe), runtime).heldout[0]
    item = Cache(cache).path("video", heldout.keys["video"])
    whole = item.read_bytes()

    def damage(job: Job, step: int, *arguments: object, **keywords: object) -> StepResult:
        if step == 2:
            item.write_bytes(whole[:100])
        return run_step(job.state, step, *arguments, **keywords)

    with patch.object(Job, "step", damage), pytest.raises(UserError, match="cached item cannot be read"):
        train(recipe, runtime)
    assert checkpoints(recipe.output) == [3]
    assert train(recipe, runtime) == 0  # it is encoded anew
    assert checkpoints(recipe.output) == [3, 10]


def test_a_stop_while_samples_are_made_leaves_them_to_the_next_start(
    recipe_file: Path, runtime: Runtime, tmp_path: Path
) -> None:
    settings = [*SETTINGS, "train.steps=6", "checkpoint.every=100", "validation.samples_every=3"]
    recipe = load_recipe(recipe_file, settings)
    made: list[int] = []

    def stopped_at_3(job: Job, step: int, stop: Callable[[], bool]) -> object:
        made.append(step)
        return validation_samples(job, step, lambda: step == 3 or stop())

    with patch("finetune.training.run.validation_samples", stopped_at_3):
        assert train(recipe, runtime) == 128 + signal.SIGTERM
    assert made == [0, 3]
    assert checkpoints(recipe.output) == [3]
    assert train(recipe, runtime) == 0
    sheets = sorted(sheet.parent.name for sheet in (recipe.output / "samples").glob("*/contact_sheet.png"))
    assert sheets == [f"step_{step:08d}" for step in (0, 3, 6)]


def test_a_stop_while_the_last_samples_are_made_is_said(
    recipe_file: Path, runtime: Runtime, tmp_path: Path, capsys
) -> None:
    """The weights are exported then, but the run has not made all its results."""
    recipe = load_recipe(recipe_file, SETTINGS)

    def stopped_at_the_end(job: Job, step: int, stop: Callable[[], bool]) -> object:
        return validation_samples(job, step, lambda: step == STEPS or stop())

    with patch("finetune.training.run.validation_samples", stopped_at_the_end):
        assert train(recipe, runtime) == 128 + signal.SIGTERM
    said = capsys.readouterr().err
    assert "stopped by SIGTERM" in said
    assert "done." not in said
    assert train(recipe, runtime) == 0
    assert (recipe.output / "samples" / f"step_{STEPS:08d}" / "contact_sheet.png").is_file()


def test_a_folder_in_which_no_step_was_made_takes_another_recipe(
    recipe_file: Path, runtime: Runtime, tmp_path: Path
) -> None:
    """Out of memory in the first step, say: the settings that fit are those of another training."""
    with patch.object(Job, "step", side_effect=RuntimeError("too large")), pytest.raises(RuntimeError):
        train(load_recipe(recipe_file, ["lora.rank=8"]), runtime)
    assert (tmp_path / "run" / "recipe.toml").is_file()
    assert train(load_recipe(recipe_file, ["train.steps=1"]), runtime) == 0
