"""The checkpoints of the least held-out loss are kept, and a run ends where that loss has had no new least one for long enough."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import Finetune
from safetensors.torch import load_file
from trainings import adapter, checkpoints, rows, steps_done

from finetune.checks.model import open_family
from finetune.engine.weights.best import RECORD, HeldOutRecord, ranked
from finetune.recipe import load_recipe
from finetune.runtime.distributed import Runtime
from finetune.training.finished import recipe_of_run, trained_of
from finetune.training.output import ended_at
from finetune.training.run import train

# Updates that are too large: the held-out loss falls and rises.
SETTINGS = [
    "optimizer.lr=0.05",
    "train.steps=8",
    "validation.every=1",
    "validation.sigmas=2",
]
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_recipe, runtime: Runtime, request) -> Train:
    """Train in this process, in a folder by name: `trained("straight", "validation.patience=1")`. Returns the run's folder."""
    recipe_file = small_recipe(tmp_path_factory.mktemp("best"))
    held = f"validation.heldout={request.getfixturevalue('heldout')}"

    def run(name: str, *overrides: str) -> Path:
        output = recipe_file.parent / name
        assert train(load_recipe(recipe_file, [*SETTINGS, held, f"output={output}", *overrides]), runtime) == 0
        return output

    return run


@pytest.fixture(scope="module")
def straight(trained: Train) -> Path:
    """The run that is not ended."""
    return trained("straight", "checkpoint.keep_best=2", "checkpoint.keep_last=1")


def heldout(output: Path) -> dict[int, float]:
    return {row["step"]: row["heldout_loss"] for row in rows(output, "heldout_loss")}


def ends_at(losses: dict[int, float], patience: int) -> int:
    """The first step at which there was no new least loss for so many measurements."""
    for step in losses:
        before = [losses[each] for each in range(step + 1)]
        if step - before.index(min(before)) >= patience:
            return step
    return max(losses)


@pytest.mark.parametrize("stopped", range(1, 7))
def test_a_record_goes_on_from_what_a_checkpoint_notes(stopped: int) -> None:
    losses = [3.0, 2.0, 2.5, float("nan"), 1.5, 2.0, 1.75]
    straight, first, second = HeldOutRecord(2), HeldOutRecord(2), HeldOutRecord(2)
    for step, loss in enumerate(losses):
        straight.note(step, loss)
        if step == stopped:
            second.restore(json.loads(json.dumps(first.facts(step))))
        (first if step < stopped else second).note(step, loss)
    assert second == straight
    assert (straight.least, straight.best, straight.misses) == ([(1.5, 4), (1.75, 6)], 1.5, 2)
    assert [straight.is_over(patience) for patience in (None, 2, 3)] == [False, True, False]


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_best_are_kept_beside_the_last(straight: Path) -> None:
    losses = heldout(straight)
    best = sorted((step for step in losses if step), key=lambda step: losses[step])[:2]
    assert checkpoints(straight) == sorted({*best, 8})
    facts = json.loads((straight / "checkpoints" / f"step_{best[0]:08d}" / "trainer.json").read_text())
    assert facts["heldout_loss"] == losses[best[0]]


def test_patience_ends_the_run_with_its_results_and_more_of_it_goes_on(trained: Train, straight: Path, capsys) -> None:
    end = ends_at(heldout(straight), 1)
    assert end < 8
    output = trained("patient", "validation.patience=1")
    assert steps_done(output) == end
    assert json.loads((output / "results.json").read_text())["step"] == end
    capsys.readouterr()
    trained("patient", "validation.patience=1")
    said = capsys.readouterr()
    assert f"this run is finished: {end} steps (the held-out loss was measured 1 time without" in said.out + said.err
    assert "raise validation.patience, or remove it, to go on" in said.out + said.err
    assert steps_done(output) == end
    trained("patient", "validation.patience=100")
    assert same(adapter(output), adapter(straight))
    assert heldout(output) == heldout(straight)


def test_a_run_that_was_interrupted_ends_at_the_same_step(trained: Train, straight: Path) -> None:
    end = ends_at(heldout(straight), 1)
    trained("interrupted", "validation.patience=1", f"train.steps={end - 1}")
    output = trained("interrupted", "validation.patience=1")
    assert steps_done(output) == end


