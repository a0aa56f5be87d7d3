"""Every way to save activations gives the same training, and keeps what it says."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from closeness import assert_close_to_scale
from every_family import Model, every_transformer, every_transformer_with
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.engine.savers.offload import SMALLEST, ActivationOffload
from finetune.training.job import Job

MODES = {
    "full": ["memory.activation_checkpointing=full"],
    "every_n": ["memory.activation_checkpointing=every_n"],
    "selective": ["memory.activation_checkpointing=selective"],
    "selective, a little": ["memory.activation_checkpointing=selective", "memory.keep_gib=0.0002"],
}


def train(job: Job, steps: int = 2) -> list[tuple[float, float]]:
    batches, count = job.micro_batches(), job.split.accumulation
    results = [job.step(step, [batches[step * count + k] for k in range(count)]) for step in range(steps)]
    return [(result.loss, result.grad_norm) for result in results]


@every_transformer_with(
    "mode, method",
    [("full", "lora"), ("selective", "lora")],
    [("every_n", "lora"), ("selective, a little", "lora"), *((mode, "full") for mode in MODES)],
)
def test_recomputing_changes_nothing(
    build_job: Callable[..., Job], family_recipe: Callable[..., Path], model: Model, mode: str, method: str
) -> None:
    overrides = [f"train.method={method}", "optimizer.lr=1e-3"]
    plain = train(build_job(*overrides, "memory.activation_checkpointing=none", recipe_file=family_recipe(*model)))
    saved = train(build_job(*overrides, *MODES[mode], recipe_file=family_recipe(*model)))
    for (loss, norm), (other_loss, other_norm) in zip(plain, saved, strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-6)  # of itself: nothing cancels in a sum of squares
        assert other_norm == pytest.approx(norm, rel=1e-5)


@every_transformer_with("mode", ["none"], ["full", "selective"])
def test_activations_come_back_from_host_memory_as_they_left(
    build_job: Callable[..., Job], family_recipe: Callable[..., Path], model: Model, mode: str
) -> None:
    overrides = [f"memory.activation_checkpointing={mode}", "train.micro_batch_size=1"]
    kept = train(build_job(*overrides, recipe_file=family_recipe(*model)))
    job = build_job(*overrides, "memory.offload_activations=true", recipe_file=family_recipe(*model))
    assert job.state.activations.smallest == SMALLEST
    job.state.activations = Counting(job.state.runtime.device, smallest=1)
    assert train(job) == kept
    left = sum(record is not None for record in job.state.activations.saved)  # not asked for by the backward pass
    assert job.state.activations.count - left > 10
    assert left <= (7 if model[0] == "hunyuan15" else 1)  # its last block makes text that nothing is computed from


class Counting(ActivationOffload):
    """How many tensors left, and their shapes."""

    count = 0
    shapes: tuple[torch.Size, ...] = ()
    all: tuple[object, ...] = ()

    def _pack(self, tensor):
        packed = super()._pack(tensor)
        self.count += packed is not tensor
        if packed is not tensor:
            self.shapes += (tensor.shape,)
            self.all += (packed,)
        return packed


@every_transformer
def test_what_a_checkpointed_block_is_given_leaves_the_device(
    build_job: Callable[..., Job], family_recipe: Callable[..., Path], model: Model
) -> None:
    """Its hidden states, for each block, though families pass them by name."""
    job = build_job("memory.activation_checkpointing=full", recipe_file=family_recipe(*model))
    offload = job.state.activations = Counting(job.state.runtime.device, smallest=1)
    given: list[torch.Size] = []
    for blocks in (getattr(job.state.transformer, name) for name in job.state.family.block_lists):
        for block in blocks:
            block.register_forward_pre_hook(
                lambda _, args, kwargs: given.append((args[0] if args else kwargs["hidden_states"]).shape),
                with_kwargs=True,
            )
    batch = job.micro_batches()[0]
    with offload.saving():
        prediction = job.state.family.predict(job.state.transformer, batch.inputs)["video"]
    assert len(given) >= 2
    assert not Counter(given) - Counter(offload.shapes)
    prediction.sum().backward()


def test_a_tensor_that_several_layers_save_leaves_once_and_keeps_its_strides(build_job: Callable[..., Job]) -> None:
    offload = Counting(build_job().state.runtime.device, smallest=1)
    x = torch.randn(8, 16, 32).transpose(1, 2).requires_grad_()  # dense, in another order
    with offload.saving():
        results = [x.square().sum(), x.exp().sum(), x.square().sum()]
    torch.stack(results).sum().backward()
    assert_close_to_scale(x.grad, 4 * x.detach() + x.detach().exp())
    assert offload.count == 3  # x for two squares, and the exponential
    assert len({id(record) for record in offload.all}) == 2
    assert {record.stride for record in offload.all} == {x.stride()}


def test_a_tensor_that_is_changed_in_place_between_two_saves_leaves_twice(build_job: Callable[..., Job]) -> None:
    offload = Counting(build_job().state.runtime.device, smallest=1)
    x = torch.randn(8, 16, requires_grad=True)
    y = x.clone()
    with offload.saving():
        before = y.square().sum()
        y.mul_(2)
        after = y.square().sum()
    (before + after).backward()
    assert offload.count == 2
    torch.testing.assert_close(x.grad, 2 * x.detach() + 8 * x.detach())  # of x squared, and of 2x squared


def test_weights_and_small_tensors_stay_on_the_device(build_job: Callable[..., Job]) -> None:
    offload = Counting(build_job().state.runtime.device, smallest=1000)
    weight = torch.nn.Parameter(torch.randn(64, 64))
    x = torch.randn(64, 64, requires_grad=True)
    with offload.saving():
        small = (x[:2] * x[:2]).sum()
        y = torch.nn.functional.linear(x, weight)  # saves x and a view of the weight
    assert offload.count == 1
    (y.sum() + small).backward()
    assert_close_to_scale(x.grad[2:], weight.detach().sum(0).expand(62, 64))


class Count(TorchDispatchMode):
    """How often attention and matrix products run."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = self.products = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = str(function)
        self.attention += "scaled_dot_product" in name and "backward" not in name
        self.products += name in ("aten.mm.default", "aten.addmm.default")
        return function(*arguments, **(keywords or {}))


