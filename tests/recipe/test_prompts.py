"""Validation prompts: in the recipe, in a file, and in the form that finetrainers takes."""

import json
from pathlib import Path

import pytest

from finetune.recipe import Bucket, load_recipe
from finetune.recipe.prompts import read_prompts, validation_prompts
from finetune.recipe.validation import Prompt, Validation
from finetune.runtime.errors import UserError

TWO = [Prompt(text="A cat, asleep", shape="49x512x768"), Prompt(text="A dog")]


def test_prompts_are_written_as_tables_or_in_one_string(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    base = '[model]\nfamily = "ltx"\npath = "m"\n[data]\npath = "d"\nbuckets = ["9x64x64"]\n'
    tables = (
        '[[validation.prompts]]\ntext = "A cat, asleep"\nshape = "49x512x768"\n[[validation.prompts]]\ntext = "A dog"\n'
    )
    string = '[validation]\nprompts = "A cat, asleep@@@49x512x768:::A dog"\n'
    for text in (tables, string):
        recipe.write_text(base + text)
        assert load_recipe(recipe).validation.prompts == TWO
    recipe.write_text(base)
    assert load_recipe(recipe, ["validation.prompts=A cat, asleep@@@49x512x768:::A dog"]).validation.prompts == TWO


@pytest.mark.parametrize(
    "name, text",
    [
        ("lines.txt", "A cat, asleep@@@49x512x768\n\nA dog\n"),
        ("one_line.txt", "A cat, asleep@@@49x512x768:::A dog"),
        ("broken.txt", "A cat, asleep @@@ 49x512x768 :::\n  A dog"),
        ("bom.txt", "\ufeffA cat, asleep@@@49x512x768\r\nA dog\r\n"),
        ("a.toml", '[[prompts]]\ntext = "A cat, asleep"\nshape = "49x512x768"\n[[prompts]]\ntext = "A dog"\n'),
        ("a.json", json.dumps([{"text": "A cat, asleep", "shape": "49x512x768"}, {"text": "A dog"}])),
        (
            "as_in_a_recipe.toml",
            '[[validation.prompts]]\ntext = "A cat, asleep"\nshape = "49x512x768"\n'
            '[[validation.prompts]]\ntext = "A dog"\n',
        ),
        ("remarks.txt", "# two animals\nA cat, asleep@@@49x512x768\nA dog"),
        ("a.jsonl", '{"text": "A cat, asleep", "shape": "49x512x768"}\n{"text": "A dog"}\n'),
    ],
)
def test_prompts_are_read_from_a_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(tmp_path / name) == TWO


def test_a_file_of_finetrainers_is_read_with_its_own_names(tmp_path: Path) -> None:
    entry = {
        "caption": "A cat",
        "image_path": "cat.png",
        "video_path": None,
        "num_inference_steps": 40,
        "guidance_scale": 4.5,
        "negative_prompt": "blurry",
        "frame_rate": 24,
        "num_frames": 49,
        "height": 480,
        "width": 704,
    }
    (tmp_path / "validation.json").write_text(json.dumps({"data": [entry]}))
    expected = Prompt(
        text="A cat",
        image="cat.png",
        steps=40,
        guidance=4.5,
        negative="blurry",
        fps=24.0,
        shape="49x480x704",
    )
    assert read_prompts(tmp_path / "validation.json") == [expected]


def test_prompts_of_recipe_and_file_are_generated_both(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("A dog\n")
    settings = Validation(prompts=[TWO[0]], prompts_file=tmp_path / "more.txt")
    default = Bucket(9, 64, 64)
    cat, dog = validation_prompts(settings, default)
    assert (cat.text, cat.shape, dog.text, dog.shape) == (TWO[0].text, TWO[0].shape, TWO[1].text, default)


def test_only_the_shape_of_a_resolved_prompt_can_differ(tmp_path: Path) -> None:
    prompt = Prompt(text="A cat", negative="blurry", count=2, seed=3, steps=4, guidance=5.0, image="cat.png", fps=24.0)
    (resolved,) = validation_prompts(Validation(prompts=[prompt]), Bucket(9, 64, 64))
    assert resolved.model_dump() == {**prompt.model_dump(), "shape": "9x64x64"}
    assert resolved.model_fields_set == prompt.model_fields_set | {"shape"}


@pytest.mark.parametrize(
    "name, text, complaint",
    [
        ("a.txt", "", "there is no prompt in it"),
        ("a.txt", "A cat@@@49x512", "prompt 1"),
        (
            "a.json",
            '[{"text": "A cat"}, {"text": "A dog", "seeed": 1}]',
            "prompt 2: unknown key 'seeed'.*did you mean 'seed'",
        ),
        ("a.json", '[{"shape": "9x64x64"}]', "text: Field required"),
        ("a.json", '["A cat"]', "prompt 1"),
        ("a.json", '"A cat"', "cannot be read"),
        ("a.json", '{"promts": []}', 'name it "prompts"'),
        ("a.json", "[{]", "cannot be read"),
        ("a.json", '[{"text": "A cat", "num_frames": 9, "height": 64}]', "9x64x\\?' is not a bucket"),
        ("a.jsonl", '{"text": "A cat"}\n{"text": }\n', "line 2: "),
        ("a.toml", "prompts = [", "cannot be read"),
        ("a.docx", "A cat", "use one of .txt"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"(?s){complaint}"):
        read_prompts(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        read_prompts(tmp_path / "nowhere.txt")
