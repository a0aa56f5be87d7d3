"""However a global batch is spread over processes and accumulation steps, it is the same training; and the right one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from diffusers.optimization import get_scheduler
from parity_worker import FULL, LORA
from peft import LoraConfig
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from finetune.data.loader import BatchSplit, MicroBatches
from finetune.training.job import Job

TOLERANCE = 1e-5  # in float32, relative to each figure, a mean or root of squares: nothing cancels; seen is 1e-7

Figures = dict[int, dict[str, dict[str, list[float]]]]
SPREAD = [
    (processes, configuration)
    for method in ("lora", "full")
    for processes, configuration in [
        (1, f"{method}, accumulated"),
        (1, f"{method}, not checkpointed"),
        (2, method),
        (2, f"{method}, accumulated"),
        (2, f"{method}, not checkpointed"),
    ]
]


@pytest.mark.parametrize("processes, configuration", SPREAD)
@pytest.mark.parametrize("figure", ["loss", "grad_norm"])
def test_figures_are_those_of_one_process(parity: Figures, processes: int, configuration: str, figure: str) -> None:
    alone = parity[1][configuration.partition(",")[0]][figure]
    assert len(alone) == 10
    assert parity[processes][configuration][figure] == pytest.approx(alone, rel=TOLERANCE)


@pytest.mark.parametrize("figure", ["loss", "grad_norm", "heldout", "heldout_zero"])
def test_targets_with_guidance_are_the_same_for_two_processes(parity: Figures, figure: str) -> None:
    """Of sharded weights, whose frozen base is gathered once more for each micro-batch."""
    alone, spread = (parity[processes]["lora, guided"][figure] for processes in (1, 2))
    assert len(alone) == (10 if figure in ("loss", "grad_norm") else 2)
    assert spread == pytest.approx(alone, rel=TOLERANCE)
    assert alone != pytest.approx(parity[1]["lora"][figure], rel=0.01)


@pytest.mark.parametrize("processes", [1, 2])
def test_recomputed_dropout_is_the_same_dropout(parity: Figures, processes: int) -> None:
    checkpointed, plain = (parity[processes][f"lora, dropout{rest}"] for rest in ("", ", not checkpointed"))
    assert checkpointed["grad_norm"] == pytest.approx(plain["grad_norm"], rel=TOLERANCE)


@pytest.mark.parametrize("ranks, micro", [(1, 2), (1, 1), (2, 2), (2, 1), (4, 1)])
def test_the_batches_are_bit_for_bit_those_of_one_process(
    build_job: Callable[..., Job], parity_recipe: Path, ranks: int, micro: int
) -> None:
    """What the ranks take together, in the order of their positions in the global batch."""
    job = build_job(recipe_file=parity_recipe)
    alone = replace_split(job, BatchSplit(0, 1, 4, 4))
    spread = [replace_split(job, BatchSplit(rank, ranks, 4, micro)) for rank in range(ranks)]
    for step in range(4):
        whole, parts = (
            alone[step],
            [
                share[step * share.split.accumulation + index]
                for index in range(spread[0].split.accumulation)
                for share in spread
            ],
        )
        assert torch.equal(torch.cat([part.only.target for part in parts]), whole.only.target)
        assert torch.equal(torch.cat([part.only.weight for part in parts]), whole.only.weight)
        for name, value in whole.inputs.items():
            if isinstance(value, Tensor):
                assert torch.equal(torch.cat([part.inputs[name] for part in parts]), value), name


def replace_split(job: Job, split: BatchSplit) -> MicroBatches:
    batches = job.micro_batches()
    batches.split = split
    return batches


# A plain loop


@pytest.fixture
def oracle(
    build_job: Callable[..., Job], parity_recipe: Path, tiny_ltx: Path
) -> Callable[[list[str]], dict[str, list[float]]]:
    """Train without the engine: diffusers, peft and torch alone, on the same batches from the same weights."""

    def train(overrides: list[str]) -> dict[str, list[float]]:
        job = build_job(*overrides, "train.micro_batch_size=4", recipe_file=parity_recipe)
        recipe, batches = job.recipe, job.micro_batches()
        transformer = LTXVideoTransformer3DModel.from_pretrained(tiny_ltx, subfolder="transformer").train()
        if recipe.train.method == "lora":
            transformer.requires_grad_(False)
            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            transformer.add_adapter(
                LoraConfig(r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, target_modules=targets)
            )
            transformer.load_state_dict(initial_weights(job))
        trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=recipe.optimizer.lr, betas=(0.9, 0.95), weight_decay=1e-2)
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=3, num_training_steps=10)
        losses, norms = [], []
        for step in range(10):
            batch = batches[step]
            output = transformer(**batch.inputs).sample
            errors = torch.nn.functional.mse_loss(output, batch.only.target, reduction="none").mean((1, 2))
            loss = (batch.only.weight * errors).mean()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(trained, 0.1).item())
            losses.append(loss.item())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return {"loss": losses, "grad_norm": norms}

    return train


def initial_weights(job: Job) -> dict[str, Tensor]:
    return get_model_state_dict(job.state.transformer, options=StateDictOptions(full_state_dict=True))


@pytest.mark.parametrize("method, overrides", [("lora", LORA), ("full", FULL)])
def test_figures_are_those_of_a_plain_torch_loop(
    parity: Figures, oracle: Callable[[list[str]], dict[str, list[float]]], method: str, overrides: list[str]
) -> None:
    expected = oracle(overrides)
    assert max(expected["grad_norm"]) > 0.1  # so that clipping is part of what is compared
    for processes in (1, 2):
        assert parity[processes][method]["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
        assert parity[processes][method]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=TOLERANCE)
