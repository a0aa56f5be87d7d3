"""A frozen base in few bits: what is trained is exactly the adapter of the rounded weights."""

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from closeness import assert_close_to_scale
from every_family import Model, every_transformer_with
from exports import export_weights
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from finetune.engine.savers.lowbit import LowBitLinear, dequantize, quantize
from finetune.engine.weights.exporters.diffusers_lora import LORA_FILE
from finetune.engine.weights.loading import plain_name, whole_transformer
from finetune.models.weights import Weights
from finetune.training.job import Job

KINDS = ["int8", "float8", "nf4"]
BITS = {"int8": 8, "float8": 8, "nf4": 4}
TABLE = {
    "int8": 0,
    "float8": 0,
    "nf4": 256 * 2 * 4,
}  # bytes of what codes are looked up in, which the layer has in any case
STORAGES = [torch.bfloat16, torch.float32]


def weight_of(linear: LowBitLinear) -> Tensor:
    return dequantize(linear.weight, linear.weight_scale, linear.kind, torch.float32)


@pytest.mark.parametrize("kind, limit", [("int8", 0.008), ("float8", 0.04), ("nf4", 0.12)])
def test_rounding_errors_are_those_of_the_format(kind: str, limit: float) -> None:
    """Of normal weights: int8 a step of 2.9 / 127 over the root of 12; float8 3 bits of mantissa; nf4 as QLoRA has it."""
    torch.manual_seed(0)
    linear = nn.Linear(256, 512)
    nn.init.normal_(linear.weight)
    error = weight_of(LowBitLinear(linear, kind, torch.float32)) - linear.weight
    assert 0 < error.norm() / linear.weight.norm() < limit


