"""Training inverts LTXPipeline: each part of a training batch is compared with what the pipeline itself does."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from PIL import Image
from torch import Tensor

from finetune.data.loader import Sample
from finetune.data.synthetic import scene
from finetune.models.folder import ModelFolder
from finetune.models.ltx import LTXVideo
from finetune.models.objective import FlowMatching, constant_shift, scheduler_shift
from finetune.recipe import Bucket
from finetune.recipe.schema import Objective, Vae

CPU = torch.device("cpu")
PROMPT = "a red ball moves to the left over a dark floor"
SHAPE = Bucket(17, 64, 96)


@pytest.fixture(scope="module")
def family(tiny_ltx: Path) -> LTXVideo:
    return LTXVideo(ModelFolder(tiny_ltx))


@pytest.fixture(scope="module")
def pipeline(tiny_ltx: Path) -> LTXPipeline:
    return load_pipeline(tiny_ltx)


def load_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> LTXPipeline:
    pipeline = LTXPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_of(bucket: Bucket = SHAPE, fps: float = 25.0, text: dict[str, Tensor] | None = None) -> Sample:
    """What `Family.inputs` is told of a clip, without its latents."""
    return Sample({}, text or {}, bucket, fps, torch.Generator())


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pipeline_schedule(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int, steps: int) -> Tensor:
    """Set the scheduler as LTXPipeline does; returns the unshifted sigmas."""
    sigmas = np.linspace(1.0, 1 / steps, steps)
    config = scheduler.config
    mu = calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    return torch.from_numpy(sigmas)


# Noise and target


def test_noised_latents_are_those_of_the_pipelines_scheduler(family: LTXVideo, pipeline: LTXPipeline) -> None:
    scheduler = pipeline.scheduler
    pipeline_schedule(scheduler, family.tokens(SHAPE), steps=7)
    x0, noise = torch.randn(2, 7, 16, 3, 2, 3)
    noisy, _ = family.objective(Objective()).noised(x0, noise, scheduler.sigmas[:-1])
    torch.testing.assert_close(noisy, scheduler.scale_noise(x0, scheduler.timesteps, noise), rtol=0, atol=1e-6)


def test_a_perfect_prediction_inverts_to_the_clip_through_the_pipelines_scheduler(
    family: LTXVideo, pipeline: LTXPipeline
) -> None:
    scheduler = pipeline.scheduler
    pipeline_schedule(scheduler, family.tokens(SHAPE), steps=7)
    x0, noise = torch.randn(2, 1, 16, 3, 2, 3)
    latents, target = family.objective(Objective()).noised(x0, noise, scheduler.sigmas[:1])
    for t in scheduler.timesteps:
        latents = scheduler.step(target, t, latents, return_dict=False)[0]
    torch.testing.assert_close(latents, x0, rtol=0, atol=1e-4)


def test_a_batch_is_made_of_the_clips_latents(family: LTXVideo) -> None:
    """Taking the target, scaled by the noise level, from the noised latents leaves the normalised latents."""
    means = torch.randn(3, 16, 3, 2, 3)
    text = {"encoder_hidden_states": torch.zeros(128, 32)}
    samples = [
        Sample({"mean": mean, "logvar": torch.full_like(mean, -30)}, text, SHAPE, 25.0, generator(i))
        for i, mean in enumerate(means)
    ]
    batch = family.batch(samples, family.objective(Objective()))
    sigma = batch.inputs["timestep"].view(-1, 1, 1) / 1000
    latents = LTXPipeline._normalize_latents(means, family.mean, family.std, family.scaling_factor)
    left = batch.inputs["hidden_states"] - sigma * batch.target
    torch.testing.assert_close(left, LTXPipeline._pack_latents(latents), rtol=0, atol=1e-5)


def test_each_sample_of_a_batch_has_standard_normal_noise_of_its_own(family: LTXVideo) -> None:
    zeros = {"mean": family.mean.expand(16, 3, 16, 16), "logvar": torch.full((16, 3, 16, 16), -30.0)}
    text = {"encoder_hidden_states": torch.zeros(128, 32)}
    samples = [Sample(zeros, text, Bucket(17, 512, 512), 25.0, generator(i)) for i in range(4)]
    noise = family.batch(samples, family.objective(Objective())).target.flatten(1)
    torch.testing.assert_close(torch.corrcoef(noise), torch.eye(4), rtol=0, atol=0.05)
    torch.testing.assert_close(noise.std(1), torch.ones(4), rtol=0, atol=0.02)


# Noise levels

SCHEDULERS = {
    "dynamic, stretched to a terminal (0.9.0, 0.9.1)": {
        "use_dynamic_shifting": True,
        "base_shift": 0.95,
        "max_shift": 2.05,
        "base_image_seq_len": 1024,
        "max_image_seq_len": 4096,
        "shift_terminal": 0.1,
    },
    "dynamic": {"use_dynamic_shifting": True, "base_shift": 0.7, "max_shift": 1.3},
    "dynamic, linear in mu": {
        "use_dynamic_shifting": True,
        "base_shift": 0.95,
        "max_shift": 2.05,
        "time_shift_type": "linear",
    },
    "none": {},
    "fixed": {"shift": 7.0},
    "fixed, stretched to a terminal": {"shift": 3.0, "shift_terminal": 0.2},
}


@pytest.mark.parametrize("tokens", [18, 1024, 2944, 6000])
@pytest.mark.parametrize("config", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_shift_is_the_schedulers_in_the_limit_of_many_steps(config: dict, tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    sigma = pipeline_schedule(scheduler, tokens, steps=1_000_000)
    shifted = scheduler_shift(dict(scheduler.config))(sigma, tokens)
    torch.testing.assert_close(shifted.float(), scheduler.sigmas[:-1], rtol=0, atol=2e-5)


def test_the_tiny_pipelines_own_scheduler_is_what_its_objective_uses(family: LTXVideo, pipeline: LTXPipeline) -> None:
    objective = family.objective(Objective(sigma_sampling="uniform", shift="scheduler"))
    sigma = pipeline_schedule(pipeline.scheduler, family.tokens(SHAPE), steps=1_000_000)
    shifted = objective.level(sigma, family.tokens(SHAPE))
    torch.testing.assert_close(shifted.float(), pipeline.scheduler.sigmas[:-1], rtol=0, atol=2e-5)


def test_a_shift_of_the_recipe_replaces_the_schedulers(family: LTXVideo) -> None:
    objective = family.objective(Objective(sigma_sampling="uniform", shift=7.0))
    fixed = FlowMatchEulerDiscreteScheduler(shift=7.0)
    sigma = pipeline_schedule(fixed, tokens=18, steps=50)
    torch.testing.assert_close(objective.level(sigma, 18).float(), fixed.sigmas[:-1])


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 1.6)])
def test_logit_normal_sigmas_are_diffusers(mean: float, std: float) -> None:
    seed = generator(0)
    oracle = compute_density_for_timestep_sampling("logit_normal", 1000, mean, std, generator=seed)
    u = torch.special.ndtr(torch.randn(1000, generator=generator(0), dtype=torch.float32).double())
    ours = unshifted(Objective(sigma_sampling="logit_normal", logit_mean=mean, logit_std=std)).level(u, tokens=1)
    torch.testing.assert_close(ours.float(), oracle, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1.29, 0.5])
def test_mode_sigmas_are_diffusers(scale: float) -> None:
    seed = generator(0)
    oracle = compute_density_for_timestep_sampling("mode", 1000, mode_scale=scale, generator=seed)
    u = torch.rand(1000, generator=generator(0))
    ours = unshifted(Objective(sigma_sampling="mode", mode_scale=scale)).level(u, tokens=1)
    torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "mode"])
def test_drawn_sigmas_are_distributed_as_diffusers(family: LTXVideo, sampling: str) -> None:
    """Over many batches, through `Family.batch`, which draws u itself."""
    objective = unshifted(Objective(sigma_sampling=sampling))
    seed = generator(1)
    oracle = compute_density_for_timestep_sampling(sampling, 100_000, 0.0, 1.0, 1.29, generator=seed)
    moments = {"mean": torch.zeros(16, 1, 1, 1), "logvar": torch.zeros(16, 1, 1, 1)}
    text = {"encoder_hidden_states": torch.zeros(1, 1)}
    samples = [Sample(moments, text, Bucket(1, 32, 32), 25.0, generator(i)) for i in range(4000)]
    sigma = family.batch(samples, objective).inputs["timestep"] / 1000
    levels = torch.linspace(0.05, 0.95, 19)
    torch.testing.assert_close(sigma.quantile(levels), oracle.quantile(levels), rtol=0, atol=0.03)


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_loss_weights_are_diffusers(weighting: str) -> None:
    sigma = torch.linspace(0.01, 1, 100)
    ours = unshifted(Objective(weighting=weighting)).weight(sigma)
    torch.testing.assert_close(ours, compute_loss_weighting_for_sd3(weighting, sigma))


def unshifted(settings: Objective) -> FlowMatching:
    return FlowMatching(settings, constant_shift(1.0))


# The transformer's call


def record_calls(pipeline: LTXPipeline, prompt: str, shape: Bucket, fps: float) -> list[SimpleNamespace]:
    """Generate, without guidance; returns for each step the transformer's arguments and output, sigma, and latents."""
    steps: list[SimpleNamespace] = []
    packed_noise = pipeline.prepare_latents(
        1, 16, shape.height, shape.width, shape.frames, torch.float32, CPU, generator(3)
    )
    latents = [packed_noise]
    before = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: steps.append(SimpleNamespace(args=args, kwargs=kwargs)), with_kwargs=True
    )
    after = pipeline.transformer.register_forward_hook(
        lambda module, args, output: setattr(steps[-1], "output", output[0])
    )
    pipeline(
        prompt,
        height=shape.height,
        width=shape.width,
        num_frames=shape.frames,
        frame_rate=fps,
        num_inference_steps=4,
        guidance_scale=1.0,
        latents=packed_noise,
        output_type="latent",
        callback_on_step_end=lambda pipe, index, t, tensors: latents.append(tensors["latents"]) or {},
    )
    before.remove()
    after.remove()
    for index, step in enumerate(steps):
        size = (step.kwargs["num_frames"], step.kwargs["height"], step.kwargs["width"])
        step.latents = LTXPipeline._unpack_latents(latents[index], *size)
        step.sigma = pipeline.scheduler.sigmas[index : index + 1]
    return steps


