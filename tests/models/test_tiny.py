"""The tiny pipelines: complete, loadable by diffusers alone, small, and the same for the same seed."""

from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from PIL import Image
from recording import FIRST, PROMPT, VARIANTS, TinyModel, generator

from finetune.models import family_class


def test_diffusers_generates_a_finite_video_from_the_folder_alone(model: TinyModel) -> None:
    """With classifier-free guidance, as a user would sample."""
    pipeline = DiffusionPipeline.from_pretrained(model.folder)
    if model.family.name == "wan_i2v" and model.family.folder.pipeline_class == "WanPipeline":  # one of 5B is for both
        pipeline = model.pipeline_class.from_pretrained(model.folder)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == model.family.pipeline_class
    bucket, family = model.small, model.family
    image = Image.fromarray(model.clip[0]).resize((bucket.width, bucket.height))
    condition = {"image": family.condition_image(image, bucket)} if family.takes_image else {}
    condition |= {"last_image": image} if family.last_image else {}
    sizes = family.shape_arguments(bucket)
    made = pipeline(
        prompt=PROMPT, **sizes, **condition, num_inference_steps=2, generator=generator(), output_type="pt"
    ).frames
    assert made.shape == (1, bucket.frames, 3, bucket.height, bucket.width)
    assert made.isfinite().all()
    assert made.std() > 1e-3


def test_every_component_that_the_family_names_is_there(model: TinyModel) -> None:
    assert model.family.folder.problems(model.family.components) == []


@pytest.mark.parametrize(
    "name, variant", [pytest.param(*each, marks=[] if each in FIRST else pytest.mark.full) for each in VARIANTS]
)
def test_it_is_the_same_for_the_same_seed(
    name: str, variant: str | None, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    cls = family_class(name)
    cls.tiny(
        tmp_path / "again", variant=None if variant in cls.variants[:1] else variant
    )  # the first, if none is named
    cls.tiny(tmp_path / "other", seed=1, variant=variant)
    contents = contents_of(tiny_model(name, variant))
    assert contents_of(tmp_path / "again") == contents
    weights = Path("transformer") / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "other" / weights).read_bytes() != contents[weights]


def test_it_takes_a_few_megabytes(model: TinyModel) -> None:
    """HunyuanVideo-1.5's glyphs pass through a layer of 2048 x 2048 weights, whatever its config says."""
    limit = 10e6 if model.family.name.startswith("hunyuan15") else 8e6
    assert sum(map(len, contents_of(model.folder).values())) < limit


@pytest.mark.parametrize("name", ["cogvideox", "cogvideox_i2v", "hunyuan_i2v", "ltx", "ltx_i2v", "wan", "wan_i2v"])
def test_variants_of_a_family_differ(name: str, tiny_model: Callable[..., Path]) -> None:
    files = ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json")
    folders = [tiny_model(name, variant) for variant in family_class(name).variants]
    configs = [tuple((folder / file).read_text() for file in files) for folder in folders]
    assert len(set(configs)) == len(configs) > 1


def contents_of(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
