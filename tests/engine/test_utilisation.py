"""FLOPs of a step, which the utilisation of a GPU is told from, are those that torch counts in a real one."""

from collections.abc import Callable

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from finetune.planning.simulate import example_batch
from finetune.recipe import Bucket
from finetune.runtime.gpus import GPUS, known_gpu
from finetune.training.job import Job
from finetune.training.utilisation import Utilisation, step_flops


@pytest.mark.parametrize(
    "method, overrides, near",
    [
        ("lora", ["lora.rank=1"], 0.1),
        ("full", [], 0.1),
        ("partial", ["partial.modules=transformer_blocks.1.attn1"], 1e-6),
        ("partial", ["partial.modules=norm_q"], 1e-6),
    ],
)
def test_the_flops_of_a_step_are_those_of_a_real_one(
    build_job: Callable[..., Job], method: str, overrides: list[str], near: float
) -> None:
    job = build_job(f"train.method={method}", "memory.activation_checkpointing=none", *overrides)
    # Large, because the text's layers need no gradient of their input where an adapter is trained.
    batch, counter = example_batch(job.recipe, job.state.family, Bucket(49, 384, 384)), FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # others are not counted on a CPU
        losses = batch.losses(job.state.family.predict(job.state.transformer, batch.inputs))
        losses["video"].mean().backward()
    counted = step_flops(job.state.family, batch, method, job.recipe.adapter)
    assert counted == pytest.approx(counter.get_total_flops(), rel=near)  # the first layers' inputs need no gradient
    utilisation = Utilisation(job.recipe, job.state.family, GPUS["H100"])
    bucket = job.order.plan(0).bucket
    assert utilisation.metrics(bucket, batch, 3, 0.5) == {"mfu": 3 * counted / 0.5 / GPUS["H100"].float32_flops}
    assert Utilisation(job.recipe, job.state.family, None).metrics(bucket, batch, 3, 0.5) == {}


@pytest.mark.parametrize(
    "name, gpu",
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA GeForce RTX 4060 Ti 16GB", "RTX 4060 Ti 16GB"), ("CPU", None)],
)
def test_a_gpu_is_known_by_its_device_name(name: str, gpu: str | None) -> None:
    assert known_gpu(name) == (GPUS[gpu] if gpu else None)