def training_inputs(family: LTXVideo, dtype: torch.dtype, call: SimpleNamespace, prompt: str, fps: float) -> dict:
    text = {name: value[None] for name, value in family.text_encoder(CPU, dtype)(prompt).items()}
    return family.inputs(call.latents, call.sigma, text, {}, [sample_of(fps=fps)])


@pytest.mark.parametrize("fps", [24.0, 25.0, 29.97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_the_transformer_is_called_as_the_pipeline_calls_it(
    family: LTXVideo, tiny_ltx: Path, dtype: torch.dtype, fps: float
) -> None:
    pipeline = load_pipeline(tiny_ltx, dtype)
    call = record_calls(pipeline, PROMPT, SHAPE, fps)[2]
    ours = training_inputs(family, dtype, call, PROMPT, fps)

    assert call.args == ()
    assert call.kwargs["attention_kwargs"] is None
    theirs = {name: value for name, value in call.kwargs.items() if name not in ("attention_kwargs", "return_dict")}
    assert ours.keys() == theirs.keys()
    rope = [
        pipeline.transformer.rope(
            arguments["hidden_states"],
            *(arguments[name] for name in ("num_frames", "height", "width", "rope_interpolation_scale")),
        )
        for arguments in (ours, theirs)
    ]
    assert all(map(torch.equal, *rope))
    for name in ours.keys() - {"rope_interpolation_scale"}:
        assert type(ours[name]) is type(theirs[name]), name
        if isinstance(ours[name], Tensor):
            torch.testing.assert_close(
                ours[name], theirs[name], rtol=0, atol=0, msg=lambda text, n=name: f"{n}: {text}"
            )
        else:
            assert ours[name] == theirs[name], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_the_prediction_is_the_pipelines(family: LTXVideo, tiny_ltx: Path, dtype: torch.dtype) -> None:
    pipeline = load_pipeline(tiny_ltx, dtype)
    call = record_calls(pipeline, PROMPT, SHAPE, 24.0)[2]
    ours = training_inputs(family, dtype, call, PROMPT, 24.0)
    with torch.no_grad():
        prediction = family.predict(family.load_transformer(dtype), ours)
    assert torch.equal(prediction, call.output)


def test_a_batch_of_clips_of_different_frame_rates_is_the_same_as_each_alone(
    family: LTXVideo, pipeline: LTXPipeline
) -> None:
    prompts, rates = (PROMPT, "white stripes drift upwards"), (12.0, 50.0)
    calls = [record_calls(pipeline, *each)[2] for each in zip(prompts, (SHAPE, SHAPE), rates, strict=True)]
    encode = family.text_encoder(CPU, torch.float32)
    texts = [encode(prompt) for prompt in prompts]
    together = family.inputs(
        torch.cat([call.latents for call in calls]),
        torch.cat([call.sigma for call in calls]),
        {name: torch.stack([text[name] for text in texts]) for name in texts[0]},
        {},
        [sample_of(fps=fps) for fps in rates],
    )
    with torch.no_grad():
        prediction = family.predict(pipeline.transformer, together)
    torch.testing.assert_close(prediction, torch.cat([call.output for call in calls]), rtol=0, atol=1e-5)


def test_the_target_has_the_layout_of_the_models_output(family: LTXVideo) -> None:
    velocity = torch.randn(2, 16, 3, 2, 3)
    assert torch.equal(family.target(velocity), LTXPipeline._pack_latents(velocity))


# Text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("caption", [PROMPT, "Übermäßig: 視頻, émigré!", "word " * 400], ids=["short", "odd", "long"])
def test_captions_are_encoded_as_the_pipeline_encodes_prompts(
    family: LTXVideo, tiny_ltx: Path, caption: str, dtype: torch.dtype
) -> None:
    with torch.no_grad():
        embeds, mask, *_ = load_pipeline(tiny_ltx, dtype).encode_prompt(caption, do_classifier_free_guidance=False)
    ours = family.text_encoder(CPU, dtype)(caption)
    assert ours["encoder_hidden_states"].dtype == dtype
    assert torch.equal(ours["encoder_hidden_states"], embeds[0])
    assert torch.equal(ours["encoder_attention_mask"], mask[0])


def test_the_empty_caption_is_the_pipelines_unconditional_input(family: LTXVideo, pipeline: LTXPipeline) -> None:
    with torch.no_grad():
        _, _, embeds, mask = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=True)
    ours = family.text_encoder(CPU, torch.float32)("")
    assert torch.equal(ours["encoder_hidden_states"], embeds[0])
    assert torch.equal(ours["encoder_attention_mask"], mask[0])


# Video


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


@pytest.mark.parametrize("scaling_factor", [1.0, 0.5])
def test_latents_decode_to_what_a_posterior_sample_decodes_to(
    tiny_ltx: Path, tmp_path: Path, scaling_factor: float
) -> None:
    folder = Path(shutil.copytree(tiny_ltx, tmp_path / "model"))
    AutoencoderKLLTXVideo.from_pretrained(folder, subfolder="vae", scaling_factor=scaling_factor).save_pretrained(
        folder / "vae"
    )
    family, pipeline = LTXVideo(ModelFolder(folder)), load_pipeline(folder)
    assert pipeline.vae.config.scaling_factor == scaling_factor
    frames, _ = scene(0, *SHAPE)
    moments = family.video_encoder(CPU, torch.float32, Vae())(frames)
    latents = family.latents(moments, generator(5))
    video = decode(pipeline, family.target(latents[None]), family.latent_shape(SHAPE))

    with torch.no_grad():
        posterior = pipeline.vae.encode(as_video(frames)).latent_dist
        expected = pipeline.vae.decode(posterior.sample(generator(5)), return_dict=False)[0]
    torch.testing.assert_close(video, expected, rtol=0, atol=1e-5)


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

    family = LTXVideo(ModelFolder(folder))
    moments = family.video_encoder(CPU, torch.float32, Vae())(frames)
    latents = family.latents(moments, generator(0))
    returned = decode(load_pipeline(folder), family.target(latents[None]), family.latent_shape(shape))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def test_frames_reach_the_vae_as_diffusers_prepares_them(tiny_ltx: Path, family: LTXVideo, dtype: torch.dtype) -> None:
    frames, _ = scene(0, *SHAPE)
    moments = family.video_encoder(CPU, dtype, Vae())(frames)
    pipeline = load_pipeline(tiny_ltx, dtype)
    video = pipeline.video_processor.preprocess_video([Image.fromarray(frame) for frame in frames]).to(dtype)
    with torch.no_grad():
        posterior = pipeline.vae.encode(video).latent_dist
    assert torch.equal(moments["mean"], posterior.mean[0])
    assert torch.equal(moments["logvar"], posterior.logvar[0])


@pytest.mark.parametrize("setting", ["slicing", "tiling"])
def test_vae_settings_reach_the_vae(family: LTXVideo, pipeline: LTXPipeline, setting: str) -> None:
    frames, _ = scene(0, 9, 64, 576)  # wider than one tile
    moments = family.video_encoder(CPU, torch.float32, Vae(**{setting: True}))(frames)
    vae = AutoencoderKLLTXVideo.from_pretrained(family.folder.path, subfolder="vae")
    getattr(vae, f"enable_{setting}")()
    with torch.no_grad():
        assert torch.equal(moments["mean"], vae.encode(as_video(frames)).latent_dist.mean[0])


# Shapes

BUCKETS = [
    Bucket(frames, height, width)
    for frames, height, width in [
        (1, 32, 32),
        (9, 32, 64),
        (17, 64, 96),
        (25, 96, 32),
        (2, 32, 32),
        (8, 64, 64),
        (16, 64, 64),
        (18, 64, 64),
        (9, 33, 64),
        (9, 64, 48),
        (9, 16, 64),
        (17, 60, 100),
        (10, 50, 50),
    ]
]


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
def test_a_bucket_is_accepted_exactly_if_the_pipeline_generates_videos_of_its_shape(
    family: LTXVideo, pipeline: LTXPipeline, bucket: Bucket
) -> None:
    assert (family.bucket_problem(bucket) is None) == (generated_shape(pipeline, bucket) == bucket)


def generated_shape(pipeline: LTXPipeline, bucket: Bucket) -> Bucket | None:
    frames, height, width = bucket
    arguments = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "pt"}
    try:
        video = pipeline(PROMPT, num_frames=frames, height=height, width=width, **arguments).frames
    except ValueError:
        return None
    return Bucket(video.shape[1], *video.shape[-2:])


