"""What a recipe's head says of its hours is what is planned for it."""

import json
from pathlib import Path

import pytest
from processes import ROOT, run_python

from benchmarks.hours import CARD, NAMES, current, gpus_of, head, with_head
from benchmarks.plans import full_size_settings

PLANNED = "import json, sys\nfrom benchmarks.hours import planned\nprint(json.dumps(planned(sys.argv[1])))"
CLOSE = 0.01  # of a step's time
SMALL = "ltx_lora"


@pytest.mark.parametrize("name", NAMES)
def test_the_head_says_what_is_kept_of_the_recipe_as_it_is(name: str) -> None:
    found = current(name)
    assert found, f"the recipe has changed: python -m benchmarks.hours --only {name}"
    text = (ROOT / "recipes" / f"{name}.toml").read_text()
    assert with_head(text, head(found)) == text


@pytest.mark.parametrize(
    "name", [name if name == SMALL else pytest.param(name, marks=pytest.mark.full) for name in NAMES]
)
def test_what_is_kept_is_planned_again(name: str) -> None:
    done = run_python(["-c", PLANNED, name], seconds=280)
    assert done.returncode == 0, done.stderr
    again, kept = json.loads(done.stdout.splitlines()[-1]), current(name)
    assert kept
    assert again["seconds"] == pytest.approx(kept["seconds"], rel=CLOSE)
    assert (again["steps"], again["gpus"]) == (kept["steps"], kept["gpus"])


@pytest.mark.full
@pytest.mark.parametrize("name", [SMALL, "cogvideox_2b_full", "mochi_lora"])
def test_the_command_plans_the_same_and_it_fits(finetune, name: str, tmp_path: Path) -> None:
    gpus = gpus_of(name)
    file, settings = full_size_settings(name, gpus, tmp_path)
    overrides = [part for setting in settings for part in ("--set", setting)]
    done = finetune("plan", "--recipe", file, "--gpus", gpus, "--gpu", CARD, "--json", *overrides, timeout=280)
    assert done.returncode == 0, done.stderr
    (step,) = [phase for phase in json.loads(done.stdout)["phases"] if phase["kind"] == "step"]
    kept = current(name)
    assert kept
    assert step["seconds"] == pytest.approx(kept["seconds"], rel=CLOSE)
