"""The plan of samples with two transformers: the device holds one of them, and the host what is not in use."""

import json
import os
import shutil
from typing import Any

import pytest
from processes import ROOT, run_python

CASES = {
    "lora": ([], 1),
    "lora in bf16 over two GPUs": (["train.precision=bf16", "memory.layout=shard"], 2),
    "low-bit codes": (["memory.low_bit=nf4"], 1),
    "streamed blocks": (["memory.offload=true"], 1),
    "offloaded shards": (["memory.offload=true", "memory.layout=shard"], 2),
    "full": (["train.method=full", "train.precision=bf16"], 1),
    "full over two GPUs": (["train.method=full"], 2),
}
FULL = ("low-bit codes", "streamed blocks", "offloaded shards", "full over two GPUs")  # these with --full
every_case = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.full) if case in FULL else case for case in CASES]
)
SCHEDULE = 64  # bytes; the noise levels of two more steps
WEIGHTS = {"frozen weights", "trained weights", "gathered weights", "load"}
MAKE = """
import sys
from pathlib import Path
from experts import HighNoise, recipe_of
path = Path(sys.argv[1])
HighNoise.tiny(path / "two")
prompts = [{"text": "a red ball", "steps": 4, "guidance": 3.0}]
recipe = recipe_of(HighNoise, path / "two", path, path / "cache", path / "run", prompts)
(path / "recipe.toml").write_text(recipe)
"""


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """Of each case that is asked for, phases with one transformer and with two; simulated in a process of its own."""
    asked = {item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")}
    chosen = {name: case for name, case in CASES.items() if name not in FULL or name in asked}
    folder = tmp_path_factory.mktemp("experts")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "engine")))
    made = run_python(["-c", MAKE, folder], environment={"PYTHONPATH": paths})
    assert made.returncode == 0, made.stderr
    shutil.copytree(folder / "two", folder / "one")
    index = folder / "one" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"boundary_ratio": None}))
    worker = [ROOT / "tests" / "planning" / "experts_worker.py", folder / "out.json", folder / "recipe.toml", folder]
    done = run_python([*worker, json.dumps(chosen)], environment={"PYTHONPATH": paths}, seconds=280)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("phase", ["load", "step", "validation", "export"])
@every_case
def test_the_device_never_holds_more_than_one_transformer(figures: dict[str, Any], case: str, phase: str) -> None:
    """What the peaks are otherwise, a model of one transformer says. A companion that is held in bf16 takes less."""
    one, two = (figures[case][model] for model in ("one", "two"))
    assert two["swaps"] == 2
    assert two[phase]["device"]["requested"] <= one[phase]["device"]["requested"] + SCHEDULE
    assert two[phase]["device"]["before"] == one[phase]["device"]["before"]


def test_the_companion_is_counted_at_the_peak_of_samples(figures: dict[str, Any]) -> None:
    """It decodes the video with the second of them on the device, all of whose weights are frozen."""
    one, two = (figures["lora"][model]["validation"]["device"] for model in ("one", "two"))
    assert two["requested"] >= one["requested"]
    assert two["parts"]["frozen weights"] == one["parts"]["frozen weights"] + one["parts"]["trained weights"]


@every_case
def test_what_comes_back_is_told_under_its_name(figures: dict[str, Any], case: str) -> None:
    one, two = (figures[case][model]["export"]["device"]["parts"] for model in ("one", "two"))
    assert {name: two.get(name) for name in WEIGHTS} == {name: one.get(name) for name in WEIGHTS}


def test_the_host_holds_copies_of_both(figures: dict[str, Any]) -> None:
    """Frozen weights are copied once and their copies kept."""
    one, two = (figures["lora in bf16 over two GPUs"][model]["validation"] for model in ("one", "two"))
    weights = sum(one["device"]["parts"][name] for name in ("frozen weights", "trained weights"))
    grown = two["host"]["before"] - one["host"]["before"]
    tables = one["device"]["parts"]["load"]  # buffers
    assert 2 * (weights + tables) <= grown < 1.03 * 2 * (weights + tables)  # each piece is aligned
