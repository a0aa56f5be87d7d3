"""MLflow and Trackio get the figures and videos of a run, without a network; a run that resumes goes on in the same one.

Some of their packages contradict the versions of finetune[dev], so these tests run only where they are installed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.data.synthetic import scene
from finetune.recipe import load_recipe
from finetune.recipe.schema import Tracking
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.tracking.media import contact_sheet, strip, suffix_of, write_video
from finetune.tracking.trackers import open_trackers, tracker_problems
from finetune.training.run import train


@pytest.fixture
def videos(tmp_path: Path) -> tuple[list[tuple[str, Path]], Path]:
    """A generated video, an image, and their sheet."""
    made = []
    for index, count in enumerate((9, 1)):
        frames, _ = scene(index, count, 64, 96)
        path = tmp_path / "step_2" / f"{index:02d}_seed0{suffix_of(frames)}"
        write_video(frames, path, 24)
        made.append((f"prompt {index}", frames, path))
    sheet = tmp_path / "step_2" / "contact_sheet.png"
    contact_sheet([(label, strip(frames)) for label, frames, _ in made], sheet)
    return [(label, path) for label, _, path in made], sheet


def test_mlflow_keeps_a_run_in_its_folder_and_goes_on_with_it(tmp_path: Path, videos, monkeypatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for first_step in (0, 1):
        trackers = open_trackers(
            Tracking(trackers=["mlflow"], name="a run"), tmp_path, {"train": {"steps": 2}}, first_step
        )
        for tracker in trackers:
            tracker.log(first_step + 1, {"loss": 0.5 + first_step, "heldout_loss": 2.0})
            if first_step:
                tracker.log_videos(2, *videos)
            tracker.close(failed=not first_step)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("finetune").experiment_id])
    assert (run.info.run_name, run.info.status) == ("a run", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, 1.5)]
    assert run.data.metrics["heldout/loss"] == 2.0
    files = tmp_path / "mlflow" / "artifacts" / run.info.run_id / "artifacts"
    assert (files / "recipe.toml").read_text() == "[train]\nsteps = 2\n"
    kept = {path.read_bytes() for path in (files / "samples" / "step_00000002").iterdir()}
    assert kept == {path.read_bytes() for path in (*(path for _, path in videos[0]), videos[1])}


def test_mlflow_that_cannot_start_is_named(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(UserError, match=r"MLflow cannot start "):
        open_trackers(Tracking(trackers=["mlflow"]), tmp_path, {}, 0)


TRACKIO = """
import json, sys
from pathlib import Path
from finetune.recipe.schema import Tracking
from finetune.tracking.trackers import open_trackers
folder, videos, sheet = Path(sys.argv[1]), [(label, Path(path)) for label, path in json.loads(sys.argv[2])], Path(sys.argv[3])
for first_step in (0, 1):
    trackers = open_trackers(Tracking(trackers=["trackio"], name="a run"), folder, {"train": {"steps": 2}}, first_step)
    for tracker in trackers:
        tracker.log(first_step + 1, {"loss": 0.5 + first_step})
        if first_step:
            tracker.log_videos(2, videos, sheet)
        tracker.close(failed=not first_step)
import trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("finetune")
print(json.dumps([run.name, SQLiteStorage.get_logs("finetune", run.name)]))
"""


def test_trackio_keeps_a_run_on_this_machine_and_goes_on_with_it(tmp_path: Path, videos) -> None:
    pytest.importorskip("trackio")
    named = json.dumps([(label, str(path)) for label, path in videos[0]])
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO, tmp_path, named, videos[1]],
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    name, logs = json.loads(done.stdout.splitlines()[0])
    assert name.startswith("a run-")
    assert [(row["step"], row["train/loss"]) for row in logs if "train/loss" in row] == [(1, 0.5), (2, 1.5)]
    kept = {path.read_bytes() for path in (tmp_path / "trackio").rglob("*.mp4")}
    assert kept == {path.read_bytes() for _, path in videos[0] if path.suffix == ".mp4"}


@pytest.mark.parametrize("name", ["mlflow", "trackio"])
def test_an_extra_that_is_missing_is_named_with_its_cure(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    (problem,) = tracker_problems([name])
    assert name in problem.what
    assert problem.cure == f'in the checkout: pip install -e ".[{name}]"'
    with pytest.raises(UserError, match=name):
        open_trackers(Tracking(trackers=[name]), tmp_path, {}, 0)


def test_mlflow_that_fails_in_mid_run_is_said_once_and_the_run_ends_well(
    recipe_file: Path, runtime: Runtime, monkeypatch, capsys
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    recipe = load_recipe(recipe_file, ["train.steps=3", "tracking.trackers=mlflow"])

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", full)
    assert train(recipe, runtime) == 0
    assert capsys.readouterr().err.count("warning: MLflow fails ([Errno 28] No space left on device)") == 1
