"""Two GPUs: replicas hold the same bits, and a killed rank ends its peers. One: float8 products and storage."""

import hashlib
import os
import signal
import time
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks.gpu.first.bench import (
    Bench,
    Failed,
    Skipped,
    child_environment,
    descendants,
    end_all,
    start_program,
    tail,
    wait_until,
)
from benchmarks.gpu.first.quickstart import Training
from benchmarks.gpu.first.tiny import FULL, UNCLIPPED, apart, batches_of, build, losses_of, recipe_of, tiny_family
from finetune.engine.gradients import local, part_of
from finetune.engine.savers.lowbit import LowBitLinear, dequantize, quantize
from finetune.engine.step import run_step

OPTIMIZERS = {
    "adamw": {"optimizer.name": "adamw"},
    "adamw_8bit": {"optimizer.name": "adamw_8bit"},
    "adamw_8bit in backward": {"optimizer.name": "adamw_8bit", "optimizer.in_backward": True, **UNCLIPPED},
}
SOON = 60.0  # seconds in which all processes of a run end after one of them was killed
FLOAT8 = 0.05  # by which float8 may change losses


def ranks(bench: Bench) -> str:
    """What there are GPUs for; all of it with `smoke`."""
    verdicts = []
    if bench.gpus != 1:
        verdicts.append(bench.elsewhere("benchmarks.gpu.first.ranks:replicas", processes=2, seconds=150))
        verdicts.append(killed_rank(bench))
    if bench.gpus < 2:
        verdicts.append(float8(bench))
    return "; ".join(verdicts)


def replicas(bench: Bench) -> str:
    """Replicated bf16 weights after three steps on different samples."""
    family, runtime = tiny_family(bench, "ltx"), bench.runtime
    for name, settings in OPTIMIZERS.items():
        recipe = recipe_of(
            family,
            FULL | {"train.weights": "bf16", "train.precision": "bf16", "memory.layout": "replicate"} | settings,
        )
        state = build(bench, family, recipe)
        for step in range(3):
            result = run_step(state, step, batches_of(family, recipe, step * runtime.world_size + runtime.rank))
        mine = {name: (part_of(p), _digest(p)) for name, p in state.transformer.named_parameters() if p.requires_grad}
        found = defaultdict(set)
        for share in runtime.gather(mine):
            for parameter, (part, bits) in share.items():
                found[parameter, part].add(bits)
        if differing := [parameter for (parameter, _), bits in found.items() if len(bits) > 1]:
            raise Failed(f"{name}: replicas of {len(differing)} of {len(found)} weights differ, {differing[0]} first")
        bench.notes.append(f"{name}: {len(found)} weights, loss {result.loss:.5f}")
    return f"replicas of bf16 weights are equal bit for bit with {', '.join(OPTIMIZERS)}"


def _digest(parameter: torch.Tensor) -> str:
    held = local(parameter.detach()).cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(held.numpy().tobytes()).hexdigest()


def killed_rank(bench: Bench) -> str:
    """SIGKILL to one rank of the quickstart: torchrun and the other rank end, and say why."""
    settings = ("train.precision=bf16", "train.steps=100000", "validation.prompts=[]", "memory.plan=false")
    training = Training(bench, "killed", 2, settings)
    training.output.parent.mkdir(exist_ok=True)
    process = start_program(training.command(), training.log, child_environment(bench.smoke))
    try:
        wait_until(lambda: len(training.losses()) >= 3, process, training.log)
        started = descendants(process.pid)
        os.kill(_rank(1, started), signal.SIGKILL)
        began = time.monotonic()
        process.wait(SOON)
        while left := [pid for pid in started if _is_alive(pid)]:
            if time.monotonic() - began > SOON:
                raise Failed(f"{len(left)} processes of a run are alive {SOON:.0f} s after rank 1 was killed")
            time.sleep(0.1)
        took = time.monotonic() - began
    finally:
        end_all(process)
    said = " ".join(training.log.read_text(errors="replace").split())
    if process.returncode == 0 or not ("lost its peers" in said or "Signal 9" in said):
        raise Failed(f"a killed rank is not told: {' / '.join(tail(training.log)[-4:])}")
    who = "the other rank names it" if "lost its peers" in said else "torchrun names it"
    return f"after SIGKILL to rank 1 all end in {took:.1f} s, {who}"


def _rank(rank: int, processes: list[int]) -> int:
    """The first of these processes that has this rank: loader processes come later."""
    for pid in processes:
        if b"RANK=%d" % rank in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise Failed(f"there is no rank {rank}")


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def float8(bench: Bench) -> str:
    """Losses with float8 products and float8 storage against those without, and float8 codes against a CPU's."""
    if not bench.smoke and not bench.device.has_float8:
        raise Skipped(f"one GPU, and {bench.device.name} has no float8 arithmetic")
    family = tiny_family(bench, "ltx")
    bf16 = {} if bench.smoke else {"train.precision": "bf16"}
    products = apart(
        losses_of(bench, family, FULL | bf16 | {"train.float8": True}), losses_of(bench, family, FULL | bf16)
    )
    stored = apart(losses_of(bench, family, bf16 | {"memory.low_bit": "float8"}), losses_of(bench, family, bf16))
    for what, off in (("products", products), ("storage", stored)):
        if not 0 < off <= FLOAT8:
            raise Failed(f"losses with float8 {what} are {off:.1e} off")
    codes = _codes(bench)
    how = "emulated" if bench.smoke else bench.device.name
    return f"float8 ({how}): losses with products {products:.1e} off, with storage {stored:.1e}; {codes}"


def _codes(bench: Bench) -> str:
    """Quantised and back on the device and on the CPU."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    device = bench.device.torch_device
    linear = torch.nn.Linear(512, 256, bias=False).to(device)
    layer = LowBitLinear(linear, "float8", torch.float32, device).to(device)
    layer.fill(layer.weight.data, layer.weight_scale.data, weight.to(device))
    codes, scale = quantize(weight, "float8")
    here = dequantize(codes, scale, "float8", torch.float32)
    there = dequantize(layer.weight.data.view(torch.uint8), layer.weight_scale.data, "float8", torch.float32).cpu()
    same = (here == there).float().mean().item()
    if same < 0.999:
        raise Failed(f"{1 - same:.1%} of float8 weights are unlike those of a CPU")
    return f"{same:.2%} of stored weights as on a CPU"