def test_nf4_rounds_each_weight_to_the_nearest_level() -> None:
    from finetune.engine.savers.lowbit import _NF4

    weight = torch.randn(8, 128)
    codes, scale = quantize(weight, "nf4")
    scaled = weight.view(8, 2, 64) / scale[..., None]
    nearest = (scaled[..., None] - torch.tensor(_NF4)).abs().argmin(-1).flatten(1)
    assert torch.equal(torch.stack([codes >> 4, codes & 15], 2).flatten(1).long(), nearest)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_same_in_whatever_dtype_their_bits_are_held(kind: str) -> None:
    linear = nn.Linear(128, 32)
    low, other = (LowBitLinear(linear, kind, storage) for storage in STORAGES)
    assert [low.weight.dtype, other.weight_scale.dtype] == STORAGES
    assert low.weight.nbytes == other.weight.nbytes == 128 * 32 * BITS[kind] // 8
    assert torch.equal(weight_of(low), weight_of(other))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_zeros_stays_zero(kind: str) -> None:
    linear = nn.Linear(64, 4)
    nn.init.zeros_(linear.weight)
    assert torch.equal(weight_of(LowBitLinear(linear, kind, torch.float32)), linear.weight)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_rounded_weight(kind: str, storage: torch.dtype) -> None:
    linear = nn.Linear(128, 32)
    low = LowBitLinear(linear, kind, storage)
    dense = nn.Linear(128, 32)
    dense.weight.data, dense.bias = weight_of(low), linear.bias
    x, y = (torch.ones(2, 5, 128).cumsum(2).sin().requires_grad_() for _ in range(2))
    ours, theirs = low(x), dense(y)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert_close_to_scale(ours, theirs)
    assert_close_to_scale(x.grad, y.grad)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_dequantised_waits_for_the_backward_pass(kind: str, storage: torch.dtype) -> None:
    low, saved = LowBitLinear(nn.Linear(128, 128), kind, storage), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        low(torch.randn(1, 128, requires_grad=True))
    assert sum(tensor.nbytes for tensor in saved) <= 128 * 128 * BITS[kind] // 8 + 4 * 128 * 2 + TABLE[kind]


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_nor_does_it_when_compiled(kind: str, storage: torch.dtype) -> None:
    """What is common to both passes would be kept from one to the other."""
    low, saved = LowBitLinear(nn.Linear(128, 128), kind, storage), []
    low.compile(dynamic=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out = low(torch.randn(1, 128, requires_grad=True))
    out.sum().backward()
    assert sum(tensor.nbytes for tensor in saved) <= 128 * 128 * BITS[kind] // 8 + 4 * 128 * 2 + TABLE[kind]


# In training


def train(job: Job, steps: int = 3) -> list[float]:
    return [job.step(step, [job.micro_batches()[step]]).loss for step in range(steps)]


@every_transformer_with("kind", KINDS[:1], KINDS[1:])
def test_losses_are_those_on_the_rounded_weights(
    build_job: Callable[..., Job],
    family_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    model: Model,
    kind: str,
) -> None:
    recipe = family_recipe(*model)
    low = build_job(f"memory.low_bit={kind}", recipe_file=recipe)
    rounded = {
        plain_name(f"{name}.").removesuffix("."): weight_of_sharded(module)
        for name, module in low.state.transformer.named_modules()
        if isinstance(module, LowBitLinear)
    }
    assert len(rounded) >= 4
    files = Weights.rows

    def rounded_rows(self: Weights, name: str, start: int, stop: int) -> Tensor:
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in rounded:
            return rounded[layer][start:stop]
        return files(self, name, start, stop)

    losses = train(low)
    plain = train(build_job(recipe_file=recipe))
    monkeypatch.setattr(Weights, "rows", rounded_rows)
    assert losses == pytest.approx(train(build_job(recipe_file=recipe)), rel=1e-5)
    assert losses != pytest.approx(plain, rel=1e-6)
    assert losses == pytest.approx(plain, rel=0.1)  # a random model of a few layers; far less on a trained one


def weight_of_sharded(linear: LowBitLinear) -> Tensor:
    whole = (each.full_tensor() if isinstance(each, DTensor) else each for each in (linear.weight, linear.weight_scale))
    codes, scale = whole
    return dequantize(codes, scale, linear.kind, torch.float32)


@every_transformer_with("kind", KINDS[:1], KINDS[1:])
def test_an_exported_adapter_on_the_dequantised_model_is_the_trained_one(
    build_job: Callable[..., Job], family_recipe: Callable[..., Path], model: Model, kind: str, tmp_path: Path
) -> None:
    """The pipeline's own loader on diffusers' own transformer, whose weights are what the codes say."""
    job = build_job(f"memory.low_bit={kind}", "optimizer.lr=1e-2", recipe_file=family_recipe(*model))
    train(job)
    export_weights(job.state, job.recipe.train.method, tmp_path / "lora")
    family, batch = job.state.family, job.micro_batches()[0]
    transformer = whole_transformer(family, torch.float32)
    rounded = 0
    for name, module in job.state.transformer.named_modules():
        if isinstance(module, LowBitLinear):
            base = transformer.get_submodule(plain_name(f"{name}.").removesuffix("."))
            base.weight.data = weight_of_sharded(module)
            rounded += 1
    assert rounded >= 4
    if hasattr(getattr(diffusers, family.pipeline_class), "load_lora_weights"):
        family.pipeline(transformer=transformer).load_lora_weights(tmp_path / "lora")
    else:
        transformer.load_lora_adapter(tmp_path / "lora", weight_name=LORA_FILE)
    with torch.no_grad():
        expected = family.predict(transformer.train(), batch.inputs)["video"]
        assert torch.equal(family.predict(job.state.transformer, batch.inputs)["video"], expected)


@every_transformer_with("kind, most", [("int8", 1e-3)], [("float8", 5e-3), ("nf4", 3e-2)])
def test_rounding_moves_the_loss_by_little(
    build_job: Callable[..., Job], family_recipe: Callable[..., Path], model: Model, kind: str, most: float
) -> None:
    """The stated bounds, relative, on the first loss of a random model, whose layers are too small to average much out."""
    plain, low = (
        train(build_job(f"memory.low_bit={each}", recipe_file=family_recipe(*model)), 1) for each in ("none", kind)
    )
    assert low != plain
    assert low == pytest.approx(plain, rel=most)


def test_nf4_is_looked_up_by_pairs_and_the_table_is_on_the_layers_device() -> None:
    """Against the table of single values, with the indices that torch makes int64."""
    from finetune.engine.savers.lowbit import _NF4

    low = LowBitLinear(nn.Linear(128, 64), "nf4", torch.float32)
    codes, scale = low.weight.view(torch.uint8), low.weight_scale
    index = torch.stack([codes >> 4, codes & 15], 2).flatten(1).long()
    expected = (torch.tensor(_NF4)[index].view(64, -1, 64) * scale[..., None]).flatten(1)
    assert torch.equal(dequantize(low.weight, scale, "nf4", torch.float32, low.table), expected)
    assert LowBitLinear(nn.Linear(128, 64), "nf4", torch.float32).to("meta").table.is_meta
    assert "table" not in low.state_dict()
