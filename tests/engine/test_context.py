"""Ranks that share their samples: two processes of one context are given what one process is given.

Nothing divides the tokens of a sample yet, so each rank computes the whole of it, and all figures are one process's.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from processes import figures_of
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from finetune.engine.gradients import replicas
from finetune.recipe import load_recipe, write_recipe
from finetune.runtime.device import Device
from finetune.runtime.distributed import Runtime, data_mesh, mesh

PROMPTS = ["a red ball moves", "a blue square falls"]


pytestmark = pytest.mark.full  # no training makes contexts of several ranks yet


@pytest.fixture(scope="module")
def figures(parity_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """By number of processes, the figures of each of them."""
    folder = tmp_path_factory.mktemp("context")
    prompts = ", ".join(f'{{text = "{text}", steps = 2, guidance = 3.0}}' for text in PROMPTS)
    overrides = ["train.micro_batch_size=2", "lora.dropout=0.2", "lora.rank=4", f"validation.prompts=[{prompts}]"]
    write_recipe(load_recipe(parity_recipe, overrides), folder / "recipe.toml")
    return {
        processes: figures_of("context_worker.py", processes, folder, [folder / "recipe.toml"]) for processes in (1, 2)
    }


def test_both_ranks_are_given_the_samples_of_the_whole_batch(figures: dict[int, list[dict]]) -> None:
    (alone,) = figures[1]
    assert [rank["batches"] for rank in figures[2]] == [alone["batches"]] * 2


@pytest.mark.parametrize("figure", ["loss", "grad_norm"])
def test_steps_are_those_of_one_process(figures: dict[int, list[dict]], figure: str) -> None:
    """Means and norms count what two ranks hold once; dropout is drawn by the share of the data, not by the rank."""
    (alone,) = figures[1]
    for rank in figures[2]:
        assert rank[figure] == pytest.approx(alone[figure], rel=1e-6)


@pytest.mark.parametrize(
    "shard_size, context_size, copies", [(None, 1, 1), (4, 1, 2), (1, 1, 8), (None, 2, 2), (2, 2, 4), (None, 8, 8)]
)
def test_a_norm_counts_each_part_once_however_many_of_eight_ranks_hold_it(
    shard_size: int | None, context_size: int, copies: int
) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        runtime = Runtime(0, 0, 8, Device(torch.device("cpu")), None, 8, context_size)
        placements = [Shard(0)] if shard_size is None else [Replicate(), Shard(0)]
        weight = DTensor.from_local(torch.ones(3), data_mesh(mesh(runtime, shard_size)), placements)
        assert replicas(weight) == copies
    finally:
        dist.destroy_process_group()


def test_heldout_evaluations_are_divided_by_data_rank(figures: dict[int, list[dict]]) -> None:
    """Three clips at three noise levels: each rank of the context takes part in all nine."""
    (alone,) = figures[1]
    assert alone["heldout calls"] == 9
    for rank in figures[2]:
        assert rank["heldout calls"] == 9
        assert rank["heldout"] == pytest.approx(alone["heldout"], rel=1e-6)


def test_samples_are_divided_by_data_rank(figures: dict[int, list[dict]]) -> None:
    (alone,) = figures[1]
    assert alone["videos"] == ["00_seed0.mp4", "01_seed0.mp4"]
    for rank in figures[2]:
        assert rank["sampling calls"] == alone["sampling calls"]
        assert rank["videos"] == alone["videos"]
    sheets = [np.asarray(Image.open(figures[processes][0]["sheet"])).astype(int) for processes in (1, 2)]
    # Values that round apart by one: frames are scaled for a sheet by weights whose sizes sum to more than one.
    assert np.abs(sheets[0] - sheets[1]).max() <= 2
    assert np.abs(sheets[0] - sheets[1]).mean() < 0.01


def test_a_checkpoint_holds_the_weights_of_the_context_once(figures: dict[int, list[dict]]) -> None:
    folders = [Path(figures[n][0]["sheet"]).parents[2] / "checkpoints" / "step_00000003" for n in (1, 2)]
    alone, shared = (load_file(folder / "lora" / "pytorch_lora_weights.safetensors") for folder in folders)
    assert alone.keys() == shared.keys()
    assert all((alone[name] - shared[name]).norm() <= 1e-5 * alone[name].norm() for name in alone)
    for rank in figures[2]:
        assert rank["resumed"] == 3
        assert rank["resumed heldout"] == [True]
