"""Samples are the same on any number of ranks, in any number, and change nothing of the training."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import figures_of
from safetensors.torch import load_file

from finetune.recipe import load_recipe, write_recipe
from finetune.tracking.metrics import JsonLines

PROMPTS = [("a red ball moves", 2, 1.0), ("a blue square falls", 4, 3.0), ("a green triangle grows", 3, 1.0)]
COUNTS = {"none": 0, "one": 1, "three": 3}


@pytest.fixture(scope="session")
def runs(
    tmp_path_factory: pytest.TempPathFactory, family_recipe: Callable[..., Path]
) -> dict[int, tuple[Path, dict[str, list]]]:
    """By number of processes: the folder of all trainings, and how each of them ended."""
    found = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"samples-{processes}")
        names = ["three"] if processes == 1 else [*COUNTS, "unwritable"]
        recipes = [written(folder, name, family_recipe("ltx")) for name in names]
        if processes == 2:
            (folder / "run-unwritable" / "samples" / "step_00000000" / "01_seed0.mp4").mkdir(parents=True)
        found[processes] = folder, figures_of("sampling_worker.py", processes, folder, recipes)
    return found


def written(folder: Path, name: str, base: Path) -> Path:
    prompts = [
        f'{{text = "{text}", steps = {steps}, guidance = {guidance}}}'
        for text, steps, guidance in PROMPTS[: COUNTS.get(name, 3)]
    ]
    overrides = [f"output={folder / f'run-{name}'}", "train.steps=4"]
    overrides += ["train.global_batch_size=4", "train.micro_batch_size=2"]
    if prompts:
        overrides += ["validation.samples_every=2", f"validation.prompts=[{', '.join(prompts)}]"]
    path = folder / f"{name}.toml"
    write_recipe(load_recipe(base, overrides), path)
    return path


def samples(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.mp4"))}


@pytest.mark.parametrize("name", COUNTS)
def test_any_number_of_prompts_is_generated_on_two_ranks(runs: dict, name: str) -> None:
    folder, ends = runs[2]
    assert ends[name] == [0, 0]
    expected = {f"step_{step:08d}/{index:02d}_seed0.mp4" for step in (0, 2, 4) for index in range(COUNTS[name])}
    assert samples(folder / f"run-{name}" / "samples").keys() == expected
    sheets = list((folder / f"run-{name}").rglob("contact_sheet.png"))
    assert len(sheets) == (3 if COUNTS[name] else 0)


def test_a_prompt_gives_the_same_video_on_one_rank_and_on_two(runs: dict) -> None:
    """Seen on the sheets, which show the frames as they were generated; H.264 does not encode noise twice alike."""
    sheets = [runs[n][0] / "run-three" / "samples" / "step_00000000" / "contact_sheet.png" for n in (1, 2)]
    alone, spread = (np.asarray(Image.open(sheet)) for sheet in sheets)
    assert np.array_equal(alone, spread)
    rows = np.array_split(alone, 3)
    assert not np.array_equal(rows[0], rows[1])


def test_training_with_samples_ends_in_the_same_bytes_as_without(runs: dict) -> None:
    folder, _ = runs[2]
    adapters = [load_file(folder / f"run-{name}" / "lora" / "pytorch_lora_weights.safetensors") for name in COUNTS]
    for other in adapters[1:]:
        assert other.keys() == adapters[0].keys()
        assert all(torch.equal(other[name], adapters[0][name]) for name in other)
    losses = [[entry["loss"] for entry in metrics(folder / f"run-{name}") if "loss" in entry] for name in COUNTS]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1] == losses[2]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_metrics_name_the_folder_of_each_set_of_samples(runs: dict) -> None:
    named = [entry for entry in metrics(runs[2][0] / "run-three") if "samples" in entry]
    assert [entry["step"] for entry in named] == [0, 2, 4]
    assert all(Path(entry["samples"]).is_dir() for entry in named)


def test_a_video_that_one_rank_cannot_write_ends_the_run_on_both(runs: dict) -> None:
    ends = runs[2][1]["unwritable"]
    assert len(ends) == 2
    assert all("cannot be written" in end for end in ends), ends


def test_a_run_that_resumes_drops_the_samples_of_steps_it_repeats(tmp_path: Path) -> None:
    first = JsonLines(tmp_path / "metrics.jsonl", 0)
    for step in (0, 2, 4):
        first.log_videos(step, [], tmp_path / f"step_{step}" / "contact_sheet.png")
    first.close()
    JsonLines(tmp_path / "metrics.jsonl", 2).close()
    assert [entry["step"] for entry in metrics(tmp_path)] == [0, 2]
