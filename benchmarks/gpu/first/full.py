"""Full finetuning: bf16 weights with 8-bit moments, updates in the backward pass, and weights in host memory."""

import os

import torch

from benchmarks.gpu.first.bench import Bench, Failed
from benchmarks.gpu.first.tiny import (
    DETERMINISTIC,
    FULL,
    UNCLIPPED,
    Losses,
    apart,
    batches_of,
    build,
    deterministic,
    losses_of,
    recipe_of,
    said,
    tiny_family,
)
from finetune.engine.step import run_step

FAMILY = "ltx"
STEPS = 5
ROUNDED = 2e-2  # what other random numbers in rounding may change, as in tests/engine/test_savers.py
OFFLOADED = 1e-5
SMALL = FULL | UNCLIPPED | {"train.weights": "bf16", "optimizer.name": "adamw_8bit"}


def full(bench: Bench) -> str:
    """Losses with and without updates in the backward pass; and of the same training twice."""
    family = tiny_family(bench, FAMILY)
    settings = SMALL if bench.smoke else SMALL | {"train.precision": "bf16"}
    after, again = (losses_of(bench, family, settings, STEPS) for _ in range(2))
    within = losses_of(bench, family, settings | {"optimizer.in_backward": True}, STEPS)
    exact = losses_of(bench, family, settings | {"train.weights": "float32", "optimizer.name": "adamw"}, STEPS)
    for name, losses in (("after", after), ("in", within), ("float32", exact)):
        bench.notes.append(f"{name}: losses {', '.join(f'{loss:.5f}' for loss, _ in losses)}")
    off = apart(_losses(within), _losses(after))
    if not off <= ROUNDED:
        raise Failed(f"losses with updates in the backward pass are {off:.1e} off")
    far = apart(_losses(after), _losses(exact))
    if not far <= ROUNDED:
        raise Failed(f"losses with bf16 weights and 8-bit moments are {far:.1e} off those of float32")
    twice = apart(again, after)
    return (
        f"{STEPS} losses in the backward pass equal those after it to {off:.1e}, those of float32 weights and moments to "
        f"{far:.1e}; the same training twice is equal {said(twice)}"
    )


def _losses(steps: Losses) -> Losses:
    """Losses alone: norms of rounded weights differ more."""
    return [(loss, loss) for loss, _ in steps]


def offload(bench: Bench) -> str:
    """Under torchrun, on as many GPUs as there are, two at most."""
    processes = min(2, bench.gpus) or 2
    environment = DETERMINISTIC | {"OMP_NUM_THREADS": "1"}  # as torchrun sets it for several processes
    return bench.elsewhere("benchmarks.gpu.first.full:offloaded", environment, processes=processes)


def offloaded(bench: Bench) -> str:
    """Losses, norms and threads with weights, gradients and moments in host memory."""
    deterministic()
    family, runtime = tiny_family(bench, FAMILY), bench.runtime
    settings = FULL | {"memory.layout": "shard"}
    plain = losses_of(bench, family, settings)
    recipe = recipe_of(family, settings | {"memory.offload": True})
    state = build(bench, family, recipe)
    threads = []
    state.optimizer.register_step_pre_hook(lambda *_: threads.append(torch.get_num_threads()))
    found = []
    for step in range(len(plain)):
        result = run_step(state, step, batches_of(family, recipe, step))
        found.append((result.loss, result.grad_norm))
    off = apart(found, plain)
    bench.notes.append(f"norms {', '.join(f'{norm:.5f}' for _, norm in found)}")
    if not off <= OFFLOADED:
        raise Failed(f"losses and norms of gradients are {off:.1e} off with memory.offload")
    share = 1 if runtime.device.is_cpu else max(1, len(os.sched_getaffinity(0)) // runtime.local_world_size)
    if set(threads) != {share}:
        raise Failed(f"updates on the host use {sorted(set(threads))} threads, not {share}")
    if torch.get_num_threads() != 1:
        raise Failed(f"after the update there are {torch.get_num_threads()} threads, not torchrun's one")
    return (
        f"losses and norms equal those on the device {said(off)} on {runtime.world_size} process(es), with clipping; "
        f"updates on the host by {share} thread(s)"
    )
