"""Every optimizer learns, keeps its schedule, and resumes bit for bit."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import pytest
import torch
from closeness import assert_close_to_scale
from exports import export_weights
from processes import figures_of
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from finetune.engine.optimizers import BUILDERS
from finetune.engine.step import StepResult
from finetune.recipe.optimizers import OPTIMIZERS, Optimizer
from finetune.training.job import Job

NAMES = ["adamw", "adamw_8bit", "adamw_4bit", "adamw_fp8"]
WEIGHTS = ["float32", "bf16"]
every_optimizer = pytest.mark.parametrize("name", NAMES)
every_dtype = pytest.mark.parametrize("weights", WEIGHTS)


@pytest.fixture
def make_job(build_job: Callable[..., Job], family_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Job]:
    def make(name: str, weights: str, *overrides: str) -> Job:
        settings = [f"optimizer.name={name}", f"train.weights={weights}", "train.method=full", "optimizer.lr=1e-3"]
        return build_job(f"output={tmp_path / 'run'}", *settings, *overrides, recipe_file=family_recipe("ltx"))

    return make


def train(job: Job, first: int, last: int) -> list[StepResult]:
    return [job.step(step, [job.micro_batches()[step]]) for step in range(first, last)]


def weights_of(job: Job) -> dict[str, torch.Tensor]:
    state = get_model_state_dict(job.state.transformer, options=StateDictOptions(full_state_dict=True))
    return {name: tensor.clone() for name, tensor in state.items()}


@every_optimizer
@every_dtype
def test_a_resumed_run_is_the_straight_one(make_job: Callable[..., Job], name: str, weights: str) -> None:
    straight = make_job(name, weights)
    expected = train(straight, 0, 4)
    broken = make_job(name, weights)
    train(broken, 0, 2)
    broken.save(2)
    resumed = make_job(name, weights)
    assert resumed.resume() == 2
    assert train(resumed, 2, 4) == expected[2:]
    ours, theirs = weights_of(resumed), weights_of(straight)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert {tensor.dtype for tensor in theirs.values()} == {torch.float32 if weights == "float32" else torch.bfloat16}


@pytest.mark.full
def test_so_it_is_on_two_processes(family_recipe: Callable[..., Path], tmp_path: Path) -> None:
    figures = figures_of("resume_worker.py", 2, tmp_path, [family_recipe("ltx")])
    assert len(figures) == len(NAMES) * len(WEIGHTS)
    for name, (expected, resumed) in figures.items():
        assert resumed == expected, name


@every_optimizer
@every_dtype
def test_steps_stay_near_those_of_adamw(make_job: Callable[..., Job], name: str, weights: str) -> None:
    """Moments of 8 and 4 bits and float8 round each update; bf16 weights round the model, too."""
    plain = train(make_job("adamw", "float32"), 0, 5)
    ours = train(make_job(name, weights), 0, 5)
    limit = {"adamw": 1e-5, "adamw_8bit": 5e-3, "adamw_4bit": 2e-2, "adamw_fp8": 5e-3}[name]
    limit = limit if weights == "float32" else max(limit, 2e-2)
    assert [step.loss for step in ours] == pytest.approx([step.loss for step in plain], rel=limit)
    assert [step.lr for step in ours] == pytest.approx([step.lr for step in plain], rel=1e-6)


@pytest.mark.parametrize("name, most", [("adamw_8bit", 0.35), ("adamw_4bit", 0.25), ("adamw_fp8", 0.35)])
def test_moments_take_the_bytes_they_say(make_job: Callable[..., Job], name: str, most: float) -> None:
    """Besides those of small tensors, which torchao keeps whole."""
    sizes = []
    for optimizer in ("adamw", name):
        job = make_job(optimizer, "float32")
        train(job, 0, 1)
        moments = [state["exp_avg"].to_local() for state in job.state.optimizer.state.values()]
        sizes.append(sum(stored(moment) for moment in moments if moment.numel() >= 4096))
    assert sizes[1] / sizes[0] < most


def stored(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, or of the parts that a quantised one is made of."""
    if hasattr(tensor, "tensor_attrs"):
        return sum(getattr(tensor, name).nbytes for name in tensor.tensor_attrs)
    return tensor.nbytes


def test_small_updates_of_bf16_weights_are_not_lost(make_job: Callable[..., Job]) -> None:
    """Adam moves a weight by its rate: here a tenth of half a bf16 step below 1.0, which plain rounding would lose."""
    job = make_job("adamw", "bf16", "optimizer.lr=2e-4", "optimizer.weight_decay=0", "schedule.warmup_steps=0")
    before = weights_of(job)
    train(job, 0, 3)
    after = weights_of(job)
    moved = [(after[key] != 1).float().mean() for key in before if (before[key] == 1).all()]
    assert moved
    assert 0.02 < torch.stack(moved).mean() < 0.4  # about 5 % a step


