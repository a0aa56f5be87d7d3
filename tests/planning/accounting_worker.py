"""The storages of a real step on the CPU, and those of the same step on the simulated accelerator.

Usage: accounting_worker.py OUT RECIPE CASES      CASES: overrides by name, as JSON. Figures go to OUT as JSON.

Real and simulated steps run the same code but for what depends on the device: attention's kernel, which is given the
simulated kernel's storages for both. A batch is on the CPU already where a GPU would get a copy: it is cloned there.
"""

import json
import sys
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.checks.model import open_family
from finetune.engine.savers.activation import ATTENTION
from finetune.engine.step import run_step
from finetune.models.batch import Batch
from finetune.planning.gpus import Hardware
from finetune.planning.kernels import FORWARD, fused_attention
from finetune.planning.simulate import STEPS, example_batch, simulate
from finetune.planning.trace import Trace
from finetune.recipe import Recipe, load_recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries
from finetune.training.job import build_state


class Recorder(TorchDispatchMode):
    """Tells a trace of every storage that operations on the CPU make."""

    def __init__(self) -> None:
        super().__init__()
        self.trace, self.known = Trace(), {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if any(issubclass(kind, DTensor) or hasattr(kind, "tensor_attrs") for kind in types):
            return NotImplemented
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return function(*arguments, **(keywords or {}))  # shapes only
        result = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                self.note(leaf.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.known:
            weakref.finalize(storage, self.drop, key)
        if self.known.get(key) != storage.nbytes():
            self.known[key] = storage.nbytes()
            self.trace.resize(key, storage.nbytes())

    def drop(self, key: int) -> None:
        if self.known.pop(key, None) is not None:
            self.trace.resize(key, 0)

    def __enter__(self):
        self.resize = torch.UntypedStorage.resize_

        def traced(storage, size):
            result = self.resize(storage, size)
            if storage._cdata in self.known:
                self.known[storage._cdata] = size
                self.trace.resize(storage._cdata, size)
            return result

        torch.UntypedStorage.resize_ = traced
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)


class OnHost:
    """A batch that is copied when a step takes it to its device, and whose copy nothing holds but the step."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.terms = batch, batch.terms

    def to(self, device: torch.device) -> Batch:
        return self.batch._map(torch.clone)


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of each storage once; of a DTensor's shard, and of all that a low-bit tensor is made of."""
    storages = {}
    for tensor in tensors:
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        for part in [getattr(local, name) for name in getattr(local, "tensor_attrs", ())] or [local]:
            storages[part.untyped_storage()._cdata] = part.untyped_storage().nbytes()
    return sum(storages.values())


def real(recipe: Recipe, runtime: Runtime) -> dict[str, Any]:
    family = open_family(recipe)
    batch = example_batch(recipe, family, recipe.data.buckets[0])
    with Recorder() as recorder, torch.autograd.set_multithreading_enabled(False):
        state = build_state(recipe, runtime, family, family.transformer_weights())
        recorder.trace.begin()
        for step in range(len(STEPS)):
            assert run_step(state, step, [OnHost(batch)]).updated
        peak = recorder.trace.peak()
    counters = 0
    if (
        type(state.optimizer) is not torch.optim.AdamW
    ):  # whose counts of steps are on the GPU; torchao's are on the host
        values = (value for each in state.optimizer.state.values() for value in each.values())
        counters = sum(value.nbytes for value in values if value.dim() == 0)
    weights = {
        name: storage_bytes(each for each in state.transformer.parameters() if each.requires_grad == trained)
        for name, trained in (("trained weights", True), ("frozen weights", False))
    }
    return {"growth": peak.requested - peak.before - counters, "before": peak.before, "weights": weights}


def simulated(recipe: Recipe) -> dict[str, dict[str, int]]:
    plan = simulate(recipe, open_family(recipe), recipe.data.buckets[:1], Hardware(), temporaries=False)
    peak, on_host = plan.phases[-1].device, plan.phases[-1].host.parts
    simulated = {"growth": peak.requested - peak.before, "before": peak.before}
    return {"simulated": simulated, "parts": peak.parts, "parts on the host": on_host}


def main(out: Path, recipe_file: str, cases: dict[str, list[str]]) -> None:
    one = ["train.global_batch_size=1", "train.micro_batch_size=1"]
    recipes = {name: load_recipe(recipe_file, [*overrides, *one]) for name, overrides in cases.items()}
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", fused_attention, "AutogradCPU")
    library.impl("scaled_dot_product_attention", fused_attention, "CPU")
    ATTENTION.add(FORWARD.name())
    runtime = distributed.start(timeout_seconds=60)
    figures = {name: {"real": real(recipe, runtime)} for name, recipe in recipes.items()}
    distributed.stop()
    for name, recipe in recipes.items():
        figures[name] |= simulated(recipe)
    out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    quiet_libraries()
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
    leave(0)
