"""What is asked of CUDA's allocator, without one."""

import pytest

from finetune.runtime.device import has_expandable_segments, use_expandable_segments

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # to be put back, whatever happens
        monkeypatch.delenv(name)
    return monkeypatch


def test_segments_grow_if_the_recipe_says_so(environment: pytest.MonkeyPatch) -> None:
    assert not has_expandable_segments()
    use_expandable_segments()
    assert has_expandable_segments()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "said, grow", [("expandable_segments:True", True), ("garbage_collection_threshold:0.8", False)]
)
def test_what_the_environment_says_stays(environment: pytest.MonkeyPatch, name: str, said: str, grow: bool) -> None:
    environment.setenv(name, said)
    use_expandable_segments()
    assert has_expandable_segments() == grow
