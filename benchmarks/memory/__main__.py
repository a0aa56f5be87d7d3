"""Reproduces published peak memory, and compares it with ours: `python -m benchmarks.memory`.

Every row of published.csv is simulated in two ways, each in a process of its own on a simulated accelerator: the published run
itself (reference.py), and a recipe of ours for the same work (ours.py), without and with memory savers. Writes a table and a
chart to benchmarks/results/; `--redraw` draws the chart of the table that is there. `--only N [N ...]` takes some rows only.
`--measure` runs ours on a GPU and compares the prediction.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from benchmarks.memory.chart import draw, read_table
from benchmarks.memory.ours import resident, with_savers
from benchmarks.memory.published import HERE, Row, rows
from benchmarks.memory.table import GIB, Line, errors, markdown

RESULTS = HERE.parent / "results"
INTRODUCTION = (HERE / "introduction.md").read_text()
TIMEOUT = 900  # seconds of one run
MEASURED = (2, 4, 8, 9, 10, 13, 15, 50, 54)  # where ours fit 80 GB: both models, LoRA and full, batch 1 and 4


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of rows, from 1")
    parser.add_argument("--measure", action="store_true", help="ours, predicted and measured on the GPU that is here")
    parser.add_argument("--minutes", type=float, help="begin no further run after this long; a later call goes on")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--redraw", action="store_true", help="only the chart, from the table that is there")
    arguments = parser.parse_args()
    if arguments.redraw:
        draw(read_table((arguments.out / "memory.md").read_text()), arguments.out / "memory.png")
        return
    start, chosen = time.perf_counter(), rows()
    if arguments.only or arguments.measure:
        chosen = [chosen[number - 1] for number in arguments.only or MEASURED]
    if arguments.measure:
        _measure(chosen, arguments.out)
        return
    wanted: dict[tuple[str, str], None] = {}
    for row in chosen:
        wanted |= dict.fromkeys(_runs(row).values())
    kept = _Kept(HERE.parent.parent / "runs" / "benchmarks_memory.jsonl")

    def figures(run: tuple[str, str]) -> dict[str, float] | None:
        late = arguments.minutes is not None and time.perf_counter() - start > 60 * arguments.minutes
        return kept.get(run) or (None if late else kept.put(run, _run(run)))

    with ThreadPoolExecutor(arguments.jobs) as pool:
        done = dict(zip(wanted, pool.map(figures, wanted), strict=True))
    if left := sum(found is None for found in done.values()):
        sys.exit(f"{left} of {len(wanted)} runs are left; the same command goes on with them")
    lines = [Line(row, **{name: done[run] for name, run in _runs(row).items()}) for row in chosen]
    report = f"{INTRODUCTION}\n{markdown(lines)}\n\n{errors(lines)}\n"
    print(report)
    print(
        f"{len(chosen)} rows, {len(wanted)} runs, {(time.perf_counter() - start) / 60:.0f} minutes, {arguments.jobs} at a time"
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "memory.md").write_text(report)
    draw(read_table(report), arguments.out / "memory.png")


class _Kept:
    """The figures of earlier runs with the same code, in a file to which each run is added."""

    def __init__(self, file: Path) -> None:
        self.file, self.lock = file, threading.Lock()
        file.parent.mkdir(parents=True, exist_ok=True)
        sources = sorted([*(HERE.parent.parent / "finetune").rglob("*.py"), *HERE.glob("*.py")])
        self.code = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
        lines = file.read_text().splitlines() if file.exists() else []
        entries = [json.loads(line) for line in lines]
        self.figures = {tuple(entry["run"]): entry["figures"] for entry in entries if entry["code"] == self.code}

    def get(self, run: tuple[str, str]) -> dict[str, float] | None:
        return self.figures.get(run)

    def put(self, run: tuple[str, str], figures: dict[str, float]) -> dict[str, float]:
        with self.lock, self.file.open("a") as file:
            file.write(json.dumps({"code": self.code, "run": run, "figures": figures}) + "\n")
        return figures


def _measure(chosen: list[Row], out: Path) -> None:
    """Write a table of predicted and measured peaks. Runs are made one at a time."""
    table = [
        "| ours | GPU | allocated, predicted / measured | reserved, predicted / measured | errors |",
        "|---|---|---|---|---|",
    ]
    wanted = dict.fromkeys(choose(row) for row in chosen for choose in (resident, with_savers) if row.gpus == 1)
    for ours in wanted:
        predicted, measured = (_run((module, ours.key)) for module in ("ours", "measure"))
        cells, errors = [ours.key, measured["gpu"]], []
        for kind in ("allocated", "reserved"):
            cells.append(f"{predicted[kind] / GIB:.2f} / {measured[kind] / GIB:.2f}")
            errors.append(f"{predicted[kind] / measured[kind] - 1:+.1%}")
        table.append("| " + " | ".join([*cells, ", ".join(errors)]) + " |")
        print(table[-1], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "memory_measured.md").write_text("\n".join(table) + "\n")


def _runs(row: Row) -> dict[str, tuple[str, str]]:
    """The runs that a row needs, by name: (module, argument) of each."""
    runs = {name: ("ours", choose(row).key) for name, choose in (("resident", resident), ("savers", with_savers))}
    if row.gpus == 1:
        figures = asdict(row) | {"published": []}
        runs["reproduced"] = "reference", json.dumps(figures)
    return runs


def _run(run: tuple[str, str]) -> dict[str, float]:
    module, argument = run
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.memory.{module}", argument]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    print(f"{figures['seconds']:5.0f} s  {module} {argument}", file=sys.stderr, flush=True)
    return figures


if __name__ == "__main__":
    main()
