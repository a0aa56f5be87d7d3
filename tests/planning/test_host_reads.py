"""One optimizer step reads the device once, by `Device.read`. Whatever else would make the host wait is seen in simulation."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from every_family import FEW, MODELS, title
from processes import ROOT, run_python

METHODS = {"lora": [], "full": ["train.method=full"]}
FULL = ["train.method=full"]
# Full finetuning with `memory.offload` is not among them: FSDP2 updates on the host, which must wait for the gradients.
SAVERS = {
    "nothing recomputed": ["memory.activation_checkpointing=none"],
    "selective": ["memory.activation_checkpointing=selective"],
    "int8": ["memory.low_bit=int8"],
    "float8": ["memory.low_bit=float8"],
    "nf4": ["memory.low_bit=nf4"],
    "streamed": ["memory.offload=true"],
    "activations": ["memory.offload_activations=true"],
    "all three": ["memory.offload=true", "memory.offload_activations=true", "memory.low_bit=nf4"],
    "dropout": ["lora.dropout=0.1"],
    "watched": ["tracking.quantiles_every=1", "tracking.block_norms_every=1"],
    "full": FULL,
    "float8 products": [*FULL, "train.float8=true", "train.precision=bf16"],
    "bf16 weights": [*FULL, "train.weights=bf16"],
    "adamw_8bit": [*FULL, "optimizer.name=adamw_8bit"],
    "updates in backward": [*FULL, "optimizer.in_backward=true", "train.max_grad_norm=none"],
}
MORE_SAVERS = {
    "every second block": ["memory.activation_checkpointing=every_n"],
    "bf16": ["train.precision=bf16"],
    "unclipped": ["train.max_grad_norm=none"],
    "adamw_4bit": [*FULL, "optimizer.name=adamw_4bit"],
    "adamw_fp8": [*FULL, "optimizer.name=adamw_fp8"],
    "adamw_8bit, bf16 weights": [*FULL, "optimizer.name=adamw_8bit", "train.weights=bf16"],
    "updates of 8 bits in backward": [*SAVERS["updates in backward"], "optimizer.name=adamw_8bit"],
}


OF_FAMILIES = {f"{title(model)} {method}": (model, METHODS[method]) for model in MODELS for method in METHODS}
SHORT = {name: case for name, case in OF_FAMILIES.items() if case[0] in FEW and "lora" in name}
SHORT |= {f"ltx {saver}": (("ltx", None), overrides) for saver, overrides in SAVERS.items()}
LONG = {f"ltx {saver}": (("ltx", None), overrides) for saver, overrides in MORE_SAVERS.items()}
LONG |= {name: case for name, case in OF_FAMILIES.items() if name not in SHORT}


@pytest.fixture(scope="module")
def steps(family_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict]]:
    """Figures of tests/planning/host_reads_worker.py, in a process of its own: a simulated device stays known to torch."""
    out, known = tmp_path_factory.mktemp("reads") / "figures.json", {}

    def get(name: str) -> list[dict]:
        if name not in known:
            matrix = SHORT if name in SHORT else LONG
            cases = {each: (str(family_recipe(*model)), overrides) for each, (model, overrides) in matrix.items()}
            worker = ROOT / "tests" / "planning" / "host_reads_worker.py"
            done = run_python([worker, out, json.dumps(cases)], seconds=580)
            assert done.returncode == 0, done.stderr
            known.update(json.loads(out.read_text()))
        return known[name]

    return get


@pytest.mark.parametrize("name", [*SHORT, *(pytest.param(name, marks=pytest.mark.full) for name in LONG)])
def test_a_step_reads_the_device_once(steps: Callable[[str], list[dict]], name: str) -> None:
    first, later = steps(name)
    assert later == {"reads": 1, "waits": []}
    assert first["reads"] == 1
    assert all("/torchao/optim/" in wait for wait in first["waits"])  # as it allocates moments in few bits


# What the simulated device sees, and what it does with it

SEEN = {  # what `torch.cuda.set_sync_debug_mode` warns of, for x: float32 (4, 4), and mask: bool (4, 4)
    "item": "x.sum().item()",
    "float": "float(x[0, 0])",
    "if": "assert x.sum() > 0",
    "tolist": "x.tolist()",
    "cpu": "x.cpu()",
    "to cpu": "x.to('cpu')",
    "copied to the host": "torch.empty(4, 4).copy_(x)",
    "from the host": "torch.ones(4).to(x.device)",
    "copied from the host": "x.copy_(torch.ones(4, 4))",
    "tensor": "torch.tensor([1.0, 2.0], device=x.device)",
    "nonzero": "x.nonzero()",
    "where": "torch.where(mask)",
    "mask": "x[mask]",
    "masked_select": "x.masked_select(mask)",
    "written by a mask": "x[mask] = torch.ones(16, device=x.device)",
    "unique": "x.unique()",
    "repeat_interleave": "x.repeat_interleave(torch.ones(4, dtype=torch.int64, device=x.device).mul(2), dim=0)",
    "equal": "torch.equal(x, x + 1)",
    "allclose": "torch.allclose(x, x)",
}
UNSEEN = {
    "non_blocking": "torch.ones(4).to(x.device, non_blocking=True)",
    "to the host, non_blocking": "torch.empty(4, 4).copy_(x, non_blocking=True)",
    "filled": "torch.full((), 3.0, device=x.device)",
    "a number": "x[0, 0] = 3.0",
    "a masked number": "x[mask] = 3.0",
    "masked_fill": "x.masked_fill(mask, 3.0)",
    "where of three": "torch.where(mask, x, 0)",
    "indices": "x[torch.arange(2, device=x.device)]",
    "repeat_interleave of a known size": "x.repeat_interleave(2, dim=0)",
    "on the host": "torch.ones(4).nonzero(), torch.ones(4).sum().item()",
}
ONE = """
import json, torch, warnings
from finetune.planning.accelerator import Accelerator
from finetune.planning.device import register
from finetune.planning.trace import Trace
device, waits = register(), {}
for name, code in json.loads(input()).items():
    with Accelerator(Trace(), Trace()) as accelerator:
        x = torch.full((4, 4), 1.0, device=device)
        mask = x > 0
        accelerator.reset_cost()
        exec(code)
        waits[name] = accelerator.waits
