"""The time per step that the training loop takes more than a bare torch loop, on a tiny model, or on one whose steps take seconds.

`python -m benchmarks.overhead [--large] [--workers N]`. `finetune.training.run.run` runs as in a training, with its loader,
metrics.jsonl and progress line. After each block of its steps, each bare loop runs a block of as many steps, on batches in
memory: forward, loss, backward, clipping, AdamW, loss to the host. One bare loop uses the run's own parallelised model,
the other the same model without FSDP. Both have the run's optimizer settings.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import LTXVideoTransformer3DModel
from torch import nn

from benchmarks.paired import print_table
from finetune.checks.model import open_family
from finetune.commands.demo import make_demo
from finetune.engine.optimizers import build_optimizer
from finetune.engine.parallel import trained_parameters
from finetune.engine.precision import storage_dtype
from finetune.engine.step import StepResult
from finetune.engine.weights.loading import whole_transformer
from finetune.models.adapters import lora
from finetune.models.batch import Batch
from finetune.models.family import Family
from finetune.preparation.encode import prepare
from finetune.recipe import Recipe
from finetune.runtime import distributed
from finetune.runtime.signals import StopRequest
from finetune.training.job import Job, build
from finetune.training.memory import NoPlan
from finetune.training.report import Report
from finetune.training.run import run

MAX_NORM = 1.0


def recipe_in(folder: Path, steps: int, workers: int, bucket: str) -> Recipe:
    """A recipe for a LoRA of the demo's model on the demo's clips."""
    return Recipe.model_validate(
        {
            "output": str(folder / "run"),
            "model": {"family": "ltx", "path": str(folder / "model")},
            "data": {
                "path": str(folder / "clips"),
                "buckets": [bucket],
                "cache": str(folder / "cache"),
                "workers": workers,
            },
            "train": {"steps": steps, "precision": "float32", "max_grad_norm": MAX_NORM},
            "lora": {"rank": 16},
            "memory": {"activation_checkpointing": "none"},
            "checkpoint": {"every": steps},
        }
    )


def enlarge(model: Path) -> None:
    """Replace the demo's transformer by one whose step takes a second and more on one thread."""
    folder = model / "transformer"
    config = LTXVideoTransformer3DModel.load_config(folder)
    wide = {"num_attention_heads": 8, "attention_head_dim": 64, "cross_attention_dim": 512, "num_layers": 16}
    torch.manual_seed(0)
    LTXVideoTransformer3DModel.from_config({**config, **wide}).save_pretrained(folder)


def plain_model(recipe: Recipe, family: Family) -> nn.Module:
    """The model with its adapter, without FSDP."""
    model = whole_transformer(family, storage_dtype(recipe.train))
    model.requires_grad_(False)
    lora.add(model, family, recipe.lora, recipe.train.seed)
    return model.train()


def bare_loop(model: nn.Module, recipe: Recipe, family: Family, batches: list[Batch]) -> Callable[[int], None]:
    """A function that makes a given number of optimizer steps and does nothing else."""
    parameters = trained_parameters(model)
    optimizer = build_optimizer(parameters, recipe.optimizer)

    def steps(count: int) -> None:
        for index in range(count):
            batch = batches[index % len(batches)]
            prediction = family.predict(model, batch.inputs)["video"]
            loss = (prediction.float() - batch.only.target).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

    return steps


class TakingTurns(Report):
    """The run's own report, which runs and times the bare loops after each block of steps."""

    def __init__(self, job: Job, block: int, others: dict[str, Callable[[int], None]]) -> None:
        super().__init__(job, done=0)
        self.block, self.others = block, others
        self.milliseconds: dict[str, list[np.ndarray]] = {name: [] for name in ("finetune", *others)}

    def step(self, step: int, result: StepResult) -> None:
        super().step(step, result)
        if step % self.block:
            return
        if step > self.block:  # the first block warms up
            self.milliseconds["finetune"].append(self.a_step())
        for name, steps in self.others.items():
            self.start = clocks()
            steps(self.block)
            if step > self.block:
                self.milliseconds[name].append(self.a_step())
        self.last = time.monotonic()  # the report's own clock
        self.start = clocks()

    def a_step(self) -> np.ndarray:
        """Milliseconds per step of the block that ends now, by both clocks."""
        return (clocks() - self.start) / self.block * 1e3


def clocks() -> np.ndarray:
    """(wall-clock seconds, CPU seconds of this thread). Other programs do not change the latter."""
    return np.array([time.perf_counter(), time.thread_time()])


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--steps", type=int, help="of a block; 20, with --large 2")
    parser.add_argument("--large", action="store_true", help="a wider model on larger clips, in blocks of 2 steps")
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or (2 if arguments.large else 20)
    torch.set_num_threads(1)  # as under torchrun
    runtime = distributed.start(600)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_demo(folder, "ltx")
        if arguments.large:
            enlarge(folder / "model")
        bucket = "17x256x384" if arguments.large else "17x64x96"
        recipe = recipe_in(folder, (arguments.blocks + 1) * arguments.steps, arguments.workers, bucket)
        recipe.output.mkdir()
        family = open_family(recipe)
        job = build(recipe, runtime, family, prepare(recipe, family, runtime))
        in_memory = [job.micro_batches()[k] for k in range(16)]
        others = {
            "bare, same model": bare_loop(job.state.transformer, recipe, family, in_memory),
            "bare, no FSDP": bare_loop(plain_model(recipe, family), recipe, family, in_memory),
        }
        with TakingTurns(job, arguments.steps, others) as report:
            run(job, 0, report, StopRequest(), NoPlan(recipe, runtime))
    distributed.stop()
    ours = np.array(report.milliseconds["finetune"])  # (blocks, clocks)
    rows = []
    for name, blocks in report.milliseconds.items():
        row = [name, *(f"{value:.2f}" for value in np.median(blocks, 0))]
        over = [f"{value:+.2f}" for value in np.median(ours - blocks, 0)]
        over += [f"{value:.3f}" for value in np.median(ours / blocks, 0)]
        rows.append([*row, *over] if name in others else [*row, *[""] * 4])
    workers = f"{arguments.workers} loader processes"
    print(f"\n{arguments.blocks} blocks of {arguments.steps} steps, in turn, one process of one thread, {workers};")
    print("milliseconds a step, and how many more finetune takes: medians over blocks\n")
    heads = ["loop", "wall", "processor", "finetune - it, wall", "processor", "finetune / it, wall", "processor"]
    print_table(heads, rows)


if __name__ == "__main__":
    main()
