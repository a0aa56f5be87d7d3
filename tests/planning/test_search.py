"""Which settings are tried, in what order, and how well shallow models tell what the whole one takes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, run_python
from search_worker import block_bytes

from finetune.checks.model import open_family
from finetune.planning.search import Candidate, _attempts, _block_bytes, _ranked, _settings, inexact_settings
from finetune.recipe import load_recipe, write_recipe
from finetune.recipe.optimizers import Optimizer

GIB = 2**30


@pytest.fixture(scope="module")
def recipe_of_depth(
    family_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A LoRA of LTX-Video with this many blocks, which have no weights on disk, wide enough to be what memory goes to."""
    folder, known = tmp_path_factory.mktemp("search"), family_recipe("ltx")

    def make(blocks: int, *overrides: str) -> Path:
        model, path = folder / f"{blocks}_blocks", folder / f"{blocks}_blocks.toml"
        shutil.copytree(load_recipe(known).model.path, model, dirs_exist_ok=True)
        config = json.loads((model / "transformer" / "config.json").read_text())
        width = {"num_attention_heads": 16, "attention_head_dim": 64, "cross_attention_dim": 1024}
        (model / "transformer" / "config.json").write_text(json.dumps(config | width | {"num_layers": blocks}))
        one = ["train.global_batch_size=1", "train.micro_batch_size=1", 'lora.targets=["to_q"]']
        write_recipe(load_recipe(known, [f"model.path={model}", *one, *overrides]), path)
        return path

    return make


@pytest.fixture(scope="module")
def figures(recipe_of_depth: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Figures of tests/planning/search_worker.py, in a process of its own: a simulated device stays known to torch."""
    out = tmp_path_factory.mktemp("figures") / "search.json"
    large = 'validation.prompts=[{text = "a ball", shape = "65x256x384"}]'
    recipes = recipe_of_depth(8), recipe_of_depth(4, large, "validation.tiling=false")
    done = run_python([ROOT / "tests" / "planning" / "search_worker.py", out, *recipes], seconds=290)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


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


# What shallow models tell of the whole one


@pytest.mark.parametrize("figure, tolerance", [("memory", 0.01), ("host", 0.01), ("seconds", 1e-6)])
def test_two_shallow_models_tell_what_the_whole_one_takes(
    figures: dict[str, Any], figure: str, tolerance: float
) -> None:
    """Of 4 and 6 blocks for 8, all of them streamed but those that stay."""
    streamed = figures["streamed"]
    assert streamed["expected"][figure] == pytest.approx(streamed["taken"][figure], rel=tolerance)


def test_resident_blocks_fill_the_gpu(figures: dict[str, Any]) -> None:
    """By the whole model's simulation they fit, and two more would not."""
    streamed = figures["streamed"]
    assert 0 < streamed["resident"] < 7
    assert streamed["taken"]["memory"] <= streamed["capacity"]
    assert streamed["taken"]["memory"] + 2 * streamed["block"] > streamed["capacity"]


@pytest.mark.parametrize("precision", ["bf16", "float32"])
@pytest.mark.parametrize("low_bit", ["none", "int8", "float8", "nf4"])
def test_a_block_has_the_bytes_that_it_is_stored_in(
    recipe_of_depth: Callable[..., Path], low_bit: str, precision: str
) -> None:
    """Of low bits to 2 %: norms and biases stay as they are, and int8 and float8 have a scale for each row."""
    recipe = load_recipe(recipe_of_depth(2), [f"memory.low_bit={low_bit}", f"train.precision={precision}"])
    family = open_family(recipe, with_weights=False)
    expected, stored = _block_bytes(recipe, family), block_bytes(recipe, family)
    assert expected == pytest.approx(stored, rel=0 if low_bit == "none" else 0.02)


# Samples that do not fit


def test_samples_for_which_no_block_can_make_room_are_left_out(figures: dict[str, Any]) -> None:
    """Their memory lies above what the steps take, and the limit in between."""
    samples = figures["samples"]
    found = samples["none resident"]
    assert found["fits"] is True
    assert found["prompts"] == 0
    assert found["changes"]["validation.prompts"] == []
    assert "validation" not in found["reserved"]
    assert max(found["reserved"].values()) <= found["capacity"]
    (note,) = found["notes"]
    assert note.endswith(" GiB, and are left out; a smaller shape may fit")
    assert float(note.split()[3]) * GIB > found["capacity"]


def test_resident_blocks_make_room_for_samples(figures: dict[str, Any]) -> None:
    found = figures["samples"]["resident"]
    assert found["fits"] is True
    assert found["prompts"] == 1
    assert found["reserved"]["validation"] <= found["capacity"]
    assert found["changes"].get("memory.resident_blocks", 0) < 2
    assert found["notes"] == []


@pytest.mark.parametrize(
    "method, left", [("lora", [{"memory.low_bit": "int8"}]), ("full", [{"train.weights": "bf16"}])]
)
def test_an_optimizer_of_another_algorithm_is_not_replaced_by_adamw(
    recipe_file: Path, method: str, left: list[dict[str, str]]
) -> None:
    recipe = load_recipe(recipe_file, [f"train.method={method}"])
    other = recipe.model_copy(update={"optimizer": Optimizer(name="lion")})
    assert {"optimizer.name": "adamw_8bit"}.items() <= inexact_settings(recipe)[-1].items()
    assert inexact_settings(other) == left
