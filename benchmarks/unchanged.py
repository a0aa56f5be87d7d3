"""Shows that a refactor does not change what a training computes: two checkouts train on this machine and are compared.

`python -m benchmarks.unchanged BEFORE [AFTER] [--only ltx] [--methods lora full] [--processes 1 2]`. BEFORE and AFTER are
git revisions; without AFTER it is the working tree. Every variant's demo is made once and trained on by both, as LoRA and
full finetuning, on 1 and 2 processes. Losses, gradient norms, held-out losses and exported tensors must be equal digit
for digit (metrics that only AFTER has are left out); the exit status is 1 if any is not. No figures are recorded,
because they depend on the processor.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.paired import print_table
from finetune.models import FAMILIES, family_class

ROOT = Path(__file__).parent.parent
CLIPS = 5  # of the demo's twelve
GLOBAL_BATCH = 2
EXPORTS = {"lora": "lora", "full": "transformer"}  # folders in a run's output
# Prefixes of keys that differ from run to run.
MEASURED = (
    "seconds_per_step",
    "samples_per_second",
    "peak_memory",
    "checkpoint_wait",
    "checkpoint_seconds",
    "data_wait",
    "mfu",
)
STEP = " after step "  # in the names of metrics
EQUAL = "equal"
TAIL = 15  # lines shown of a command that failed

# Uses everything that must not change: dropped captions and images, stratified noise levels, clipped gradients, a
# learning-rate schedule, and a held-out clip.
RECIPE = """\
output = "{output}"
[model]
family = "{family}"
path = "{demo}/model"
[data]
path = "{demo}/few"
buckets = ["{bucket}"]
caption_dropout = 0.4
{image_dropout}
cache = "{cache}"
workers = 0
[train]
method = "{method}"
steps = 5
global_batch_size = {global_batch}
micro_batch_size = {micro_batch}
precision = "float32"
max_grad_norm = 0.05
[objective]
stratified = true
[optimizer]
lr = 1e-2
weight_decay = 1e-2
[schedule]
name = "cosine"
warmup_steps = 2
[validation]
heldout_clips = 1
sigmas = 3
"""

Figures = dict[str, str]  # name -> the number as the run wrote it, or a digest
SIDES = ("before", "after")


class Failed(Exception):
    """A command ended with an error. The message has its last lines."""


@dataclass(frozen=True)
class Model:
    """A variant of a family."""

    family: str
    variant: str | None

    def __str__(self) -> str:
        return " ".join(part for part in (self.family, self.variant) if part)

    @property
    def slug(self) -> str:
        return str(self).replace(" ", "-")


@dataclass(frozen=True)
class Training:
    """A training that both checkouts make."""

    model: Model
    method: str
    processes: int

    def __str__(self) -> str:
        return f"{self.model}, {self.method}, {self.processes} process{'es' if self.processes > 1 else ''}"


@dataclass(frozen=True)
class Outcome:
    """The figures that a training computed, or the error that ended it."""

    figures: Figures
    error: str = ""


class Commands:
    """Runs commands in several threads, and ends them all when this program is interrupted."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def run(self, checkout: Path, arguments: Sequence[object]) -> None:
        """Run `python -m ...` on a checkout until it ends. Raises Failed if it fails."""
        command = [sys.executable, "-m", *map(str, arguments)]
        env = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with self.lock:
            if self.stopped:
                raise Failed("interrupted")
            process = subprocess.Popen(command, cwd=checkout, env=env, **pipes)
            self.running.add(process)
        said = process.communicate()[1]
        with self.lock:
            self.running.remove(process)
        if process.returncode:
            tail = "\n".join(said.splitlines()[-TAIL:])
            raise Failed(f"{' '.join(command)} ended with status {process.returncode}:\n{tail}")

    def share_cores(self, function: Callable, items: Sequence, processes: int) -> Iterator:
        """Results of `function` in order, for as many items at a time as cores allow if each takes `processes` of them."""
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // processes)) as pool:
            try:
                yield from pool.map(function, items)
            except BaseException:  # also an interrupt: the pool waits for its threads, and they for commands
                self.stop()
                raise

    def stop(self) -> None:
        """End the running commands and start no more. torchrun ends its own ranks."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()


@contextmanager
def checked_out(revision: str | None, folder: Path) -> Iterator[Path]:
    """A checkout of a revision, removed after the block. For None it is the working tree."""
    if revision is None:
        yield ROOT
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    added = subprocess.run([*git, "add", "--detach", folder, revision], capture_output=True, text=True, check=False)
    if added.returncode:
        raise SystemExit(f"{revision} cannot be checked out: {added.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", folder], capture_output=True, check=True)


@dataclass(frozen=True)
class Comparison:
    """Both checkouts, and a folder for the demos and for the cache and outputs of each checkout."""

    checkouts: dict[str, Path]  # by side
    folder: Path
    commands: Commands

    def make_demo(self, model: Model) -> Outcome:
        """Make the variant's random weights and a few clips, with the code before, so that both sides start from the same bytes."""
        out = self.demo(model)
        variant = ["--variant", model.variant] if model.variant else []
        try:
            arguments = ["finetune", "demo", "--out", out, "--family", model.family, *variant]
            self.commands.run(self.checkouts["before"], arguments)
        except Failed as error:
            return Outcome({}, str(error))
        (out / "few").mkdir()
        for video in sorted((out / "clips").glob("*.mp4"))[:CLIPS]:  # other containers contain random bytes
            for file in (video, video.with_suffix(".txt")):
                shutil.copy(file, out / "few")
        return Outcome({})

    def train(self, training: Training, side: str) -> Outcome:
        """Make a training with the checkout of one side."""
        name = f"{training.model.slug}-{training.method}-{training.processes}"
        output, recipe = self.folder / side / name, self.folder / side / f"{name}.toml"
        recipe.parent.mkdir(exist_ok=True)
        recipe.write_text(self.recipe(training, side, output), encoding="utf-8")
        torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", training.processes, "-m"]
        try:
            arguments = [*(torchrun if training.processes > 1 else []), "finetune", "--recipe", recipe]
            self.commands.run(self.checkouts[side], arguments)
            figures: Figures = {}
            for file in sorted(output.rglob("metrics.jsonl")):  # one, or of each expert
                found = read_metrics(file) | read_tensors(file.parent / EXPORTS[training.method])
                expert = "" if file.parent == output else f"{file.parent.name}: "
                figures |= {f"{expert}{name}": value for name, value in found.items()}
            return Outcome(figures, "" if figures else "no metrics were written")
        except (Failed, OSError) as error:
            return Outcome({}, str(error))
        finally:
            shutil.rmtree(output, ignore_errors=True)  # together the outputs take gigabytes

    def recipe(self, training: Training, side: str, output: Path) -> str:
        family = training.model.family
        return RECIPE.format(
            output=output,
            family=family,
            demo=self.demo(training.model),
            bucket="13x64x96" if family == "mochi" else "17x64x96",
            image_dropout="image_dropout = 0.4" if family_class(family).takes_image else "",
            cache=self.folder / side / "cache",
            method=training.method,
            global_batch=GLOBAL_BATCH,
            micro_batch=GLOBAL_BATCH // training.processes,
        )

    def demo(self, model: Model) -> Path:
        return self.folder / "demos" / model.slug


