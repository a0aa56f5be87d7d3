"""Trainings with an average of their weights, on any number of processes.

Usage: [torchrun ... ] ema_worker.py OUT RECIPE CASES     CASES: names of `CONFIGURATIONS`, as JSON. Figures go to OUT as JSON.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from parts_worker import digest as digest_of
from parts_worker import step, whole
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from finetune.checks.model import open_family
from finetune.engine.ema import WeightAverage
from finetune.engine.weights.exporters import exporter_of
from finetune.models.family import Family
from finetune.preparation.encode import Prepared, prepare
from finetune.recipe import Recipe, load_recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries
from finetune.training.job import Job, build

FULL = ["train.method=full", "optimizer.lr=1e-3"]
CONFIGURATIONS = {
    "lora": ["lora.rank=4", "optimizer.lr=1e-2"],
    "every second step": [*FULL, "memory.layout=zero2", "ema.every=2", "ema.warmup=false"],
    "bf16 weights, on the host": [*FULL, "train.weights=bf16", "ema.device=host"],
    "offload": [*FULL, "memory.offload=true", "checkpoint.background=false"],
    "replicate": [*FULL, "memory.layout=replicate"],
    "in backward": [*FULL, "optimizer.in_backward=true", "train.max_grad_norm=none"],
    "offloaded optimizer": [*FULL, "optimizer.offload=state_and_gradients"],
    "8 bits": [*FULL, "optimizer.name=adamw_8bit"],
    "streamed nf4": ["memory.layout=replicate", "memory.offload=true", "memory.low_bit=nf4"],
}
STEPS, BREAK = 5, 3


def average_of(job: Job) -> WeightAverage:
    (average,) = (part for part in job.state.parts if isinstance(part, WeightAverage))
    return average


def digest(tensors: dict[str, Tensor]) -> str:
    return digest_of({name: value.float() for name, value in tensors.items()})


def weights_of(job: Job) -> dict[str, Tensor]:
    return whole(average_of(job)._parameters)


def averages_of(job: Job) -> dict[str, Tensor]:
    return whole(average_of(job).state_dict()["values"])


class Oracle:
    """The average that diffusers makes of weights with a warm-up, and torch without one."""

    def __init__(self, recipe: Recipe, weights: dict[str, Tensor]) -> None:
        self.ema, tensors = recipe.ema, [value.float() for value in weights.values()]
        self.of_diffusers = EMAModel(tensors, decay=recipe.ema.decay)
        self.module = torch.nn.ParameterList(tensors)
        self.of_torch = AveragedModel(self.module, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema.decay))

    def follow(self, number: int, weights: dict[str, Tensor]) -> None:
        if (number + 1) % self.ema.every:
            return
        tensors = [value.float() for value in weights.values()]
        # It copies what is not trained.
        self.of_diffusers.step([tensor.clone().requires_grad_() for tensor in tensors])
        for parameter, tensor in zip(self.module, tensors, strict=True):
            parameter.data.copy_(tensor)
        self.of_torch.update_parameters(self.module)

    def furthest(self, averages: dict[str, Tensor]) -> float:
        """The largest difference from it, of the largest value of its tensor."""
        theirs = self.of_diffusers.shadow_params if self.ema.warmup else list(self.of_torch.module)
        pairs = zip(averages.values(), theirs, strict=True)
        return max(float((ours - their).abs().max() / their.abs().max().clamp_min(1e-12)) for ours, their in pairs)


def straight(recipe: Recipe, runtime: Runtime, family: Family, prepared: Prepared) -> tuple[Job, dict]:
    """The run that is never interrupted."""
    job = build(recipe, runtime, family, prepared)
    oracle = Oracle(recipe, weights_of(job))
    figures: dict = {"steps": [], "furthest": [], "changed by evaluation": []}
    for number in range(STEPS):
        figures["steps"].append(step(job, number))
        oracle.follow(number, weights_of(job))
        if (number + 1) >= recipe.ema.every:
            figures["furthest"].append(oracle.furthest(averages_of(job)))
        before = digest(weights_of(job)), digest(averages_of(job))
        figures["heldout"] = asdict(job.heldout_loss())
        figures["changed by evaluation"].append(before != (digest(weights_of(job)), digest(averages_of(job))))
    figures["average"], figures["weights"] = digest(averages_of(job)), digest(weights_of(job))
    figures["first average"] = next(iter(averages_of(job).values())).flatten()[:50].tolist()
    return job, figures


def evaluated(job: Job, recipe: Recipe, runtime: Runtime, family: Family, prepared: Prepared, folder: Path) -> dict:
    """What is measured and exported with the average, and where the weights are what they are."""
    raw = build(recipe.model_copy(update={"ema": recipe.ema.model_copy(update={"use": []})}), runtime, family, prepared)
    steps = [step(raw, number) for number in range(STEPS)]
    figures: dict = {"raw steps": steps, "raw heldout": asdict(raw.heldout_loss())}
    averages = averages_of(job)
    with torch.no_grad():
        for name, parameter in average_of(raw)._parameters.items():
            shard = average_of(job).values[name]
            (parameter.to_local() if hasattr(parameter, "to_local") else parameter).copy_(shard)
    figures["heldout of average"] = asdict(raw.heldout_loss())
    job.save(STEPS)
    if exporter_of(recipe.train.method).is_small and runtime.is_main:
        (file,) = (job.checkpoints.path(STEPS) / "lora").glob("*.safetensors")
        exported = {
            name.removeprefix("transformer.").replace(".weight", ".default.weight"): value
            for name, value in load_file(file).items()
        }
        scale = recipe.lora.alpha / recipe.lora.rank  # is folded into the second matrices
        figures["exported"] = exported.keys() == averages.keys() and all(
            torch.equal(exported[name], scale * value if "lora_B" in name else value)
            for name, value in averages.items()
        )
    return figures


def interrupted(recipe: Recipe, runtime: Runtime, family: Family, prepared: Prepared) -> dict:
    job = build(recipe, runtime, family, prepared)
    first = [step(job, number) for number in range(BREAK)]
    job.save(BREAK)
    resumed = build(recipe, runtime, family, prepared)
    figures: dict = {"resumed at": resumed.resume(), "saved": digest(averages_of(job))}
    figures["restored"], figures["updates"] = digest(averages_of(resumed)), average_of(resumed).updates
    figures["steps"] = first + [step(resumed, number) for number in range(BREAK, STEPS)]
    figures["average"] = digest(averages_of(resumed))
    return figures


def main(out: Path, recipe_file: str, cases: list[str], runtime: Runtime) -> None:
    found = {}
    for name in cases:
        folder = out.parent / f"{name} {runtime.world_size}"
        shared = ["ema.decay=0.75", f"train.micro_batch_size={4 // runtime.world_size}", "train.global_batch_size=4"]
        overrides = [*CONFIGURATIONS[name], *shared]
        recipe = load_recipe(recipe_file, [*overrides, f"output={folder}"])
        family = open_family(recipe)
        prepared = prepare(recipe, family, runtime)
        found[name] = {"interrupted": interrupted(recipe, runtime, family, prepared)}
        aside = recipe.model_copy(update={"output": folder / "straight"})
        job, figures = straight(aside, runtime, family, prepared)
        found[name]["straight"] = figures
        found[name]["evaluated"] = evaluated(job, aside, runtime, family, prepared, folder)
    if runtime.is_main:
        out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    quiet_libraries()
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), distributed.start(timeout_seconds=60))
    distributed.stop()
    leave(0)
