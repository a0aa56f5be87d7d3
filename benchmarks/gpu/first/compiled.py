"""Compiled blocks have the gradients of eager ones."""

from functools import reduce
from operator import add

import torch
from torch import Tensor

from benchmarks.gpu.first.bench import Bench, Failed
from benchmarks.gpu.first.tiny import FULL, batches_of, build, recipe_of, tiny_family
from finetune.engine.gradients import local
from finetune.models.family import Family
from finetune.recipe.rules import Settings

FAMILIES = ("ltx", "cogvideox", "hunyuan")
LIMIT = 1e-4  # of the norm of each gradient; of all gradients, if its own is less than a thousandth of it
FAMILY_OF_EACH_SAVER = "hunyuan"
RECOMPUTED = {"full checkpointing": "full", "nothing recomputed": "none"}


def compiled(bench: Bench) -> str:
    """In float32, full finetuning, so that every weight has a gradient."""
    worst = []
    for name in FAMILIES:
        family = tiny_family(bench, name)
        for title, which in RECOMPUTED.items():
            if which == "none" and name != FAMILY_OF_EACH_SAVER:
                continue
            settings = FULL | {"memory.activation_checkpointing": which}
            eager = gradients(bench, family, settings)
            fast = gradients(bench, family, settings | {"memory.compile": True})
            off, where = greatest_difference(fast, eager)
            bench.notes.append(f"{name}, {title}: {len(eager)} gradients, at most {off:.1e} off ({where})")
            worst.append((off, f"{name}, {title}, {where}"))
            torch.compiler.reset()
    off, where = max(worst)
    if not off <= LIMIT:
        raise Failed(f"gradients of {where} are {off:.1e} off")
    return f"gradients of {', '.join(FAMILIES)} are at most {off:.1e} off in float32 ({where})"


def gradients(bench: Bench, family: Family, settings: Settings) -> dict[str, Tensor]:
    """The gradient of each weight, on the CPU, for one batch whose captions need a mask."""
    recipe = recipe_of(family, settings)
    state = build(bench, family, recipe)
    family.keeps_text_length = True  # as compiled blocks have it
    (batch,) = batches_of(family, recipe, 0)
    batch = batch.to(bench.device.torch_device)
    predictions = family.predict(state.transformer, batch.inputs)
    reduce(add, (loss.mean() for loss in batch.losses(predictions).values())).backward()
    named = {name: p.grad for name, p in state.transformer.named_parameters() if p.grad is not None}
    return {name: local(gradient).detach().float().cpu() for name, gradient in named.items()}


def greatest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """(the greatest relative error of a gradient, its name)."""
    if found.keys() != expected.keys() or not expected:
        raise Failed(f"{len(found)} weights have gradients, not {len(expected)}")
    least = 1e-3 * torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    errors = {}
    for name, gradient in expected.items():
        error = ((found[name] - gradient).norm() / torch.maximum(gradient.norm(), least)).item()
        errors[name] = error if error == error else float("inf")
    where = max(errors, key=lambda name: errors[name])
    return errors[where], where
