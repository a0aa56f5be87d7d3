"""Metrics land where a recipe says: JSON Lines always, TensorBoard and W&B (offline) on request."""

import io
import json
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import wandb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune.data.synthetic import scene
from finetune.recipe import load_recipe
from finetune.recipe.schema import Tracking
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.tracking.media import contact_sheet, strip, suffix_of, write_video
from finetune.tracking.metrics import JsonLines
from finetune.tracking.trackers import Retrying, open_trackers, tracker_problems
from finetune.training.run import train


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
            tracker.close(failed=False)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
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
        ids.add(trackers[1].tracker.run.id)
        for tracker in trackers:
            tracker.close(failed=False)
    assert len(ids) == 1
    assert list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.fixture
def videos(tmp_path: Path) -> tuple[list[tuple[str, Path]], Path]:
    """Two generated videos, an image, and their sheet."""
    made = []
    for index, count in enumerate((9, 9, 1)):
        frames, _ = scene(index, count, 64, 96)
        path = tmp_path / "step_2" / f"{index}{suffix_of(frames)}"
        write_video(frames, path, 24)
        made.append((f"prompt {index}", frames, path))
    sheet = tmp_path / "step_2" / "contact_sheet.png"
    contact_sheet([(label, strip(frames)) for label, frames, _ in made], sheet)
    return [(label, path) for label, _, path in made], sheet


def test_samples_reach_every_tracker(tmp_path: Path, videos, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers = open_trackers(Tracking(trackers=["tensorboard", "wandb"]), tmp_path, {"train": {"steps": 2}}, 0)
    for tracker in trackers:
        tracker.log_videos(2, *videos)
    run = Path(trackers[2].tracker.run.dir)
    for tracker in trackers:
        tracker.close(failed=False)
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 2, "samples": str(tmp_path / "step_2")}]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    image = events.Images("samples")[0]
    assert (image.step, image.height) == (2, Image.open(videos[1]).height)
    moving = [Image.open(io.BytesIO(events.Images(f"samples/{index}")[0].encoded_image_string)) for index in range(3)]
    assert [(picture.format, picture.n_frames) for picture in moving] == [("GIF", 9), ("GIF", 9), ("GIF", 1)]
    (text,) = events.Tensors("recipe/text_summary")
    assert text.tensor_proto.string_val[0] == b"```toml\n[train]\nsteps = 2\n\n```"
    kept = {path.read_bytes() for pattern in ("*.mp4", "*.png") for path in run.rglob(pattern)}
    assert kept == {path.read_bytes() for path in (*(path for _, path in videos[0]), videos[1])}


def test_wandb_without_a_login_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.teardown()  # forget the mode another test chose
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match="WANDB_MODE=offline"):
        open_trackers(Tracking(trackers=["wandb"]), tmp_path, {}, 0)


# What fails


class Service:
    """A tracker that fails as long as it is told to."""

    def __init__(self) -> None:
        self.fails, self.got, self.closed = False, [], None

    def log(self, step: int, values: dict[str, float]) -> None:
        if self.fails:
            raise ConnectionError("no route to host\nand much else")
        self.got.append((step, values["loss"]))

    def log_videos(self, step: int, videos: list, sheet: Path) -> None:
        self.log(step, {"loss": 0.0})

    def close(self, failed: bool) -> None:
        self.closed = failed


def test_a_tracker_that_fails_is_said_once_and_gets_what_it_missed_later(
    monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    now = 1000.0
    monkeypatch.setattr("finetune.tracking.trackers.time.monotonic", lambda: now)
    service = Service()
    tracker = Retrying(service, "W&B")
    for step in range(1, 10):
        service.fails = 3 <= step < 6
        now += 30
        tracker.log(step, {"loss": float(step)})
    tracker.close(failed=False)
    assert service.got == [(step, float(step)) for step in range(1, 10)]
    assert service.closed is False
    said = capsys.readouterr().err
    assert said.count("warning: W&B fails (no route to host); the training goes on") == 1
    assert "lacks" not in said


def test_a_tracker_that_never_comes_back_is_said_to_lack_what_it_missed(capsys) -> None:
    service = Service()
    tracker = Retrying(service, "W&B")
    service.fails = True
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0})
    tracker.close(failed=True)
    assert "W&B lacks 2 entries of this run; metrics.jsonl has them" in capsys.readouterr().err


