"""Offloaded weights and activations train what a training without them does: copies are awaited, and memory is not reused early."""

import torch

from benchmarks.gpu.first.bench import Bench, Failed
from benchmarks.gpu.first.tiny import DETERMINISTIC, Losses, apart, deterministic, losses_of, said, scratch, tiny_family
from benchmarks.gpu.random_model import full_width, random_weights
from finetune.models.ltx import LTXVideo
from finetune.recipe import Bucket

FAMILIES = ("ltx", "hunyuan")
STREAMED, ACTIVATIONS = {"memory.offload": True}, {"memory.offload_activations": True}
NF4 = {"memory.low_bit": "nf4"}
CASES = {
    "plain": {},
    "streamed": STREAMED,
    "activations": ACTIVATIONS,
    "both": STREAMED | ACTIVATIONS,
    "NF4": NF4,
    "both, NF4": STREAMED | ACTIVATIONS | NF4,
}
OVER = {"both, NF4": "NF4"}  # what a case is compared with; others with "plain"
LIMITS = {"float32": 1e-6, "bf16": 1e-3}
WIDE = "Lightricks/LTX-Video"
_HERE = "benchmarks.gpu.first.savers:"


def savers(bench: Bench) -> str:
    """Compare each saver with the training without it, in three kinds of processes on a GPU."""
    plain = bench.elsewhere(f"{_HERE}losses", DETERMINISTIC)
    verdicts = [_compared(bench, plain)]
    if bench.smoke:
        return verdicts[0]
    blocking = bench.elsewhere(f"{_HERE}losses", DETERMINISTIC | {"CUDA_LAUNCH_BLOCKING": "1"})
    difference = max(apart(blocking[name], plain[name]) for name in plain)
    if difference > LIMITS["bf16"]:
        raise Failed(f"with CUDA_LAUNCH_BLOCKING=1 losses are {difference:.1e} off; {verdicts[0]}")
    verdicts.append(f"with CUDA_LAUNCH_BLOCKING=1 the same {said(difference)}")
    return "; ".join([*verdicts, _sanitized(bench)])


def _sanitized(bench: Bench) -> str:
    """What torch's sanitizer says. Raises Failed if it has found a race; it may also fail for reasons of its own."""
    try:
        sanitized = bench.elsewhere(f"{_HERE}few_losses", {"TORCH_CUDA_SANITIZER": "1"})
    except Failed as error:
        if "CUDASanitizerErrors" in str(error):
            raise
        return f"TORCH_CUDA_SANITIZER could not be used ({error})"
    return f"TORCH_CUDA_SANITIZER finds no race in {len(sanitized)} trainings"


def losses(bench: Bench) -> dict[str, Losses]:
    """Losses of three steps of each case: "family, precision, case" -> losses."""
    deterministic()
    found = {}
    for name in FAMILIES:
        family = tiny_family(bench, name)
        for case, settings in CASES.items():
            found[f"{name}, float32, {case}"] = losses_of(bench, family, settings, accumulated=2)
    if not bench.smoke:  # blocks of a real size, whose copies take a while
        family = full_width(WIDE, scratch(bench, "savers"), 6, LTXVideo)
        weights = random_weights(family, torch.bfloat16)
        for case, settings in CASES.items():
            found[f"ltx of full width, bf16, {case}"] = losses_of(
                bench, family, settings | {"train.precision": "bf16"}, bucket=Bucket(49, 512, 768), weights=weights
            )
    return found


def few_losses(bench: Bench) -> dict[str, Losses]:
    """Losses of two steps of what copies most; a sanitizer makes each operation slow."""
    return {
        f"{name}, {case}": losses_of(bench, tiny_family(bench, name), CASES[case], steps=2)
        for name in FAMILIES
        for case in ("both", "both, NF4")
    }


def _compared(bench: Bench, found: dict[str, Losses]) -> str:
    """A line on all comparisons. Raises Failed if any is past its limit."""
    worst, exact, wrong = 0.0, 0, []
    compared = 0
    for name, losses in found.items():
        model, precision, case = name.split(", ", 2)
        if case in ("plain", "NF4"):
            continue
        difference = apart(losses, found[f"{model}, {precision}, {OVER.get(case, 'plain')}"])
        compared, exact, worst = compared + 1, exact + (difference == 0), max(worst, difference)
        bench.notes.append(f"{name}: equal {said(difference)}")
        if difference > LIMITS[precision]:
            wrong.append(f"{name} is {difference:.1e} off")
    if wrong:
        raise Failed("; ".join(wrong))
    rest = "" if exact == compared else f", the others to {worst:.1e}"
    return f"{exact} of {compared} comparisons equal bit for bit{rest}"
