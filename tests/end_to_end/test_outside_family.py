"""A family that is defined in a file of the user's, in the working directory, does all that one of the project's does."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import LTXPipeline
from processes import ROOT
from safetensors.torch import load_file

FAMILY = "outside_family:Clay"
RECIPE = f"""
[model]
family = "{FAMILY}"
path = "model"
[data]
path = "clips"
buckets = ["17x64x96"]
cache = "cache"
workers = 1
[train]
steps = 4
global_batch_size = 2
precision = "float32"
[optimizer]
lr = 1e-2
[checkpoint]
every = 2
[validation]
heldout_clips = 1
[[validation.prompts]]
text = "a red ball"
steps = 2
"""
Command = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the family's file and a recipe of it, far from the project."""
    folder = tmp_path_factory.mktemp("workshop")
    shutil.copy(ROOT / "tests" / "models" / "outside_family.py", folder)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def run(workshop: Path, finetune: Command) -> Command:
    """Run the command line in the workshop; `demo` has made its model and clips."""

    def command(*arguments: object, env: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess:
        environment = {"PYTHONPATH": str(ROOT), **(env or {})}
        done = finetune(*arguments, cwd=workshop, env=environment, timeout=200, **options)
        assert done.returncode == 0, done.stderr
        return done

    command("demo", "--out", ".", "--family", FAMILY)
    return command


@pytest.fixture(scope="module")
def trained(workshop: Path, run: Command) -> Path:
    """A run of four steps by one process."""
    run("--recipe", "recipe.toml", "--set", "output=straight", processes=1)
    return workshop / "straight"


def losses(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_it_is_planned_where_python_does_not_look_in_the_working_directory(run: Command) -> None:
    """As under a console script."""
    plan = json.loads(run("plan", "--recipe", "recipe.toml", "--json", env={"PYTHONSAFEPATH": "1"}).stdout)
    shape = "17x64x96"
    names = ["encode text", f"encode video {shape}", "load", f"step {shape}", f"validation {shape}", "export"]
    assert [phase["name"] for phase in plan["phases"]] == names


def test_it_trains_and_samples(trained: Path) -> None:
    assert sorted(losses(trained)) == [1, 2, 3, 4]
    for step in (0, 4):
        assert (trained / "samples" / f"step_{step:08d}" / "00_seed0.mp4").is_file()


def test_its_adapter_is_what_diffusers_loads(workshop: Path, trained: Path) -> None:
    weights = load_file(trained / "lora" / "pytorch_lora_weights.safetensors")
    layers = {name.partition(".lora_")[0] for name in weights}
    assert layers == {f"transformer.transformer_blocks.{n}.attn1.to_{which}" for n in (0, 1) for which in "qv"}
    pipeline = LTXPipeline.from_pretrained(workshop / "model")
    pipeline.load_lora_weights(trained / "lora")
    loaded = pipeline.transformer.transformer_blocks[1].attn1.to_v.lora_B["default_0"].weight
    assert torch.equal(loaded, weights["transformer.transformer_blocks.1.attn1.to_v.lora_B.weight"])
    assert loaded.abs().max() > 0


@pytest.mark.full
def test_two_processes_go_on_as_the_one_does_that_was_not_stopped(workshop: Path, run: Command, trained: Path) -> None:
    """From the checkpoint of step 2."""
    shutil.copytree(trained, workshop / "resumed", ignore=shutil.ignore_patterns("step_00000004", "metrics.jsonl"))
    done = run("--recipe", "recipe.toml", "--set", "output=resumed", processes=2)
    assert "resuming after step 2" in done.stderr
    expected = losses(trained)
    assert losses(workshop / "resumed") == pytest.approx({step: expected[step] for step in (3, 4)}, rel=1e-5)
    ours, theirs = (
        load_file(folder / "lora" / "pytorch_lora_weights.safetensors") for folder in (workshop / "resumed", trained)
    )
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-5 * float(weight.abs().max()))


SPAWNING = """
import multiprocessing, sys
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    from finetune.cli import main
    from finetune.runtime.exit import leave
    leave(main(sys.argv[1:]))
"""


@pytest.mark.full
def test_loader_workers_that_are_spawned_find_it(workshop: Path, trained: Path) -> None:
    """A worker that is forked has it already; one that is spawned imports it by its name."""
    (workshop / "spawning.py").write_text(SPAWNING)
    settings = ["output=spawned", "train.steps=2", "validation.prompts=[]"]
    arguments = ["--recipe", "recipe.toml", *(part for each in settings for part in ("--set", each))]
    done = subprocess.run(
        [sys.executable, "spawning.py", *arguments],
        cwd=workshop,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = losses(trained)
    assert losses(workshop / "spawned") == {step: expected[step] for step in (1, 2)}


def test_a_checkpoint_is_exported_and_sampled_from(workshop: Path, run: Command, trained: Path) -> None:
    run("export", "--recipe", "recipe.toml", "--set", "output=straight", "--out", "exported")
    ours, theirs = (
        load_file(folder / "pytorch_lora_weights.safetensors") for folder in (workshop / "exported", trained / "lora")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    done = run("sample", "--recipe", "recipe.toml", "--adapter", "exported", "--compare")
    assert "training changes a pixel by" in done.stderr