print(json.dumps(waits))
"""


@pytest.fixture(scope="module")
def waits() -> dict[str, list[str]]:
    """What the simulated device lists, by name of SEEN and UNSEEN."""
    command, cases = [sys.executable, "-c", ONE], json.dumps(SEEN | UNSEEN)
    done = subprocess.run(command, cwd=ROOT, input=cases, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SEEN)
def test_what_makes_the_host_wait_is_seen(waits: dict[str, list[str]], name: str) -> None:
    assert waits[name]
    assert all(wait.endswith(" in <string>, line 1") for wait in waits[name])


@pytest.mark.parametrize("name", UNSEEN)
def test_what_does_not_make_the_host_wait_is_not_listed(waits: dict[str, list[str]], name: str) -> None:
    assert waits[name] == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")
@pytest.mark.parametrize("name", [*SEEN, *UNSEEN])
def test_cuda_warns_of_the_same(name: str) -> None:
    x = torch.full((4, 4), 1.0, device="cuda")
    places = {"x": x, "mask": x > 0, "torch": torch}
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exec((SEEN | UNSEEN)[name], places)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert bool([each for each in caught if "synchronizing CUDA operation" in str(each.message)]) == (name in SEEN)


FAMILY = """
from finetune.models.ltx import LTXVideo


class Reading(LTXVideo):
    name = "reading"

    def predict(self, transformer, inputs):
        outputs = super().predict(transformer, inputs)
        {what}
        return outputs
"""


@pytest.fixture
def plan(family_recipe: Callable[..., Path], tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess]:
    """`plan` of a family that does something in `predict`, by the command line."""

    def run(what: str) -> subprocess.CompletedProcess:
        (tmp_path / "reading.py").write_text(FAMILY.format(what=what))
        overrides = ["--set", "model.family=reading:Reading", "--set", f"data.cache={tmp_path}"]
        command = [
            sys.executable,
            "-m",
            "finetune",
            "plan",
            "--recipe",
            family_recipe("ltx"),
            "--gpus",
            "1",
            *overrides,
        ]
        paths = os.pathsep.join((str(tmp_path), str(ROOT)))
        environment = {**os.environ, "PYTHONPATH": paths}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False
        )

    return run


def test_a_family_that_reads_a_number_is_told_so(
    plan: Callable[[str], subprocess.CompletedProcess], tmp_path: Path
) -> None:
    done = plan("self.last = next(iter(outputs.values())).mean().item()")
    assert done.returncode == 2
    line = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: {tmp_path / 'reading.py'}, line 10: `.item()` reads values of the device")
    assert "Traceback" not in done.stderr


def test_a_plan_notes_what_makes_the_host_wait(
    plan: Callable[[str], subprocess.CompletedProcess], tmp_path: Path
) -> None:
    done = plan("self.level = inputs['timestep'].max().item()")  # a small tensor, which is known
    assert done.returncode == 0, done.stderr
    where = f"{tmp_path / 'reading.py'}, line 10"
    assert f"each step makes the host wait for the GPU: `.item()` in {where}" in done.stdout
