"""What recipes take of named cards and how long they train there, and what `plan --fit` changes for small ones.

`python -m benchmarks.cards [--only wan_14b_lora ...]`: one plan at full size a cell, each of which takes minutes. Finished
cells are kept in benchmarks/results/cards.json, and are made again only after a change of their recipe, so the command goes on
where it was interrupted. Writes benchmarks/results/cards.md.
"""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.plans import ROOT, finetune, full_size_settings, gib
from finetune.models import family_class
from finetune.models.folder import ModelFolder
from finetune.recipe import Recipe, load_recipe, recipe_values

HOST_MEMORY = "64GiB"  # of a machine with one small card
RESULTS = ROOT / "benchmarks" / "results"
MODELS = [  # in the order in which they are planned
    "wan_14b",
    "wan2.2_a14b",
    "wan_1.3b",
    "wan2.2_5b",
    "wan_14b_i2v",
    "hunyuan15",
    "hunyuan_i2v",
    "wan2.2_a14b_i2v",
    "hunyuan15_i2v",
    "wan2.2_5b_i2v",
    "wan_14b_flf2v",
]
TITLE = """\
# Recipes on cards

`python -m benchmarks.cards`: each recipe with its global batch and its largest clips, planned at full size on a CPU. None is
measured yet. Small cards, alone in a machine with 64 GiB of host memory: what `plan --fit` finds. GiB: reserved of each GPU at
the peak of all phases, and taken of a node's host memory. Seconds are by the card's peak rates; kernels reach half to three
quarters of them. Hours are those of the recipe's steps, of both experts where there are two. A row without figures has not
been planned yet: the same command goes on with it.

"""
HEAD = ["recipe", "parameters", "steps", "GPUs", "what `--fit` changes", "GiB", "in", "host, GiB", "s a step", "hours"]


@dataclass(frozen=True)
class Cell:
    """A plan: of a recipe as it is, or of what `--fit` makes of it, on GPUs with the memory of the first of `cards`.

    Attributes:
        cards: of one size; each gives a row.
    """

    recipe: str
    gpus: int
    cards: tuple[str, ...]
    fit: bool = False

    @property
    def name(self) -> str:
        return f"{self.recipe} {self.gpus} x {self.cards[0]}{' fit' if self.fit else ''}"


SMALL = [Cell("", 1, (card,), fit=True) for card in ("RTX 4090", "RTX 4070", "RTX 4080")]
LARGE = [Cell("", 8, ("A100", "H100")), Cell("", 8, ("RTX 4090",)), Cell("", 1, ("A100", "H100"))]
CELLS = {"lora": [SMALL[0], LARGE[0], *SMALL[1:2], *LARGE[1:], SMALL[2]], "full": LARGE}
NOMINAL = {"RTX 4070": 12, "RTX 4080": 16, "RTX 4090": 24, "A100": 80, "H100": 80}  # GB
ROWS = ["RTX 4070", "RTX 4080", "RTX 4090", "A100", "H100"]


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--only", nargs="+", help="names of recipes, or of cells")
    parser.add_argument("--out", type=Path, default=RESULTS / "cards.md", help="the results lie beside it, as .json")
    arguments = parser.parse_args()
    kept = arguments.out.with_suffix(".json")
    results: dict[str, dict] = json.loads(kept.read_text()) if kept.exists() else {}
    wanted = [c for c in cells() if not arguments.only or {c.recipe, c.name} & {*arguments.only}]
    missing = [cell for cell in wanted if results.get(cell.name, {}).get("recipe") != _digest(cell.recipe)]
    for number, cell in enumerate(missing, 1):
        print(f"{number} of {len(missing)}: {cell.name} ... ", end="", flush=True)
        results[cell.name] = made = _made(cell)
        print(f"{gib(made['reserved'])} GiB, {made['took']:.0f} s", flush=True)
        kept.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        arguments.out.write_text(table(results))
    arguments.out.write_text(table(results))


