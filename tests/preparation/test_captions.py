"""Captions that are longer than the text encoders read are named, with what is lost, and trained on."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finetune.checks.everything import check_all
from finetune.checks.model import open_family
from finetune.models.family import Family
from finetune.preparation.captions import CaptionCounter, cut_captions
from finetune.preparation.encode import prepare
from finetune.recipe import Recipe, load_recipe
from finetune.runtime.distributed import Runtime

LONG = "a red ball moves to the left over a dark floor " * 20  # 200 words, each a token
PROMPT = "a blue triangle falls down " * 30


@pytest.fixture
def recipe(recipe_file: Path, few_clips: Path, tmp_path: Path) -> Recipe:
    """Of five clips, four have captions that are too long."""
    folder = Path(shutil.copytree(few_clips, tmp_path / "clips"))
    for number, caption in enumerate(sorted(folder.glob("*.txt"))[1:]):
        caption.write_text(f"{LONG}number {number}")
    settings = [f"data.path={folder}", f"data.cache={tmp_path / 'cache'}", f'validation.prompts=[{{text="{PROMPT}"}}]']
    return load_recipe(recipe_file, settings)


def assert_told(said: str, recipe: Recipe) -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(recipe.model.path) / "tokenizer")
    tokens = len(tokenizer(f"{LONG}number 0").input_ids)
    path = sorted(recipe.data.path.glob("*.txt"))[1].with_suffix("")
    assert "5 captions have more text than the text encoder reads (128 tokens):" in said
    assert f"{path}." in said
    assert f"{tokens} tokens, its last {tokens - 128} are lost: '" in said
    assert "and 2 more" in said


def test_check_and_prepare_say_what_is_lost_and_go_on(
    recipe: Recipe, runtime: Runtime, capsys: pytest.CaptureFixture
) -> None:
    assert check_all(recipe, runtime, gpus=1) == []
    assert_told(capsys.readouterr().err, recipe)
    prepared = prepare(recipe, open_family(recipe), runtime)
    assert len(prepared.train) == 5
    assert_told(capsys.readouterr().err, recipe)


def test_check_says_which_prompts_and_lines_of_their_file_are_left_as_they_are(
    recipe: Recipe, runtime: Runtime, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# two prompts\na zorb falls\na ball # 1 falls\n")
    data, validation = recipe.data, recipe.validation
    recipe = recipe.model_copy(
        update={
            "data": data.model_copy(update={"id_token": "zorb"}),
            "validation": validation.model_copy(update={"prompts": [], "prompts_file": file}),
        }
    )
    assert check_all(recipe, runtime, gpus=1) == []
    said = capsys.readouterr().err
    assert "the trigger word 'zorb' is put before captions, not before prompts: 1 without it (" in said
    assert f"{file}: 1 line beginning with # left out, as comments" in said


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the components that are loaded from now on."""
    names: list[str] = []
    load = Family.transformers_component

    def noted(family: Family, name: str, *args: object, **options: object) -> object:
        names.append(name)
        return load(family, name, *args, **options)

    monkeypatch.setattr(Family, "transformers_component", noted)
    return names


def test_a_start_with_a_full_cache_does_not_say_it_again(
    recipe: Recipe, runtime: Runtime, capsys: pytest.CaptureFixture, loaded: list[str]
) -> None:
    family = open_family(recipe)
    prepare(recipe, family, runtime)
    capsys.readouterr()
    loaded.clear()
    prepare(recipe, family, runtime)
    assert "more text than" not in capsys.readouterr().err
    assert loaded == []


def test_check_and_its_report_count_captions_once(
    recipe: Recipe, runtime: Runtime, tmp_path: Path, loaded: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert check_all(recipe, runtime, gpus=1, report=tmp_path / "report") == []
    assert "5 captions have more text" in capsys.readouterr().err
    assert loaded == ["tokenizer"]


def test_encoders_of_one_family_have_limits_of_their_own(recipe: Recipe, tiny_model: Callable[..., Path]) -> None:
    model = recipe.model.model_copy(update={"path": str(tiny_model("hunyuan")), "family": "hunyuan"})
    family = open_family(recipe.model_copy(update={"model": model}))
    words = "ball " * 100  # 100 of Llama's tokens, 400 of this CLIP's
    found = cut_captions([("a.mp4", words), ("b.mp4", "a ball")], CaptionCounter(family))
    assert [(each.where, each.limit.tokenizer, each.limit.tokens) for each in found] == [("a.mp4", "tokenizer_2", 77)]
