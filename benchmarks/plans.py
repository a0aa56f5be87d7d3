"""The figures of `plan` for recipes at full size, run as a user would, and how long it takes.

`python -m benchmarks.plans [--gpus 1 8 64] [--only cogvideox_5b_lora ...]`. Writes benchmarks/results/plans.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from finetune.models.published import complete
from finetune.recipe import load_recipe

ROOT = Path(__file__).parent.parent
GIB = 2**30
DOES_NOT_FIT = 3  # exit status
PHASES = ["encode text", "encode video", "load", "step", "validation", "export"]
HEAD = ["recipe", "GPUs", *PHASES, "host of a node", "a step on A100, by peak rates", "took"]

TITLE = """\
# Recipes, planned phase by phase

`python -m benchmarks.plans`: GiB reserved by each GPU in each phase (the largest bucket, the recipe's own settings,
its global batch rounded up to the GPUs), simulated on one core of a CPU with full-size configs. None is measured yet.

"""


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--only", nargs="+", help="names of recipes")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "plans.md")
    arguments = parser.parse_args()
    names = arguments.only or sorted(
        file.stem for file in (ROOT / "recipes").glob("*.toml") if file.stem != "quickstart"
    )
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for gpus in arguments.gpus:
                cells = _plan(name, gpus, Path(folder))
                lines.append("| " + " | ".join([name, str(gpus), *cells]) + " |")
                print(lines[-1], flush=True)
                arguments.out.write_text(TITLE + "\n".join(lines) + "\n")


def _plan(name: str, gpus: int, folder: Path) -> list[str]:
    file, settings = full_size_settings(name, gpus, folder)
    start = time.perf_counter()
    plan = planned("--recipe", file, "--gpus", gpus, settings=settings)
    took = time.perf_counter() - start
    phases = {kind: phase for kind in PHASES for phase in plan["phases"] if phase["kind"] == kind}
    reserved = [gib(phases[kind]["device"]["reserved"]) if kind in phases else "" for kind in PHASES]
    return [*reserved, gib(plan["host_bytes"]), f"{phases['step']['seconds']:.1f} s", f"{took:.0f} s"]


def full_size_settings(name: str, gpus: int, folder: Path) -> tuple[Path, list[str]]:
    """A recipe's file, and settings that open it on its published model without weights, written to `folder`, with prompts
    whose images are there and a global batch that divides by the GPUs.
    """
    file = ROOT / "recipes" / f"{name}.toml"
    recipe = load_recipe(file)
    model = complete(recipe.model.path, folder / name)
    size = -(-recipe.train.global_batch_size // gpus) * gpus
    image = folder / "frame.png"
    Image.new("RGB", (1360, 768)).save(image)
    prompts = [prompt.model_dump(mode="json", exclude_none=True) for prompt in recipe.validation.prompts]
    for prompt in prompts:
        prompt.update((key, str(image)) for key in ("image", "last_image") if key in prompt)
    return file, [
        f"model.path={json.dumps(str(model))}",
        f"train.global_batch_size={size}",
        f"validation.prompts={_toml(prompts)}",
    ]


def planned(*arguments: object, settings: Sequence[str] = ()) -> dict:
    """Run `plan` and return its figures, read from its JSON."""
    return json.loads(finetune("plan", *arguments, "--json", settings=settings))


def finetune(*arguments: object, settings: Sequence[str] = ()) -> str:
    """Run a command of finetune and return what it prints.

    Raises:
        RuntimeError: the command failed.
    """
    command = [sys.executable, "-W", "ignore", "-m", "finetune", *map(str, arguments)]
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode not in (0, DOES_NOT_FIT):
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
    return done.stdout


def gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def _toml(tables: list[dict]) -> str:
    inside = (", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) for table in tables)
    return "[" + ", ".join(f"{{{each}}}" for each in inside) + "]"


if __name__ == "__main__":
    main()
