"""Two experts in one recipe are two trainings: each as if it were alone, and in the folder of its own."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import ROOT, Finetune
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from trainings import Run, checkpoints, resumed_after, rows

STEPS = {"high": 3, "low": 4}
SETTINGS = (
    "train.steps={high = 3, low = 4}",
    "checkpoint.every=1",
    "train.micro_batch_size=1",
    'validation.prompts=[{text = "a red ball", steps = 4, guidance = 2.0, shape = "9x32x32"}]',
)


@pytest.fixture(scope="module")
def recipe(family_recipe: Callable[..., Path]) -> Path:
    return family_recipe("wan", "2.2-A14B")


@pytest.fixture(scope="module")
def both(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of both experts, on two processes."""
    run = Run(recipe, tmp_path_factory.mktemp("experts") / "both", 2, SETTINGS)
    assert run.wait() == 0, run.said
    return run


def lora(output: Path, expert: str) -> dict[str, Tensor]:
    return load_file(output / expert / "lora" / f"pytorch_lora_weights_{expert}_noise.safetensors")


def losses(output: Path, expert: str) -> list[dict]:
    kept = ("step", "loss", "grad_norm", "lr", "heldout_loss", "heldout_loss_outside")
    return [{key: row[key] for key in kept if key in row} for row in rows(output / expert, "step")]


@pytest.mark.full
@pytest.mark.parametrize("expert", STEPS)
def test_each_expert_is_trained_as_if_it_were_alone(both: Run, recipe: Path, tmp_path: Path, expert: str) -> None:
    alone = Run(recipe, tmp_path / "alone", 2, (*SETTINGS, f'model.experts=["{expert}"]'))
    assert alone.wait() == 0, alone.said
    ours, theirs = lora(both.output, expert), lora(alone.output, expert)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses(both.output, expert) == losses(alone.output, expert)
    assert [row["step"] for row in rows(both.output / expert)] == list(range(1, STEPS[expert] + 1))
    assert [path.name for path in alone.output.iterdir()] == [expert]


@pytest.mark.full
def test_where_one_expert_is_finished_the_other_is_trained_as_if_it_were_alone(
    both: Run, recipe: Path, tmp_path: Path
) -> None:
    shutil.copytree(both.output / "high", tmp_path / "output" / "high")
    again = Run(recipe, tmp_path / "output", 2, SETTINGS)
    assert again.wait() == 0, again.said
    assert "it is finished: 3 steps and all results" in again.said
    ours, theirs = lora(again.output, "low"), lora(both.output, "low")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses(again.output, "low") == losses(both.output, "low")


def test_the_experts_differ(both: Run) -> None:
    high, low = lora(both.output, "high"), lora(both.output, "low")
    assert high.keys() == low.keys()
    assert not any(torch.equal(high[name], low[name]) for name in high if "lora_B" in name)


def test_held_out_losses_are_those_inside_and_outside_of_the_experts_noise_levels(both: Run) -> None:
    """What is inside for the one is outside for the other, with the same clips and noise."""
    for expert in STEPS:
        (first, *_, last) = rows(both.output / expert, "heldout_loss")
        assert (first["step"], last["step"]) == (0, STEPS[expert])
        for row in (first, last):
            assert row["heldout_loss"] != row["heldout_loss_outside"]


@pytest.mark.full
def test_a_run_that_is_killed_goes_on_at_the_right_expert(both: Run, recipe: Path, tmp_path: Path) -> None:
    broken = Run(recipe, tmp_path / "broken", 2, SETTINGS)
    broken.wait_until(lambda: checkpoints(broken.output / "low") >= [2])
    broken.kill_all()
    before = (broken.output / "high" / "lora").stat().st_mtime_ns
    again = Run(recipe, tmp_path / "broken", 2, SETTINGS)
    assert again.wait() == 0, again.said
    assert "it is finished: 3 steps and all results" in again.said
    assert resumed_after(again.said) >= 2
    assert (broken.output / "high" / "lora").stat().st_mtime_ns == before
    for expert in STEPS:
        ours, theirs = lora(broken.output, expert), lora(both.output, expert)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert [row["loss"] for row in rows(broken.output / expert)] == [
            row["loss"] for row in rows(both.output / expert)
        ]


@pytest.mark.full
def test_a_stop_ends_the_run_before_the_other_expert(recipe: Path, tmp_path: Path) -> None:
    """The first expert has made its steps, and is exported or generates its samples."""
    run = Run(recipe, tmp_path / "stopped", 0, SETTINGS)
    run.wait_until(lambda: (run.output / "high" / "results.json").exists())
    run.process.terminate()
    assert run.wait() == 128 + signal.SIGTERM, run.said
    assert "stopped by SIGTERM; the same command goes on" in run.said
    assert not (run.output / "low").exists()


