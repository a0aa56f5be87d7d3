"""A loss over part of the target: the tokens of a condition image, which are given, are no part of the question."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from every_family import MODELS, Model, every_family
from torch import Tensor

from finetune.models.batch import Batch
from finetune.training.job import Job

LTX_I2V = [model for model in MODELS if model[0] == "ltx_i2v"]
GIVEN_FRAME = [*LTX_I2V, ("hunyuan_i2v", "token_replace"), ("wan_i2v", "2.2-5B")]

TOLERANCE = {"rtol": 1e-5, "atol": 0}  # relative to each loss: nothing cancels in a mean of squares


@pytest.fixture
def batch(build_job: Callable[..., Job], family_recipe: Callable[..., Path], request: pytest.FixtureRequest) -> Batch:
    """Four samples of the parameter's model, some without their image; the loss weighs them differently."""
    sizes = ["train.global_batch_size=4", "train.micro_batch_size=4"]
    weighting = [] if request.param[0].startswith("cogvideox") else ["objective.weighting=cosmap"]
    return build_job(*sizes, *weighting, recipe_file=family_recipe(*request.param)).micro_batches()[0]


given_frame = pytest.mark.parametrize("batch", GIVEN_FRAME, indirect=True, ids=lambda model: model[1])


def excluded(batch: Batch) -> Tensor:
    """Which elements of the target are not counted, bool, shaped like it."""
    return batch.only.counted.expand_as(batch.only.target) == 0


@pytest.mark.parametrize("batch", LTX_I2V, indirect=True, ids=lambda model: model[1])
def test_the_first_latent_frame_is_not_counted_unless_the_image_is_dropped(batch: Batch) -> None:
    first = 2 * 3  # tokens of a 64x96 frame
    whole = [not sample.any() for sample in excluded(batch)]
    assert True in whole
    assert False in whole
    for sample, all_counted in zip(excluded(batch), whole, strict=True):
        assert sample[:first].all() != all_counted
        assert not sample[first:].any()


@given_frame
def test_the_loss_is_the_mean_square_over_what_is_counted(batch: Batch) -> None:
    prediction = torch.randn(batch.only.target.shape)
    counted = ~excluded(batch)
    expected = [
        weight * torch.nn.functional.mse_loss(ours[mask], theirs[mask])
        for weight, ours, theirs, mask in zip(batch.only.weight, prediction, batch.only.target, counted, strict=True)
    ]
    assert len(batch.only.weight.unique()) == 4
    torch.testing.assert_close(batch.only.losses(prediction), torch.stack(expected), **TOLERANCE)


@given_frame
def test_what_is_not_counted_has_no_gradient(batch: Batch) -> None:
    prediction = torch.randn(batch.only.target.shape, requires_grad=True)
    batch.only.target.requires_grad_()
    batch.only.losses(prediction).sum().backward()
    for gradient in (prediction.grad, batch.only.target.grad):
        assert not gradient[excluded(batch)].any()
        assert gradient[~excluded(batch)].all()


@pytest.mark.parametrize("batch", [model for model in MODELS if model not in GIVEN_FRAME][:1], indirect=True)
def test_a_batch_that_names_nothing_counts_everything(batch: Batch) -> None:
    assert batch.only.counted is None
    prediction = torch.randn(batch.only.target.shape)
    expected = torch.nn.functional.mse_loss(prediction, batch.only.target, reduction="none").mean((1, 2, 3, 4))
    torch.testing.assert_close(batch.only.losses(prediction), batch.only.weight * expected, **TOLERANCE)


@every_family
def test_a_batch_is_sent_to_another_process_bit_for_bit(
    build_job: Callable[..., Job], family_recipe: Callable[..., Path], model: Model
) -> None:
    """Masks, tables and what is absent included."""
    batch = build_job(recipe_file=family_recipe(*model)).micro_batches()[0]
    received = pickle.loads(pickle.dumps(batch))
    (ours, shape), (theirs, sent) = (torch.utils._pytree.tree_flatten(vars(each)) for each in (received, batch))
    assert shape == sent
    assert (received.only.counted is None) == (model not in GIVEN_FRAME)
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(other, Tensor):
            assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
            assert torch.equal(mine, other)
        else:
            assert mine == other
