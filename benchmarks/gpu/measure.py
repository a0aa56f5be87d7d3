"""Step time, peak memory and model FLOPs utilisation of CogVideoX-2b and 5b with each memory saver, random weights."""

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.cases import BUCKET, CASES, CHECKPOINTED, recipe_with
from benchmarks.gpu.planned import Asked, planned
from benchmarks.gpu.random_model import RandomCogVideoX, model_folder, random_batch
from benchmarks.paired import print_table
from finetune.engine.step import run_step
from finetune.models.adapters import lora
from finetune.models.batch import Batch
from finetune.models.cogvideox import CogVideoX
from finetune.recipe import Bucket, Recipe
from finetune.runtime import distributed
from finetune.runtime.device import PeakMemory
from finetune.runtime.distributed import Runtime
from finetune.runtime.units import GIB
from finetune.training.job import build_state

SMOKE_BUCKET = Bucket(9, 64, 96)
HEAD = [
    "model",
    "savers",
    "s/step",
    "over without",
    "GiB allocated",
    "planned GiB",
    "off",
    "GiB reserved",
    "planned GiB",
    "off",
    "utilisation",
]


def step_flops(family: CogVideoX, batch: Batch, recipe: Recipe, method: str) -> int:
    """FLOPs of one forward and one backward pass without recomputation, counted on the meta device."""
    transformer = family.empty_transformer().requires_grad_(method == "full")
    with torch.device("meta"):
        if method == "lora":
            lora.add(transformer, family, recipe.lora, seed=0)
        inputs = batch.to(torch.device("meta")).inputs
        with FlopCounterMode(display=False) as counter:
            family.predict(transformer, {**inputs, "hidden_states": inputs["hidden_states"].float()})[
                "video"
            ].sum().backward()
    return counter.get_total_flops()


def matmul_rate(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """FLOPs per second of the product of two square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def measure(family: CogVideoX, recipe: Recipe, batch: Batch, runtime: Runtime, steps: int) -> tuple[float, PeakMemory]:
    """(median seconds per step, peak memory of steps), both without the first two steps."""
    state = build_state(recipe, runtime, family, family.transformer_weights())
    seconds = []
    for step in range(steps + 2):
        if step == 2:
            runtime.device.reset_peak()
        start = time.perf_counter()
        run_step(state, step, [batch])  # waits for the device, since it reads the loss
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:]), runtime.device.memory()


def beside(measured: PeakMemory, plan: PeakMemory | None) -> list[str]:
    """Cells of the table: GiB allocated, planned, and by how much the plan is off; the same of GiB reserved."""
    cells = []
    for name in ("allocated", "reserved"):
        taken = getattr(measured, name)
        cells.append(f"{taken / GIB:.2f}")
        cells += (
            ["", ""]
            if plan is None
            else [f"{getattr(plan, name) / GIB:.2f}", f"{getattr(plan, name) / taken - 1:+.1%}"]
        )
    return cells


def describe_bus() -> str:
    """The GPU's name, PCIe generation and width, from nvidia-smi."""
    fields = "name,pcie.link.gen.max,pcie.link.width.max"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"


def run(arguments: argparse.Namespace) -> int:
    """Measure and print the table; returns the exit status."""
    began = time.monotonic()
    runtime = distributed.start(600)
    device = runtime.device
    bucket, precision = (SMOKE_BUCKET, "float32") if arguments.smoke else (BUCKET, "bf16")
    dtype = torch.float32 if arguments.smoke else torch.bfloat16
    rate = matmul_rate(device.torch_device, 512 if arguments.smoke else 8192, dtype)
    print(
        f"{device.name}; PCIe: {describe_bus()}; matrix product {rate / 1e12:.3g} TFLOP/s; torch {torch.__version__}\n"
    )
    rows: dict[tuple[str, str], list[str] | tuple[float, str, PeakMemory, str]] = {}
    left_out = []
    for name in ["smoke"] if arguments.smoke else arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            family = RandomCogVideoX(model_folder(Path(folder), name))
            reference = recipe_with(CASES[CHECKPOINTED], precision)
            batch = random_batch(family, reference, bucket, dtype)
            flops = {method: step_flops(family, batch, reference, method) for method in ("lora", "full")}
            times: dict[str, float] = {}
            for title, case in CASES.items():
                if time.monotonic() - began > arguments.seconds:
                    left_out.append(f"{name} {title}")
                    continue
                recipe = recipe_with(case, precision)
                try:
                    seconds, memory = measure(family, recipe, batch, runtime, arguments.steps)
                    times[title] = seconds
                    used = f"{flops[recipe.train.method] / seconds / rate:.1%}"
                    over = f"{seconds / times[case.over]:.3f}" if case.over in times else ""
                    rows[name, title] = (seconds, over, memory, used)
                except torch.OutOfMemoryError:
                    rows[name, title] = ["out of memory"]
                torch.compiler.reset()
                gc.collect()
                device.empty_cache()
                print(f"{name}, {title}: {rows[name, title]}", file=sys.stderr, flush=True)
    asked = [Asked(name, title, bucket, precision, device.name, device.available_memory) for name, title in rows]
    plans = {} if arguments.no_plan else planned(asked)  # afterwards: it takes the host's cores
    cells = []
    for each, (key, found) in zip(asked, rows.items(), strict=True):
        if isinstance(found, list):
            cells.append([*key, *found, *[""] * (len(HEAD) - 3)])
        else:
            seconds, over, memory, used = found
            cells.append([*key, f"{seconds:.3f}", over, *beside(memory, plans.get(each)), used])
    print_table(HEAD, cells)
    if device.is_cpu:
        print("\nOn a CPU, memory is that of the whole process; what is planned is a GPU's.")
    if left_out:
        print(f"\nnot measured, for want of time: {', '.join(left_out)}")
    distributed.stop()
    return 0
