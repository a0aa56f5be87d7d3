"""Trainings of a model that keeps some of its modules in float32, by one process and by two: started once each.

Usage: [torchrun ... ] float32_worker.py OUT WHICH RECIPE      WHICH is "all" or "some"; figures go to OUT as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from parity_worker import figures
from torch import nn

from finetune.checks.model import open_family
from finetune.checks.settings import check_recipe
from finetune.models.family import Family
from finetune.preparation.encode import Prepared, prepare
from finetune.recipe import Recipe, load_recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries
from finetune.training.job import Job, build

METHODS = {
    "lora": ["lora.rank=4", "lora.alpha=8"],
    "full": ["train.method=full", "optimizer.lr=1e-3"],
    "bf16 weights": ["train.method=full", "optimizer.lr=1e-3", "train.weights=bf16"],
}
PLAIN = ["memory.layout=shard", "memory.activation_checkpointing=none", "train.max_grad_norm=none"]
HOW = {
    "plain": [],
    "replicate": ["memory.layout=replicate"],
    "recomputed": ["memory.activation_checkpointing=full"],
    "offload": ["memory.offload=true"],
    "zero2": ["memory.layout=zero2"],
    "hybrid": ["memory.layout=hybrid", "memory.shard_size=2"],
    "gradients offloaded": ["optimizer.offload=state_and_gradients"],
    "updates in backward": ["optimizer.in_backward=true"],
    "zero2, recomputed, offload": [
        "memory.layout=zero2",
        "memory.activation_checkpointing=full",
        "memory.offload=true",
    ],
    "compile": ["memory.compile=true"],
    "compile, recomputed": ["memory.compile=true", "memory.activation_checkpointing=full"],
}
SOME = ("plain", "replicate", "recomputed", "offload", "updates in backward", "gradients offloaded")


def ways(which: str, processes: int) -> list[tuple[str, str]]:
    """(method, how) of each training in bf16."""
    hows = HOW if which == "all" else SOME
    return [(method, how) for method in METHODS for how in hows if _goes(method, how, processes)]


def _goes(method: str, how: str, processes: int) -> bool:
    if "hybrid" in how and processes == 1:
        return False
    if how == "updates in backward":
        return method != "lora"
    return True


def recipe_of(file: str, runtime: Runtime, *overrides: str) -> Recipe:
    share = 2 // runtime.world_size
    recipe = load_recipe(file, [*PLAIN, f"train.micro_batch_size={share}", *overrides])
    assert not check_recipe(recipe, runtime.world_size), overrides
    return recipe


@torch.no_grad()
def difference(job: Job, family: Family) -> float:
    """How far an untrained model's outputs are from those of diffusers' own in bf16, on this rank's batch."""
    theirs = family._transformer_class.from_pretrained(family.folder.path / "transformer", torch_dtype=torch.bfloat16)
    inputs = job.micro_batches()[0].inputs
    found = job.state.family.predict(job.state.transformer, inputs)["video"]
    expected = family.predict(theirs.train(), inputs)["video"]
    assert found.dtype == expected.dtype == torch.bfloat16
    return (found - expected).abs().max().item()


def watched(transformer: nn.Module) -> dict[str, list[str]]:
    """The dtypes of inputs, and of parameters, with which modules are computed, filled in as they are called."""
    seen: dict[str, list[str]] = {}

    def watch(name: str, module: nn.Module, parameter: str, owner: nn.Module) -> None:
        def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            dtypes = inputs[0].dtype, getattr(owner, parameter).dtype
            seen[name] = [str(dtype).removeprefix("torch.") for dtype in dtypes]

        module.register_forward_pre_hook(note)

    conditions, block = transformer.condition_embedder, transformer.blocks[0]
    watch("time_embedder", conditions.time_embedder.linear_1, "weight", conditions.time_embedder.linear_1)
    watch("image_embedder.norm1", conditions.image_embedder.norm1, "weight", conditions.image_embedder.norm1)
    watch("block.norm2", block.norm2, "weight", block.norm2)
    watch("block.scale_shift_table", block.norm1, "scale_shift_table", block)
    watch("scale_shift_table", transformer.norm_out, "scale_shift_table", transformer)
    watch("time_proj", conditions.time_proj, "weight", conditions.time_proj)
    watch("image_embedder.pos_embed", conditions.image_embedder.ff, "pos_embed", conditions.image_embedder)
    watch("block.ffn", block.ffn, "weight", block.ffn.net[2])
    watch("proj_out", transformer.proj_out, "weight", transformer.proj_out)
    return seen


def resumed(recipe: Recipe, runtime: Runtime, family: Family, prepared: Prepared) -> list[list[float]]:
    """Loss and norm of steps 2 and 3, of a run that went straight on and of one that was taken up from a checkpoint."""

    def steps(job: Job, first: int, last: int) -> list[float]:
        batches = iter(job.batches(first))
        results = [job.step(step, [next(batches)]) for step in range(first, last)]
        return [figure for result in results for figure in (result.loss, result.grad_norm)]

    straight, second = (build(recipe, runtime, family, prepared) for _ in range(2))
    steps(straight, 0, 2)
    straight.save(2)
    expected = steps(straight, 2, 4)
    assert second.resume() == 2
    return [expected, steps(second, 2, 4)]


def main(out: Path, which: str, file: str, runtime: Runtime) -> None:
    family = open_family(recipe_of(file, runtime))
    prepared = {precision: prepare(recipe_of(file, runtime, f"train.precision={precision}"), family, runtime)
                for precision in ("bf16", "float32")}  # fmt: skip
    results: dict[str, Any] = {"bf16": {}, "float32": {}, "resumed": {}}
    for method, how in ways(which, runtime.world_size):
        torch._dynamo.reset()
        recipe = recipe_of(file, runtime, *METHODS[method], *HOW[how], "train.precision=bf16")
        job = build(recipe, runtime, family, prepared["bf16"])
        apart = max(runtime.gather(difference(job, family)))
        seen = {} if recipe.memory.compile else watched(job.state.transformer)
        results["bf16"][f"{method}, {how}"] = figures(job, "never") | {"difference": apart, "seen": seen}
    for method in ("lora", "full"):
        for share in (1, 2 // runtime.world_size):  # two accumulation steps, too, for one process
            overrides = [*METHODS[method], "train.precision=float32", f"train.micro_batch_size={share}"]
            job = build(recipe_of(file, runtime, *overrides), runtime, family, prepared["float32"])
            results["float32"][f"{method}, {job.split.accumulation}"] = figures(job, "first and last")
    for method in METHODS:
        output = f"output={out.with_suffix('')}-{method.replace(' ', '-')}"
        recipe = recipe_of(file, runtime, *METHODS[method], "train.precision=bf16", output)
        results["resumed"][method] = resumed(recipe, runtime, family, prepared["bf16"])
    if runtime.is_main:
        out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    quiet_libraries()
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], distributed.start(timeout_seconds=60))
    distributed.stop()
    leave(0)
