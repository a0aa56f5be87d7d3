"""How the anonymous memory of a process grows while it builds and loads a transformer.

Usage: [torchrun ... ] loading_worker.py OUT MODEL        writes bytes of every rank, by recipe, to OUT as JSON.
"""

import gc
import json
import sys
import threading
from pathlib import Path

from torch.distributed.tensor import DTensor

from finetune.models import family_class
from finetune.models.folder import ModelFolder
from finetune.recipe import Recipe
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries
from finetune.training.job import build_state

CONFIGURATIONS = {
    "lora": {"train": {"method": "lora"}},
    "full": {"train": {"method": "full"}},
    "int8": {"train": {"method": "lora"}, "memory": {"low_bit": "int8"}},
}


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


class Peak:
    """The most `anonymous` has been while this was open, sampled every millisecond."""

    def __enter__(self) -> "Peak":
        self.highest = self.before = anonymous()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self.highest = max(self.highest, anonymous())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.highest = max(self.highest, anonymous())

    @property
    def growth(self) -> int:
        return self.highest - self.before


def main(model: Path, out: Path, runtime: Runtime) -> None:
    family = family_class("ltx")(ModelFolder(model))
    figures = {}
    for name, tables in {"warm-up": CONFIGURATIONS["lora"], **CONFIGURATIONS}.items():
        recipe = Recipe.model_validate(
            {
                "model": {"family": "ltx", "path": str(model)},
                "data": {"path": "none", "buckets": ["17x64x96"]},
                "lora": {"rank": 4},
                **tables,
            }
        )
        gc.collect()
        with Peak() as peak:
            state = build_state(recipe, runtime, family, family.transformer_weights())
        locals_ = [p.to_local() if isinstance(p, DTensor) else p for p in state.transformer.parameters()]
        shard = sum(tensor.nbytes for tensor in locals_)
        figures[name] = runtime.gather({"growth": peak.growth, "shard": shard})
        del state, locals_
    del figures["warm-up"]  # it imports, compiles regular expressions, and so on
    if runtime.is_main:
        out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    quiet_libraries()
    main(Path(sys.argv[2]), Path(sys.argv[1]), distributed.start(timeout_seconds=120))
    distributed.stop()
    leave(0)
