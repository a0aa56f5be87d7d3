"""A model that generates with two transformers has one at a time on the device, and generates what its pipeline does."""

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from companion_worker import CONFIGURATIONS
from experts import HighNoise, LowNoise, bits, recipe_of, step, training_state, with_companion
from exports import export_weights
from processes import figures_of
from test_generate import assert_same, live_video, out_of_memory
from torch import Tensor, nn

from finetune.engine.companion import Movable
from finetune.engine.generate import generate
from finetune.engine.weights.exporters.diffusers_lora import LORA_FILE
from finetune.engine.weights.loading import host_copies
from finetune.planning.simulate import example_batch
from finetune.training.job import Job
from finetune.training.other_expert import load_weights_of
from finetune.training.samples import request_of

PROMPT = "a red ball moves"
STEPS = 4  # two of each expert
Build = Callable[..., Job]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "experts"
    HighNoise.tiny(path)
    return path


@pytest.fixture
def build(build_job: Build, tmp_path: Path, model: Path, few_clips: Path, cache: Path) -> Build:
    """Build a training of one of the experts, with a prompt: `build(HighNoise, "train.method=full")`."""

    def make(family: type[HighNoise], *overrides: str) -> Job:
        path = tmp_path / f"{family.name}.toml"
        prompts = [{"text": PROMPT, "steps": STEPS, "guidance": 3.0, "seed": 7}]
        path.write_text(recipe_of(family, model, few_clips, cache, tmp_path / f"run-{family.name}", prompts))
        return build_job(*overrides, recipe_file=path)

    return make


def pipeline_video(job: Job, adapters: dict[str, Path] | None = None) -> np.ndarray:
    """The prompt by diffusers alone, and exported adapters by the component that they are of."""
    pipeline = diffusers.WanPipeline.from_pretrained(job.state.family.folder.path)
    for component, folder in (adapters or {}).items():
        second = component == "transformer_2"
        pipeline.load_lora_weights(
            folder, weight_name=LORA_FILE, adapter_name=component, load_into_transformer_2=second
        )
    return video_of(pipeline, PROMPT, STEPS, 3.0, 7)


def video_of(pipeline: diffusers.WanPipeline, prompt: str, steps: int, guidance: float, seed: int) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        prompt=prompt,
        negative_prompt="",
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]
    return (frames * 255).round().astype(np.uint8)


# What is generated


@pytest.mark.parametrize("family", [HighNoise, LowNoise])
def test_both_experts_generate_what_their_pipeline_does(build: Build, family: type[HighNoise]) -> None:
    job = build(family)
    companion = with_companion(job)
    assert_same(live_video(job), pipeline_video(job))
    assert not companion.is_on_device
    assert companion.swaps == 2
    live_video(job)
    assert companion.swaps == 4


def test_full_finetuning_generates_with_both_experts(build: Build) -> None:
    job = build(LowNoise, "train.method=full")
    with_companion(job)
    assert_same(live_video(job), pipeline_video(job))


def test_full_finetuning_holds_the_companion_in_compute_precision(build: Build) -> None:
    job = build(HighNoise, "train.method=full", "train.precision=bf16", "train.weights=float32")
    companion = with_companion(job)
    dtypes = {parameter.dtype for parameter in companion.transformer.parameters()}
    assert dtypes == {parameter.dtype for parameter in job.state.family.build_transformer(torch.bfloat16).parameters()}
    assert torch.bfloat16 in dtypes
    assert live_video(job).shape == (9, 64, 64, 3)


@pytest.mark.parametrize(
    "average", [[], ["ema.decay=0.5"], ["optimizer.name=schedule_free_adamw"]], ids=["none", "ema", "schedule-free"]
)
def test_adapters_of_both_experts_generate_what_their_exports_do(
    build: Build, tmp_path: Path, average: list[str]
) -> None:
    first = build(LowNoise, *average)
    for number in range(3):
        step(first, number)
    first.save(3)
    export_weights(first.state, "lora", tmp_path / "low")
    job = build(HighNoise, *average)
    for number in range(3):
        step(job, number)
    export_weights(job.state, "lora", tmp_path / "high")
    settings = first.recipe.ema, first.recipe.optimizer
    with_companion(job, take_up=lambda part: load_weights_of(first.checkpoints, 3, part, *settings))
    both = live_video(job)
    folders = {"transformer": tmp_path / "high", "transformer_2": tmp_path / "low"}
    assert_same(both, pipeline_video(job, folders))
    assert np.abs(both.astype(int) - pipeline_video(job, {"transformer": tmp_path / "high"})).max() > 1
    assert np.abs(both.astype(int) - pipeline_video(job, {"transformer_2": tmp_path / "low"})).max() > 1


# What it leaves of the training


@pytest.mark.parametrize("method", ["lora", "full"])
def test_training_goes_on_as_without_samples(build: Build, method: str) -> None:
    job, other = (build(HighNoise, f"train.method={method}", "optimizer.lr=1e-3") for _ in range(2))
    with_companion(job)
    figures, expected = [], []
    for number in range(3):
        before = training_state(job)
        live_video(job)
        assert training_state(job) == before
        figures.append(step(job, number))
        expected.append(step(other, number))
    assert figures == expected
    assert training_state(job) == training_state(other)


@pytest.mark.parametrize("component", ["transformer", "transformer_2"])
def test_the_trained_one_is_back_after_an_error_inside_a_transformer(build: Build, component: str) -> None:
    job = build(HighNoise)
    companion = with_companion(job)
    before = training_state(job)
    failing = companion.transformer if component == companion.component else job.state.transformer
    hook = failing.blocks[1].register_forward_pre_hook(out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="in a block"):
        live_video(job)
    hook.remove()
    assert not companion.is_on_device
    assert training_state(job) == before
    assert_same(live_video(job), pipeline_video(job))


