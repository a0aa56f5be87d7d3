"""How long each recipe trains on named cards, for the head of its file.

`python -m benchmarks.hours [--only ltx_lora ...] [--check]`: a LoRA is planned for one A100, or for eight if it does not fit
one; all weights are planned for eight. The plans are kept with those of benchmarks.cards, and made again after a change of
their recipe. Writes the line that begins with "# Predicted" into each recipe; --check makes no plan, writes nothing, and
names the recipes whose head does not say what is kept.
"""

import argparse
import json
import re
import sys
from dataclasses import replace

from benchmarks.cards import LARGE, RESULTS, Cell, current, plan_cell
from benchmarks.plans import ROOT

KEPT = RESULTS / "cards.json"
RECIPES = ROOT / "recipes"
NAMES = sorted((file.stem for file in RECIPES.glob("*_*.toml")), key=lambda name: (name.endswith("_full"), name))
OF_EIGHT, OF_ONE = (cell for cell in LARGE if cell.cards == ("A100", "H100"))
_LINE = re.compile(r"^# Predicted: .*\n", re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--only", nargs="+", help="names of recipes")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    wrong = []
    for name in arguments.only or NAMES:
        file = RECIPES / f"{name}.toml"
        text = file.read_text(encoding="utf-8")
        plan = kept_plan(name) if arguments.check else made_plan(name)
        if plan is None or with_head(text, head(*plan)) != text:
            wrong.append(name)
        if plan and not arguments.check:
            file.write_text(with_head(text, head(*plan)), encoding="utf-8")
            print(f"{name}: {head(*plan)}", flush=True)
    if arguments.check and wrong:
        print(f"run `python -m benchmarks.hours --only {' '.join(wrong)}`", file=sys.stderr)
    return int(arguments.check and bool(wrong))


def cells_of(name: str) -> list[Cell]:
    """The plans that may be told, the preferred one first."""
    kinds = [OF_EIGHT] if name.endswith("_full") else [OF_ONE, OF_EIGHT]
    return [replace(kind, recipe=name) for kind in kinds]


def kept_plan(name: str) -> tuple[Cell, dict] | None:
    """The first plan that fits, of those that are kept and current."""
    results = json.loads(KEPT.read_text())
    for cell in cells_of(name):
        result = current(cell, results)
        if result and result["fits"]:
            return cell, result
        if result is None:
            return None
    return None


def made_plan(name: str) -> tuple[Cell, dict]:
    """The first plan that fits, which is made and kept if it is not there yet; or the last one."""
    for cell in cells_of(name):
        results = json.loads(KEPT.read_text())
        if current(cell, results) is None:
            results[cell.name] = plan_cell(cell)
            KEPT.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        if results[cell.name]["fits"]:
            break
    return cell, results[cell.name]


def head(cell: Cell, result: dict) -> str:
    """The line of a recipe's head."""
    steps = sum(result["steps"])
    hours = {card: f"{steps * seconds / 3600:.1f}" for card, seconds in result["seconds_on"].items()}
    each = "one" if cell.gpus == 1 else str(cell.gpus)
    told = " or ".join(f"{hours[card]} hours on {each} {card}" for card in cell.cards)
    return f"# Predicted: {told}, for {steps:,} steps at peak rates. Expect up to twice that."


def with_head(text: str, line: str) -> str:
    """A recipe's text with the line at the end of its first comments."""
    comments, blank, rest = _LINE.sub("", text, count=1).partition("\n\n")
    return f"{comments}\n{line}{blank}{rest}"


if __name__ == "__main__":
    sys.exit(main())
