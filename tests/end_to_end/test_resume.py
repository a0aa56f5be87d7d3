"""A run that is stopped, killed and resumed ends where the run that was never disturbed ends. Real processes and signals."""

import re
import shutil
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from every_family import few
from processes import Finetune
from trainings import Run, adapter, checkpoints, resumed_after, rows, steps_done

STEPS = 20


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_ltx: Path, clips: Path, heldout: Path, cache: Path) -> Path:
    """Two buckets, dropped captions, a moving rate, loader processes, a held-out loss: all that must be restored."""
    path = tmp_path_factory.mktemp("resume") / "recipe.toml"
    path.write_text(
        f"""
[model]
family = "ltx"
path = "{tiny_ltx}"
[data]
path = "{clips}"
buckets = ["17x64x96", "9x64x64"]
caption_dropout = 0.2
cache = "{cache}"
workers = 1
[train]
steps = {STEPS}
global_batch_size = 4
precision = "float32"
[lora]
rank = 4
alpha = 8
[optimizer]
lr = 1e-2
[schedule]
name = "cosine"
warmup_steps = 4
[checkpoint]
every = 2
[validation]
heldout = "{heldout}"
sigmas = 1
every = 5
"""
    )
    return path


@pytest.fixture(scope="module")
def straight(recipe: Path) -> Run:
    """The run that is never disturbed, in two processes."""
    run = Run(recipe, recipe.with_name("straight"), processes=2)
    assert run.wait() == 0, run.said
    return run


@dataclass(frozen=True)
class Disturbed:
    """One run in three parts: stopped politely, killed, finished. `alone` goes on from the first part in one process."""

    stopped: Run
    killed: Run
    finished: Run
    alone: Run
    at_stop: list[int]  # its checkpoints after each part
    at_kill: list[int]


@pytest.fixture(scope="module")
def disturbed(recipe: Path) -> Disturbed:
    output = recipe.with_name("disturbed")
    stopped = Run(recipe, output, processes=2)
    stopped.wait_until(lambda: steps_done(output) >= 3)
    stopped.process.send_signal(signal.SIGTERM)
    stopped.wait()
    at_stop = checkpoints(output)
    copy = Path(shutil.copytree(output, recipe.with_name("alone")))

    killed = Run(recipe, output, processes=2)
    killed.wait_until(lambda: checkpoints(output)[-1] >= at_stop[-1] + 2)
    killed.kill_all()
    at_kill = checkpoints(output)

    finished = Run(recipe, output, processes=2)
    finished.wait()
    alone = Run(recipe, copy, processes=0)
    alone.wait()
    return Disturbed(stopped, killed, finished, alone, at_stop, at_kill)


# A polite stop


def test_sigterm_ends_the_run_with_a_status_that_says_it_is_not_finished(disturbed: Disturbed) -> None:
    assert disturbed.stopped.process.returncode != 0
    assert "stopped by SIGTERM; the same command goes on" in disturbed.stopped.said


def test_sigterm_leaves_a_checkpoint_of_the_last_step_that_was_made(disturbed: Disturbed) -> None:
    (last,) = re.findall(r"saved \S+step_(\d+) \(in \S+ s\)\s+stopped by", disturbed.stopped.said)
    assert 3 <= int(last) < STEPS
    assert disturbed.at_stop[-1] == int(last)
    assert resumed_after(disturbed.killed.said) == int(last)


# A kill


def test_a_killed_run_goes_on_from_its_newest_checkpoint(disturbed: Disturbed) -> None:
    assert disturbed.at_stop[-1] < disturbed.at_kill[-1] < STEPS
    assert resumed_after(disturbed.finished.said) == disturbed.at_kill[-1]


# The end


def test_the_disturbed_run_ends_with_the_same_adapter_bit_for_bit(straight: Run, disturbed: Disturbed) -> None:
    assert disturbed.finished.process.returncode == 0, disturbed.finished.said
    ours, theirs = (adapter(run.output) for run in (disturbed.finished, straight))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("figure", ["loss", "grad_norm", "lr", "epoch"])
def test_the_disturbed_run_makes_the_same_steps(straight: Run, disturbed: Disturbed, figure: str) -> None:
    ours, theirs = ([row[figure] for row in rows(run.output)] for run in (disturbed.finished, straight))
    assert len(theirs) == STEPS
    assert ours == theirs


