"""What a start of a run notes of itself beside its recipe: when, with which command, versions and devices, and on which clips."""

import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import finetune
from finetune.runtime.files import atomic
from finetune.runtime.units import GIB
from finetune.training.facts import base_facts
from finetune.training.job import Job

SCRIPT_FILE = "use.py"  # in the run's folder, once there is a result: the script that the end of the run prints
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "torchao", "safetensors", "av", "numpy")


def write_start_note(job: Job, recipe_file: Path) -> None:
    """Write the note beside the recipe of this start. Collective; rank 0 writes.

    Args:
        recipe_file: the start's recipe, as rank 0 has written it.
    Raises:
        UserError: it cannot be written.
    """
    runtime, recipe, split = job.state.runtime, job.recipe, job.split
    devices = runtime.gather({"host": platform.node(), "name": runtime.device.name, **_memory(job)})
    with runtime.together():
        if not runtime.is_main:
            return
        note = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command(),
            "versions": versions(),
            "system": platform.platform(),
            "devices": devices,
            "model": base_facts(recipe.model, job.state.family),
            "title": job.state.family.title,
            "trained_parameters": sum(parameter.numel() for parameter in job.state.parameters),
            "batch": {
                "global": split.global_batch,
                "ranks": split.size,
                "micro": split.micro,
                "accumulation": split.accumulation,
            },
            "steps_per_epoch": job.order.steps_per_epoch,
            "clips": {"trained": len(job.prepared.train), "heldout": len(job.prepared.heldout)},
            "datasets": job.prepared.datasets,
        }
        with atomic(recipe_file.with_suffix(".json")) as partial:
            partial.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")


def command() -> str:
    """The command that started this process, as it is typed: with torchrun, if that did."""
    arguments = shlex.join(sys.argv[1:])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        count, nodes = os.environ.get("LOCAL_WORLD_SIZE", "1"), os.environ.get("GROUP_WORLD_SIZE", "1")
        several = "" if nodes == "1" else f" --nnodes {nodes}"
        return f"torchrun{several} --nproc_per_node {count} -m finetune {arguments}"
    return f"python -m finetune {arguments}"


def versions() -> dict[str, str]:
    """Versions of this project, of Python, and of the packages that a training's numbers come from."""
    found = {"finetune": finetune.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    if torch.version.hip:
        found["ROCm"] = torch.version.hip
    return found


def _memory(job: Job) -> dict[str, Any]:
    total = job.state.runtime.device.total_memory
    return {} if total is None else {"memory_gib": round(total / GIB, 1)}
