"""What `plan --fit` finds for full-size models on GPUs of several sizes, run as a user would.

`python -m benchmarks.fits [--only hunyuan_lora_24 ...]`: one GPU, one clip per step. Each takes minutes. The recipe that
`--fit` wrote is planned once more. Writes benchmarks/results/fits.md.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.plans import ROOT, finetune, gib, planned
from finetune.models.published import complete
from finetune.recipe import load_recipe
from finetune.recipe.load import flat_values


@dataclass(frozen=True)
class Fit:
    recipe: str
    bucket: str
    memory: int  # GiB of the GPU

    @property
    def name(self) -> str:
        return f"{self.recipe}_{self.memory}"


FITS = [
    *(Fit("cogvideox_5b_lora", "49x480x720", memory) for memory in (24, 16, 12, 8, 4)),
    *(Fit("hunyuan_lora", "49x512x768", memory) for memory in (24, 12)),
    *(Fit("cogvideox_5b_full", "49x480x720", memory) for memory in (80, 24)),
]
HEAD = [
    "recipe",
    "clips",
    "--device-memory, GiB",
    "what --fit changes",
    "reserved at the peak",
    "in",
    "host",
    "a step on A100, by peak rates",
    "took",
]

TITLE = """\
# What `--fit` finds

`python -m benchmarks.fits`: one GPU, one clip a step; GiB, simulated on a CPU.
A row is the plan of the recipe that was written, with all of its phases.

"""


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--only", nargs="+", choices=[fit.name for fit in FITS], help="a part")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "fits.md")
    arguments = parser.parse_args()
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for fit in FITS:
        if arguments.only and fit.name not in arguments.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            lines.append("| " + " | ".join(_fit(fit, Path(folder))) + " |")
        print(lines[-1], flush=True)
        arguments.out.write_text(TITLE + "\n".join(lines) + "\n")


def _fit(fit: Fit, folder: Path) -> list[str]:
    file = ROOT / "recipes" / f"{fit.recipe}.toml"
    model = complete(load_recipe(file).model.path, folder / "model")
    settings = [f'model.path="{model}"', f'data.buckets=["{fit.bucket}"]', "train.global_batch_size=1"]
    found = folder / "fits.toml"
    memory = ["--device-memory", f"{fit.memory}GiB"]
    start = time.perf_counter()
    finetune("plan", "--recipe", file, *memory, "--fit", "--write", found, settings=settings)
    took = time.perf_counter() - start
    if not found.exists():
        return [fit.recipe, fit.bucket, str(fit.memory), "nothing fits", "", "", "", "", f"{took:.0f} s"]
    before, after = (flat_values(recipe) for recipe in (load_recipe(file, settings), load_recipe(found)))
    changes = [f"{key} = {after.get(key)}" for key in sorted(after) if after[key] != before.get(key)]
    changes += [f"no {key}" for key in sorted(before.keys() - after.keys())]
    plan = planned("--recipe", found, *memory)
    if not plan["fits"]:
        raise RuntimeError(f"{fit.name}: what --fit wrote does not fit")
    highest = max(plan["phases"], key=lambda phase: phase["device"]["reserved"])
    (step,) = (phase for phase in plan["phases"] if phase["kind"] == "step")
    reserved = [gib(highest["device"]["reserved"]), highest["name"], gib(plan["host_bytes"])]
    return [
        fit.recipe,
        fit.bucket,
        str(fit.memory),
        "<br>".join(changes),
        *reserved,
        f"{step['seconds']:.1f} s",
        f"{took:.0f} s",
    ]


if __name__ == "__main__":
    main()