def cells() -> list[Cell]:
    """All of them, those first that matter most: a column of `CELLS` is made for every model before the next one."""
    found = [
        (place, number, Cell(f"{model}_{method}", each.gpus, each.cards, each.fit))
        for method, kinds in CELLS.items()
        for number, model in enumerate(MODELS)
        for place, each in enumerate(kinds)
    ]
    return [cell for *_, cell in sorted(found, key=lambda each: each[:2])]


def table(results: dict[str, dict]) -> str:
    """The results as Markdown: a row for each card and number of GPUs of each recipe."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for name in [f"{model}_{method}" for model in MODELS for method in CELLS]:
        of_recipe = [cell for cell in cells() if cell.recipe == name]
        rows = [(card, cell) for cell in of_recipe for card in cell.cards]
        for card, cell in sorted(rows, key=lambda row: (row[1].gpus, ROWS.index(row[0]))):
            lines.append("| " + " | ".join(_row(card, cell, results.get(cell.name))) + " |")
    return TITLE + "\n".join(lines) + "\n"


def _row(card: str, cell: Cell, result: dict | None) -> list[str]:
    where = f"{cell.gpus} x {card}, {NOMINAL[card]} GB"
    if result is None:
        return [cell.recipe, "", "", where, *[""] * 6]
    steps, seconds = result["steps"], result["seconds_on"][card]
    told = "<br>".join(_changes(result["changes"])) or "nothing"
    told = told if cell.fit else "(as it is)"
    if not result["fits"]:
        told = "does not fit: the settings that take least" if cell.fit else "does not fit as it is"
    time = [f"{seconds:.1f}", f"{sum(steps) * seconds / 3600:.1f}"] if result["fits"] else ["", ""]
    return [
        cell.recipe,
        f"{result['parameters'] / 1e9:.1f} B",
        " + ".join(map(str, steps)),
        where,
        told,
        gib(result["reserved"]),
        result["peak_in"],
        gib(result["host_bytes"]),
        *time,
    ]


def _changes(changes: dict[str, Any]) -> Iterator[str]:
    """The lines of a recipe that `--fit` changes; samples that it leaves out are told in a word."""
    for key, value in changes.items():
        if key == "validation.prompts":
            yield "no samples"
        elif not key.startswith("validation."):
            yield f"{key} = {json.dumps(value)}"


def _made(cell: Cell) -> dict:
    """Plan a cell in a process of its own. Raises RuntimeError if the command fails."""
    with tempfile.TemporaryDirectory() as folder:
        file, settings = full_size_settings(cell.recipe, cell.gpus, Path(folder))
        options = [
            "--gpus",
            cell.gpus,
            "--gpu",
            cell.cards[0],
            "--json",
            *(["--fit", "--host-memory", HOST_MEMORY] if cell.fit else []),
        ]
        start = time.perf_counter()
        plan = json.loads(finetune("plan", "--recipe", file, *options, settings=settings))
        took = time.perf_counter() - start
        recipe = load_recipe(file, settings)
        family = family_class(recipe.model.family)(ModelFolder(Path(folder) / cell.recipe))
        parameters = sum(parameter.numel() for parameter in family.empty_transformer().parameters())
    highest = max(plan["phases"], key=lambda phase: phase["device"]["reserved"])
    steps = [phase["seconds_on"] for phase in plan["phases"] if phase["kind"] == "step"]  # --fit plans every bucket
    return {
        "recipe": _digest(cell.recipe),
        "parameters": parameters,
        "steps": _steps(recipe),
        "fits": plan["fits"],
        "changes": plan.get("changes", {}),
        "reserved": highest["device"]["reserved"],
        "peak_in": highest["kind"],
        "host_bytes": plan["host_bytes"],
        "seconds_on": {card: max(seconds[card] for seconds in steps) for card in cell.cards},
        "took": took,
    }


def _steps(recipe: Recipe) -> list[int]:
    """Steps of the training, or of each expert's."""
    train, experts = recipe.train, recipe.model.experts
    return [train.expert_steps.get(expert, train.steps) for expert in experts] if experts else [train.steps]


def _digest(name: str) -> str:
    """Of a recipe's values, so that comments may change."""
    values = recipe_values(load_recipe(ROOT / "recipes" / f"{name}.toml"))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