def read_metrics(path: Path) -> Figures:
    """Everything in metrics.jsonl except times and memory. Numbers are kept as text, digit for digit."""
    figures = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line, parse_float=str, parse_int=str, parse_constant=str)
        computed = {key: value for key, value in row.items() if key != "step" and not key.startswith(MEASURED)}
        figures |= {f"{key}{STEP}{row['step']}": value for key, value in computed.items()}
    return figures


def read_tensors(folder: Path) -> Figures:
    """Dtype, shape and digest of each exported tensor. Files are not compared, because their headers may differ."""
    figures = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in sorted(weights.keys()):
                tensor = weights.get_tensor(name)
                content = hashlib.blake2b(tensor.flatten().view(torch.uint8).numpy(), digest_size=8).hexdigest()
                figures[name] = f"{tensor.dtype} {tuple(tensor.shape)} {content}"
    if not figures:
        raise Failed(f"no weights were exported to {folder}")
    return figures


def verdict(before: Outcome, after: Outcome) -> str:
    """EQUAL, or the first figure that differs."""
    if failed := [side for side, found in zip(SIDES, (before, after), strict=True) if found.error]:
        return f"failed {' and '.join(failed)}"
    added = {name for name in after.figures.keys() - before.figures.keys() if STEP in name}  # metrics that are new
    for name in (name for name in before.figures | after.figures if name not in added):
        left, right = (found.figures.get(name, "absent") for found in (before, after))
        if left != right:
            return f"{name}: {left} before, {right} after"
    return EQUAL


