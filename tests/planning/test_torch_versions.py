"""The simulated device on a torch that it does not know: a line says so, and figures are not made up."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from every_family import few
from packaging.specifiers import SpecifierSet
from processes import ROOT, run_python

from finetune.planning.device import NEWEST, OLDEST

# Not torch's own number: other packages choose by it what they import of torch.
VERSION = "from finetune.planning import device; device.VERSION = '{}'"
UNKNOWN = {  # what is done to torch before the command is run -> how the error goes on
    VERSION.format("2.10.0"): "does not know torch 2.10.0",
    VERSION.format("2.16.0.dev20261201+cu130"): "does not know torch 2.16.0.dev20261201+cu130",
    "from finetune.planning.device import _Stream; del _Stream.wait_stream": (
        f"fails on torch {torch.__version__} (AttributeError: '_Stream' object has no attribute 'wait_stream')"
    ),
    "import torch.utils.backend_registration as known; del known._setup_privateuseone_for_python_backend": (
        f"fails on torch {torch.__version__} (ImportError: cannot import name "
        "'_setup_privateuseone_for_python_backend' from 'torch.utils.backend_registration'"
    ),
}


@pytest.mark.parametrize("done, error", few(UNKNOWN.items(), 1), ids=["older", "newer", "asks for more", "has less"])
def test_a_plan_on_a_torch_that_is_not_known_is_an_error_of_one_line(
    family_recipe: Callable[..., Path], done: str, error: str
) -> None:
    script = f"{done}\nimport runpy\nrunpy.run_module('finetune', run_name='__main__')"
    ended = run_python(["-c", script, "plan", "--recipe", family_recipe("ltx"), "--gpus", "1"])
    assert (ended.returncode, ended.stdout) == (2, "")
    line, cure = ended.stderr.splitlines()
    assert line.startswith(f"error: the simulated device {error}")
    assert cure == "    -> it is tested with torch 2.11 to 2.15"


def test_the_packages_torch_is_the_one_it_is_tested_with() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (torchs,) = [SpecifierSet(name[5:]) for name in dependencies if name.startswith("torch>")]
    (major, oldest), (_, newest) = OLDEST, NEWEST
    minors = [minor for minor in range(100) if f"{major}.{minor}.0" in torchs]
    assert minors == list(range(oldest, newest + 1))
