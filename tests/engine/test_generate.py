"""Validation samples are what the diffusers pipeline generates, and leave the training as it was."""

import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from every_family import Model, every_family, few_families
from exports import export_weights, load_adapter
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from finetune.data.synthetic import scene
from finetune.engine.generate import Request, generate
from finetune.engine.precision import DTYPES
from finetune.engine.weights.exporters.diffusers_lora import lora_file
from finetune.recipe import Bucket
from finetune.training.job import Job
from finetune.training.other_expert import add_other_expert
from finetune.training.samples import request_of, validation_samples

PROMPT = "a red ball moves to the left over a dark floor"
NEGATIVE = "blurry"


@pytest.fixture
def prompted(family_recipe: Callable[..., Path], tmp_path: Path) -> Callable[[Model], Path]:
    """A family's recipe with one prompt: two steps, guidance, a negative prompt, and an image if it takes one."""

    def make(model: Model) -> Path:
        Image.fromarray(scene(5, 1, 64, 96)[0][0]).save(tmp_path / "first.png")
        lines = ["[[validation.prompts]]", f'text = "{PROMPT}"', f'negative = "{NEGATIVE}"', "steps = 2", "seed = 7"]
        lines += ["guidance = 3.0"] if model != ("hunyuan_i2v", "latent_concat") else []
        lines += ["true_guidance = 2.0"] if model[0] in ("hunyuan", "hunyuan_i2v") else []
        lines += [f'image = "{tmp_path / "first.png"}"'] if model[0].endswith("i2v") else []
        # In sizes of their own: the pipeline scales images, and CLIP sees them whole.
        if model == ("wan_i2v", "2.1-FLF2V"):
            for name, (seed, height, width) in {"first": (5, 50, 110), "last": (6, 70, 64)}.items():
                Image.fromarray(scene(seed, 1, height, width)[0][0]).save(tmp_path / f"{name}.png")
            lines += [f'last_image = "{tmp_path / "last.png"}"']
        path = tmp_path / "recipe.toml"
        path.write_text(family_recipe(*model).read_text() + "\n".join(lines))
        return path

    return make


def live_video(job: Job, tiling: bool = False) -> np.ndarray:
    """The recipe's prompt by the transformer in training."""
    made: list[np.ndarray] = []
    requests: list[Request] = [request_of(job, job.prepared.prompts[0], seed=7)]
    dtype = DTYPES[job.recipe.train.precision]
    add_other_expert(job)
    generate(job.state, requests, job.idle_batch(), tiling, dtype, lambda index, frames: made.append(frames))
    return made[0]


