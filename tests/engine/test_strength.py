"""Samples at several strengths of the LoRA are diffusers' own, and lie beside each other by prompt, strength and step."""

from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from exports import export_weights
from PIL import Image

from finetune.checks.model import open_family
from finetune.engine.generate import generate
from finetune.engine.precision import DTYPES
from finetune.recipe import load_recipe
from finetune.runtime.errors import UserError
from finetune.training.exported_videos import sample
from finetune.training.job import Job
from finetune.training.sample_grid import write_grid
from finetune.training.samples import request_of, validation_samples

PROMPT = "a red ball moves to the left"
PROMPTS = f'validation.prompts=[{{text = "{PROMPT}", steps = 2, guidance = 1.0, seed = 7, strength = [0.0, 0.4, 1.0]}}]'

PARTIAL = {"full": [], "partial": ['partial.modules=["attn1.to_q"]']}


@pytest.fixture
def trained(build_job: Callable[..., Job], family_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Job]:
    """A LoRA that two steps have changed, or another one of another seed."""

    def train(prompts: str = PROMPTS, *overrides: str) -> Job:
        shared = ["optimizer.lr=0.05", f"output={tmp_path / 'run'}", prompts, *overrides]
        job = build_job(*shared, recipe_file=family_recipe("ltx"))
        for step in range(2):
            job.step(step, [job.micro_batches()[step]])
        return job

    return train


