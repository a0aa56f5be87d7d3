"""Step times of LTX-Video 2B: what memory history costs, and what the fused AdamW and compilation save."""

import math
from collections.abc import Callable

import torch

from benchmarks.gpu.first.bench import Bench, Failed
from benchmarks.gpu.first.tiny import batches_of, bucket_of, recipe_of, scratch, tiny_family
from benchmarks.gpu.random_model import full_width, random_weights
from benchmarks.paired import median_ratio, take_turns
from finetune.engine.step import StepState, run_step
from finetune.models.ltx import LTXVideo
from finetune.recipe import Bucket
from finetune.recipe.rules import Settings
from finetune.training.job import build_state

BUCKET = Bucket(49, 512, 768)
STEPS, ROUNDS = 2, 4  # steps of a turn, turns


def speed(bench: Bench) -> str:
    """Variants take turns; the ratio to plain steps is that of each turn, in the median."""
    if bench.smoke:
        family = tiny_family(bench, "ltx")
        weights, bucket = family.transformer_weights(), bucket_of(family)
    else:
        family = full_width("Lightricks/LTX-Video", scratch(bench, "speed"), None, LTXVideo)
        weights, bucket = random_weights(family, torch.bfloat16), BUCKET
    common = {"train.precision": "float32" if bench.smoke else "bf16", "train.micro_batch_size": 1}
    size = {} if bench.smoke else {"lora.rank": 64, "lora.alpha": 64}
    device = bench.device

    def state_of(settings: Settings, fused: bool = True) -> StepState:
        recipe = recipe_of(family, {**common, **size, **settings}, bucket)
        state = build_state(recipe, bench.runtime, family, weights)
        if not fused:  # before the first step, which allocates the optimizer's state
            for group in state.optimizer.param_groups:
                group["fused"], group["foreach"] = False, True
        return state

    def stepping(state: StepState) -> Callable[[], None]:
        recipe = recipe_of(family, {**common, **size}, bucket)
        batch = batches_of(family, recipe, 0)

        def steps() -> None:
            for step in range(STEPS):
                if not math.isfinite(run_step(state, step, batch).loss):
                    raise Failed("the loss is not finite")

        return steps

    plain = stepping(state_of({}))

    def recorded() -> None:
        device.record_memory()
        plain()
        device.record_memory(False)

    variants = {
        "plain": plain,
        "with memory history": recorded,
        "AdamW not fused": stepping(state_of({}, fused=False)),
        "compiled": stepping(state_of({"memory.compile": True})),
    }
    seconds = take_turns(variants, ROUNDS)
    for name, taken in seconds.items():
        bench.notes.append(f"{name}: {', '.join(f'{each / STEPS:.4f}' for each in taken)} s a step")
    ratios = {name: median_ratio(taken, seconds["plain"]) for name, taken in seconds.items() if name != "plain"}
    one = sorted(seconds["plain"])[len(seconds["plain"]) // 2] / STEPS
    beside = ", ".join(f"{name} x {ratio:.3f}" for name, ratio in ratios.items())
    return f"{device.name}, LoRA at {bucket}: {one:.4f} s a step; {beside}"