@pytest.fixture(scope="module")
def updates(tmp_path_factory: pytest.TempPathFactory, family_recipe: Callable[..., Path]) -> Path:
    """A folder of what tests/engine/updates_worker.py writes on one process and on two."""
    folder = tmp_path_factory.mktemp("updates")
    for processes in (1, 2):
        norms = figures_of("updates_worker.py", processes, folder, [family_recipe("ltx")])
        assert all(norm > 0.05 for steps in norms.values() for norm in steps)
    return folder


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("processes", [1, 2])
def test_updates_in_host_memory_are_those_of_plain_adamw(updates: Path, method: str, processes: int) -> None:
    """With clipped norms, and 4 micro-batches a step on one process, 2 on two."""
    plain = load_file(updates / f"{method} plain {processes}.safetensors")
    offloaded = load_file(updates / f"{method} offloaded {processes}.safetensors")
    assert plain.keys() == offloaded.keys()
    for name, weight in plain.items():
        assert_close_to_scale(offloaded[name], weight, name=name)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bf16_weights_are_exported_as_they_were_trained(
    make_job: Callable[..., Job], tmp_path: Path, method: str
) -> None:
    job = make_job("adamw_8bit", "bf16", f"train.method={method}")
    train(job, 0, 2)
    export_weights(job.state, job.recipe.train.method, tmp_path / "out")  # verifies every tensor
    saved = [load_file(file) for file in (tmp_path / "out").glob("*.safetensors")]
    assert {tensor.dtype for tensors in saved for tensor in tensors.values()} == {torch.bfloat16}


def test_moments_that_cannot_be_divided_say_where_to_go_on(tmp_path: Path) -> None:
    """torchao's 8-bit moments have blocks of 256, and half of 100 rows of 64 ends within one."""
    (tmp_path / "saved").mkdir()
    saved = figures_of("division_worker.py", 1, tmp_path / "saved", [tmp_path / "checkpoints"])
    loaded = figures_of("division_worker.py", 2, tmp_path / "saved", [tmp_path / "checkpoints"])
    assert saved == {"adamw": "", "adamw_8bit": "", "adamw_fp8": ""}
    assert loaded["adamw"] == ""
    for name in ("adamw_8bit", "adamw_fp8"):
        assert "moments in few bits, saved by 1 process, cannot be divided for 2" in loaded[name]
        assert "-> resume it with 1" in loaded[name]


# Updates in the backward pass


IN_BACKWARD = "optimizer.in_backward=true"


@every_optimizer
def test_updates_in_the_backward_pass_are_the_same(make_job: Callable[..., Job], name: str) -> None:
    """In float32; bf16 weights are rounded with numbers drawn in the order of the updates."""
    unclipped = "train.max_grad_norm=none"
    plain, job = make_job(name, "float32", unclipped), make_job(name, "float32", unclipped, IN_BACKWARD)
    expected, found = train(plain, 0, 4), train(job, 0, 4)
    assert [step.loss for step in found] == [step.loss for step in expected]
    assert [step.lr for step in found] == [step.lr for step in expected]
    assert [step.grad_norm for step in found] == pytest.approx([step.grad_norm for step in expected], rel=1e-6)
    ours, theirs = weights_of(job), weights_of(plain)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_gradients_are_dropped_as_they_are_used(make_job: Callable[..., Job]) -> None:
    """Never more than those of one unit of FSDP at a time, which it makes together."""
    job = make_job("adamw", "float32", "train.max_grad_norm=none", IN_BACKWARD)
    alive, unit_of = [], {}
    for unit in [m for m in job.state.transformer.modules() if isinstance(m, FSDPModule)][::-1]:
        unit_of |= {parameter: unit for parameter in unit.parameters() if parameter not in unit_of}
    for parameter in job.state.parameters:
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(len({unit_of[p] for p in job.state.parameters if p.grad is not None}))
        )
    train(job, 0, 1)
    assert len(alive) == len(job.state.parameters)
    assert max(alive) <= 1
    assert all(parameter.grad is None for parameter in job.state.parameters)