def by_diffusers(job: Job, folders: list[Path], weights: list[float], frames: int = 17) -> np.ndarray:
    """The prompt by diffusers alone, with LoRAs at their weights: uint8 (F, H, W, 3)."""
    family = job.state.family
    pipeline = diffusers.LTXPipeline.from_pretrained(family.folder.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for place, folder in enumerate(folders):
        pipeline.load_lora_weights(folder, adapter_name=f"lora{place}")
    pipeline.set_adapters([f"lora{place}" for place in range(len(folders))], weights)
    special = {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
    made = pipeline(
        prompt=PROMPT,
        negative_prompt="",
        num_frames=frames,
        height=64,
        width=96,
        frame_rate=25,
        guidance_scale=1.0,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
        **(special if pipeline.vae.config.timestep_conditioning else {}),
    ).frames[0]
    return (made * 255).round().astype(np.uint8)


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """As in test_generate.py: last bits of float32 may turn a pixel in a thousand to its neighbour."""
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_a_strength_is_that_of_diffusers(trained: Callable[..., Job], tmp_path: Path) -> None:
    job = trained()
    export_weights(job.state, job.recipe.train.method, tmp_path / "lora")
    made: list[np.ndarray] = []
    strengths = job.prepared.prompts[0].prompt.strengths
    requests = [request_of(job, job.prepared.prompts[0], 7, strength) for strength in strengths]
    dtype = DTYPES[job.recipe.train.precision]
    generate(job.state, requests, job.idle_batch(), False, dtype, lambda index, frames: made.append(frames))
    none, some, all_of_it = made
    assert_same(some, by_diffusers(job, [tmp_path / "lora"], [0.4]))
    assert_same(all_of_it, by_diffusers(job, [tmp_path / "lora"], [1.0]))
    assert 0.1 < np.abs(some.astype(int) - none).mean() < np.abs(all_of_it.astype(int) - none).mean()


def test_dora_at_strength_0_is_the_base_model(
    trained: Callable[..., Job], family_recipe: Callable[..., Path], runtime, tmp_path: Path
) -> None:
    picture = PROMPTS.replace("steps = 2", 'steps = 2, shape = "1x64x96"')  # as PNG it is exact
    job = trained(picture, "lora.dora=true")
    export_weights(job.state, job.recipe.train.method, tmp_path / "dora")
    samples = validation_samples(job, 2)
    live = {path.stem.partition("strength")[2]: np.asarray(Image.open(path)) for _, path in samples.videos}
    recipe = load_recipe(family_recipe("ltx"), [picture])
    sample(recipe, open_family(recipe), runtime, tmp_path / "out", tmp_path / "dora", compare=True)
    exported = {
        path.stem.removeprefix("00_seed7_"): np.asarray(Image.open(path)) for path in (tmp_path / "out").glob("00*")
    }
    base = exported["base"]
    assert_same(live["0"], base)
    assert np.array_equal(exported["trained_strength0"], base)
    for strength in ("0.4", "1"):
        assert_same(live[strength], exported[f"trained_strength{strength}"])
        assert np.abs(live[strength].astype(int) - base).max() > 1


def test_samples_of_several_strengths_and_steps_lie_in_one_picture(trained: Callable[..., Job]) -> None:
    job = trained()
    assert validation_samples(job, 0) is not None
    assert write_grid(job) is None  # there is nothing to lie beside
    samples = validation_samples(job, 2)
    names = [path.name for _, path in samples.videos]
    assert names == [f"00_seed7_strength{strength}.mp4" for strength in ("0", "0.4", "1")]
    assert "strength 0.4" in samples.videos[1][0]
    assert samples.control_change is None
    grid = np.asarray(Image.open(write_grid(job)))
    rows, columns, width = 3, 2, 192  # of 128 pixels in height
    assert grid.shape[0] > rows * 128
    assert columns * width < grid.shape[1] < (columns + 1) * width


def test_a_control_prompt_is_made_without_the_lora_too_and_compared(trained: Callable[..., Job]) -> None:
    job = trained('validation.prompts=[{text = "a dog", steps = 2, guidance = 1.0, control = true}]')
    samples = validation_samples(job, 2)
    assert [path.name for _, path in samples.videos] == ["00_seed0_strength0.mp4", "00_seed0_strength1.mp4"]
    assert all(label.startswith("control: a dog") for label, _ in samples.videos)
    assert samples.control_change > 0.1


def test_a_control_prompt_has_no_trigger_word(family_recipe: Callable[..., Path]) -> None:
    prompts = 'validation.prompts=[{text = "a Sks dog", control = true}]'
    with pytest.raises(UserError, match=r"a control prompt has no trigger word \(sks\)"):
        open_family(load_recipe(family_recipe("ltx"), [prompts, "data.id_token=sks"]))


@pytest.mark.parametrize("method", ["full", "partial"])
def test_trained_weights_of_the_model_have_no_strength(family_recipe: Callable[..., Path], method: str) -> None:
    with pytest.raises(UserError, match=f"strength is about a LoRA, and train.method is {method}"):
        open_family(load_recipe(family_recipe("ltx"), [PROMPTS, f"train.method={method}", *PARTIAL[method]]))


def test_sample_applies_several_loras_with_their_strengths(
    trained: Callable[..., Job],
    family_recipe: Callable[..., Path],
    runtime,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = trained()
    export_weights(job.state, job.recipe.train.method, tmp_path / "one")
    other = trained(PROMPTS, "train.seed=3", "lora.rank=2")
    export_weights(other.state, other.recipe.train.method, tmp_path / "two")
    picture = PROMPTS.replace("steps = 2", 'steps = 2, shape = "1x64x96"')  # as PNG it is exact
    recipe = load_recipe(family_recipe("ltx"), [picture])
    adapters = [(tmp_path / "one", 1.0), (tmp_path / "two", 0.6)]
    sample(recipe, open_family(recipe), runtime, tmp_path / "out", adapters, strengths=[0.5, 1.0])
    made = {path.name: np.asarray(Image.open(path)) for path in (tmp_path / "out").glob("00*")}
    assert sorted(made) == ["00_seed7_trained_strength0.5.png", "00_seed7_trained_strength1.png"]
    theirs = by_diffusers(job, [tmp_path / "one", tmp_path / "two"], [0.5, 0.3], frames=1)
    assert_same(made["00_seed7_trained_strength0.5.png"], theirs[0])
