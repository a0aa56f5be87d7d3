"""The quickstart as a user runs it, in bf16: stopped by SIGTERM and resumed, it has the losses of a run that was left alone."""

import json
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.first.bench import (
    ROOT,
    Bench,
    Failed,
    child_environment,
    end_all,
    run_program,
    start_program,
    tail,
    wait_until,
)

PROMPT = '{text = "a red zorb moves right over a black floor", shape = "17x64x96", steps = 4, guidance = 1.0}'
STOPPED = 128 + signal.SIGTERM
NOISE = 10.0  # times what two runs that are left alone differ by, if they do


@dataclass(frozen=True)
class Training:
    """A training of the quickstart's recipe on the demo, by torchrun."""

    bench: Bench
    name: str
    processes: int
    settings: tuple[str, ...]

    @property
    def output(self) -> Path:
        return self.bench.folder / "quickstart" / self.name

    @property
    def log(self) -> Path:
        return self.output.with_suffix(".log")

    def command(self) -> list[str]:
        demo = make_demo(self.bench)
        settings = [
            f"output={self.output}",
            f"model.path={demo / 'model'}",
            f"data.path={demo / 'clips'}",
            f"data.cache={demo / 'cache'}",
            f"validation.heldout={demo / 'heldout'}",
            f"train.micro_batch_size={8 // self.processes}",
            *self.settings,
        ]
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes)]
        command = ["-m", "finetune", "--recipe", str(ROOT / "recipes" / "quickstart.toml")]
        return [*start, *command, *(part for setting in settings for part in ("--set", setting))]

    def run(self, seconds: float = 150) -> None:
        """Train to the end. Raises Failed if it does not come there."""
        self.output.parent.mkdir(exist_ok=True)
        status = run_program(self.command(), self.log, child_environment(self.bench.smoke), seconds)
        if status != 0:
            ended = "is not done" if status is None else f"ended with status {status}"
            raise Failed(f"the {self.name} training {ended}: {' / '.join(tail(self.log)[-4:])}")

    def losses(self) -> dict[int, float]:
        """Step -> loss, of the whole lines of metrics.jsonl."""
        file = self.output / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return {row["step"]: row["loss"] for row in rows if "loss" in row}


def make_demo(bench: Bench) -> Path:
    """The small pipeline and the clips of `finetune demo`, made once."""
    demo = bench.folder / "demo"
    log = bench.folder / "demo.log"
    command = [sys.executable, "-m", "finetune", "demo", "--out", str(demo)]
    if not (demo / "heldout").exists() and run_program(command, log, child_environment(bench.smoke), 120) != 0:
        raise Failed(f"`finetune demo` failed: {' / '.join(tail(log)[-4:])}")
    return demo


def processes_of(bench: Bench) -> int:
    """As launch/quickstart.sh has it: one for one GPU, else two."""
    return 1 if bench.gpus == 1 else 2


def quickstart(bench: Bench) -> str:
    """Three starts on real processes: one that is left alone, one that is stopped, and its resumption."""
    steps, stop_after = (12, 4) if bench.smoke else (200, 20)
    settings = (
        "train.precision=bf16",
        f"train.steps={steps}",
        "validation.every=1000",
        "checkpoint.every=1000",
        f"validation.prompts=[{'' if bench.smoke else PROMPT}]",
    )
    straight = Training(bench, "straight", processes_of(bench), settings)
    began = time.monotonic()
    straight.run()
    took = time.monotonic() - began
    expected = straight.losses()
    if sorted(expected) != list(range(1, steps + 1)):
        raise Failed(f"metrics.jsonl has {len(expected)} of {steps} losses")
    disturbed = Training(bench, "disturbed", processes_of(bench), settings)
    stopped_at = stop(disturbed, stop_after, steps)
    disturbed.run()
    said = disturbed.log.read_text(errors="replace")
    resumed = re.search(r"resuming after step (\d+):", said)
    if resumed is None or int(resumed[1]) != stopped_at:
        raise Failed(f"it was stopped at step {stopped_at}, and said: {' / '.join(said.splitlines()[:3])}")
    off = apart(disturbed.losses(), expected)
    text = (
        f"{straight.processes} process(es), {steps} steps in {took:.0f} s, loss {expected[1]:.3f} to {expected[steps]:.3f}; "
        f"stopped after step {stopped_at} and resumed, losses are"
    )
    if off == 0:
        return f"{text} equal digit for digit"
    again = Training(bench, "again", processes_of(bench), settings)
    again.run()
    noise = apart(again.losses(), expected)
    text = f"{text} {off:.1e} off; two runs that are left alone differ by {noise:.1e}"
    if not off <= NOISE * noise:
        raise Failed(text)
    return text


def stop(training: Training, after: int, steps: int) -> int:
    """Send SIGTERM to a training once it has made some steps; returns the step of the checkpoint that it leaves."""
    training.output.parent.mkdir(exist_ok=True)
    process = start_program(training.command(), training.log, child_environment(training.bench.smoke))
    try:
        wait_until(lambda: max(training.losses(), default=0) >= after, process, training.log)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        end_all(process)
    done = max(training.losses())
    if "stopped by SIGTERM" not in training.log.read_text(errors="replace") or done == steps:
        raise Failed(f"SIGTERM did not stop it politely: {' / '.join(tail(training.log)[-4:])}")
    return done


def apart(some: dict[int, float], others: dict[int, float]) -> float:
    """The greatest relative difference of losses at the same step. Raises Failed if their steps differ."""
    if some.keys() != others.keys():
        raise Failed(f"there are losses of {len(some)} steps, not of {len(others)}")
    return max(abs(some[step] - others[step]) / abs(others[step]) for step in some)