def test_the_files_say_which_expert_they_are_for(both: Run) -> None:
    for expert, component, levels in (("high", "transformer", "0.875 to 1"), ("low", "transformer_2", "0 to 0.875")):
        (file,) = (both.output / expert / "lora").iterdir()
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        facts = {name: metadata[name] for name in ("expert", "component", "denoises")}
        assert facts == {"expert": f"{expert}_noise", "component": component, "denoises": f"sigma {levels}"}
        assert "lora_adapter_metadata" in metadata  # rank and alpha, as diffusers reads them


def test_the_printed_script_loads_both(both: Run, tmp_path: Path) -> None:
    script = both.said.rpartition("Use it with diffusers:\n")[2]
    lines = [line.removeprefix("    ") for line in script.splitlines() if line.startswith("    ")]
    lines = [line for line in lines if "export_to_video" not in line]  # which needs a package of its own
    lines = [line.replace('prompt="your prompt"', 'prompt="a", num_inference_steps=2') for line in lines]
    lines.append("print(pipe.transformer.active_adapters(), pipe.transformer_2.active_adapters())")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=ROOT, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['high_noise'] ['low_noise']"


def test_samples_use_the_other_expert_as_it_is_so_far(both: Run) -> None:
    assert "samples: the low-noise expert is as it was" in both.said
    assert "samples: the high-noise expert is that of its step 3" in both.said
    assert sorted(path.name for path in (both.output / "low" / "samples").iterdir()) == [
        "grid.png",
        "step_00000000",
        "step_00000004",
    ]


def test_runs_are_compared_by_their_held_out_losses(both: Run, finetune: Finetune) -> None:
    done = finetune("compare", both.output)
    assert done.returncode == 0, done.stderr
    for expert in STEPS:
        measured = rows(both.output / expert, "heldout_loss")
        (line,) = (line for line in done.stdout.splitlines() if f"{expert}-noise" in line)
        for name in ("heldout_loss", "heldout_loss_outside"):
            assert f"{measured[0][name]:.4f} -> {measured[-1][name]:.4f}" in line
    nothing = finetune("compare", both.output.parent)
    assert nothing.returncode == 2
    assert "there is no metrics.jsonl in it" in nothing.stderr


def test_a_step_to_go_back_to_is_that_of_one_expert(both: Run, recipe: Path, finetune: Finetune) -> None:
    settings = [part for setting in (f"output={both.output}", *SETTINGS) for part in ("--set", setting)]
    refused = finetune("--recipe", recipe, *settings, "--resume-step", "2")
    assert refused.returncode == 2
    assert "each expert has steps of its own" in refused.stderr


def test_each_expert_keeps_a_recipe_that_starts_it_again(both: Run, finetune: Finetune) -> None:
    again = finetune("--recipe", both.output / "low" / "recipe.toml")
    assert again.returncode == 0, again.stderr
    assert f"this run is finished: 4 steps, and all results are in {both.output / 'low'}" in again.stdout + again.stderr


def test_exports_of_both(both: Run, recipe: Path, finetune: Finetune, tmp_path: Path) -> None:
    settings = [part for setting in (f"output={both.output}", *SETTINGS) for part in ("--set", setting)]
    done = finetune("export", "--recipe", recipe, *settings, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for expert in STEPS:
        name = f"pytorch_lora_weights_{expert}_noise.safetensors"
        assert load_file(tmp_path / "out" / expert / "lora" / name).keys() == lora(both.output, expert).keys()


@pytest.mark.full
def test_a_finished_expert_is_not_passed_over_with_other_captions(
    both: Run, recipe: Path, few_clips: Path, tmp_path: Path
) -> None:
    clips = tmp_path / "clips"
    shutil.copytree(few_clips, clips)
    min(clips.glob("*.txt")).write_text("another caption")
    settings = (*SETTINGS, f"data.path={clips}")
    shutil.copytree(both.output, tmp_path / "output")
    again = Run(recipe, tmp_path / "output", 0, settings)
    assert again.wait() == 2
    assert "it is finished" not in again.said
    assert "the clips or captions are not those" in again.said


@pytest.mark.full
def test_two_machines_may_train_one_each(recipe: Path, tmp_path: Path) -> None:
    """Their folders are in one output, with a lock each."""
    runs = [Run(recipe, tmp_path / "shared", 0, (*SETTINGS, f'model.experts=["{each}"]')) for each in STEPS]
    assert [run.wait() for run in runs] == [0, 0], "\n".join(run.said for run in runs)
    notes = {each: json.loads((tmp_path / "shared" / each / "results.json").read_text())["step"] for each in STEPS}
    assert notes == STEPS
