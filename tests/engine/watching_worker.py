"""Trainings that report losses by noise level and norms of blocks, beside a plain computation of the same figures.

Usage: [torchrun ... ] watching_worker.py OUT RECIPE        writes the figures of every configuration to OUT as JSON.
"""

import json
import sys
from pathlib import Path

import torch
from torch.nn.utils import get_total_norm

from finetune.checks.model import open_family
from finetune.preparation.encode import prepare
from finetune.recipe import load_recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries
from finetune.training.job import Job, build

UNCLIPPED = ["train.method=full", "train.max_grad_norm=none"]
CONFIGURATIONS = {
    "lora": [],
    "not watched": ["tracking.quantiles_every=1000"],
    "full": UNCLIPPED,
    "in backward": [*UNCLIPPED, "optimizer.in_backward=true"],
    "gradients on the host": [*UNCLIPPED, "optimizer.offload=state_and_gradients"],
}
RANKS = {"not watched": (1,), "full": (1,), "in backward": (2,), "gradients on the host": (2,)}
WATCHED = ["tracking.quantiles_every=2", "tracking.block_norms_every=1"]
STEPS = 4


def plainly(job: Job, step: int) -> tuple[list[tuple[int, float]], dict[str, float]]:
    """(quarter and loss of each of this rank's samples, norm of each block) by a forward and a backward pass of its own."""
    state, losses = job.state, []
    (batch,) = (job.micro_batches()[step],)
    each = batch.only.losses(next(iter(state.family.predict(state.transformer, batch.inputs).values())))
    losses = list(zip(batch.quarters.tolist(), each.tolist(), strict=True))
    norms: dict[str, float] = {}
    if state.runtime.world_size == 1 and not state.in_backward and not state.host_gradients:
        each.mean().backward()
        grouped: dict[str, list[torch.Tensor]] = {}
        for name, parameter in state.transformer.named_parameters():
            if parameter.grad is not None:
                parts = name.replace("._checkpoint_wrapped_module", "").split(".")
                block = ".".join(parts[:2]) if parts[0] == "transformer_blocks" else "other"
                grouped.setdefault(block, []).append(parameter.grad)
        norms = {f"grad_norm/{block}": get_total_norm(grads).item() for block, grads in grouped.items()}
        state.transformer.zero_grad()
    return losses, norms


def main(recipe_file: str, out: Path, runtime: Runtime) -> None:
    found = {}
    for name, overrides in CONFIGURATIONS.items():
        if runtime.world_size not in RANKS.get(name, (1, 2)):
            continue
        settings = [] if name == "not watched" else WATCHED
        size = ["train.global_batch_size=4", f"train.micro_batch_size={4 // runtime.world_size}", "train.steps=4"]
        recipe = load_recipe(recipe_file, [*settings, *size, *overrides])
        family = open_family(recipe)
        job = build(recipe, runtime, family, prepare(recipe, family, runtime))
        steps = []
        for step in range(STEPS):
            losses, norms = plainly(job, step)
            result = job.step(step, [job.micro_batches()[step]])
            gathered = [each for share in runtime.gather(losses) for each in share]
            steps.append(
                {
                    "watched": result.watched,
                    "losses": gathered,
                    "norms": norms,
                    "loss": result.loss,
                    "norm": result.grad_norm,
                }
            )
        found[name] = steps
    if runtime.is_main:
        out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    quiet_libraries()
    main(sys.argv[2], Path(sys.argv[1]), distributed.start(timeout_seconds=60))
    distributed.stop()
    leave(0)
