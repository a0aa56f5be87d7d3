"""The first two checks: processes that talk to each other, and copies from page-locked memory."""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu.first.bench import Bench, Failed
from finetune.runtime.distributed import data_mesh, mesh

SIZE = 256 * 2**20  # bytes
LEAST_OVERLAP = 0.5  # of the shorter of both
ROUNDS, COPIES = 5, 4


def start(bench: Bench) -> str:
    """As a single process, and under torchrun with two ranks, or with one where there is one GPU."""
    alone = reduced(bench)
    processes = 1 if bench.gpus == 1 else 2
    ranks = bench.elsewhere("benchmarks.gpu.first.starting:reduced", processes=processes, seconds=100)
    return f"alone: {alone}; by torchrun: {ranks}"


def reduced(bench: Bench) -> str:
    """All-reduce over the whole group and over the mesh, on both kinds of tensors; a line that describes the group."""
    runtime = bench.runtime
    expected = sum(range(1, runtime.world_size + 1))
    whole = data_mesh(mesh(runtime))
    groups = {"the group": dist.group.WORLD, "the mesh": whole.get_group(), "control": runtime.control}
    for name, group in groups.items():
        kinds = ["cpu"] if name == "control" else (["cpu"] if runtime.device.is_cpu else [runtime.device.kind])
        if name == "the group":
            kinds = sorted({"cpu", *kinds})
        for kind in kinds:
            device = runtime.device.torch_device if kind != "cpu" else torch.device("cpu")
            value = torch.full((1000,), runtime.rank + 1.0, device=device)
            dist.all_reduce(value, group=group)
            if value.tolist() != [expected] * 1000:
                raise Failed(f"all-reduce over {name} on {kind} gives {value[0].item()}, not {expected}")
    if runtime.gather(runtime.rank) != list(range(runtime.world_size)) or runtime.any(runtime.is_main) != [True]:
        raise Failed("objects are not gathered in the order of ranks")
    backends = dist.get_backend_config() if not runtime.device.is_cpu else dist.get_backend()
    return f"{runtime.world_size} process(es), {runtime.device.name}, {backends}, mesh {tuple(whole.mesh.shape)}"


def copies(bench: Bench) -> str:
    """Both directions: contents first, then times."""
    device, copies = bench.device, bench.device.copies()
    numbers = torch.arange(SIZE // 4, dtype=torch.int32)
    there, back = device.pinned(SIZE).view(torch.int32), device.pinned(SIZE).view(torch.int32)
    there.copy_(numbers)
    if device.pins and not (there.is_pinned() and back.is_pinned()):
        raise Failed("Device.pinned gives memory that torch does not take for page-locked")
    target = torch.zeros(SIZE // 4, dtype=torch.int32, device=device.torch_device)
    copies.wait(copies.start(target, there))
    copies.wait(copies.start(back, target))
    device.synchronize()
    if not torch.equal(back, numbers) or not torch.equal(target, numbers.to(device.torch_device)):
        raise Failed("what was copied to the device and back is not what it was")
    waited = _fetched_late(bench, target[: SIZE // 256], numbers[: SIZE // 256])
    if device.is_cpu:
        return "256 MiB are the same after a copy and back; no verdict on overlap"
    if waited:
        raise Failed("a thread that fetches a tensor waits for work that was queued after it")
    found = [
        _overlap(bench, name, target_, source)
        for name, target_, source in (("to the device", target, there), ("to the host", back, target))
    ]
    return "256 MiB page-locked, the same after a copy and back; " + "; ".join(found)


def _fetched_late(bench: Bench, source: Tensor, expected: Tensor) -> bool:
    """Fetch a tensor in another thread, as the cache's writer does, and say whether that waited for work that is queued later."""
    device, copies = bench.device, bench.device.copies()
    size = 64 if device.is_cpu else 4096
    a = torch.randn(size, size, device=device.torch_device)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(copies.fetch, source, copies.computed()).result()  # what the first call sets up
        held = source.clone()
        computed = copies.computed()
        for _ in range(200):
            a @ a
        later = copies.computed()
        fetched = thread.submit(copies.fetch, held, computed).result()
        waited = later is None or later.query()
    if not torch.equal(fetched, expected):
        raise Failed("what another thread fetches from the device is not what it was")
    return waited


def _overlap(bench: Bench, name: str, target: Tensor, source: Tensor) -> str:
    """Time copies, products, and both; raise Failed if they run one after the other."""
    device, copies = bench.device, bench.device.copies()
    a = torch.randn(4096, 4096, device=device.torch_device, dtype=torch.bfloat16)

    def copy() -> None:
        arrivals = [copies.start(target, source) for _ in range(COPIES)]
        for arrival in arrivals:
            copies.wait(arrival)

    def multiply(count: int) -> None:
        for _ in range(count):
            a @ a

    def both(count: int) -> None:
        arrivals = [copies.start(target, source) for _ in range(COPIES)]  # first: a copy waits for what is queued
        multiply(count)
        for arrival in arrivals:
            copies.wait(arrival)

    def seconds(call: Callable[[], None]) -> float:
        taken = []
        for _ in range(ROUNDS):
            device.synchronize()
            begin = time.perf_counter()
            call()
            device.synchronize()
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken)

    multiply(10)
    copying, one = seconds(copy), seconds(lambda: multiply(20)) / 20
    count = max(1, round(copying / one))
    multiplying, together = seconds(lambda: multiply(count)), seconds(lambda: both(count))
    hidden = (copying + multiplying - together) / min(copying, multiplying)
    rate = COPIES * SIZE / copying / 1e9
    text = (
        f"{name} {rate:.1f} GB/s, {copying * 1e3:.1f} ms copies + {multiplying * 1e3:.1f} ms products take "
        f"{together * 1e3:.1f} ms: {hidden:.0%} hidden"
    )
    if hidden < LEAST_OVERLAP:
        raise Failed(f"no overlap: {text}")
    return text
