"""A family is found by its name, or by where it is defined; what is wrong with the name or the class is said."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from outside_family import Clay

from finetune.models import FAMILIES, family_class
from finetune.models.ltx import LTXVideo
from finetune.runtime.errors import UserError


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Write a module into the working directory, which Python does not look through: `module("mine.py", text)`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(Path.cwd()))])
    before = set(sys.modules)

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refusal(name: str) -> str:
    with pytest.raises(UserError) as caught:
        family_class(name)
    assert all(problem.where == "model.family" for problem in caught.value.problems)
    return str(caught.value)


WHOLE = "from outside_family import Clay\nclass Mine(Clay):\n    name = 'mine'\n"


@pytest.mark.parametrize("file, name", [("mine.py", "mine"), ("package/mine.py", "package.mine")])
def test_a_class_in_the_working_directory_is_found(module, file: str, name: str) -> None:
    module(file, WHOLE)
    cls = family_class(f"{name}:Mine")
    assert cls.name == "mine"
    assert issubclass(cls, Clay)


def test_a_name_of_the_project_is_found_as_ever() -> None:
    assert family_class("ltx") is LTXVideo
    assert [family_class(name).name for name in FAMILIES] == list(FAMILIES)


@pytest.mark.parametrize(
    "name, words",
    [
        ("lxt", "did you mean 'ltx'?"),
        ("svd", 'one of your own is "package.module:Class"'),
        ("mine.Mine", "did you mean 'mine:Mine'?"),
        ("concurrent.futures", "did you mean 'concurrent.futures:Class'?"),
        ("mine.py:Mine", "write 'mine:Mine'"),
        ("package/mine.py:Mine", "write 'package.mine:Mine'"),
        ("mine:", 'write "package.module:Class"'),
        (":Mine", 'write "package.module:Class"'),
        ("mine.py:Mine.Other", 'write "package.module:Class"'),
    ],
)
def test_a_name_that_cannot_be_a_familys_says_how_it_is_written(name: str, words: str) -> None:
    assert words in refusal(name)


def test_a_module_that_is_not_there_says_where_it_was_looked_for(module, tmp_path: Path) -> None:
    text = refusal("clay_models:Clay")
    assert "no module named 'clay_models'" in text
    assert f"looked in the working directory {tmp_path}, in PYTHONPATH and among the installed packages" in text
    assert "start the command in the folder that clay_models.py or clay_models/ is in" in text


def test_a_module_that_is_nearly_there_is_named(module) -> None:
    module("clay_model.py", WHOLE)
    assert "did you mean 'clay_model'?" in refusal("clay_modle:Clay")


def test_a_module_that_its_package_lacks_says_where_the_package_is(module, tmp_path: Path) -> None:
    module("workshop/__init__.py", "")
    module("workshop/models.py", WHOLE)
    text = refusal("workshop.model:Mine")
    assert f"no module named 'workshop.model' (looked in {tmp_path / 'workshop'})" in text
    assert "did you mean 'models'?" in text
    assert "write clay.py there" in refusal("workshop.clay:Mine")


@pytest.mark.parametrize("text, error", [("import not_installed_anywhere", ImportError), ("1 / 0", ZeroDivisionError)])
def test_an_error_inside_the_module_is_its_authors(module, text: str, error: type[Exception]) -> None:
    """With its traceback: it is not the name that is wrong."""
    module("mine.py", text)
    with pytest.raises(error):
        family_class("mine:Mine")


@pytest.mark.parametrize(
    "text, words",
    [
        ("class Mine(:\n", "mine.py, line 1: invalid syntax: class Mine(:"),
        ("import sys\nsys.exit(3)\n", "mine ends the process when it is imported (3)"),
    ],
)
def test_a_file_that_is_no_module_is_told_in_a_line(module, text: str, words: str) -> None:
    module("mine.py", text)
    with pytest.raises(UserError) as error:
        family_class("mine:Mine")
    assert words in str(error.value)


def test_a_class_that_is_not_there_names_the_nearest(module, tmp_path: Path) -> None:
    module("mine.py", WHOLE)
    text = refusal("mine:Mien")
    assert f"{tmp_path / 'mine.py'} has no 'Mien'" in text
    assert "did you mean 'Mine'?" in text
    assert "families there are: Clay, Mine" in refusal("mine:Else")


@pytest.mark.parametrize("text", ["class Mine: pass", "Mine = 3"])
def test_what_is_no_family_is_refused(module, text: str) -> None:
    module("mine.py", text)
    assert "make it a subclass of it: class Mine(Family)" in refusal("mine:Mine")


def test_what_a_family_lacks_is_listed(module) -> None:
    module(
        "mine.py",
        "from finetune.models.family import Family\n"
        "class Mine(Family):\n"
        "    title = 'Mine'\n"
        "    pipeline_classes = ('LTXPipeline',)\n"
        "    def normalise(self, z): return z\n",
    )
    text = refusal("mine:Mine")
    assert "mine:Mine does not define example_text(), inputs(), tiny(), name, transformer_class" in text
    assert "finetune/models/family.py" in text


@pytest.mark.parametrize(
    "line, words",
    [
        ("trained_components = ('transformer', 'transformer_2')", "trains transformer, transformer_2"),
        ("trained_components = ()", "trains no component"),
        ("trained_components = ('unet',)", "trains unet, and has no such component"),
    ],
)
def test_what_cannot_be_trained_is_refused(module, line: str, words: str) -> None:
    module("mine.py", f"{WHOLE}    {line}\n")
    assert words in refusal("mine:Mine")