def pipeline_video(job: Job, folder: Path | None = None, tiling: bool = False) -> np.ndarray:
    """The same by diffusers alone, from the model's folder and, if given, an exported adapter."""
    family, prompt = job.state.family, job.prepared.prompts[0].prompt
    dtype = DTYPES[job.recipe.train.precision]
    pipeline = getattr(diffusers, family.pipeline_class).from_pretrained(
        family.folder.path, dtype={"default": dtype, "vae": family.vae_dtype or dtype}
    )
    pipeline.set_progress_bar_config(disable=True)
    if tiling:
        pipeline.vae.enable_tiling()
    if folder is not None:
        load_adapter(pipeline, folder, lora_file(family))
    special = {"frame_rate": 25} if family.name.startswith("ltx") else {}
    if special and pipeline.vae.config.timestep_conditioning:
        special |= {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
    special |= {"true_cfg_scale": 2.0} if family.name in ("hunyuan", "hunyuan_i2v") else {}
    if family.name.startswith("hunyuan15"):
        pipeline.guider = pipeline.guider.new(guidance_scale=3.0)
    else:
        special |= {"guidance_scale": 3.0}
    special |= dict(zip(("image", "last_image"), map(Image.open, prompt.images), strict=False))
    frames = pipeline(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        **family.shape_arguments(Bucket(13 if family.name == "mochi" else 17, 64, 96)),
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        **special,
    ).frames[0]
    return (frames * 255).round().astype(np.uint8)


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Last bits of float32 may differ with the layout in memory: they turn a pixel in a thousand to its neighbour."""
    assert ours.shape == theirs.shape
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@every_family
def test_the_base_model_generates_what_its_pipeline_does(
    build_job: Callable[..., Job], prompted: Callable[[Model], Path], model: Model
) -> None:
    job = build_job(recipe_file=prompted(model))
    assert_same(live_video(job), pipeline_video(job))


@few_families
def test_float32_masters_generate_in_the_precision_of_the_step(
    build_job: Callable[..., Job], prompted: Callable[[Model], Path], model: Model
) -> None:
    job = build_job("train.method=full", "train.precision=bf16", recipe_file=prompted(model))
    ours, theirs = live_video(job), pipeline_video(job)
    if model[0] in (
        "mochi",
        "hunyuan15",
        "hunyuan15_i2v",
    ):  # rounding to bf16 makes much of their attention's different order of sums
        assert np.abs(ours.astype(int) - theirs).mean() < 3
    else:
        assert_same(ours, theirs)


@few_families
def test_a_trained_adapter_generates_what_its_export_does(
    build_job: Callable[..., Job], prompted: Callable[[Model], Path], tmp_path: Path, model: Model
) -> None:
    job = build_job("optimizer.lr=0.05", recipe_file=prompted(model))
    base = live_video(job)
    batches = job.batches(0)
    for step in range(5):
        job.step(step, [next(batches) for _ in range(job.split.accumulation)])
    trained = live_video(job)
    assert np.abs(trained.astype(int) - base).mean() > 0.5
    export_weights(job.state, job.recipe.train.method, tmp_path / "lora")
    assert_same(trained, pipeline_video(job, tmp_path / "lora"))


def test_samples_are_decoded_in_tiles(build_job: Callable[..., Job], prompted: Callable[[Model], Path]) -> None:
    job = build_job(recipe_file=prompted(("cogvideox", "5b")))  # its tiles are half of its 64x96
    assert_same(live_video(job, tiling=True), pipeline_video(job, tiling=True))
    assert np.abs(live_video(job, tiling=True).astype(int) - live_video(job)).max() > 1


@pytest.mark.parametrize("method", ["lora", "full"])
def test_nothing_stays_in_memory(build_job: Callable[..., Job], prompted: Callable[[Model], Path], method: str) -> None:
    job = build_job(f"train.method={method}", recipe_file=prompted(("cogvideox_i2v", "5b-I2V")))
    batches = job.batches(0)
    job.step(0, [next(batches) for _ in range(job.split.accumulation)])
    live_video(job)  # what libraries keep from their first use
    job.step(1, [next(batches) for _ in range(job.split.accumulation)])
    before = tensors_alive()
    live_video(job)
    job.heldout_loss()
    assert tensors_alive() == before


def tensors_alive() -> Counter:
    gc.collect()
    alive = [thing for thing in gc.get_objects() if isinstance(thing, Tensor) and not isinstance(thing, FakeTensor)]
    return Counter((tuple(tensor.shape), tensor.dtype, tensor.untyped_storage().nbytes()) for tensor in alive)


@pytest.mark.parametrize("calls", [0, 1])
def test_a_polite_stop_ends_sampling_and_not_the_job(
    build_job: Callable[..., Job], prompted: Callable[[Model], Path], tmp_path: Path, calls: int
) -> None:
    job = build_job(f"output={tmp_path / 'run'}", recipe_file=prompted(("ltx", None)))
    votes = iter([False] * calls + [True])
    assert validation_samples(job, 0, lambda: next(votes)) is None
    assert list((tmp_path / "run").rglob("*.mp4")) == []
    assert job.state.transformer.training
    assert job.step(0, [job.micro_batches()[0]]).updated


def test_an_error_inside_the_transformer_is_not_put_off(
    build_job: Callable[..., Job], prompted: Callable[[Model], Path]
) -> None:
    """The other ranks are in the middle of the same call, and would wait for this one."""
    job = build_job(recipe_file=prompted(("ltx", None)))
    hook = job.state.transformer.transformer_blocks[1].register_forward_pre_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="in a block"):
        live_video(job)
    hook.remove()


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("in a block")
