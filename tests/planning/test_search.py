"""Which settings are tried, and in what order."""

from processes import ROOT

from finetune.planning.search import Candidate, _attempts, _ranked, _settings
from finetune.recipe import load_recipe

GIB = 2**30


def candidate(seconds: float, memory: float = 1.0, **memory_keys: object) -> Candidate:
    changes = {"memory.resident_blocks": 0} | {f"memory.{key}": value for key, value in memory_keys.items()}
    return Candidate(changes, memory * GIB, 0, seconds)


def test_of_settings_that_are_as_fast_the_simpler_come_first() -> None:
    slow, simple, fastest, middle = (candidate(seconds) for seconds in (2.0, 1.02, 1.0, 1.5))
    assert list(_ranked([slow, simple, fastest, middle])) == [simple, fastest, middle, slow]


def test_settings_with_room_are_tried_as_they_are() -> None:
    assert [each.get("memory.expandable_segments", False) for each in _attempts(candidate(1), 2 * GIB)] == [False, True]


def test_tight_settings_are_tried_with_expandable_segments_alone() -> None:
    assert [each["memory.expandable_segments"] for each in _attempts(candidate(1, memory=0.95), GIB)] == [True]


def test_where_resident_blocks_fill_the_gpu_fewer_are_tried_at_last() -> None:
    *_, last = _attempts(candidate(1, memory=0.97, resident_blocks=20), GIB)
    assert last["memory.resident_blocks"] < 20


def test_settings_that_break_a_rule_of_the_savers_are_left_out() -> None:
    """Offloaded weights are updated in host memory, and not in the backward pass."""
    recipe = load_recipe(ROOT / "recipes" / "ltx_full.toml", ["train.micro_batch_size=8", "train.global_batch_size=8"])
    in_backward = {"optimizer.in_backward": True, "train.max_grad_norm": "none"}
    offloads = [[each["memory.offload"] for each in _settings(recipe, 1, extra)] for extra in ({}, in_backward)]
    assert set(offloads[0]) == {False, True}
    assert set(offloads[1]) == {False}