def test_metrics_have_each_step_once_and_in_order(disturbed: Disturbed) -> None:
    assert [row["step"] for row in rows(disturbed.finished.output)] == list(range(1, STEPS + 1))


def test_metrics_have_the_same_heldout_losses(straight: Run, disturbed: Disturbed) -> None:
    ours, theirs = (rows(run.output, "heldout_loss") for run in (disturbed.finished, straight))
    assert [row["step"] for row in theirs] == [0, 5, 10, 15, 20]
    assert ours == theirs


def test_old_checkpoints_are_pruned_across_restarts(disturbed: Disturbed) -> None:
    assert checkpoints(disturbed.finished.output) == [STEPS - 2, STEPS]


@pytest.mark.full
def test_a_finished_run_is_not_trained_further(straight: Run, finetune: Finetune, recipe: Path) -> None:
    before = (straight.output / "metrics.jsonl").read_bytes()
    again = finetune("--recipe", recipe, "--set", f"output={straight.output}", processes=0)
    assert again.returncode == 0, again.stderr
    assert (straight.output / "metrics.jsonl").read_bytes() == before


# Another number of processes


def test_two_processes_checkpoint_is_resumed_by_one(straight: Run, disturbed: Disturbed) -> None:
    """Same order, same noise: what is left is the rounding of sums taken in another order."""
    assert disturbed.alone.process.returncode == 0, disturbed.alone.said
    assert resumed_after(disturbed.alone.said) == disturbed.at_stop[-1]
    ours, theirs = (rows(run.output) for run in (disturbed.alone, straight))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)


def test_the_adapter_of_one_process_is_that_of_two(straight: Run, disturbed: Disturbed) -> None:
    ours, theirs = (adapter(run.output) for run in (disturbed.alone, straight))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] - theirs[name]).norm() < 1e-3 * theirs[name].norm() for name in theirs)


# Killed while a checkpoint is being saved


@dataclass(frozen=True)
class Kill:
    """One kill: the complete checkpoints after it, the half one it left, and the log of the run that came next."""

    complete: list[int]
    partial: list[Path]
    next_run: Run


@pytest.fixture(scope="module", params=few([2, 3, 10]))
def kills(recipe: Path, request: pytest.FixtureRequest) -> list[Kill]:
    """A run that saves each step, killed again and again while it writes a checkpoint; the last one is left to finish.

    The first is killed in its first checkpoint, the others in their second.
    """
    output = recipe.with_name(f"saving-{request.param}")
    settings = ["checkpoint.every=1", "checkpoint.keep_last=all", "data.workers=0", f"train.steps={request.param + 6}"]
    run = Run(recipe, output, 0, settings)
    found: list[Kill] = []
    for _ in range(request.param):
        whole = len(found[-1].complete) + 1 if found else 0
        run.wait_until(lambda whole=whole: len(checkpoints(output)) >= whole)
        run.wait_until(lambda: any(output.glob("checkpoints/.partial-*/state/*")))
        run.kill_all()
        complete, partial = checkpoints(output), list(output.glob("checkpoints/.partial-*"))
        run = Run(recipe, output, 0, settings)
        found.append(Kill(complete, partial, run))
    assert run.wait() == 0, run.said
    return found


def test_a_kill_while_saving_leaves_a_half_checkpoint_that_is_not_trusted(kills: list[Kill]) -> None:
    assert any(kill.partial for kill in kills)
    for kill in kills:
        assert resumed_after(kill.next_run.said) == (kill.complete[-1] if kill.complete else 0)


def test_a_kill_while_saving_costs_no_complete_checkpoint(kills: list[Kill]) -> None:
    newest = [kill.complete[-1] if kill.complete else 0 for kill in kills]
    assert newest == sorted(newest)
    assert newest[-1] > 0


def test_half_checkpoints_are_cleared_away(kills: list[Kill]) -> None:
    folder = kills[-1].next_run.output / "checkpoints"
    assert not list(folder.glob(".partial-*"))


def test_metrics_of_a_run_killed_while_saving_have_each_figure_once(kills: list[Kill]) -> None:
    output = kills[-1].next_run.output
    seen = Counter((row["step"], key) for key in ("loss", "heldout_loss") for row in rows(output, key))
    assert set(seen.values()) == {1}