def work(job: Job) -> Count:
    with Count() as count:
        job.step(0, [job.micro_batches()[0]])
    return count


def test_each_way_recomputes_what_it_says(build_job: Callable[..., Job], family_recipe: Callable[..., Path]) -> None:
    recipe = family_recipe("ltx")
    counts = {name: work(build_job(*overrides, recipe_file=recipe)) for name, overrides in MODES.items()}
    plain = work(build_job("memory.activation_checkpointing=none", recipe_file=recipe))
    assert counts["full"].attention == 2 * plain.attention
    assert counts["every_n"].attention == 1.5 * plain.attention  # one of two blocks
    assert counts["selective"].attention == plain.attention
    assert counts["selective"].products == plain.products
    assert plain.products < counts["selective, a little"].products < counts["full"].products


def test_a_budget_is_spent_in_the_order_of_computation_and_not_exceeded() -> None:
    from torch.utils.checkpoint import CheckpointPolicy

    from finetune.engine.savers.activation import Keep

    class Context:
        is_recompute = False

    keep, product = Keep(budget=100.0), torch.ops.aten.mm.default
    small, large = torch.empty(4, 2), torch.empty(2, 4)  # products of 64 bytes, of 32 with a column less
    choices = [keep(Context, product, small, large), keep(Context, product, small, large)]
    choices += [keep(Context, product, small, large[:, :2])]
    kept, dropped = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
    assert choices == [kept, dropped, kept]
    assert keep(Context, torch.ops.aten.add.Tensor, small, small) == dropped
