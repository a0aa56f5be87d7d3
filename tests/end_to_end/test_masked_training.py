"""A dataset in which some clips have masks is trained by one process and by two."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from PIL import Image, ImageDraw
from trainings import rows

from finetune.training.job import Job

MASKED = 3


@pytest.fixture
def masked_clips(few_clips: Path, tmp_path: Path) -> Path:
    """A manifest of five clips, three of them with a mask: a disc as large as half of the clip's height."""
    folder = tmp_path / "masked"
    folder.mkdir()
    table = []
    for index, caption in enumerate(sorted(few_clips.glob("*.txt"))):
        (video,) = (path for path in few_clips.glob(f"{caption.stem}.*") if path != caption)
        row = {"video": str(video), "caption": caption.read_text().strip()}
        if index < MASKED:
            mask = Image.new("L", (192, 128))
            ImageDraw.Draw(mask).ellipse((20 + 30 * index, 30, 84 + 30 * index, 94), fill=255)
            mask.save(folder / f"{index}.png")
            row["mask"] = f"{index}.png"
        table.append(row)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    return folder


def test_two_processes_train_masked_clips_as_one_does(
    finetune: Callable[..., CompletedProcess],
    build_job: Callable[..., Job],
    recipe_file: Path,
    masked_clips: Path,
    tmp_path: Path,
) -> None:
    settings = [f"output={tmp_path / 'run'}", f"data.path={masked_clips}", f"data.cache={tmp_path / 'cache'}"]
    settings += ["train.steps=2", "validation.heldout_clips=1", "validation.sigmas=2", "train.micro_batch_size=2"]
    spread = [part for each in [*settings, "data.workers=1"] for part in ("--set", each)]
    done = finetune("--recipe", recipe_file, *spread, processes=2, timeout=200)
    assert done.returncode == 0, done.stderr
    assert f"the loss of {MASKED} of 5 clips is weighed by their masks; the others count everywhere" in done.stderr

    job = build_job(*settings)
    heldout = [job.heldout_loss()]
    losses = []
    for step in range(2):
        batches = [job.micro_batches()[2 * step + index] for index in range(2)]
        assert any(batch.only.counted is not None for batch in batches)
        losses.append(job.step(step, batches).loss)
    heldout.append(job.heldout_loss())
    assert [row["loss"] for row in rows(tmp_path / "run")] == pytest.approx(losses, rel=1e-5)
    measured = [row["heldout_loss"] for row in rows(tmp_path / "run", "heldout_loss")]
    assert measured == pytest.approx([figures.loss for figures in heldout], rel=1e-5)
