"""What a machine lacks is said before anything is done: a GPU, a compiler, float8."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from full_size import CONFIGS
from processes import ROOT

from finetune.checks.settings import check_cpu, check_device, refuse_large_model
from finetune.engine.attention import choose_kernel
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
    capability: tuple[int, int] = (8, 0)

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


BF16 = "train.precision=bf16"


@pytest.mark.parametrize("kernel", ["cudnn", "efficient", "fa3", "fa4"])
def test_a_training_on_a_cpu_has_no_kernels_of_gpus(recipe_file: Path, runtime: Runtime, kernel: str) -> None:
    recipe = load_recipe(recipe_file, [f"memory.attention={kernel}"])
    with pytest.raises(UserError, match=f'"{kernel}" is a kernel of GPUs, and this is a CPU') as caught:
        train(recipe, runtime)
    assert str(caught.value).startswith("memory.attention: ")
    assert check_device(recipe, runtime.device) == []  # `check` is for GPUs elsewhere


@pytest.mark.parametrize("kernel", ["auto", "flash", "math"])
def test_a_cpu_has_its_flash_kernel_and_products(recipe_file: Path, kernel: str) -> None:
    assert check_cpu(load_recipe(recipe_file, [f"memory.attention={kernel}"])) == []


def refused_attention(recipe_file: Path, kernel: str, capability: tuple[int, int], *overrides: str) -> list[str]:
    recipe = load_recipe(recipe_file, [f"memory.attention={kernel}", *overrides])
    return [str(problem) for problem in check_device(recipe, Card(capability=capability))]


@pytest.mark.parametrize(
    "kernel, capability, needed",
    [
        ("flash", (7, 5), "8.0 and above"),
        ("cudnn", (7, 5), "8.0 and above"),
        ("fa3", (8, 0), "9.0"),
        ("fa3", (10, 0), "9.0"),
        ("fa4", (8, 9), "9.0 to 10.3"),
        ("fa4", (12, 0), "9.0 to 10.3"),
    ],
)
def test_kernels_of_attention_that_a_gpu_lacks_are_refused(
    recipe_file: Path, kernel: str, capability: tuple[int, int], needed: str
) -> None:
    problem = refused_attention(recipe_file, kernel, capability, BF16)[0]
    has = ".".join(map(str, capability))
    assert problem.startswith(
        f'memory.attention: "{kernel}" needs compute capability {needed}, and an old card has {has}'
    )


@pytest.mark.parametrize(
    "kernel, capability", [("flash", (8, 0)), ("cudnn", (12, 0)), ("efficient", (7, 5)), ("math", (7, 5))]
)
def test_kernels_of_attention_that_a_gpu_has_are_taken(
    recipe_file: Path, kernel: str, capability: tuple[int, int]
) -> None:
    assert refused_attention(recipe_file, kernel, capability, BF16) == []


@pytest.mark.parametrize(
    "kernel, is_refused", [("flash", True), ("cudnn", True), ("efficient", False), ("math", False)]
)
def test_kernels_of_half_precision_are_refused_in_float32(recipe_file: Path, kernel: str, is_refused: bool) -> None:
    found = refused_attention(recipe_file, kernel, (9, 0))
    assert ['"' + kernel + '" does not compute in float32' in each for each in found] == [True] * is_refused


@pytest.mark.parametrize("kernel, module", [("fa3", "flash_attn_interface"), ("fa4", "flash_attn.cute.interface")])
def test_packages_of_attention_are_looked_for(
    recipe_file: Path, kernel: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (problem,) = refused_attention(recipe_file, kernel, (9, 0), BF16)
    assert problem.startswith(f"memory.attention: there is no Python module {module}")
    assert f"install FlashAttention {kernel[-1]}" in problem
    *packages, name = module.split(".")
    folder = tmp_path.joinpath(*packages)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert refused_attention(recipe_file, kernel, (9, 0), BF16) == []
    for package in ("flash_attn", "flash_attn.cute"):  # which are imported to look for the module
        sys.modules.pop(package, None)


def test_torch_looks_for_the_same_packages_and_what_it_misses_is_said() -> None:
    for kernel, module in (("fa3", "flash_attn_interface"), ("fa4", "flash_attn")):
        with pytest.raises(
            UserError, match=f"torch cannot use FlashAttention {kernel[-1]}: No module named '{module}'"
        ):
            choose_kernel([], kernel, False, Card())