def test_patience_that_a_resumed_run_has_used_up_exports_the_step_that_it_has_reached(trained: Train) -> None:
    """One past the last measurement: the weights are of that step, and are noted as such."""
    settings = ["validation.every=2", "train.steps=6", "checkpoint.every=1", "checkpoint.keep_last=all"]
    output = trained("reached", *settings, "optimizer.lr=0.5")
    losses = heldout(output)
    assert losses[2] > losses[0]
    for step in (4, 5, 6):
        shutil.rmtree(output / "checkpoints" / f"step_{step:08d}")
    expected = load_file(output / "checkpoints" / "step_00000003" / "lora" / "pytorch_lora_weights.safetensors")
    patient = [*settings, "optimizer.lr=0.5", "validation.patience=1"]
    trained("reached", *patient)
    assert json.loads((output / "results.json").read_text())["step"] == 3
    assert same(adapter(output), expected)
    recipe = recipe_of_run(output, [])
    (found,) = trained_of(recipe, open_family(recipe, with_weights=False))
    assert found.recipe.run_folder == output
    before = (output / "results.json").stat().st_mtime_ns
    trained("reached", *patient)
    assert (output / "results.json").stat().st_mtime_ns == before
    shutil.rmtree(output / "checkpoints")  # to save room: the run is still one that has ended there
    assert ended_at(recipe) == 3
    (found,) = trained_of(recipe, open_family(recipe, with_weights=False))
    assert [form.folder.name for form in found.forms] == ["lora"]


def test_what_is_watched_changes_no_weight(trained: Train, straight: Path) -> None:
    output = trained(
        "watched", "tracking.quantiles_every=1", "tracking.block_norms_every=2", "tracking.trackers=tensorboard"
    )
    assert same(adapter(output), adapter(straight))
    assert [row["loss"] for row in rows(output)] == [row["loss"] for row in rows(straight)]


def test_export_and_sample_take_the_best(straight: Path, finetune: Finetune, tmp_path: Path) -> None:
    recipe, losses = straight / "recipe.toml", heldout(straight)
    best = min((step for step in losses if step), key=lambda step: losses[step])
    done = finetune("export", "--recipe", recipe, "--step", "best", "--out", tmp_path / "lora")
    assert done.returncode == 0, done.stderr
    exported = (tmp_path / "lora" / "pytorch_lora_weights.safetensors").read_bytes()
    kept = straight / "checkpoints" / f"step_{best:08d}" / "lora" / "pytorch_lora_weights.safetensors"
    assert exported == kept.read_bytes()
    prompt = ["--prompt", "a ball", "--shape", "9x64x64", "--steps", "2", "--out", tmp_path / "videos", "--compare"]
    done = finetune("sample", "--recipe", recipe, "--step", "best", *prompt)
    assert done.returncode == 0, done.stderr
    assert f"the best checkpoint by held-out loss is that of step {best}" in done.stdout + done.stderr


@pytest.mark.full
def test_two_processes_end_where_one_does(straight: Path, finetune: Finetune, tmp_path: Path) -> None:
    settings = ["validation.patience=1", "checkpoint.keep_best=2", f"output={tmp_path / 'run'}"]
    overrides = [part for setting in settings for part in ("--set", setting)]
    for _ in range(2):  # the second start has nothing to do
        done = finetune("--recipe", straight / "recipe.toml", *overrides, processes=2)
        assert done.returncode == 0, done.stderr
        assert steps_done(tmp_path / "run") == ends_at(heldout(straight), 1)
    assert heldout(tmp_path / "run") == pytest.approx(
        {step: loss for step, loss in heldout(straight).items() if step <= steps_done(tmp_path / "run")}, rel=1e-3
    )


def test_losses_that_were_measured_otherwise_are_not_compared() -> None:
    """Those of before that was noted count, both for the run that goes on and for the best of its checkpoints."""
    before, first, second = HeldOutRecord(), HeldOutRecord(measured_by="a"), HeldOutRecord(measured_by="b")
    facts = {}
    for step, record, loss in ((10, before, 0.3), (20, first, 0.2), (30, second, 0.4)):
        record.note(step, loss)
        facts[step] = record.facts(step)
    del facts[10][RECORD]["measured_by"]
    assert ranked([10, 20], facts.__getitem__) == [20, 10]
    assert ranked([10, 20, 30], facts.__getitem__) == [10, 30]
    for step, best in ((10, 0.3), (20, None), (30, 0.4)):
        resumed = HeldOutRecord(measured_by="b")
        resumed.restore(facts[step])
        assert resumed.best == best
