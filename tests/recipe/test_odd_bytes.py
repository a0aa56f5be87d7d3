"""Recipes and prompts of odd bytes: each is refused with what is wrong, and none is a traceback."""

from collections.abc import Callable
from pathlib import Path

import pytest
from minimal import MINIMAL

from finetune.recipe import load_recipe
from finetune.recipe.prompts import read_prompts
from finetune.runtime.errors import UserError


def test_a_byte_order_mark_is_no_part_of_a_recipe(written: Callable[[str], Path]) -> None:
    marked = load_recipe(written("\ufeff" + MINIMAL))
    assert marked == load_recipe(written(MINIMAL.replace("\n", "\r\n")))


@pytest.mark.parametrize(
    "content, what",
    [
        (b"output = 'caf\xe9'", "not UTF-8 text (byte 0xe9 in line 1)"),
        (b"# fine\n\n\xff", "not UTF-8 text (byte 0xff in line 3)"),
        ("output = 'x'".encode("utf-16"), "not UTF-8 text (it is UTF-16)"),
        (b"a = " + b"[" * 100_000, "not valid TOML: "),
        (b"a = " + b"9" * 5000, "not valid TOML: "),
        (b"a = '\0'", "not valid TOML: "),
    ],
)
def test_a_recipe_of_odd_bytes(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "recipe.toml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "recipe.toml")
    assert what in str(caught.value)


@pytest.mark.parametrize(
    "name, content",
    [
        ("p.json", b"[" * 100_000),
        ("p.jsonl", b"[" * 100_000),
        ("p.toml", b"a = " + b"[" * 100_000),
        ("p.txt", b"caf\xe9"),
        ("p.json", b'["\\ud800"]'),
        ("p.json", b'[{"text": "\\ud800"}]'),
        ("p.json", b'[{"text": ' + b"9" * 5000 + b"}]"),
    ],
)
def test_prompts_of_odd_bytes(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_prompts(tmp_path / name)
    assert str(caught.value).encode()  # can be printed
