"""Signals that ask for a stop: real trainings by the command line, and real signals to them."""

import signal
from pathlib import Path

import pytest
from every_family import few
from trainings import Run, checkpoints, steps_done

from finetune.recipe import load_recipe
from finetune.runtime.distributed import Runtime
from finetune.runtime.signals import POLITE, StopRequest
from finetune.training.run import train

LONG = ["train.steps=100000", "checkpoint.every=100000"]  # nothing but a signal ends it, or saves it


def catches(run: Run, number: signal.Signals) -> bool:
    """Whether the process has a handler of its own for a signal now."""
    (caught,) = [line for line in Path(f"/proc/{run.process.pid}/status").read_text().splitlines() if "SigCgt" in line]
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def assert_stopped(run: Run, by: signal.Signals) -> None:
    """It ended with a checkpoint of its last step, and a status that says by what."""
    assert run.wait() == 128 + by, run.said
    assert f"stopped by {by.name}; the same command goes on" in run.said
    assert checkpoints(run.output) == [steps_done(run.output)]


@pytest.mark.parametrize("number", few([signal.SIGINT, signal.SIGHUP]))
def test_a_polite_signal_saves_a_checkpoint_and_is_the_exit_status(
    recipe_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = Run(recipe_file, tmp_path / "run", 0, LONG)
    run.wait_until(lambda: steps_done(run.output) >= 1)
    run.process.send_signal(number)
    assert_stopped(run, number)


@pytest.mark.full
def test_under_nohup_sighup_is_ignored_and_sigusr1_saves_a_checkpoint(recipe_file: Path, tmp_path: Path) -> None:
    run = Run(recipe_file, tmp_path / "run", 0, LONG, starter=["nohup"])
    run.wait_until(lambda: steps_done(run.output) >= 1)
    run.process.send_signal(signal.SIGHUP)
    seen = steps_done(run.output)
    run.wait_until(lambda: steps_done(run.output) >= seen + 3)
    run.process.send_signal(signal.SIGUSR1)
    assert_stopped(run, signal.SIGUSR1)


def test_a_second_sigint_ends_the_run_at_once(recipe_file: Path, tmp_path: Path) -> None:
    """In the middle of a step, of 4,000 micro-batches here: it is not made, and nothing is saved."""
    long_step = ["train.global_batch_size=4000", "train.micro_batch_size=1"]
    run = Run(recipe_file, tmp_path / "run", 0, [*LONG, *long_step])
    run.wait_until(lambda: catches(run, signal.SIGUSR1))  # Python itself handles SIGINT alone
    run.process.send_signal(signal.SIGINT)
    run.wait_until(lambda: not catches(run, signal.SIGINT))
    run.process.send_signal(signal.SIGINT)
    assert run.wait() == -signal.SIGINT, run.said
    assert steps_done(run.output) == 0
    assert checkpoints(run.output) == []


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in POLITE]


@pytest.mark.parametrize("number", POLITE)
def test_handlers_are_given_back_after_a_stop_was_asked_for(number: signal.Signals) -> None:
    before = handlers()
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(number)
    assert stop.signal == number
    assert handlers() == before


def test_handlers_are_given_back_after_an_error() -> None:
    before = handlers()
    with pytest.raises(ZeroDivisionError), StopRequest():
        assert before != handlers()
        1 / 0  # noqa: B018
    assert handlers() == before


def test_a_training_gives_the_handlers_back(recipe_file: Path, runtime: Runtime) -> None:
    before = handlers()
    assert train(load_recipe(recipe_file, ["train.steps=1"]), runtime) == 0
    assert handlers() == before
