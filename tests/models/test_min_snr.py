"""Min-SNR weights of v-prediction are those of diffusers' helper, on the schedules of CogVideoX's checkpoints."""

import pytest
import torch
from diffusers.training_utils import compute_snr
from recording import TinyModel, variant_id, variants

from finetune.models.noise_range import restricted
from finetune.recipe.schema import ObjectiveSettings

MODELS = [each for each in variants("cogvideox") if each[1] in ("5b", "2b")]
LEVELS = torch.arange(1000)


@pytest.mark.parametrize("gamma", [5.0, 1.0, 20.0])
@pytest.mark.parametrize("model", MODELS, ids=variant_id, indirect=True)
def test_the_weight_is_min_snr_gamma_over_snr_and_one(model: TinyModel, gamma: float) -> None:
    objective = model.family.objective(ObjectiveSettings(weighting="min_snr", snr_gamma=gamma))
    snr = compute_snr(model.pipeline().scheduler, LEVELS).double()
    expected = torch.minimum(snr, torch.tensor(gamma)) / (snr + 1)
    weight = objective.weight(LEVELS)
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-7)
    assert (expected < snr / (snr + 1) - 1e-3).any()  # gamma is at work


@pytest.mark.parametrize("model", MODELS[:1], ids=variant_id, indirect=True)
def test_the_last_timestep_is_all_noise_and_weighs_nothing(model: TinyModel) -> None:
    """Its SNR is 0: there v is the clip alone, of which the noised latents tell nothing."""
    objective = model.family.objective(ObjectiveSettings(weighting="min_snr"))
    assert model.pipeline().scheduler.alphas_cumprod[-1] == 0
    weight = objective.weight(LEVELS)
    assert weight[-1] == 0
    assert torch.isfinite(weight).all()
    assert (weight[:-1] > 0).all()
    assert torch.equal(restricted(objective, (0.5, 1.0)).weight(LEVELS[500:]), weight[500:])


@pytest.mark.parametrize("model", MODELS[:1], ids=variant_id, indirect=True)
def test_without_it_all_timesteps_weigh_the_same(model: TinyModel) -> None:
    assert torch.equal(model.family.objective(ObjectiveSettings()).weight(LEVELS), torch.ones(1000))
