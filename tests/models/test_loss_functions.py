"""The loss functions of a recipe are torch's, element by element, in every family's layout, with its weights and masks."""

import pickle

import pytest
import torch
from recording import TinyModel, variant_id, variants
from test_objectives import samples
from torch.nn.functional import huber_loss, mse_loss, smooth_l1_loss

from finetune.models.batch import Batch, Term
from finetune.models.element_error import SQUARED, ElementError
from finetune.recipe.schema import ObjectiveSettings

FUNCTIONS = {
    "mse": lambda ours, theirs, delta: mse_loss(ours, theirs),
    "huber": lambda ours, theirs, delta: huber_loss(ours, theirs, delta=delta),
    "smooth_l1": lambda ours, theirs, delta: smooth_l1_loss(ours, theirs, beta=delta),
}
FAMILIES = [each[0] for each in map(variants, ("ltx", "ltx_i2v", "cogvideox", "hunyuan", "wan"))]
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def batch_of(model: TinyModel, **settings: object) -> Batch:
    return model.family.batch(samples(model, 3), model.family.objective(ObjectiveSettings(**settings)))


@every_function
@pytest.mark.parametrize("model", FAMILIES, ids=variant_id, indirect=True)
def test_the_loss_is_torchs_over_what_is_counted(model: TinyModel, name: str) -> None:
    weighting = "min_snr" if model.family.name == "cogvideox" else "cosmap"
    term = batch_of(model, loss=name, loss_delta=0.7, weighting=weighting).only
    prediction = torch.randn(term.target.shape)
    counted = torch.ones_like(term.target) if term.counted is None else term.counted.expand_as(term.target)
    expected = [
        weight * FUNCTIONS[name](ours[mask == 1], theirs[mask == 1], 0.7)
        for weight, ours, theirs, mask in zip(term.weight, prediction, term.target, counted, strict=True)
    ]
    assert len(term.weight.unique()) == 3
    torch.testing.assert_close(term.losses(prediction), torch.stack(expected), rtol=1e-5, atol=0)


@every_function
def test_a_mask_weighs_the_error_of_each_element(name: str) -> None:
    """Weights between 0 and 1: the weighted mean, by float64."""
    prediction, target, mask = torch.randn(2, 8, 5), 3 * torch.randn(2, 8, 5), torch.rand(2, 8, 1)
    term = Term(target, torch.tensor([1.0, 0.5]), mask, ElementError(name, 2.0))
    for place, weight in enumerate((1.0, 0.5)):
        errors = [
            [FUNCTIONS[name](prediction[place, i, j], target[place, i, j], 2.0) for j in range(5)] for i in range(8)
        ]
        weights = mask[place].expand(8, 5).double()
        mean = (torch.tensor(errors).double() * weights).sum() / weights.sum()
        assert float(term.losses(prediction)[place]) == pytest.approx(weight * float(mean), rel=1e-5)


def test_a_plain_loss_is_bit_for_bit_what_it_was() -> None:
    prediction, target = torch.randn(3, 50), torch.randn(3, 50)
    term = Term(target, torch.ones(3))
    assert torch.equal(term.losses(prediction), (prediction - target).square().mean(1))
    assert Term(target, torch.ones(3), None, ElementError.of(ObjectiveSettings())).error == SQUARED


@pytest.mark.parametrize("model", FAMILIES[:1], ids=variant_id, indirect=True)
def test_the_function_comes_along_to_another_process_and_to_the_device(model: TinyModel) -> None:
    batch = batch_of(model, loss="huber", loss_delta=0.25)
    for arrived in (pickle.loads(pickle.dumps(batch)), batch.to(torch.device("cpu")), batch.contiguous()):
        assert arrived.only.error == ElementError("huber", 0.25)