@pytest.mark.parametrize(
    "bucket, nearest",
    [
        ("50x512x768", "49x512x768"),
        ("48x500x770", "49x512x768"),
        ("3x10x40", "1x32x32"),
        ("120x480x724", "121x480x736"),
    ],
)
def test_a_refused_bucket_is_told_the_nearest_one(family: LTXVideo, bucket: str, nearest: str) -> None:
    assert nearest in family.bucket_problem(Bucket.parse(bucket))
    assert family.bucket_problem(Bucket.parse(nearest)) is None


def test_tokens_are_what_the_transformer_attends_over(family: LTXVideo, pipeline: LTXPipeline) -> None:
    call = record_calls(pipeline, PROMPT, SHAPE, 25.0)[0]
    assert family.tokens(SHAPE) == call.kwargs["hidden_states"].shape[1]


# The tiny pipeline


def test_the_tiny_pipeline_generates_a_video(pipeline: LTXPipeline) -> None:
    video = pipeline(PROMPT, num_frames=17, height=64, width=96, num_inference_steps=2, output_type="np").frames
    assert video.shape == (1, 17, 64, 96, 3)
    assert np.isfinite(video).all()


def test_the_tiny_pipeline_is_the_same_for_the_same_seed(tiny_ltx: Path, tmp_path: Path) -> None:
    LTXVideo.tiny(tmp_path / "again")
    LTXVideo.tiny(tmp_path / "other", seed=1)
    contents = contents_of(tiny_ltx)
    assert contents_of(tmp_path / "again") == contents
    weights = Path("transformer") / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "other" / weights).read_bytes() != contents[weights]


def test_the_tiny_pipeline_takes_a_few_megabytes(tiny_ltx: Path) -> None:
    assert sum(map(len, contents_of(tiny_ltx).values())) < 8e6


def contents_of(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
