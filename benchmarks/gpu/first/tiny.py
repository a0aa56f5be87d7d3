"""Tiny models in this process: their families, recipes and losses."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.first.bench import Bench
from benchmarks.gpu.random_model import random_batch
from finetune.engine.precision import DTYPES
from finetune.engine.step import StepState, run_step
from finetune.models import family_class
from finetune.models.batch import Batch
from finetune.models.family import Family
from finetune.models.folder import ModelFolder
from finetune.models.weights import Weights
from finetune.recipe import Bucket, Recipe
from finetune.recipe.rules import Settings
from finetune.training.job import build_state

FULL = {"train.method": "full", "optimizer.lr": 1e-3}
UNCLIPPED = {"train.max_grad_norm": "none"}
Losses = list[tuple[float, float]]
"""(loss, gradient norm) of each step."""


def tiny_family(bench: Bench, name: str) -> Family:
    """A tiny pipeline on disk, made by rank 0 when it is first asked for. Collective."""
    folder = bench.folder / f"tiny-{name}"
    with bench.runtime.together():
        if bench.runtime.is_main and not folder.exists():
            partial = folder.with_name(f"partial-{name}")
            family_class(name).tiny(partial)
            partial.rename(folder)
    return family_class(name)(ModelFolder(folder))


def bucket_of(family: Family) -> Bucket:
    """A small bucket that the family takes."""
    return Bucket(13 if family.name == "mochi" else 17, 64, 96)


def recipe_of(family: Family, settings: Settings, bucket: Bucket | None = None) -> Recipe:
    """A recipe with `table.key` -> value: a LoRA of rank 4 in float32 on two samples, if they say nothing else."""
    tables: dict[str, dict[str, Any]] = {
        "model": {"family": family.name, "path": str(family.folder.path)},
        "data": {"path": "none", "buckets": [str(bucket or bucket_of(family))]},
        "train": {"precision": "float32", "global_batch_size": 4, "micro_batch_size": 2, "max_grad_norm": 0.05},
        "lora": {"rank": 4, "alpha": 8},
        "optimizer": {"lr": 1e-2},
    }
    for key, value in settings.items():
        table, _, name = key.partition(".")
        tables.setdefault(table, {})[name] = value
    if tables["train"].get("method") == "full":
        del tables["lora"]
    return Recipe.model_validate(tables)


def build(bench: Bench, family: Family, recipe: Recipe, weights: Weights | None = None) -> StepState:
    """The state of a training, which offloads whatever is saved, however small."""
    state = build_state(recipe, bench.runtime, family, weights or family.transformer_weights())
    if state.activations and weights is None:  # tiny models save nothing that is worth a copy
        state.activations.smallest = 1
    return state


def batches_of(family: Family, recipe: Recipe, step: int, count: int = 1) -> list[Batch]:
    """The micro-batches of a step. Make them after `build`, which says whether the text keeps its length."""
    bucket, dtype = recipe.data.buckets[0], DTYPES[recipe.train.precision]
    return [random_batch(family, recipe, bucket, dtype, seed=step * count + index) for index in range(count)]


def losses_of(
    bench: Bench,
    family: Family,
    settings: Settings,
    steps: int = 3,
    bucket: Bucket | None = None,
    weights: Weights | None = None,
    accumulated: int = 1,
) -> Losses:
    """Losses and gradient norms of a few steps of a training that is built here."""
    recipe = recipe_of(family, settings, bucket)
    state = build(bench, family, recipe, weights)
    results = [run_step(state, step, batches_of(family, recipe, step, accumulated)) for step in range(steps)]
    return [(result.loss, result.grad_norm) for result in results]


def apart(some: Losses, others: Losses) -> float:
    """The greatest relative difference of losses and norms; infinite if any is not finite."""
    greatest = 0.0
    for one, other in zip(some, others, strict=True):
        for a, b in zip(one, other, strict=True):
            difference = abs(a - b) / max(abs(b), 1e-12)
            greatest = max(greatest, difference if difference == difference and abs(a) < float("inf") else float("inf"))
    return greatest


def said(difference: float) -> str:
    """A difference in words."""
    return "bit for bit" if difference == 0 else f"to {difference:.1e}"


def deterministic() -> None:
    """Have torch use kernels that give the same bits in each run, where there are such. Call it before the device is used."""
    torch.use_deterministic_algorithms(True, warn_only=True)


DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""The environment that cuBLAS wants for it."""


def scratch(bench: Bench, name: str) -> Path:
    """A folder of its own for a full-width model."""
    return bench.folder / f"full-{name}"
