"""Runs the checks, one after the other, and prints their table."""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.first.bench import Outcome, call_in_process
from benchmarks.gpu.measure import describe_bus

_CALLS = "benchmarks.gpu.first."


@dataclass(frozen=True)
class Check:
    """A check by the name that --only takes.

    Attributes:
        call: its function, as module:function.
        longest: seconds after which it is ended, and has failed.
        unseen: what a CPU cannot show of it.
    """

    name: str
    title: str
    call: str
    longest: float
    unseen: str


CHECKS = (
    Check(
        "start",
        "process group, mesh, all-reduce on CPU and device",
        f"{_CALLS}starting:start",
        120,
        "NCCL, and gloo beside it in one group",
    ),
    Check(
        "copies",
        "256 MiB page-locked; copies beside products",
        f"{_CALLS}starting:copies",
        90,
        "page-locking, and whether copies overlap",
    ),
    Check(
        "quickstart",
        "quickstart in bf16, stopped by SIGTERM and resumed",
        f"{_CALLS}quickstart:quickstart",
        240,
        "kernels, the plan beside the training, generating on a GPU",
    ),
    Check(
        "savers",
        "losses with offloaded weights and activations",
        f"{_CALLS}savers:savers",
        300,
        "races between streams, CUDA_LAUNCH_BLOCKING, TORCH_CUDA_SANITIZER",
    ),
    Check(
        "syncs",
        "only Device.read waits for the device",
        f"{_CALLS}syncs:syncs",
        180,
        "which operations synchronise",
    ),
    Check(
        "attention",
        "attention kernels; their gradients against the math backend",
        f"{_CALLS}attention:attention",
        180,
        "flash, memory-efficient and cuDNN kernels of GPUs",
    ),
    Check(
        "compile",
        "gradients of compiled blocks",
        f"{_CALLS}compiled:compiled",
        300,
        "inductor: on a CPU the graphs run without kernels of their own",
    ),
    Check(
        "full",
        "bf16 weights, 8-bit AdamW, updates in the backward pass",
        f"{_CALLS}full:full",
        240,
        "torchao's compiled update, random rounding on the device",
    ),
    Check(
        "offload",
        "full finetuning with memory.offload: norms, host threads",
        f"{_CALLS}full:offload",
        180,
        "copies of gradients, and more threads than torchrun's one",
    ),
    Check(
        "memory",
        "CogVideoX-2b at 49x480x720: peak memory, planned",
        f"{_CALLS}memory:memory",
        420,
        "any device memory: a tiny model is planned, and trained",
    ),
    Check(
        "speed",
        "LTX-2B: memory history, fused AdamW, compile",
        f"{_CALLS}speed:speed",
        300,
        "times of a GPU: a tiny model is timed",
    ),
    Check(
        "ranks",
        "two GPUs: replicas, a killed rank; one: float8",
        f"{_CALLS}ranks:ranks",
        300,
        "NCCL's collectives, float8 kernels (emulated)",
    ),
)


@dataclass(frozen=True)
class Row:
    """A check and how it ended; `seconds` is None if it was not run."""

    check: Check
    outcome: Outcome
    seconds: float | None


def run(arguments: argparse.Namespace) -> int:
    """Run the checks that were chosen; returns the exit status, 1 if any failed."""
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # processes are ended, and what was found is told
    checks, rows = chosen(arguments.only), list[Row]()
    status = 0
    try:
        with _folder(arguments.folder) as folder:
            for check in checks:
                left = arguments.seconds - (time.monotonic() - began)
                if left <= 0:
                    rows.append(Row(check, Outcome("not run", text="the time was over"), None))
                    continue
                print(f"{check.name}: {check.title} ...", file=sys.stderr, flush=True)
                rows.append(_run_one(check, Path(folder), arguments.smoke, left))
                outcome, seconds = rows[-1].outcome, rows[-1].seconds
                print(f"    {outcome.kind} in {seconds:.0f} s: {outcome.text}", file=sys.stderr, flush=True)
                for line in outcome.trace:
                    print(f"        {line}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        rows += [Row(check, Outcome("not run", text="interrupted"), None) for check in checks[len(rows) :]]
        status = 128 + signal.SIGINT
    text = report(rows, arguments.smoke, time.monotonic() - began)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    return 1 if any(row.outcome.kind == "failed" for row in rows) else status


@contextmanager
def _folder(kept: Path | None) -> Iterator[str]:
    """A folder for models, trainings and logs: this one, which must not have files of earlier checks, or one that is removed."""
    if kept is None:
        with tempfile.TemporaryDirectory(prefix="first-", ignore_cleanup_errors=True) as folder:
            yield folder
        return
    if kept.exists() and any(kept.iterdir()):
        raise SystemExit(f"error: {kept} is not empty; name another folder")
    kept.mkdir(parents=True, exist_ok=True)
    yield str(kept.absolute())


def chosen(names: list[str] | None) -> list[Check]:
    """The checks of these names, in the order of `CHECKS`, all if None; then those named as module:function."""
    if names is None:
        return list(CHECKS)
    known = {check.name for check in CHECKS}
    if unknown := [name for name in names if name not in known and ":" not in name]:
        raise SystemExit(f"error: there is no check {unknown[0]!r}; checks are: {', '.join(sorted(known))}")
    own = [Check(name, "(of one's own)", name, 300, "") for name in names if ":" in name]
    return [check for check in CHECKS if check.name in names] + own


def _run_one(check: Check, folder: Path, smoke: bool, left: float) -> Row:
    start = time.monotonic()
    outcome = call_in_process(check.call, folder, smoke, seconds=min(check.longest, left))
    if outcome.kind == "cut off":
        kind = "failed" if check.longest <= left else "not run"
        why = outcome.text if kind == "failed" else f"the time was over {outcome.text.removeprefix('not done ')}"
        outcome = Outcome(kind, text=why, trace=outcome.trace)
    return Row(check, outcome, time.monotonic() - start)


def report(rows: list[Row], smoke: bool, seconds: float) -> str:
    """The table as Markdown, with notes and tracebacks below it."""
    counted = {
        kind: sum(row.outcome.kind == kind for row in rows) for kind in ("passed", "failed", "skipped", "not run")
    }
    where = "a CPU, tiny models" if smoke else describe_bus()
    lines = [
        "# The first minutes with a GPU",
        "",
        f"`python -m benchmarks.gpu --first{' --smoke' if smoke else ''}`: {where}; torch {torch.__version__}; "
        f"{seconds:.0f} s. " + ", ".join(f"{count} {kind}" for kind, count in counted.items() if count) + ".",
        "",
        f"| check | | | s | verdict |{' a CPU cannot show |' if smoke else ''}",
        f"|---|---|---|---|---|{'---|' if smoke else ''}",
    ]
    for row in rows:
        check, outcome = row.check, row.outcome
        taken = "" if row.seconds is None else f"{row.seconds:.0f}"
        verdict = outcome.text.replace("|", "\\|").replace("\n", " ")
        lines.append(
            f"| {check.name} | {check.title} | {outcome.kind} | {taken} | {verdict} |"
            + (f" {check.unseen} |" if smoke else "")
        )
    for row in rows:
        if row.outcome.notes:
            lines += ["", f"**{row.check.name}**", "", *(f"- {note}" for note in row.outcome.notes)]
        if row.outcome.trace:
            lines += ["", f"**{row.check.name}**", "", "```", *row.outcome.trace, "```"]
    return "\n".join(lines)
