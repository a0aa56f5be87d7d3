"""A run made by an earlier version, with its cache: this version reads it and goes on with it. See make_old_run.py.

Only the command line is used, and the old files, so that this holds whatever becomes of the modules.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from make_old_run import OLD_RUN, write_base_weights
from processes import ROOT, run_python
from safetensors.torch import load_file

EXPECTED = json.loads((OLD_RUN / "expected.json").read_text())
# Base weights, adapter and cached items are the same to the bit. What is left is rounding: another processor or number of
# processes takes sums in another order.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Resumed:
    """The run after it went on, and what it said."""

    folder: Path
    said: str

    def rows(self, key: str) -> dict[str, float]:
        """What it measured after its resume, by step."""
        rows = [json.loads(line) for line in metrics(self.folder)]
        return {str(row["step"]): row[key] for row in rows if key in row and row["step"] > EXPECTED["stopped_after"]}


def metrics(folder: Path) -> list[str]:
    return (folder / "run" / "metrics.jsonl").read_text().splitlines()


def items(folder: Path) -> dict[str, bytes]:
    """Every item of the cache."""
    cache = folder / "cache"
    return {str(file.relative_to(cache)): file.read_bytes() for file in cache.rglob("*.safetensors")}


def run(folder: Path, *arguments: object, processes: int = 0) -> str:
    """Run the command line in a copy of the old run; what it says."""
    paths = {"PYTHONPATH": str(ROOT)}
    done = run_python(["-m", "finetune", *arguments], processes, folder, paths, 280)
    assert done.returncode == 0, done.stderr
    return done.stderr


def copy_of_old_run(folder: Path) -> Path:
    """The old run as it was left, on this machine."""
    shutil.copytree(OLD_RUN, folder)
    assert write_base_weights(folder / "model" / "transformer") == EXPECTED["base_weights"]
    return folder


def remember_files(folder: Path) -> None:
    """Make files.json what it would be if the old version had seen the files here: absolute paths, and their times."""
    facts = folder / "cache" / "files.json"
    entries = {(folder / name).resolve(): entry for name, entry in json.loads(facts.read_text()).items()}
    now = {str(path): entry | {"mtime_ns": path.stat().st_mtime_ns} for path, entry in entries.items()}
    facts.write_text(json.dumps(now))


@pytest.fixture(scope="module", params=[0, pytest.param(2, marks=pytest.mark.full)], ids=["alone", "two processes"])
def resumed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """Gone on with in one process, by remembered facts of its files; or in two, which look at the files anew."""
    folder = copy_of_old_run(tmp_path_factory.mktemp("old") / "run")
    if request.param == 0:
        remember_files(folder)
    return Resumed(folder, run(folder, "--recipe", "recipe.toml", processes=request.param))


def test_an_old_run_goes_on_after_its_last_step(resumed: Resumed) -> None:
    assert f"resuming after step {EXPECTED['stopped_after']}:" in resumed.said


def test_nothing_of_an_old_cache_is_encoded_anew(resumed: Resumed) -> None:
    """Clips and captions have the same keys as before."""
    assert "encoding" not in resumed.said
    assert items(resumed.folder) == items(OLD_RUN)


@pytest.mark.parametrize("figure", ["loss", "heldout_loss", "lr"])
def test_an_old_run_goes_on_as_the_old_version_did(resumed: Resumed, figure: str) -> None:
    assert resumed.rows(figure) == pytest.approx(EXPECTED[figure], rel=TOLERANCE)


def test_what_an_old_run_measured_is_kept(resumed: Resumed) -> None:
    before = metrics(OLD_RUN)
    assert metrics(resumed.folder)[: len(before)] == before


@pytest.mark.full
def test_an_old_checkpoint_is_exported_with_the_strength_of_the_old_version(tmp_path: Path) -> None:
    folder = copy_of_old_run(tmp_path / "run")
    run(folder, "export", "--recipe", "recipe.toml", "--out", "exported")
    ours, theirs = (
        load_file(path / "pytorch_lora_weights.safetensors") for path in (folder / "exported", OLD_RUN / "run" / "lora")
    )
    assert ours.keys() == theirs.keys()
    scale = 2  # alpha over rank, which the old version wrote into the metadata alone
    assert all(ours[name].equal(theirs[name] * (scale if "lora_B" in name else 1)) for name in theirs)
