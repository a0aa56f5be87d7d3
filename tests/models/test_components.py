"""The component that is trained is the one that the family names; here it is `transformer_2`, and no other is there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from closeness import assert_close_to_scale
from diffusers import LTXVideoTransformer3DModel, WanPipeline
from outside_family import Clay, LaterSteps
from safetensors.torch import load_file, save_file

from finetune.checks.model import open_family
from finetune.engine.weights.loading import whole_transformer
from finetune.preparation.encode import prepare
from finetune.recipe import Recipe, load_recipe
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.training.exported_videos import check_trained, load_trained, trained_parts
from finetune.training.job import Job
from finetune.training.output import Results
from finetune.training.samples import validation_samples
from finetune.training.usage import say_usage

PROMPT = 'validation.prompts=[{text = "a red ball", steps = 2}]'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "later"
    LaterSteps.tiny(path)
    return path


@pytest.fixture
def overrides(model: Path, tmp_path: Path) -> list[str]:
    """A recipe of the family, with a copy of its model that may be changed."""
    shutil.copytree(model, tmp_path / "model")
    return ["model.family=outside_family:LaterSteps", f"model.path={tmp_path / 'model'}", PROMPT]


@pytest.fixture
def make_job(build_job: Callable[..., Job], overrides: list[str]) -> Callable[..., Job]:
    return lambda *more: build_job(*overrides, "optimizer.lr=1e-2", *more)


def train(job: Job, first: int, last: int) -> list[float]:
    """Losses of steps."""
    count = job.split.accumulation
    share = lambda step: [job.micro_batches()[step * count + index] for index in range(count)]  # noqa: E731
    return [job.step(step, share(step)).loss for step in range(first, last)]


def test_its_weights_are_those_that_are_read(make_job: Callable[..., Job], model: Path) -> None:
    job = make_job("train.method=full")
    saved = load_file(model / "transformer_2" / "diffusion_pytorch_model.safetensors")
    for name, tensor in job.state.transformer.state_dict().items():
        assert torch.equal(tensor.to_local() if hasattr(tensor, "to_local") else tensor, saved[name]), name


def test_what_is_wrong_with_its_files_names_it(recipe_file: Path, overrides: list[str], tmp_path: Path) -> None:
    file = tmp_path / "model" / "transformer_2" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("proj_out.weight")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError) as caught:
        open_family(load_recipe(recipe_file, overrides))
    (problem,) = caught.value.problems
    assert problem.where == str(tmp_path / "model" / "transformer_2")
    assert "1 of the transformer_2's tensors are not in its weights, proj_out.weight among them" in problem.what
    assert "download the transformer_2 again" in problem.cure


def test_a_folder_without_it_is_refused(recipe_file: Path, overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "model" / "transformer_2").rename(tmp_path / "model" / "transformer")
    with pytest.raises(UserError, match="transformer_2"):
        open_family(load_recipe(recipe_file, overrides))


def test_it_resumes_and_other_weights_of_it_are_noticed(make_job: Callable[..., Job], tmp_path: Path) -> None:
    straight = make_job()
    expected = train(straight, 0, 3)
    broken = make_job()
    train(broken, 0, 2)
    broken.save(2)
    resumed = make_job()
    assert resumed.resume() == 2
    assert train(resumed, 2, 3) == expected[2:]
    config = tmp_path / "model" / "transformer_2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"norm_eps": 1e-5}))
    with pytest.raises(UserError, match=r"weights in model.path are not those"):
        make_job().resume()


def test_it_makes_the_samples(make_job: Callable[..., Job]) -> None:
    samples = validation_samples(make_job(), 0)
    assert samples is not None
    assert [path.is_file() for _, path in samples.videos] == [True]


def test_its_adapter_is_exported_and_verified(make_job: Callable[..., Job], tmp_path: Path) -> None:
    job = make_job()
    train(job, 0, 1)
    folder = Results(job).export()
    assert folder == (tmp_path / "run" / "lora").absolute()
    check_trained(job.state.family, folder)
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    assert max(weight.abs().max() for name, weight in weights.items() if "lora_B" in name) > 0


def test_all_of_its_weights_are_exported_under_its_name(make_job: Callable[..., Job], tmp_path: Path) -> None:
    job = make_job("train.method=full")
    train(job, 0, 1)
    folder = Results(job).export()
    assert folder == (tmp_path / "run" / "transformer_2").absolute()
    loaded = LTXVideoTransformer3DModel.from_pretrained(folder).state_dict()
    trained = job.state.transformer.state_dict()
    assert loaded.keys() == trained.keys()
    assert not torch.equal(loaded["proj_out.weight"], original(tmp_path)["proj_out.weight"])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_exported_is_loaded_into_it(make_job: Callable[..., Job], method: str) -> None:
    job = make_job(f"train.method={method}", "train.precision=float32")
    train(job, 0, 2)
    folder, family, inputs = Results(job).export(), job.state.family, job.micro_batches()[0].inputs
    base = whole_transformer(family, torch.float32)
    pipeline = WanPipeline(None, None, None, None, transformer_2=base)
    with torch.no_grad():
        (before,) = family.predict(base, inputs).values()
        load_trained(pipeline, family, folder, job.recipe, job.state.runtime)
        (loaded,) = family.predict(pipeline.transformer_2, inputs).values()
        (trained,) = family.predict(job.state.transformer.eval(), inputs).values()
    assert_close_to_scale(loaded, trained)
    assert (before - trained).abs().max() > 1e-3 * trained.abs().max()


@pytest.mark.parametrize(
    ("method", "title", "line"),
    [
        ("lora", "LoRA, verified", 'pipe.transformer_2.load_lora_adapter("{}", weight_name="pytorch_lora_weights'),
        ("full", "transformer_2 lies", 'from_pretrained("{}", torch_dtype='),
    ],
)
def test_the_end_of_a_run_names_it(
    make_job: Callable[..., Job], capsys: pytest.CaptureFixture[str], tmp_path: Path, method: str, title: str, line: str
) -> None:
    say_usage(make_job(f"train.method={method}"), tmp_path)
    said = capsys.readouterr().err
    assert f"done. The {title}" in said
    assert line.format(tmp_path) in said


def test_a_folder_without_its_weights_is_said_to_have_none_of_it(make_job: Callable[..., Job], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nor a transformer_2 in it"):
        trained_parts(tmp_path, make_job().state.family)


def original(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "transformer_2" / "diffusion_pytorch_model.safetensors")


def test_configs_alone_will_do_for_a_plan(recipe_file: Path, overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "model" / "transformer_2" / "diffusion_pytorch_model.safetensors").unlink()
    recipe: Recipe = load_recipe(recipe_file, overrides)
    family = open_family(recipe, with_weights=False)
    assert len(family.empty_transformer().transformer_blocks) == family.transformer_config["num_layers"]


def test_what_an_outside_family_encodes_is_not_taken_for_anothers(
    recipe_file: Path, runtime: Runtime, tmp_path: Path
) -> None:
    """It puts words of its own before a caption, and the same components encode them."""
    Clay.tiny(tmp_path / "clay")
    encoded = {}
    for name in ("outside_family:Clay", "ltx"):
        recipe = load_recipe(recipe_file, [f"model.family={name}", f"model.path={tmp_path / 'clay'}"])
        prepared = prepare(recipe, open_family(recipe), runtime)
        encoded[name] = prepared.cache.read("text", prepared.train[0].keys["text"])["encoder_hidden_states"]
    assert not torch.equal(*encoded.values())
