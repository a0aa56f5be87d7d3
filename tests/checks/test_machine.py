"""What a machine lacks is said before anything is done: a GPU, a compiler, float8."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from full_size import CONFIGS
from processes import ROOT

from finetune.checks.settings import check_device, refuse_large_model
from finetune.models import family_class
from finetune.models.folder import ModelFolder
from finetune.recipe import load_recipe
from finetune.runtime.device import Device, why_no_accelerator
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.training.run import train

CUDA = torch.device("cuda", 0)


@dataclass(frozen=True)
class Card(Device):
    """A GPU that is not there."""

    torch_device: torch.device = CUDA
    float8: bool = False
    name: str = "an old card"

    @property
    def has_float8(self) -> bool:
        return self.float8


def refused(recipe_file: Path, *overrides: str, float8: bool = False) -> list[str]:
    return [str(problem) for problem in check_device(load_recipe(recipe_file, overrides), Card(float8=float8))]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)


@pytest.mark.parametrize(
    "setting, key",
    [
        ("memory.compile=true", "memory.compile"),
        ("optimizer.name=adamw_8bit", "optimizer.name"),
        ("train.weights=bf16", "train.weights"),
    ],
)
def test_a_compiler_is_looked_for_where_kernels_are_compiled(
    recipe_file: Path, no_compiler: None, setting: str, key: str
) -> None:
    (problem,) = refused(recipe_file, setting)
    assert problem.startswith(f"{key}: kernels are compiled for this, and there is no C compiler")
    assert "install gcc, or set it to " in problem


def test_a_compiler_is_not_asked_for_where_nothing_is_compiled(recipe_file: Path, no_compiler: None) -> None:
    assert refused(recipe_file) == []


def test_a_compiler_that_is_named_is_looked_for(
    recipe_file: Path, no_compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "mycc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert refused(recipe_file, "memory.compile=true") == []


FLOAT8 = ["memory.low_bit=float8", "memory.compile=true"]


@pytest.mark.parametrize(
    "torch_version, settings, float8, refusals",
    [
        ("2.11.0", ["optimizer.name=adamw_fp8"], False, ["optimizer.name"]),
        ("2.12.1+cu130", FLOAT8, False, ["memory.low_bit"]),
        ("2.13.0", ["optimizer.name=adamw_fp8"], False, []),
        ("2.11.0", ["optimizer.name=adamw_fp8"], True, []),
        ("2.11.0", FLOAT8[:1], False, []),  # without compiled kernels torch converts float8 itself
    ],
)
def test_float8_kernels_on_old_cards_want_a_newer_torch(
    recipe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    torch_version: str,
    settings: list[str],
    float8: bool,
    refusals: list[str],
) -> None:
    monkeypatch.setattr(torch, "__version__", torch_version)
    found = refused(recipe_file, *settings, float8=float8)
    assert [problem.partition(":")[0] for problem in found] == refusals
    assert all(f"need torch 2.13, and this is {torch_version}" in problem for problem in found)


# No GPU


def test_a_large_model_is_refused_on_a_cpu_with_torchs_own_reason() -> None:
    family = family_class("cogvideox")(ModelFolder(CONFIGS / "cogvideox-2b"))
    with pytest.raises(UserError, match=r"no GPU: .*; CogVideoX has 1,69\d million parameters") as error:
        refuse_large_model(family)
    assert why_no_accelerator() in str(error.value)
    assert "--cpu" in str(error.value)


def test_a_tiny_model_is_trained_on_a_cpu_with_a_line_that_says_why(
    recipe_file: Path, runtime: Runtime, capsys
) -> None:
    train(load_recipe(recipe_file, ["train.steps=1"]), runtime)
    assert f"training on the CPU: {why_no_accelerator()}" in capsys.readouterr().err


@pytest.fixture
def large(recipe_file: Path, tiny_ltx: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small recipe, with every model too large."""
    monkeypatch.setattr("finetune.checks.settings._LARGEST_ON_CPU", 1000)
    return recipe_file


def test_cpu_trains_any_size(large: Path, runtime: Runtime) -> None:
    recipe = load_recipe(large, ["train.steps=1"])
    with pytest.raises(UserError, match="no GPU"):
        train(recipe, runtime)
    assert not recipe.output.exists()
    assert train(recipe, runtime, any_size_on_cpu=True) == 0


@pytest.mark.parametrize(
    "done, reason",
    [
        ("", f"torch {torch.__version__} is a build without GPUs"),
        ("torch.version.cuda = '13.0'; torch.cuda.init = fail", "Found no NVIDIA driver on your system"),
    ],
)
def test_the_reason_is_torchs(done: str, reason: str) -> None:
    if not done and torch.version.cuda:
        pytest.skip("this build of torch has GPUs")
    script = (
        "import torch\ndef fail(): raise RuntimeError('Found no NVIDIA driver on your system.\\nPlease check')\n"
        f"{done}\nfrom finetune.runtime.device import why_no_accelerator\nprint(why_no_accelerator())"
    )
    said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.startswith(reason)
    assert len(said.splitlines()) == 1
