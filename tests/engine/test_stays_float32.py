"""What diffusers keeps in float32 is stored and computed in float32, while the rest of the model computes in bf16."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from exports import export_weights
from float32_worker import METHODS, PLAIN, ways
from processes import figures_of
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.models import family_class
from finetune.training.job import Job

Figures = Callable[[str, int], dict]
TOLERANCE = 1e-5  # in float32, relative to each figure, a mean or root of squares, in which nothing cancels


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan with image tokens. What is kept lies in blocks, directly on them, directly on the model, and beside others."""
    path = tmp_path_factory.mktemp("kept") / "model"
    family_class("wan_i2v").tiny(path, variant="2.1-FLF2V")
    transformer = WanTransformer3DModel.from_pretrained(path / "transformer")
    for name, parameter in transformer.named_parameters():
        if "norm" in name or "pos_embed" in name:  # they begin as ones and zeros, which are the same in any dtype
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    transformer.save_pretrained(path / "transformer")
    return path


@pytest.fixture(scope="module")
def recipe(model: Path, few_clips: Path, cache: Path) -> Path:
    path = model.parent / "recipe.toml"
    path.write_text(
        f"""
output = "{model.parent / "run"}"
[model]
family = "wan_i2v"
path = "{model}"
[data]
path = "{few_clips}"
buckets = ["9x32x48"]
last_image = true
cache = "{cache}"
workers = 0
[train]
steps = 4
global_batch_size = 2
micro_batch_size = 2
[optimizer]
lr = 1e-2
[validation]
heldout_clips = 1
sigmas = 3
"""
    )
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Figures:
    """Figures of tests/engine/float32_worker.py, made when they are first asked for."""
    known: dict[tuple[str, int], dict] = {}

    def get(which: str, processes: int) -> dict:
        if (which, processes) not in known:
            folder = tmp_path_factory.mktemp(f"kept-{which}")
            known[which, processes] = figures_of("float32_worker.py", processes, folder, [which, recipe], 600)
        return known[which, processes]

    return get


def in_bf16(which: str) -> pytest.MarkDecorator:
    cases = [(which, processes, *way) for processes in (1, 2) for way in ways(which, processes)]
    return pytest.mark.parametrize("which, processes, method, how", cases)


def check_bf16(figures: dict, method: str, how: str) -> None:
    """The same outputs as diffusers', bit for bit, and the same training as the plain one's."""
    plain, found = figures["bf16"][f"{method}, plain"], figures["bf16"][f"{method}, {how}"]
    assert found["difference"] == 0
    for name, dtypes in found["seen"].items():
        stays = name in ("time_embedder", "image_embedder.norm1", "block.norm2", "block.scale_shift_table")
        assert dtypes[1] == ("float32" if stays or name == "scale_shift_table" else "bfloat16"), name
    if found["seen"]:
        assert found["seen"]["time_embedder"][0] == "float32"
    for figure in ("loss", "grad_norm"):
        assert len(found[figure]) == 4
        limit = 5e-3 if method == "bf16 weights" else 1e-4
        assert found[figure] == pytest.approx(plain[figure], rel=limit), figure


@in_bf16("some")
def test_outputs_in_bf16_are_those_of_diffusers(trained: Figures, which: str, processes: int, method: str, how: str):
    check_bf16(trained(which, processes), method, how)


@pytest.mark.full
@pytest.mark.timeout(1300)
@in_bf16("all")
def test_so_they_are_with_every_saver(trained: Figures, which: str, processes: int, method: str, how: str):
    check_bf16(trained(which, processes), method, how)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("processes, accumulation", [(1, 2), (2, 1)])
@pytest.mark.parametrize("figure", ["loss", "grad_norm", "heldout"])
def test_figures_in_float32_are_those_of_one_process(
    trained: Figures, processes: int, accumulation: int, method: str, figure: str
) -> None:
    alone = trained("some", 1)["float32"][f"{method}, 1"][figure]
    found = trained("some", processes)["float32"][f"{method}, {accumulation}"][figure]
    assert len(alone) >= 2
    assert found == pytest.approx(alone, rel=TOLERANCE)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_going_on_from_a_checkpoint_is_the_same_as_not_having_stopped(trained: Figures, processes: int, method: str):
    straight, resumed = trained("some", processes)["resumed"][method]
    assert resumed == straight


# One process, in this one


@pytest.fixture
def make_job(build_job: Callable[..., Job], recipe: Path, tmp_path: Path) -> Callable[..., Job]:
    def make(method: str, *overrides: str) -> Job:
        output = f"output={tmp_path / 'run'}"
        return build_job(output, *PLAIN, *METHODS[method], "train.precision=bf16", *overrides, recipe_file=recipe)

    return make


def diffusers_transformer(job: Job, folder: Path) -> nn.Module:
    return job.state.family._transformer_class.from_pretrained(folder, torch_dtype=torch.bfloat16).train()


@pytest.mark.parametrize("method", ["full", "bf16 weights"])
@pytest.mark.parametrize("layout", ["shard", "replicate"])
def test_gradients_are_those_of_diffusers_model(
    make_job: Callable[..., Job], model: Path, method: str, layout: str
) -> None:
    """Of every parameter, in float32 or bf16, without FSDP: bit for bit."""
    job = make_job(method, f"memory.layout={layout}")
    batch, theirs = job.micro_batches()[0], diffusers_transformer(job, model / "transformer")
    sum(loss.mean() for loss in batch.losses(job.state.family.predict(theirs, batch.inputs)).values()).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found: dict[str, Tensor] = {}
    job.state.optimizer.register_step_pre_hook(
        lambda *_: found.update(
            {name: p.grad.full_tensor().clone() for name, p in job.state.transformer.named_parameters()}
        )
    )
    job.step(0, [batch])
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name].to(value.dtype), value)] == []
    assert found["blocks.0.scale_shift_table"].any()


def stays(name: str) -> bool:
    return any(part in name.split(".") for part in ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"))


@pytest.mark.parametrize("method, dtype", [("full", torch.float32), ("bf16 weights", torch.bfloat16)])
def test_exported_weights_are_in_the_dtypes_in_which_they_were_trained(
    make_job: Callable[..., Job], tmp_path: Path, method: str, dtype: torch.dtype
) -> None:
    job = make_job(method)
    job.step(0, [job.micro_batches()[0]])
    export_weights(job.state, "full", tmp_path / "weights")
    found = load_file(tmp_path / "weights" / "diffusion_pytorch_model.safetensors")
    assert {name for name, value in found.items() if value.dtype != (torch.float32 if stays(name) else dtype)} == set()
    theirs, inputs = diffusers_transformer(job, tmp_path / "weights"), job.micro_batches()[1].inputs
    with torch.no_grad():
        ours = job.state.family.predict(job.state.transformer, inputs)["video"]
        assert torch.equal(job.state.family.predict(theirs, inputs)["video"], ours)
    assert any(stays(name) for name in found)
