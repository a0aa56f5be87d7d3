"""How long each recipe trains on A100s, for the head of its file.

`python -m benchmarks.hours [--only ltx_lora ...] [--check]`: as `plan --gpu A100` has it, but of the steps alone. The LoRA
of a model of less than 10 billion weights is planned for one A100, everything else for eight. What is found is kept in
benchmarks/results/hours.json, and found again after a change of the recipe. Writes "Predicted: ..." into
the head of each recipe; --check plans and writes nothing, and names the recipes whose head does not say what is kept.
"""

import argparse
import gc
import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path

from benchmarks.plans import ROOT, full_size_settings
from finetune.recipe import Recipe, load_recipe, recipe_values

KEPT = ROOT / "benchmarks" / "results" / "hours.json"
RECIPES = ROOT / "recipes"
NAMES = sorted((file.stem for file in RECIPES.glob("*_*.toml")), key=lambda name: (name.endswith("_full"), name))
CARD = "A100"
LARGE = ("hunyuan_", "ltx_13b", "mochi", "wan_14b", "wan2.2_a14b")  # models of 10 billion weights and more
_TOLD = re.compile(r" Predicted: .*")
_PLACE = 2  # the line of a recipe that says how large the model is


def main() -> int:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--only", nargs="+", help="names of recipes")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    wrong = []
    for name in arguments.only or NAMES:
        if not arguments.check and current(name) is None:
            keep(name, planned(name))
        found, file = current(name), RECIPES / f"{name}.toml"
        text = file.read_text(encoding="utf-8")
        if arguments.check and (found is None or with_head(text, head(found)) != text):
            wrong.append(name)
        elif found and not arguments.check:
            file.write_text(with_head(text, head(found)), encoding="utf-8")
            print(f"{name}: {head(found)}", flush=True)
    if wrong:
        print(f"run `python -m benchmarks.hours --only {' '.join(wrong)}`", file=sys.stderr)
    return int(bool(wrong))


def current(name: str) -> dict | None:
    """What is kept of a recipe, or None if there is nothing, or the recipe has changed since."""
    found = json.loads(KEPT.read_text()).get(name) if KEPT.exists() else None
    return found if found and found["recipe"] == _digest(name) else None


def keep(name: str, found: dict) -> None:
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    KEPT.write_text(json.dumps({**kept, name: found}, indent=1, sort_keys=True) + "\n")


def planned(name: str) -> dict:
    """How many steps a recipe has, and the seconds of one."""
    from finetune.checks.model import open_family
    from finetune.planning.gpus import Hardware
    from finetune.planning.simulate import largest, simulate
    from finetune.runtime.gpus import CONTEXT, GPUS

    gpus, card = gpus_of(name), GPUS[CARD]
    with tempfile.TemporaryDirectory() as folder:
        file, settings = full_size_settings(name, gpus, Path(folder))
        recipe = load_recipe(file, settings)
        family = open_family(recipe, with_weights=False)
        hardware = Hardware(gpus, 8, card.memory - CONTEXT, None, card)
        plan = simulate(recipe, family, [largest(family, recipe.data.buckets)], hardware)
    gc.collect()
    (step,) = plan.of_kind("step")
    if not plan.fits or step.seconds is None:
        raise RuntimeError(f"{name} does not fit {gpus} {CARD}")
    return {"recipe": _digest(name), "gpus": gpus, "steps": _steps(recipe), "seconds": round(step.seconds, 3)}


def gpus_of(name: str) -> int:
    """On how many A100s a recipe's head tells its time."""
    return 8 if name.endswith("_full") or name.startswith(LARGE) else 1


def head(found: dict) -> str:
    """What a recipe's head says of its hours: by the card's peak rates, of which kernels reach half or more."""
    hours = found["steps"] * found["seconds"] / 3600
    on = f"one {CARD}" if found["gpus"] == 1 else f"{found['gpus']} {CARD}s"
    told = f"{hours:.0f}" if hours >= 9.95 else f"{hours:.1f}"
    return f"Predicted: {told} hours on {on}, or up to twice that."


def with_head(text: str, told: str) -> str:
    """A recipe's text with the hours in its head."""
    lines = text.split("\n")
    lines[_PLACE] = f"{_TOLD.sub('', lines[_PLACE])} {told}"
    return "\n".join(lines)


def _steps(recipe: Recipe) -> int:
    """Steps of the training, of all its experts together."""
    train, experts = recipe.train, recipe.model.experts
    return sum(train.expert_steps.get(expert, train.steps) for expert in experts) if experts else train.steps


def _digest(name: str) -> str:
    """Of what a step's time depends on, and how many there are."""
    values = recipe_values(load_recipe(RECIPES / f"{name}.toml"))
    values = {
        key: value for key, value in values.items() if key not in ("output", "checkpoint", "validation", "tracking")
    }
    values["optimizer"] = {key: value for key, value in values["optimizer"].items() if key != "lr"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
