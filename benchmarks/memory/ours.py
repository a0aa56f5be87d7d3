"""The same work with a recipe of ours: this project's own build and step on the simulated accelerator, or on a GPU."""

import dataclasses
import json
import sys
import time
from typing import Any

from benchmarks.full_size import CONFIGS
from benchmarks.memory.published import Row
from finetune.models.cogvideox import CogVideoX
from finetune.models.folder import ModelFolder
from finetune.planning.gpus import Hardware
from finetune.planning.simulate import simulate
from finetune.recipe import Bucket, Recipe

BUCKET = Bucket(49, 480, 720)


@dataclasses.dataclass(frozen=True)
class Ours:
    """What a recipe of ours sets; two rows whose work is the same share one."""

    model: str
    gpus: int
    tables: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]

    @property
    def key(self) -> str:
        """The same for the same settings."""
        return json.dumps([self.model, self.gpus, self.tables], sort_keys=True)

    @classmethod
    def parse(cls, key: str) -> "Ours":
        """Of its `key`."""
        model, gpus, tables = json.loads(key)
        return cls(model, gpus, tuple((name, tuple(map(tuple, settings))) for name, settings in tables))

    def recipe(self) -> Recipe:
        """As a whole."""
        tables = {name: dict(settings) for name, settings in self.tables}
        base = {"family": "cogvideox", "path": str(CONFIGS / self.model)}
        return Recipe.model_validate({"model": base, "data": {"path": "clips", "buckets": [str(BUCKET)]}, **tables})


def _tables(**tables: dict[str, Any]) -> tuple:
    return tuple((name, tuple(settings.items())) for name, settings in tables.items())


def resident(row: Row) -> Ours:
    """Everything on the GPU but what the row itself offloads: bf16, adapters and their moments float32; all weights trained in
    bf16 with stochastic rounding. Beside DeepSpeed's rows: FSDP2 with CPU offload on as many GPUs.
    """
    train = {"method": row.method, "global_batch_size": row.batch_size * row.gpus, "micro_batch_size": row.batch_size}
    memory: dict[str, Any] = {"activation_checkpointing": "full" if row.checkpointing else "none"}
    optimizer = {"name": "adamw_8bit" if row.optimizer == "adamw_8bit_bnb" else "adamw"}
    if row.method == "full":
        train["weights"] = "bf16"
    if row.gpus > 1:
        memory |= {"layout": "shard", "offload": True}
    elif row.optimizer == "adamw_cpu_offload":
        memory["offload"] = True
    return _finished(row, train, memory, optimizer)


def with_savers(row: Row) -> Ours:
    """Weights in host memory, and what the forward pass saves for the backward pass, too."""
    train = {"method": row.method, "global_batch_size": row.batch_size * row.gpus, "micro_batch_size": row.batch_size}
    memory: dict[str, Any] = {"activation_checkpointing": "full", "offload": True, "offload_activations": True}
    if row.gpus > 1:
        memory["layout"] = "shard"
    return _finished(row, train, memory, {"name": "adamw"})


def _finished(row: Row, train: dict, memory: dict, optimizer: dict) -> Ours:
    # DeepSpeed's LoRA rows do not say their rank: it was 256.
    lora = {"lora": {"rank": row.rank or 256, "alpha": 64}} if row.method == "lora" else {}
    return Ours(row.model, row.gpus, _tables(train=train, memory=memory, optimizer=optimizer, **lora))


def predict(ours: Ours) -> dict[str, float]:
    """Peaks in bytes of loading and steps, in a process of its own: the simulated device stays known to torch."""
    start = time.perf_counter()
    recipe, family = ours.recipe(), CogVideoX(ModelFolder(CONFIGS / ours.model))
    plan = simulate(recipe, family, [BUCKET], Hardware(ours.gpus))
    peak = plan.highest.device
    host = max(phase.host.requested for phase in plan.phases)
    return {
        "reserved": peak.reserved,
        "allocated": max(phase.device.allocated for phase in plan.phases),
        "host": host,
        "seconds": time.perf_counter() - start,
    }


if __name__ == "__main__":
    print(json.dumps(predict(Ours.parse(sys.argv[1]))))