def test_an_entry_that_fails_for_itself_does_not_keep_the_others(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    now = 1000.0
    monkeypatch.setattr("finetune.tracking.trackers.time.monotonic", lambda: now)
    service = Service()
    tracker = Retrying(service, "W&B")
    missing = [("a ball", Path("gone.mp4"))]
    monkeypatch.setattr(service, "log_videos", lambda *_: Path("gone.mp4").read_bytes())
    tracker.log(1, {"loss": 1.0})
    tracker.log_videos(1, missing, Path("gone.png"))
    for step in range(2, 6):
        now += 30
        tracker.log(step, {"loss": float(step)})
    tracker.log_videos(5, missing, Path("gone.png"))
    tracker.close(failed=False)
    assert service.got == [(step, float(step)) for step in range(1, 6)]
    assert service.closed is False
    assert "W&B lacks 2 entries of this run" in capsys.readouterr().err


def test_a_full_disk_of_tensorboard_does_not_end_a_training(recipe_file: Path, runtime: Runtime, capsys) -> None:
    recipe = load_recipe(recipe_file, ["train.steps=2", "tracking.trackers=tensorboard"])
    writer = "torch.utils.tensorboard.SummaryWriter.add_scalar"
    with patch(writer, side_effect=OSError(28, "No space left on device")):
        assert train(recipe, runtime) == 0
    assert len(rows(recipe.output / "metrics.jsonl")) >= 2
    assert capsys.readouterr().err.count("warning: TensorBoard fails ([Errno 28] No space left on device)") == 1


def test_a_tensorboard_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").touch()
    with pytest.raises(UserError, match=r"tensorboard: cannot be written .*File exists"):
        open_trackers(Tracking(trackers=["tensorboard"]), tmp_path, {}, 0)


def test_a_run_that_fails_ends_as_crashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers = open_trackers(Tracking(trackers=["wandb"]), tmp_path, {}, 0)
    run = trackers[1].tracker.run
    trackers[1].close(failed=True)
    trackers[0].close()
    assert run._exit_code == 1


def test_a_package_that_lacks_another_is_not_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb")
    (problem,) = tracker_problems(["wandb"])
    assert problem.what == (
        "wandb is installed, but cannot be imported (No module named 'a_package_that_is_not_there')"
    )


def test_a_package_that_is_not_there_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    (problem,) = tracker_problems(["wandb"])
    assert "wandb" in problem.what


@pytest.mark.parametrize(
    "netrc, variables, lacks",
    [
        ("", {}, True),
        ("", {"WANDB_CONFIG_DIR": "offline"}, False),
        ("machine api.wandb.ai login user password key\n", {}, False),
        ("machine elsewhere.example login user password key\n", {}, True),
        ("not a netrc", {}, True),
        ("", {"WANDB_API_KEY": "key"}, False),
        ("", {"WANDB_MODE": "offline"}, False),
        ("machine own.example login user password key\n", {"WANDB_BASE_URL": "https://own.example"}, False),
    ],
)
def test_a_key_is_looked_for_before_anything_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, netrc: str, variables: dict[str, str], lacks: bool
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "offline").mkdir()
    (tmp_path / "offline" / "settings").write_text("[default]\nmode = offline\n")  # as `wandb offline` writes it
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / ".netrc").write_text(netrc)
    (tmp_path / ".netrc").chmod(0o600)
    wandb.teardown()  # it keeps the settings that it was first asked for
    try:
        assert [problem.what for problem in tracker_problems(["wandb"])] == ["W&B has no key to log in with"] * lacks
    finally:
        wandb.teardown()