@pytest.mark.parametrize("calls", [0, 3, 5])
def test_a_polite_stop_ends_sampling_with_either_of_them(build: Build, calls: int) -> None:
    """Each step has two calls: with and without the prompt. The companion's begin with the fifth."""
    job = build(HighNoise)
    companion = with_companion(job)
    before = training_state(job)
    votes = iter([False] * calls + [True])
    requests = [request_of(job, job.prepared.prompts[0], seed=7)]
    made = generate(job.state, requests, job.idle_batch(), False, torch.float32, lambda *_: None, lambda: next(votes))
    assert not made
    assert companion.swaps == (2 if calls == 5 else 0)
    assert not companion.is_on_device
    assert training_state(job) == before


# On two ranks


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory, model: Path, few_clips: Path, cache: Path) -> dict[int, Any]:
    """By number of processes: the folder with the videos, and the figures of every configuration."""
    found = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"experts-{processes}")
        recipe = folder / "recipe.toml"
        prompts = [dict(zip(("text", "steps", "guidance"), each, strict=True)) for each in PROMPTS]
        recipe.write_text(recipe_of(HighNoise, model, few_clips, cache, folder / "run", prompts))
        found[processes] = folder, figures_of("companion_worker.py", processes, folder, [recipe])
    return found


@pytest.fixture(scope="module")
def expected(model: Path) -> list[np.ndarray]:
    """The videos of the prompts, by diffusers alone."""
    pipeline = diffusers.WanPipeline.from_pretrained(model)
    return [video_of(pipeline, text, steps, guidance, 0) for text, steps, guidance in PROMPTS]


PROMPTS = [("a red ball moves", 2, 1.0), ("a blue square falls", 6, 3.0), ("a green triangle grows", 3, 1.0)]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_any_number_of_ranks_generates_what_the_pipeline_does(
    on_ranks: dict[int, Any], expected: list[np.ndarray], name: str, processes: int
) -> None:
    folder, _ = on_ranks[processes]
    for index, video in enumerate(expected):
        assert_same(np.load(folder / f"{name}-{index}.npy"), video)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_ranks_swap_together_and_as_rarely_as_can_be(on_ranks: dict[int, Any], name: str) -> None:
    """One rank goes through two videos, the other in the meantime through one, which is longer than both."""
    assert on_ranks[1][1][name]["swaps"] == [6]
    assert on_ranks[2][1][name]["swaps"] == [4, 4]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_samples_change_nothing_of_the_training_on_any_rank(
    on_ranks: dict[int, Any], name: str, processes: int
) -> None:
    figures = on_ranks[processes][1][name]
    assert figures["unchanged"] == [True] * processes
    assert figures["steps"] == figures["steps without samples"]
    assert figures["as without samples"] == [True] * processes


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_all_ranks_stop_together_and_have_the_trained_one_back(on_ranks: dict[int, Any], name: str) -> None:
    for calls, ends in on_ranks[2][1][name]["stopped by one rank"].items():
        assert ends == [{"made": False, "companion": False}] * 2, calls


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_error_of_one_rank_is_raised_on_all_after_their_videos(on_ranks: dict[int, Any], name: str) -> None:
    assert on_ranks[2][1][name]["unwritable"] == [
        {"error": "no room", "made": made, "companion": False} for made in (2, 0)
    ]


# Moving


LAYOUTS = {
    "replicated blocks in a buffer each": ["memory.layout=replicate"],
    "shards": ["memory.layout=shard"],
    "low-bit codes": ["memory.low_bit=nf4", "memory.layout=replicate"],
    "streamed blocks": ["memory.offload=true"],
    "one streamed block, one resident": ["memory.offload=true", "memory.resident_blocks=1"],
    "full": ["train.method=full"],
    "zero2": ["train.method=full", "memory.layout=zero2"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_transformer_goes_and_comes_back_with_its_bits(build_job: Build, layout: str) -> None:
    job = build_job(*LAYOUTS[layout])
    transformer = job.state.transformer
    movable = Movable(transformer, job.state.runtime.device)
    values = {}
    for number in range(2):  # the second time, frozen weights are not copied again, and trained ones have changed
        before, video = contents(transformer), prediction(job)
        changed = [name for name in before if values.get(name) not in (None, before[name])]
        assert bool(changed) == (number > 0)
        movable.offload()
        assert not movable.is_on_device
        assert sizes(transformer) == {0}
        movable.onload()
        assert contents(transformer) == before
        assert torch.equal(prediction(job), video)
        values = before
        step(job, number)


def tensors(transformer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in chain(transformer.named_parameters(), transformer.named_buffers()):
        yield name, getattr(tensor, "_local_tensor", tensor)


def sizes(transformer: nn.Module) -> set[int]:
    """Of all storages."""
    return {tensor.untyped_storage().nbytes() for _, tensor in tensors(transformer)}


def contents(transformer: nn.Module) -> dict[str, bytes]:
    """Of all but what is streamed, whose place on the device is another block's, too."""
    named, streamed = dict(transformer.named_parameters()), host_copies(transformer)
    return {name: bits(tensor) for name, tensor in tensors(transformer) if named.get(name) not in streamed}


def prediction(job: Job) -> Tensor:
    """What the transformer makes of a batch, and nothing gathered afterwards."""
    batch = example_batch(job.recipe, job.state.family, job.recipe.data.buckets[0])
    with job.state.parts[0].evaluating("samples"):
        (made,) = job.state.family.predict(job.state.transformer, batch.inputs).values()
    return made
