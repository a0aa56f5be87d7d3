"""LTX-Video's own: normalisation, a VAE that has learnt a clip, and folders that do not name their pipeline."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_close_to_scale
from diffusers import AutoencoderKLLTXVideo, LTXConditionPipeline, LTXPipeline
from recording import CPU, PROMPT, Clip, TinyModel, assert_equal, generator, recorded, training_inputs
from torch import Tensor

from finetune.data.loader import Sample
from finetune.data.synthetic import scene
from finetune.models.ltx import LTXVideo
from finetune.recipe import Bucket
from finetune.recipe.schema import ObjectiveSettings, Vae

SHAPE = Bucket(17, 64, 96)


@pytest.fixture
def model(tiny_ltx: Path) -> TinyModel:
    return TinyModel.open(tiny_ltx, "ltx")


@pytest.fixture
def family(model: TinyModel) -> LTXVideo:
    return model.family


def test_each_sample_of_a_batch_has_standard_normal_noise_of_its_own(family: LTXVideo) -> None:
    zeros = {"mean": family.mean.expand(16, 3, 16, 16), "logvar": torch.full((16, 3, 16, 16), -30.0)}
    text = {"encoder_hidden_states": torch.zeros(128, 32)}
    samples = [Sample({"video": zeros, "text": text}, Bucket(17, 512, 512), 25.0, generator(i)) for i in range(4)]
    noise = family.batch(samples, family.objective(ObjectiveSettings())).only.target.flatten(1)
    torch.testing.assert_close(torch.corrcoef(noise), torch.eye(4), rtol=0, atol=0.05)
    torch.testing.assert_close(noise.std(1), torch.ones(4), rtol=0, atol=0.02)


def decode(pipeline: LTXPipeline, packed: Tensor, latent_shape: tuple[int, int, int]) -> Tensor:
    """Packed, normalised latents -> video (1, 3, F, H, W), as the end of LTXPipeline.__call__ does."""
    vae = pipeline.vae
    latents = LTXPipeline._unpack_latents(packed, *latent_shape)
    latents = LTXPipeline._denormalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    with torch.no_grad():
        return vae.decode(latents, None, return_dict=False)[0]


def as_video(frames: np.ndarray) -> Tensor:
    """uint8 (F, H, W, 3) -> (1, 3, F, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1


def test_a_scaling_factor_is_undone_by_the_pipeline(tiny_ltx: Path, tmp_path: Path) -> None:
    """The published checkpoints' is 1."""
    folder = Path(shutil.copytree(tiny_ltx, tmp_path / "model"))
    vae = AutoencoderKLLTXVideo.from_pretrained(folder, subfolder="vae", scaling_factor=0.5)
    vae.save_pretrained(folder / "vae")
    model = TinyModel.open(folder, "ltx")
    family, pipeline = model.family, model.pipeline()
    assert pipeline.vae.config.scaling_factor == 0.5
    moments = family.video_encoder(CPU, torch.float32, Vae())(model.clip)
    latents = family.latents(moments, generator(5))
    video = decode(pipeline, family.target(latents[None]), family.latent_shape(SHAPE))

    with torch.no_grad():
        posterior = pipeline.vae.encode(as_video(model.clip)).latent_dist
        expected = pipeline.vae.decode(posterior.sample(generator(5)), return_dict=False)[0]
    assert_close_to_scale(video, expected)


def test_each_use_of_a_clip_draws_another_posterior_sample(family: LTXVideo) -> None:
    moments = {"mean": torch.zeros(16, 3, 2, 3), "logvar": torch.full((16, 3, 2, 3), 2.0)}
    draws = torch.stack([family.latents(moments, generator(seed)) for seed in range(200)])
    posterior = (draws * family.std / family.scaling_factor + family.mean).flatten(1)
    torch.testing.assert_close(posterior.std(0).mean(), torch.tensor(2.0).exp().sqrt(), rtol=0.01, atol=0)


def test_a_clip_comes_back_from_its_cached_moments(tiny_ltx: Path, tmp_path: Path) -> None:
    """With a VAE that has learnt one clip: its time-averaged picture alone would be 0.55 of the clip's variance off."""
    shape = Bucket(9, 32, 32)
    frames, _ = scene(1, *shape)
    folder = tmp_path / "model"
    shutil.copytree(tiny_ltx, folder)
    vae = AutoencoderKLLTXVideo.from_pretrained(folder, subfolder="vae")
    learn(vae, as_video(frames), steps=200)
    vae.save_pretrained(folder / "vae")

    model = TinyModel.open(folder, "ltx")
    family = model.family
    moments = family.video_encoder(CPU, torch.float32, Vae())(frames)
    latents = family.latents(moments, generator(0))
    returned = decode(model.pipeline(), family.target(latents[None]), family.latent_shape(shape))
    clip = as_video(frames)
    assert (returned - clip).square().mean() / clip.var() < 0.1


def learn(vae: AutoencoderKLLTXVideo, clip: Tensor, steps: int) -> None:
    """Overfit the VAE to one clip, then normalise its latents."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(vae.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    vae.train()
    for _ in range(steps):
        latents = vae.encode(clip).latent_dist.sample()
        (vae.decode(latents, return_dict=False)[0] - clip).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        latents = vae.eval().encode(clip).latent_dist.mode()
    vae.latents_mean.copy_(latents.mean((0, 2, 3, 4)))
    vae.latents_std.copy_(latents.std((0, 2, 3, 4)))


def test_tiles_are_those_of_diffusers(family: LTXVideo) -> None:
    frames, _ = scene(0, 9, 64, 576)  # wider than one tile
    tiled, whole = (family.video_encoder(CPU, torch.float32, Vae(tiling=tiling))(frames) for tiling in (True, False))
    vae = AutoencoderKLLTXVideo.from_pretrained(family.folder.path, subfolder="vae")
    vae.enable_tiling()
    with torch.no_grad():
        assert torch.equal(tiled["mean"], vae.encode(as_video(frames)).latent_dist.mean[0])
    assert not torch.equal(tiled["mean"], whole["mean"])


def test_folders_of_0_9_5_are_trained_for_the_condition_pipeline_though_they_name_the_old_one(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Told by the scheduler: it shifts by resolution no longer."""
    model = TinyModel.open(tiny_model("ltx", "0.9.7"), "ltx")
    folder = Path(shutil.copytree(model.folder, tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "LTXPipeline"}))
    renamed = TinyModel.open(folder, "ltx")
    assert isinstance(renamed.pipeline(), LTXConditionPipeline)
    generation = recorded(model)
    ours, theirs = (training_inputs(each, Clip(generation, 2, each.text(PROMPT))) for each in (renamed, model))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_equal(ours[name], theirs[name], name)