@every_optimizer
def test_a_run_updated_in_the_backward_pass_resumes_as_the_straight_one(
    make_job: Callable[..., Job], name: str
) -> None:
    overrides = ("train.max_grad_norm=none", IN_BACKWARD)
    straight = make_job(name, "bf16", *overrides)
    expected = train(straight, 0, 4)
    broken = make_job(name, "bf16", *overrides)
    train(broken, 0, 2)
    broken.save(2)
    resumed = make_job(name, "bf16", *overrides)
    assert resumed.resume() == 2
    assert train(resumed, 2, 4) == expected[2:]
    ours, theirs = weights_of(resumed), weights_of(straight)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# A new optimizer: a table of settings, a builder, and their lines


class Sgd(Optimizer):
    name: Literal["sgd"]
    momentum: float = 0.0
    weight_decay: float = 0.0


def build_sgd(parameters: Mapping[str, nn.Parameter], settings: Sgd, weights: str) -> torch.optim.Optimizer:
    """Biases are a group of their own, which does not decay."""
    biases = {name for name in parameters if name.endswith(".bias")}
    groups = [
        {
            "params": [parameters[name] for name in parameters if name not in biases],
            "weight_decay": settings.weight_decay,
        },
        {"params": [parameters[name] for name in parameters if name in biases]},
    ]
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)


@pytest.fixture
def sgd(monkeypatch: pytest.MonkeyPatch, make_job: Callable[..., Job]) -> Callable[..., Job]:
    monkeypatch.setitem(OPTIMIZERS, "sgd", Sgd)
    monkeypatch.setitem(BUILDERS, Sgd, build_sgd)
    return lambda *overrides: make_job("sgd", "float32", *overrides)


def test_a_new_optimizer_is_given_parameters_by_name(sgd: Callable[..., Job]) -> None:
    rate, decay, plain = 1e-3, 0.5, ("schedule.name=constant", "schedule.warmup_steps=0")
    job, decayed = (sgd(*plain, f"optimizer.weight_decay={each}") for each in (0, decay))
    before = weights_of(job)
    train(job, 0, 1)
    train(decayed, 0, 1)
    after, shrunk = weights_of(job), weights_of(decayed)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    for name, weight in before.items():
        expected = after[name] - rate * decay * weight * (not name.endswith(".bias"))
        torch.testing.assert_close(shrunk[name], expected, rtol=0, atol=1e-6)
    assert any(name.endswith(".bias") and weight.abs().max() > 1e-2 for name, weight in before.items())


def test_a_run_with_groups_resumes_as_the_straight_one(sgd: Callable[..., Job]) -> None:
    settings = ("optimizer.momentum=0.9", "optimizer.weight_decay=0.1")
    straight, broken = sgd(*settings), sgd(*settings)
    expected = train(straight, 0, 4)
    train(broken, 0, 2)
    broken.save(2)
    resumed = sgd(*settings)
    assert resumed.resume() == 2
    assert train(resumed, 2, 4) == expected[2:]
    ours, theirs = weights_of(resumed), weights_of(straight)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_each_update_in_the_backward_pass_is_of_one_parameter(sgd: Callable[..., Job]) -> None:
    """Of whatever group: the parameters of the others are not looked at."""
    settings = ("optimizer.momentum=0.9", "optimizer.weight_decay=0.1", "train.max_grad_norm=none")
    plain, job = sgd(*settings), sgd(*settings, IN_BACKWARD)
    seen = []
    job.state.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append(sum(len(group["params"]) for group in optimizer.param_groups))
    )
    assert [step.loss for step in train(job, 0, 3)] == [step.loss for step in train(plain, 0, 3)]
    assert seen == [1] * 3 * len(job.state.parameters)
    ours, theirs = weights_of(job), weights_of(plain)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_every_optimizer_of_the_schema_has_a_builder() -> None:
    assert set(OPTIMIZERS.values()) == set(BUILDERS)


# float8 products


def test_float8_products_stay_near_those_of_bf16(make_job: Callable[..., Job]) -> None:
    """Emulated here: three bits of mantissa in the blocks' products, rounded for each step anew."""
    plain, job = make_job("adamw", "float32"), make_job("adamw", "float32", "train.float8=true")
    converted = [m for m in job.state.transformer.modules() if type(m).__name__ == "Float8Linear"]
    assert len(converted) >= 2 * 10
    expected, found = ([step.loss for step in train(each, 0, 4)] for each in (plain, job))
    assert found != expected
    assert found == pytest.approx(expected, rel=2e-2)


def test_float8_training_is_exported_in_whole_weights(make_job: Callable[..., Job], tmp_path: Path) -> None:
    job = make_job("adamw", "float32", "train.float8=true")
    train(job, 0, 1)
    export_weights(job.state, job.recipe.train.method, tmp_path / "out")  # verifies every tensor
    saved = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert saved.keys() == weights_of(job).keys()
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