def compare(comparison: Comparison, trainings: Sequence[Training]) -> dict[Training, tuple[str, str]]:
    """The last loss and the verdict of each training. Prints progress and errors to stderr."""
    models = list(dict.fromkeys(training.model for training in trainings))
    for model, made in zip(models, comparison.commands.share_cores(comparison.make_demo, models, 1), strict=True):
        say_error(f"demo of {model}", made)
    outcomes: dict[tuple[Training, str], Outcome] = {}
    found: dict[Training, tuple[str, str]] = {}
    for processes in sorted({training.processes for training in trainings}):
        work = [(training, side) for training in trainings if training.processes == processes for side in SIDES]
        made = comparison.commands.share_cores(lambda item: comparison.train(*item), work, processes)
        for (training, side), outcomes[training, side] in zip(work, made, strict=True):
            say_error(f"{training}, {side}", outcomes[training, side])
            if side == SIDES[-1]:
                before, after = (outcomes[training, side] for side in SIDES)
                losses = [value for name, value in before.figures.items() if name.startswith("loss ")]
                found[training] = (losses[-1] if losses else "", verdict(before, after))
                print(f"{len(found)}/{len(trainings)} {training}: {found[training][1]}", file=sys.stderr, flush=True)
    return found


def say_error(what: str, outcome: Outcome) -> None:
    if outcome.error:
        print(f"\n{what}: {outcome.error}\n", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("before", help="a git revision")
    parser.add_argument("after", nargs="?", help="a git revision; the working tree if not given")
    parser.add_argument("--only", default="", help="part of a model's name, like 'ltx 0.9.7'")
    parser.add_argument("--methods", nargs="+", choices=EXPORTS, default=list(EXPORTS))
    parser.add_argument("--processes", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    arguments = parser.parse_args()
    every = [Model(name, variant) for name in FAMILIES for variant in family_class(name).variants or (None,)]
    models = [model for model in every if arguments.only in str(model)]
    trainings = [Training(*each) for each in product(models, arguments.methods, arguments.processes)]
    if not trainings:
        parser.error(f"no model's name has {arguments.only!r} in it; they are: {', '.join(map(str, every))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that checkouts are removed
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        revisions = zip(SIDES, (arguments.before, arguments.after), strict=True)
        checkouts = {
            side: stack.enter_context(checked_out(revision, folder / f"checkout-{side}"))
            for side, revision in revisions
        }
        found = compare(Comparison(checkouts, folder, Commands()), trainings)
    rows = [[t.model, t.method, t.processes, *found[t]] for t in trainings]
    print_table(["model", "method", "processes", "last loss", f"{arguments.after or 'working tree'}"], rows)
    same = sum(row[-1] == EQUAL for row in rows)
    print(f"\n{same} of {len(rows)} trainings are equal, in {(time.monotonic() - start) / 60:.0f} minutes")
    return 0 if same == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
