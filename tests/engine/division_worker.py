"""A checkpoint of optimizers whose weights do not divide well: written by one process, read by two.

Usage: [torchrun ... ] division_worker.py OUT FOLDER       what went wrong, by optimizer, goes to OUT as JSON.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from finetune.engine.optimizers import build_optimizer
from finetune.engine.parts import OptimizerState, TrainedWeights
from finetune.engine.weights.checkpoint import Checkpoints
from finetune.recipe.optimizers import OPTIMIZERS
from finetune.runtime import distributed
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.runtime.exit import leave
from finetune.runtime.logging import quiet_libraries


def main(folder: Path, out: Path, runtime: Runtime) -> None:
    told = {}
    for name in ("adamw", "adamw_8bit", "adamw_fp8"):
        model = fully_shard(nn.Linear(64, 100, bias=False), mesh=distributed.mesh(runtime))
        optimizer = build_optimizer(dict(model.named_parameters()), OPTIMIZERS[name](name=name))
        parts = [TrainedWeights(model), OptimizerState(model, optimizer)]
        checkpoints = Checkpoints(folder / name, None, runtime)
        try:
            if runtime.world_size == 1:
                model(torch.randn(4, 64)).square().sum().backward()
                optimizer.step()
                checkpoints.finish(checkpoints.begin(1, parts, {}, lambda _: None))
            else:
                checkpoints.load(1, parts)
            told[name] = ""
        except UserError as error:
            told[name] = str(error)
    if runtime.is_main:
        out.write_text(json.dumps(told))


if __name__ == "__main__":
    quiet_libraries()
    main(Path(sys.argv[2]), Path(sys.argv[1]), distributed.start(timeout_seconds=60))
    distributed.stop()
    leave(0)
