"""The work of a published row with a recipe of ours: this project's own build and step, on the simulated accelerator."""

import dataclasses
import json
import sys
import time
from typing import Any

from benchmarks.memory.published import Row
from finetune.models.cogvideox import CogVideoX
from finetune.models.folder import ModelFolder
from finetune.models.published import CONFIGS
from finetune.planning.gpus import Hardware
from finetune.planning.simulate import simulate
from finetune.recipe import Bucket, Recipe

BUCKET = Bucket(49, 480, 720)


@dataclasses.dataclass(frozen=True)
class Ours:
    """The settings of a recipe of ours. Rows with the same work have equal ones."""

    model: str
    gpus: int
    tables: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]

    @property
    def key(self) -> str:
        """A text that is equal for equal settings."""
        return json.dumps([self.model, self.gpus, self.tables], sort_keys=True)

    @classmethod
    def parse(cls, key: str) -> "Ours":
        """The settings with a `key`."""
        model, gpus, tables = json.loads(key)
        return cls(model, gpus, tuple((name, tuple(map(tuple, settings))) for name, settings in tables))

    def recipe(self) -> Recipe:
        """The whole recipe."""
        tables = {name: dict(settings) for name, settings in self.tables}
        base = {"family": "cogvideox", "path": str(CONFIGS / self.model)}
        return Recipe.model_validate({"model": base, "data": {"path": "clips", "buckets": [str(BUCKET)]}, **tables})


def _tables(**tables: dict[str, Any]) -> tuple:
    return tuple((name, tuple(settings.items())) for name, settings in tables.items())


def resident(row: Row) -> Ours:
    """A recipe that keeps everything on the GPU, except for what the row itself offloads.

    Weights are bf16. LoRA trains adapters in float32 with float32 moments; full finetuning trains bf16 weights with stochastic
    rounding. DeepSpeed's rows are compared with FSDP2 and CPU offload on the same number of GPUs.
    """
    train = {"method": row.method, "global_batch_size": row.batch_size * row.gpus, "micro_batch_size": row.batch_size}
    memory: dict[str, Any] = {"activation_checkpointing": "full" if row.checkpointing else "none"}
    optimizer = {"name": "adamw_8bit" if row.optimizer == "adamw_8bit_bnb" else "adamw"}
    if row.method == "full":
        train["weights"] = "bf16"
    if row.gpus > 1:
        memory |= {"layout": "shard", "offload": True}
    elif row.optimizer == "adamw_cpu_offload":
        optimizer["offload"] = "state_and_gradients"
    return _finished(row, train, memory, optimizer)


def with_savers(row: Row) -> Ours:
    """A recipe that keeps weights and saved activations in host memory."""
    train = {"method": row.method, "global_batch_size": row.batch_size * row.gpus, "micro_batch_size": row.batch_size}
    memory: dict[str, Any] = {"activation_checkpointing": "full", "offload": True, "offload_activations": True}
    if row.gpus > 1:
        memory["layout"] = "shard"
    return _finished(row, train, memory, {"name": "adamw"})


def _finished(row: Row, train: dict, memory: dict, optimizer: dict) -> Ours:
    # DeepSpeed's LoRA rows do not give their rank, which was 256.
    lora = {"lora": {"rank": row.rank or 256, "alpha": 64}} if row.method == "lora" else {}
    return Ours(row.model, row.gpus, _tables(train=train, memory=memory, optimizer=optimizer, **lora))


def predict(ours: Ours) -> dict[str, float]:
    """Peak bytes of loading and steps. Call it in a process of its own, because torch keeps the simulated device registered."""
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
