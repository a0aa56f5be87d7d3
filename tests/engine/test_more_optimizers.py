"""Every optimizer beside AdamW in float32 and its low-bit kinds does what the library's own does with the same gradients, on one
process and on two, broken off or not.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import pytorch_optimizer
import torch
from closeness import assert_close_to_scale
from processes import ROOT, figures_of
from safetensors.torch import load_file
from test_optimizers import NAMES
from torch import Tensor

from finetune.engine.gradients import local
from finetune.engine.parts import evaluating
from finetune.recipe.optimizers import OPTIMIZERS
from finetune.training.job import Job

OTHERS = ["adamw_bf16", "lion", "adafactor", "prodigy", "schedule_free_adamw", "muon"]
# One of each code path: all parameters at once and gathered; two algorithms, gathered one by one; weights that are swapped.
FIRST = ["lora prodigy", "full muon", "full schedule_free_adamw"]
IN_BF16 = [f"full {name} bf16" for name in ("adamw_bf16", "lion", "adafactor", "muon")]
EVERY = [*(f"{method} {name}" for method in ("lora", "full") for name in OTHERS), *IN_BF16]
ON_ONE = ["full prodigy"]  # refused on two
DECAY, MANTISSA = 0.01, 2e-2


def cases(without: Sequence[str] = ()) -> list:
    kinds = [kind for kind in EVERY if kind not in without]
    return [kind if kind in FIRST else pytest.param(kind, marks=pytest.mark.full) for kind in kinds]


Figures = Callable[[str, int], dict]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optimizers")


@pytest.fixture(scope="module")
def figures(folder: Path, family_recipe: Callable[..., Path]) -> Figures:
    """What tests/engine/optimizers_worker.py finds of a kind on a number of processes: all first ones together, and all others."""
    known: dict[tuple[bool, int], dict] = {}

    def get(kind: str, processes: int) -> dict:
        key = kind in FIRST, processes
        if key not in known:
            kinds = [each for each in EVERY if (each in FIRST) == key[0] and (processes == 1 or each not in ON_ONE)]
            known[key] = figures_of(
                "optimizers_worker.py", processes, folder, [family_recipe("ltx"), *map(Path, kinds)]
            )
        return known[key][kind]

    return get


@pytest.fixture
def tensors(folder: Path) -> Callable[[str, int, str], dict[str, Tensor]]:
    return lambda kind, processes, what: load_file(folder / f"{kind} {processes} {what}.safetensors")


Tensors = Callable[[str, int, str], dict[str, Tensor]]


def library(name: str, weights: Mapping[str, Tensor]) -> list[torch.optim.Optimizer]:
    """The library's own, of plain tensors, with what tests/engine/optimizers_worker.py and the recipe's defaults give."""
    trained = list(weights.values())
    match name:
        case "lion":
            return [pytorch_optimizer.Lion(trained, betas=(0.9, 0.99), weight_decay=DECAY)]
        case "adafactor":
            return [torch.optim.Adafactor(trained, weight_decay=DECAY)]
        case "prodigy":
            keys = {"bias_correction": True, "safeguard_warmup": True}
            return [pytorch_optimizer.Prodigy(trained, betas=(0.9, 0.999), weight_decay=DECAY, **keys)]
        case "schedule_free_adamw":
            return [pytorch_optimizer.ScheduleFreeAdamW(trained, betas=(0.9, 0.999), weight_decay=DECAY)]
        case "muon":
            is_map = {key: key.startswith("transformer_blocks.") and "table" not in key for key in weights}
            maps = [weight for key, weight in weights.items() if weight.dim() == 2 and is_map[key]]
            others = [weight for key, weight in weights.items() if weight.dim() != 2 or not is_map[key]]
            muon = torch.optim.Muon(maps, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
            adamw = [torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=DECAY)] if others else []
            return [muon, *adamw]
    return [torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=DECAY)]  # adamw_bf16


@pytest.mark.parametrize("kind", cases(IN_BF16))
def test_updates_are_those_of_the_library_on_plain_tensors(figures: Figures, tensors: Tensors, kind: str) -> None:
    name = kind.split()[1]
    rates = [step["lr"] for step in figures(kind, 1)["steps"]]
    weights = {key: weight.float().requires_grad_() for key, weight in tensors(kind, 1, "before").items()}
    optimizers, gradients = library(name, weights), tensors(kind, 1, "gradients")
    assert len(gradients) == len(rates) * len(weights)
    for step, rate in enumerate(rates):
        for key, weight in weights.items():
            weight.grad = gradients[f"{step} {key}"]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
    after, evaluated, before = (tensors(kind, 1, what) for what in ("after", "evaluated", "before"))
    for key, weight in weights.items():
        moved = (after[key] - before[key]).abs().max()
        limit = MANTISSA if name == "adamw_bf16" else 1e-3
        assert (after[key] - weight).abs().max() <= limit * moved + 1e-7, key
    if name == "schedule_free_adamw":
        optimizers[0].eval()
    for key, weight in weights.items():
        if name != "adamw_bf16":
            assert_close_to_scale(evaluated[key], weight.detach(), name=key)
    assert (name == "schedule_free_adamw") == any(not torch.equal(evaluated[key], after[key]) for key in after)


@pytest.mark.parametrize("kind", cases(ON_ONE))
def test_two_processes_train_as_one(figures: Figures, tensors: Tensors, kind: str) -> None:
    """What is rounded stochastically is rounded with other numbers there."""
    one, two = figures(kind, 1), figures(kind, 2)
    rounded = "bf16" in kind
    relative = 5e-3 if rounded else 1e-5
    for name in ("losses", "grad_norm", "lr"):
        for ours, theirs in zip(two["steps"], one["steps"], strict=True):
            assert ours[name] == pytest.approx(theirs[name], rel=relative * (10 if name == "grad_norm" else 1))
    assert two["held out"] == pytest.approx(one["held out"], rel=relative)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", cases())
def test_a_resumed_run_goes_on_as_the_straight_one(figures: Figures, kind: str, processes: int) -> None:
    """Though it measured its held-out loss before it was broken off, with other weights than it trains."""
    if processes == 2 and kind in ON_ONE:
        pytest.skip("refused: tests/recipe/test_rules.py")
    found = figures(kind, processes)
    assert found["resumed"] == found["steps"][-len(found["resumed"]) :]
    assert found["unequal"] == []


@pytest.mark.parametrize("kind", cases())
def test_the_readme_tells_the_bytes_of_the_state(figures: Figures, kind: str) -> None:
    """Of tiny matrices, beside which rows, columns and counts of steps are not little, as they are of a model's."""
    name = kind.split()[1]
    row = re.search(rf"^\| .*`{name}`.*\| ([\d.]+)[^|]*\|", (ROOT / "recipes/memory.md").read_text(), re.MULTILINE)
    assert row, f"the document has no bytes of {name}"
    found = figures(kind, 1)
    told, real = float(row[1]), found["state bytes"] / found["values"]
    assert told <= real <= told + 1.5


def test_every_optimizer_is_tested() -> None:
    assert [*NAMES, *OTHERS] == list(OPTIMIZERS)


def test_what_an_export_reads_of_a_checkpoint_gives_the_average(build_job: Callable[..., Job]) -> None:
    overrides = ["optimizer.name=schedule_free_adamw", "schedule.name=constant_with_warmup", "optimizer.lr=1e-2"]
    job, fresh = build_job(*overrides), build_job(*overrides)
    for step in range(3):
        job.step(step, [job.micro_batches()[2 * step], job.micro_batches()[2 * step + 1]])
    job.save(3)
    fresh.checkpoints.load(3, [part for part in fresh.state.parts if part.is_evaluated])
    trained = [local(parameter).clone() for parameter in job.state.parameters]
    with evaluating(job.state.parts, "export"), evaluating(fresh.state.parts, "export"):
        ours, theirs = ([local(p).clone() for p in each.state.parameters] for each in (fresh, job))
    assert all(map(torch.equal, ours, theirs))
    assert not all(map(torch.equal, trained, theirs))
    assert all(map(torch.equal, trained, [local(parameter) for parameter in job.state.parameters]))
