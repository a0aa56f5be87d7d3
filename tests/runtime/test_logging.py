"""What is printed is what was said."""

import pytest

from finetune.runtime.logging import say


@pytest.mark.parametrize("text", ["runs/a:fire:b", "[bold]no markup[/bold]", "a" * 300])
def test_a_line_is_printed_as_it_is(capsys: pytest.CaptureFixture[str], text: str) -> None:
    say(text)
    assert capsys.readouterr().err == f"{text}\n"
