"""Metrics land where a recipe says: JSON Lines always, TensorBoard and W&B (offline) on request."""

import json
from pathlib import Path

import pytest
import wandb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune.data.synthetic import scene
from finetune.recipe.schema import Tracking
from finetune.runtime.errors import UserError
from finetune.tracking.media import contact_sheet, strip, write_video
from finetune.tracking.trackers import JsonLines, open_trackers


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_json_lines_readable_while_the_run_lasts(tmp_path: Path) -> None:
    tracker = JsonLines(tmp_path / "metrics.jsonl", first_step=0)
    tracker.log(1, {"loss": 0.5})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    tracker.close()


def test_a_resumed_run_drops_what_the_killed_one_wrote_ahead(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"step": 4, "lo')
    JsonLines(path, first_step=2).close()
    assert [row["step"] for row in rows(path)] == [1, 2]


def test_a_resumed_run_drops_the_zeros_that_a_crash_has_left(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n\0\0\0\n\0\0{"step": 2, "loss": 0.1}\n\0\0')
    JsonLines(path, first_step=2).close()
    assert path.read_text() == '{"step": 1, "loss": 3}\n{"step": 2, "loss": 0.1}\n'


def test_a_resumed_run_names_a_line_that_is_no_row_of_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\nstep 2\n{"step": 3, "loss": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not a row of metrics: 'step 2'"):
        JsonLines(path, first_step=3)


def test_tensorboard_gets_every_value_and_a_resumed_run_replaces_later_steps(tmp_path: Path) -> None:
    for first_step, steps in ((0, range(1, 5)), (2, range(3, 6))):
        trackers = open_trackers(Tracking(trackers=["tensorboard"]), tmp_path, {}, first_step)
        for step in steps:
            for tracker in trackers:
                tracker.log(step, {"loss": step + 10.0 * first_step})
        for tracker in trackers:
            tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 23.0),
        (4, 24.0),
        (5, 25.0),
    ]


def test_wandb_runs_offline_and_resumes_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = set()
    for first_step in (0, 1):
        trackers = open_trackers(Tracking(trackers=["wandb"]), tmp_path, {"train": {"steps": 2}}, first_step)
        trackers[1].log(first_step + 1, {"loss": 1.0})
        ids.add(trackers[1].run.id)
        for tracker in trackers:
            tracker.close()
    assert len(ids) == 1
    assert list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.fixture
def videos(tmp_path: Path) -> tuple[list[tuple[str, Path]], Path]:
    """Two generated videos and their sheet."""
    made = []
    for index in range(2):
        frames, _ = scene(index, 9, 64, 96)
        write_video(frames, tmp_path / "step_2" / f"{index}.mp4", 24)
        made.append((f"prompt {index}", frames, tmp_path / "step_2" / f"{index}.mp4"))
    sheet = tmp_path / "step_2" / "contact_sheet.png"
    contact_sheet([(label, strip(frames)) for label, frames, _ in made], sheet)
    return [(label, path) for label, _, path in made], sheet


def test_samples_reach_every_tracker(tmp_path: Path, videos, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers = open_trackers(Tracking(trackers=["tensorboard", "wandb"]), tmp_path, {}, 0)
    for tracker in trackers:
        tracker.log_videos(2, *videos)
    run = Path(trackers[2].run.dir)
    for tracker in trackers:
        tracker.close()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 2, "samples": str(tmp_path / "step_2")}]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    image = events.Images("samples")[0]
    assert (image.step, image.height) == (2, Image.open(videos[1]).height)
    kept = {path.read_bytes() for path in run.rglob("*.mp4")}
    assert kept == {path.read_bytes() for _, path in videos[0]}


def test_wandb_without_a_login_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.teardown()  # forget the mode another test chose
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match="WANDB_MODE=offline"):
        open_trackers(Tracking(trackers=["wandb"]), tmp_path, {}, 0)
