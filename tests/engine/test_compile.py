"""Blocks compile whole: one graph each, once for each bucket."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from every_family import Model, every_transformer
from torch import nn

from finetune.training.job import Job


def inputs_of(block: nn.Module, job: Job) -> tuple[tuple, dict]:
    """What a block is called with in a step."""
    seen: list[tuple[tuple, dict]] = []
    hook = block.register_forward_pre_hook(lambda _, *call: seen.append(call), with_kwargs=True)
    with torch.no_grad():
        job.state.family.predict(job.state.transformer, job.micro_batches()[0].inputs)
    hook.remove()
    return seen[0]


@every_transformer
def test_a_block_is_one_graph(build_job: Callable[..., Job], family_recipe: Callable[..., Path], model: Model) -> None:
    job = build_job("memory.activation_checkpointing=none", "memory.layout=shard", recipe_file=family_recipe(*model))
    for name in job.state.family.block_lists:
        for block in getattr(job.state.transformer, name):
            arguments, keywords = inputs_of(block, job)
            block.unshard()
            torch._dynamo.reset()
            report = torch._dynamo.explain(type(block).forward)(block, *arguments, **keywords)
            block.reshard()
            assert report.graph_count == 1, report.break_reasons
            assert report.graph_break_count == 0, report.break_reasons


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_compiled_steps_are_those_of_eager_ones_and_compiled_once_for_each_bucket(
    build_job: Callable[..., Job], family_recipe: Callable[..., Path], method: str
) -> None:
    from torch._dynamo.utils import counters

    losses = {}
    for compiled in ("false", "true"):
        torch._dynamo.reset()
        counters.clear()
        overrides = [f"train.method={method}", "optimizer.lr=1e-3", f"memory.compile={compiled}"]
        job = build_job(*overrides, "data.buckets=17x64x96, 9x64x64", recipe_file=family_recipe("ltx"))
        losses[compiled] = [job.step(step, [job.micro_batches()[step]]).loss for step in range(6)]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-5)
    blocks, buckets = 2, len({item.bucket for item in job.prepared.train})
    assert 0 < counters["stats"]["unique_graphs"] <= blocks * max(buckets, 1)
