"""Every optimizer that is not one of AdamW's low-bit kinds, with an adapter and with all weights: trained straight, and broken
off and resumed.

Usage: [torchrun ... ] optimizers_worker.py OUT RECIPE KIND...
    writes the figures of each training to OUT as JSON, and its weights beside it. A KIND is "lora lion" or "full muon bf16".
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from finetune.checks.model import open_family
from finetune.checks.settings import check_recipe
from finetune.engine.gradients import local
from finetune.engine.parallel import trained_parameters
from finetune.engine.parts import evaluating
from finetune.preparation.encode import prepare
from finetune.recipe import load_recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries
from finetune.training.job import Job, build

STEPS, BREAK = 4, 2
RATES = {"adafactor": "1e-2", "prodigy": "1", "lion": "1e-4"}
SETTINGS = {
    "lora": ["train.method=lora", "lora.rank=4"],
    "full": ["train.method=full"],
}


def steps(job: Job, first: int, last: int) -> list[dict]:
    batches, each = job.micro_batches(), job.split.accumulation
    return [
        asdict(job.step(step, [batches[step * each + turn] for turn in range(each)])) for step in range(first, last)
    ]


def whole_weights(job: Job) -> dict[str, Tensor]:
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
    weights = get_model_state_dict(job.state.transformer, options=options)
    return {name: tensor.detach().contiguous().clone() for name, tensor in weights.items()}


def gradients_of(job: Job) -> dict[str, Tensor]:
    """The gradients that each of a job's updates is given on one process, by step and name: filled as steps are made."""
    found: dict[str, Tensor] = {}
    names = list(trained_parameters(job.state.transformer))

    def note(*_: object) -> None:
        step = len(found) // len(names)
        for name, parameter in zip(names, job.state.parameters, strict=True):
            assert parameter.grad is not None
            found[f"{step} {name}"] = local(parameter.grad).detach().clone()

    if job.state.runtime.world_size == 1:
        job.state.optimizer.register_step_pre_hook(note)
    return found


def state_bytes(values: Iterable[object]) -> int:
    return sum(local(value).nbytes for value in values if isinstance(value, Tensor))


def main(recipe_file: str, kinds: list[str], out: Path, runtime: Runtime) -> None:
    found: dict[str, dict] = {}
    for kind in kinds:
        method, name, *rest = kind.split()
        overrides = [*SETTINGS[method], f"optimizer.name={name}", f"optimizer.lr={RATES.get(name, '1e-3')}"]
        overrides += ["train.weights=bf16"] if "bf16" in rest else []
        overrides += ["schedule.name=constant_with_warmup", f"output={out.parent / f'{kind} {runtime.world_size}'}"]
        overrides += ["optimizer.weight_decay=0.01", "train.micro_batch_size=1"]
        recipe = load_recipe(recipe_file, overrides)
        assert check_recipe(recipe, runtime.world_size) == [], kind
        family = open_family(recipe)
        prepared = prepare(recipe, family, runtime)
        straight = build(recipe, runtime, family, prepared)
        before, gradients = whole_weights(straight), gradients_of(straight)
        expected = steps(straight, 0, STEPS)
        weights, held_out = whole_weights(straight), straight.heldout_loss()
        with evaluating(straight.state.parts, "heldout"):
            evaluated = whole_weights(straight)
        broken = build(recipe, runtime, family, prepared)
        steps(broken, 0, BREAK)
        broken.heldout_loss()
        broken.save(BREAK)
        resumed = build(recipe, runtime, family, prepared)
        assert resumed.resume() == BREAK
        rest_of = steps(resumed, BREAK, STEPS)
        again = whole_weights(resumed)
        state = straight.state.optimizer.state
        found[kind] = {
            "steps": expected,
            "resumed": rest_of,
            "unequal": [name for name in weights if not torch.equal(weights[name], again[name])],
            "held out": held_out.loss if held_out else None,
            "values": sum(local(p).numel() for p in straight.state.parameters),
            "state bytes": sum(state_bytes(values.values()) for values in state.values()),
        }
        if runtime.is_main:
            made = {"before": before, "after": weights, "evaluated": evaluated, "gradients": gradients}
            for what, tensors in made.items():
                save_file(tensors, out.with_name(f"{kind} {runtime.world_size} {what}.safetensors"))
    if runtime.is_main:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    quiet_libraries()
    main(sys.argv[2], sys.argv[3:], Path(sys.argv[1]), distributed.start(timeout_seconds=60))
    distributed.stop()
    leave(0)
