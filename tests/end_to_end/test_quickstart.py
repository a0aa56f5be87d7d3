"""The quickstart teaches the demo's pipeline a shape that it has not seen: judged by a detector, and drawn side by side."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import ROOT, run_python

from finetune.data.shapes import FRAMES, NEW_SHAPE, Scene, draw
from finetune.tracking.media import write_video

RECIPE = ROOT / "recipes" / "quickstart.toml"
PROMPTS = 3


def judge(run: Path, samples: Path, clips: Path) -> subprocess.CompletedProcess:
    return run_python([ROOT / "launch" / "judge.py", run, samples, clips, RECIPE])


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """What the quickstart leaves, with drawn samples: the base model draws balls, the LoRA rings."""
    for folder in ("run", "samples", "clips"):
        (tmp_path / folder).mkdir()
    rows = [{"step": step, "heldout_loss": loss} for step, loss in ((0, 0.5), (100, 0.25))]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(PROMPTS):
        for version, shape in (("base", "ball"), ("trained", NEW_SHAPE)):
            video(tmp_path / "samples" / f"{number:02d}_seed{number}_{version}.mp4", shape)
    for number in range(2):
        video(tmp_path / "clips" / f"{number}.mp4", NEW_SHAPE)
        (tmp_path / "clips" / f"{number}.txt").write_text("a red zorb moves right over a black floor")
    return tmp_path


def video(path: Path, shape: str) -> None:
    write_video(draw(Scene(shape, "red", "black", "right", 13, 28, 32, 40)), path, 12)


def test_the_judge_counts_what_is_seen_and_draws_base_trained_and_a_real_clip(made: Path) -> None:
    done = judge(made / "run", made / "samples", made / "clips")
    assert done.returncode == 0, done.stderr
    assert "held-out loss 0.500 -> 0.250" in done.stdout
    assert f"the base model: 0 of {PROMPTS} videos show a ring" in done.stdout
    assert f"the model with the LoRA: {PROMPTS} of {PROMPTS} videos show a ring" in done.stdout
    with Image.open(made / "samples" / "base_trained_real.png") as sheet:
        reddish = (np.asarray(sheet).astype(int) @ (1, -0.5, -0.5) > 100).any(0)
    runs = np.flatnonzero(np.diff(np.concatenate([[0], reddish, [0]])))
    assert len(runs) // 2 == 9  # three columns with the shape at three places
    with Image.open(made / "samples" / "base_trained_real.webp") as moving:
        assert moving.n_frames == FRAMES
    assert f"the run's page, {made / 'run' / 'report.html'}" in done.stdout


def test_the_judge_refuses_a_lora_that_shows_no_ring_and_a_base_that_does(made: Path) -> None:
    video(made / "samples" / "00_seed0_trained.mp4", "ball")
    done = judge(made / "run", made / "samples", made / "clips")
    assert done.returncode == 1
    assert f"the model with the LoRA: 2 of {PROMPTS} videos show a ring" in done.stdout
    assert "expected: at least 80% with the LoRA" in done.stdout
    video(made / "samples" / "00_seed0_trained.mp4", NEW_SHAPE)
    video(made / "samples" / "00_seed0_base.mp4", NEW_SHAPE)
    assert judge(made / "run", made / "samples", made / "clips").returncode == 1


@pytest.mark.full
def test_ten_seeds_show_the_taught_shape_with_the_lora_and_not_without_it(tmp_path: Path) -> None:
    """After the quickstart's own training. The floors are dark: the small pipeline draws best on them."""
    settings = [f"output={tmp_path / 'run'}", f"model.path={tmp_path / 'model'}", f"data.path={tmp_path / 'clips'}"]
    settings += [f"data.cache={tmp_path / 'cache'}", f"validation.heldout={tmp_path / 'heldout'}"]
    chosen = [part for setting in settings for part in ("--set", setting)]
    text = [
        f"a {colour} zorb moves {way} over a {floor} floor"
        for colour, way, floor in (
            ("green", "right", "black"),
            ("purple", "left", "navy"),
            ("red", "up", "navy"),
            ("white", "down", "black"),
            ("cyan", "right", "navy"),
        )
    ]
    prompts = ", ".join(
        f'{{text = "{each}", shape = "17x64x96", steps = 12, guidance = 3.0, seed = {100 + 2 * k}, count = 2}}'
        for k, each in enumerate(text)
    )
    for arguments, processes in (
        (["demo", "--out", tmp_path], 0),
        (["--recipe", RECIPE, *chosen], 2),
        (
            [
                "sample",
                "--recipe",
                RECIPE,
                *chosen,
                "--set",
                f"validation.prompts=[{prompts}]",
                "--adapter",
                tmp_path / "run" / "lora",
                "--compare",
                "--out",
                tmp_path / "samples",
            ],
            0,
        ),
    ):
        done = run_python(["-m", "finetune", *arguments], processes, seconds=900)
        assert done.returncode == 0, done.stderr
    sys.path.insert(0, str(ROOT / "launch"))
    from judge import shares

    found = shares(tmp_path / "samples")
    assert len(found["base"]) == len(found["trained"]) == 10
    assert sum(found["trained"]) >= 8
    assert sum(found["base"]) <= 2
