"""What a training is told of its memory: while it runs, after its last step, and when there is too little."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import ROOT, Finetune, run_python

GIB = 2**30
Result = subprocess.CompletedProcess
Train = Callable[..., Result]


@pytest.fixture(scope="module")
def train(recipe: Path, fresh_cache: Path) -> Train:
    """Train three steps with tests/planning/forecast_worker.py."""

    def run(output: Path, card: int, fails: str = "never", processes: int = 0, more: tuple[str, ...] = ()) -> Result:
        settings = ["train.steps=3", f"train.micro_batch_size={2 // max(processes, 1)}", f"output={output}"]
        output.mkdir(parents=True)
        program = [ROOT / "tests" / "planning" / "forecast_worker.py", card, fails, "--recipe", recipe]
        program += [part for each in (*settings, f"data.cache={fresh_cache}", *more) for part in ("--set", each)]
        summed_up = processes > 0 and fails != "never"  # torchrun says what failed
        return run_python(program, processes, environment={"TMPDIR": str(output)}, seconds=280, is_anew=summed_up)

    return run


@pytest.fixture(scope="module")
def fitting(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A training of two processes that fits."""
    output = tmp_path_factory.mktemp("fitting") / "run"
    return output, train(output, 24 * GIB, processes=2)


@pytest.fixture(scope="module")
def too_large(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A training of one process that does not fit, by its plan."""
    output = tmp_path_factory.mktemp("too-large") / "run"
    return output, train(output, 3 * 2**20)


@pytest.fixture(scope="module")
def again(too_large: object, train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The same training once more, into another folder."""
    output = tmp_path_factory.mktemp("again") / "run"
    return output, train(output, 3 * 2**20)


@pytest.fixture(scope="module")
def unplanned(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A training whose recipe wants no plan."""
    output = tmp_path_factory.mktemp("unplanned") / "run"
    return output, train(output, 24 * GIB, more=("memory.plan=false",))


def line_of(result: Result, text: str) -> int:
    (found,) = [number for number, line in enumerate(result.stderr.splitlines()) if text in line]
    return found


# While it runs


def test_steps_are_taken_while_the_plan_is_made_and_it_is_told_between_them(fitting: tuple[Path, Result]) -> None:
    """The plan's process is held until the second step: a loop that waited for it would wait forever."""
    _, result = fitting
    assert result.returncode == 0, result.stderr
    assert "memory plan: fits: each of 2 GPUs needs 0.0" in result.stderr
    assert line_of(result, "step 1/3") < line_of(result, "memory plan: ") < line_of(result, "step 3/3")


def test_one_rank_makes_the_plan(fitting: tuple[Path, Result]) -> None:
    _, result = fitting
    assert "rank 0: 1 plans" in result.stdout
    assert "rank 1: 0 plans" in result.stdout


def test_a_training_that_does_not_fit_is_warned_and_given_a_command(too_large: tuple[Path, Result]) -> None:
    output, result = too_large
    warning, cure = result.stderr.splitlines()[line_of(result, "warning: ") :][:2]
    assert "does not fit: a GPU needs 0.0" in warning
    assert "GiB more than there are (peak in encode video 17x64x96, " in warning
    command = f"python -m finetune plan --recipe {output}/recipe.toml --gpus 1 --device-memory 2097152B --fit"
    assert cure.endswith(command)


def test_a_training_that_does_not_fit_by_its_plan_is_trained_all_the_same(too_large: tuple[Path, Result]) -> None:
    output, result = too_large
    assert result.returncode == 0, result.stderr
    assert (output / "lora").is_dir()


def test_nothing_of_the_plan_is_left_when_the_training_has_ended(fitting: tuple[Path, Result]) -> None:
    output, _ = fitting
    assert not list(output.glob("finetune-plan-*"))


# Remembered


def test_a_second_start_tells_the_plan_at_once_and_makes_none(again: tuple[Path, Result]) -> None:
    output, result = again
    assert result.returncode == 0, result.stderr
    assert "rank 0: 0 plans" in result.stdout
    assert line_of(result, "warning: by its memory plan") < line_of(result, "starting: ")
    assert f"--recipe {output}/recipe.toml" in result.stderr


def test_a_second_start_is_told_the_same_of_the_same_phases(
    too_large: tuple[Path, Result], again: tuple[Path, Result]
) -> None:
    told = [result.stderr.splitlines()[line_of(result, "warning: ")] for _, result in (too_large, again)]
    assert told[0] == told[1]
    planned = [json.loads((output / "memory.json").read_text())["planned"] for output, _ in (too_large, again)]
    assert planned[0] == planned[1] is not None


# Switched off


def test_a_training_without_a_plan_imports_nothing_of_the_planner(
    unplanned: tuple[Path, Result], fitting: tuple[Path, Result]
) -> None:
    _, result = unplanned
    assert result.returncode == 0, result.stderr
    assert "rank 0: 0 plans, planner imported: False" in result.stdout
    assert "planner imported: True" in fitting[1].stdout  # with one it does


def test_a_training_without_a_plan_still_says_what_its_steps_took(unplanned: tuple[Path, Result]) -> None:
    output, result = unplanned
    assert result.stderr.splitlines()[line_of(result, "the steps took ")] == (
        "the steps took 5.00 GiB allocated, 10.00 reserved"
    )
    assert json.loads((output / "memory.json").read_text())["planned"] is None


# After the last


def test_the_plan_is_written_beside_what_the_steps_took_of_any_rank(
    fitting: tuple[Path, Result], finetune: Finetune
) -> None:
    output, result = fitting
    figures = json.loads((output / "memory.json").read_text())
    assert figures["measured"] == {"allocated": 6 * GIB, "reserved": 12 * GIB}  # the second step's, of the second rank
    plan = finetune("plan", "--recipe", output / "recipe.toml", "--gpus", 2, "--device-memory", "24GiB", "--json")
    phases = {phase["name"]: phase for phase in json.loads(plan.stdout)["phases"]}
    step = phases["step 17x64x96"]["device"]
    assert figures["planned"] == {name: step[name] for name in ("allocated", "reserved")}
    off = step["allocated"] / (6 * GIB) - 1
    assert figures["relative_error"]["allocated"] == pytest.approx(off)
    assert "the steps took 6.00 GiB allocated, 12.00 reserved; planned were 0.0" in result.stderr
    assert f"({off:+.1%})" in result.stderr


# Out of memory


def test_out_of_memory_says_what_where_and_what_to_do(train: Train, tmp_path: Path) -> None:
    result = train(tmp_path / "run", 0, fails="0:2")
    assert result.returncode == 2, result.stderr
    message = result.stderr.partition("error: ")[2].splitlines()
    assert message == [
        "step 2 of bucket 17x64x96, rank 0: CUDA out of memory. Tried to allocate 2.00 GiB.",
        f"    -> settings that fit: python -m finetune plan --recipe {tmp_path}/run/recipe.toml --gpus 1 --fit",
    ]
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "run").glob("*.pickle"))


def test_out_of_memory_of_one_rank_ends_both_and_leaves_its_snapshot(train: Train, tmp_path: Path) -> None:
    """Of another rank than the first, which does not know the plan's figure."""
    output = tmp_path / "run"
    result = train(output, 24 * GIB, fails="1:3", processes=2)
    assert result.returncode == 1, result.stderr  # torchrun's
    assert "step 3 of bucket 17x64x96, rank 1: CUDA out of memory. Tried to allocate 2.00 GiB.\n" in result.stderr
    assert "--gpus 2 --device-memory 25768755200B --fit\n" in result.stderr
    assert f"what was in memory: {output}/memory_rank1.pickle, to be viewed at https://" in result.stderr
    assert [path.name for path in output.glob("*.pickle")] == ["memory_rank1.pickle"]
