"""`plan` as a user runs it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.memory.report import parse_bytes


@pytest.fixture(scope="module")
def recipe(family_recipe: Callable[..., Path]) -> Path:
    return family_recipe("ltx")


ONE_EACH = ["--set", "train.global_batch_size=2", "--set", "train.micro_batch_size=1"]


def planned(finetune, recipe: Path, *arguments: str) -> dict:
    done = finetune("plan", "--recipe", recipe, *ONE_EACH, "--json", *arguments)
    assert done.returncode in (0, 3), done.stderr
    return json.loads(done.stdout)


def test_a_plan_says_what_it_takes_and_whether_that_fits(finetune, recipe: Path) -> None:
    done = finetune("plan", "--recipe", recipe, *ONE_EACH, "--device-memory", "24GiB")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["load", "step"]
    assert any(line.strip().startswith("frozen weights") for line in lines)
    assert lines[-1].startswith("fits: a GPU needs 0.0")


def test_what_does_not_fit_says_how_much_is_missing(finetune, recipe: Path) -> None:
    done = finetune("plan", "--recipe", recipe, *ONE_EACH, "--device-memory", "2MiB")
    assert done.returncode == 3
    assert "does not fit: a GPU needs 0.0" in done.stdout


def test_shards_of_eight_take_less_of_each(finetune, recipe: Path) -> None:
    sharded = ["--set", "memory.layout=shard", "--set", "train.method=full", "--set", "train.global_batch_size=8"]
    alone, eight = (planned(finetune, recipe, *sharded, "--gpus", gpus) for gpus in ("1", "8"))
    state = [plan["phases"][-1]["device"]["parts"]["optimizer state"] for plan in (alone, eight)]
    assert state[1] == pytest.approx(state[0] / 8, rel=0.1)


def test_offloaded_weights_are_in_host_memory(finetune, recipe: Path) -> None:
    memory = ["--set", "train.method=full", "--set", "memory.offload=true"]
    phases = planned(finetune, recipe, *memory)["phases"]
    assert "trained weights" not in phases[-1]["device"]["parts"]


def test_a_bad_recipe_is_refused_as_check_refuses_it(finetune, recipe: Path) -> None:
    done = finetune("plan", "--recipe", recipe, "--set", "train.float8=true")
    assert done.returncode == 2
    assert "float8 training is for weights that are trained" in done.stderr


@pytest.mark.parametrize(
    "text, size",
    [
        ("24GiB", 24 * 2**30),
        ("24", 24 * 2**30),
        ("80 GB", 80 * 10**9),
        ("512MiB", 2**29),
        ("1.5g", 3 * 2**29),
        ("85899345920B", 80 * 2**30),
    ],
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "24XiB", "0"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ValueError, match=r"float|no amount"):
        parse_bytes(text)
