"""HunyuanVideo-1.5's own forward pass computes what diffusers' does, of each sample by itself, and looks at no data."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import FLOAT32, assert_close_to_scale
from PIL import Image
from recording import CPU, PROMPT, Clip, TinyModel, adapted, generator, hooks, recorded, training_inputs
from torch import Tensor, nn

from finetune.checks.model import open_family
from finetune.data.synthetic import scene
from finetune.models.hunyuan15 import HunyuanVideo15
from finetune.models.text_mask import MARK, call
from finetune.recipe import Bucket, load_recipe
from finetune.recipe.validation import Prompt
from finetune.runtime.errors import UserError

CAPTIONS = ("a red ball moves", 'a sign says "HI"', 'white stripes drift upwards: "UP" and "AWAY", and fade')
TOLERANCE = 1e-6  # in float32, beside the largest value


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> TinyModel:
    return TinyModel.open(tiny_model("hunyuan15"), "hunyuan15")


def arguments(model: TinyModel, captions: tuple[str, ...], given: tuple[bool, ...]) -> dict[str, Tensor]:
    """A call as pipelines make it: text padded to its full length; an image is given to some of the samples."""
    config, size, drawn = model.family.transformer_config, len(captions), generator()
    texts = [model.text(caption) for caption in captions]
    image = torch.randn(size, 729, config["image_embed_dim"], generator=drawn)
    return {
        "hidden_states": torch.randn(size, config["in_channels"], 3, 4, 6, generator=drawn),
        "timestep": torch.linspace(100, 900, size),
        "image_embeds": image * torch.tensor(given)[:, None, None],
        **{name: torch.stack([text[name] for text in texts]) for name in texts[0]},
    }


@torch.no_grad()
def each_alone(transformer: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    size = len(inputs["timestep"])
    singles = [{name: value[place : place + 1] for name, value in inputs.items()} for place in range(size)]
    return torch.cat([transformer(**single, return_dict=False)[0] for single in singles])


@pytest.mark.parametrize("given", [(False,) * 3, (True,) * 3, (True, False, True)], ids=["none", "all", "some"])
def test_the_forward_pass_is_diffusers_of_each_sample_alone(model: TinyModel, given: tuple[bool, ...]) -> None:
    """With an image in some samples of a batch, diffusers gives the others the zeros as an image, too."""
    inputs = arguments(model, CAPTIONS, given)
    theirs = each_alone(model.pipeline().transformer, inputs)
    with torch.no_grad():
        ours = adapted(model)(**inputs, return_dict=False)[0]
    assert_close_to_scale(ours, theirs, TOLERANCE)
    assert_close_to_scale(each_alone(adapted(model), inputs), theirs, TOLERANCE)


def test_padding_has_no_influence(model: TinyModel) -> None:
    inputs, transformer = arguments(model, CAPTIONS, (False,) * 3), adapted(model)
    with torch.no_grad():
        before = transformer(**inputs, return_dict=False)[0]
        for suffix in ("", "_2"):
            tokens, mask = inputs[f"encoder_hidden_states{suffix}"], inputs[f"encoder_attention_mask{suffix}"]
            inputs[f"encoder_hidden_states{suffix}"] = torch.where(mask[..., None].bool(), tokens, 100.0)
        after = transformer(**inputs, return_dict=False)[0]
    assert torch.equal(before, after)


def test_gradients_are_those_of_diffusers(model: TinyModel) -> None:
    inputs = arguments(model, CAPTIONS, (True,) * 3)
    found = []
    for transformer in (adapted(model), TinyModel.pipeline(model).transformer):
        transformer.zero_grad()
        transformer(**inputs, return_dict=False)[0].square().mean().backward()
        found.append({name: p.grad for name, p in transformer.named_parameters() if p.grad is not None})
        transformer.zero_grad()
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).abs().max()) < TOLERANCE * largest, name


def test_nothing_in_it_depends_on_data(model: TinyModel) -> None:
    """On the meta device tensors have no data: whoever asks for some fails."""
    inputs = arguments(model, CAPTIONS, (True, False, True))
    shape = adapted(model)(**inputs).sample.shape
    transformer = model.family.empty_transformer()
    on_meta = {name: value.to("meta") for name, value in inputs.items()}
    assert transformer(**on_meta).sample.shape == shape
    with pytest.raises(RuntimeError, match="meta tensors"):
        diffusers_own = type(transformer).from_config(transformer.config).to("meta")
        diffusers_own(**on_meta)


def test_a_batch_without_glyphs_has_no_tokens_for_them_and_their_embedder_has_a_gradient(model: TinyModel) -> None:
    """On every rank alike, whatever captions it has: ranks that share gradients must have those of the same weights."""
    transformer, family = adapted(model), model.family
    for captions, length in ((CAPTIONS[:1], 0), (CAPTIONS[:2], 12)):
        inputs = arguments(model, captions, (False,) * len(captions))
        text = {name: inputs[name] for name in family.text_arguments}
        batch = family.inputs(inputs["hidden_states"][:, :4], inputs["timestep"] / 1000, text, {}, [])
        assert batch["encoder_hidden_states_2"].shape[1] == length
        assert batch[MARK] is (length == 0)
        transformer.zero_grad()
        call(transformer, batch).square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in transformer.context_embedder_2.named_parameters()}
        assert all(gradient is not None for gradient in gradients.values())
        assert any(bool(gradient.any()) for gradient in gradients.values()) == (length > 0)
        assert all(parameter.grad is None for parameter in transformer.image_embedder.parameters())


def test_compiled_blocks_get_text_at_its_full_length(model: TinyModel) -> None:
    family = HunyuanVideo15(model.family.folder)
    family.keeps_text_length = True
    inputs = arguments(model, CAPTIONS, (False,) * 3)
    text = {name: inputs[name] for name in family.text_arguments}
    batch = family.inputs(inputs["hidden_states"][:, :4], inputs["timestep"] / 1000, text, {}, [])
    assert batch[MARK] is False
    assert all(batch[name] is text[name] for name in text)


# Image-to-video


@pytest.fixture
def i2v(tiny_model: Callable[..., Path]) -> TinyModel:
    return TinyModel.open(tiny_model("hunyuan15_i2v"), "hunyuan15_i2v")


def dropped(model: TinyModel, caption: str = PROMPT) -> Clip:
    return Clip(recorded(model, prompt=caption), 1, model.text(caption), image_dropped=True)


def test_a_dropped_image_is_text_to_video(i2v: TinyModel) -> None:
    """In all that the transformer is given: no latents, no mask, no tokens of the image."""
    given, without = training_inputs(i2v, Clip(recorded(i2v), 1, i2v.text(PROMPT))), training_inputs(i2v, dropped(i2v))
    assert given["hidden_states"][:, 4:8, 0].any()
    assert bool((given["hidden_states"][:, 8, 0] == 1).all())
    assert given["image_embeds"].shape[1] == 729
    assert not without["hidden_states"][:, 4:].any()
    assert without["image_embeds"].shape[1] == 0
    assert without[MARK] is given[MARK] is True
    inputs = {name: value for name, value in without.items() if name not in (MARK, "image_embeds")}
    with torch.no_grad():
        ours = call(adapted(i2v), without)
        theirs = i2v.pipeline().transformer(**inputs, image_embeds=torch.zeros(1, 729, 16), return_dict=False)[0]
    assert_close_to_scale(ours, theirs, TOLERANCE)


def test_images_dropped_from_some_samples_of_a_batch_leave_the_others_as_they_are(i2v: TinyModel) -> None:
    clips = [Clip(recorded(i2v), 1, i2v.text(PROMPT)), dropped(i2v, "white stripes"), dropped(i2v)]
    with torch.no_grad():
        batch = training_inputs(i2v, *clips)
        together = call(adapted(i2v), batch)
        alone = [call(adapted(i2v), training_inputs(i2v, clip)) for clip in clips]
    assert batch[MARK] is False
    assert_close_to_scale(together, torch.cat(alone), TOLERANCE)
    assert_close_to_scale(together[:1], clips[0].call.output, FLOAT32)


def test_the_images_embedder_has_a_gradient_whichever_images_are_dropped(i2v: TinyModel) -> None:
    transformer = adapted(i2v)
    for clip in (Clip(recorded(i2v), 1, i2v.text(PROMPT)), dropped(i2v)):
        transformer.zero_grad()
        call(transformer, training_inputs(i2v, clip)).square().mean().backward()
        gradients = [parameter.grad for parameter in transformer.image_embedder.parameters()]
        assert all(gradient is not None for gradient in gradients)
        assert any(bool(gradient.any()) for gradient in gradients) != clip.image_dropped


@pytest.mark.parametrize("bucket", [Bucket(5, 64, 96), Bucket(5, 96, 64), Bucket(5, 64, 80)], ids=str)
def test_a_prompts_image_is_encoded_as_the_pipeline_encodes_it(i2v: TinyModel, bucket: Bucket) -> None:
    image = Image.fromarray(scene(3, 1, 150, 90)[0][0])
    given = i2v.family.condition_image(image, bucket)
    ours = i2v.family.image_encoder(CPU, torch.float32)(np.asarray(given))["embeds"]
    pipeline, seen = i2v.pipeline(), []
    with hooks(pipeline.transformer, lambda module, args, kwargs: seen.append(kwargs["image_embeds"]), lambda *_: None):
        pipeline(prompt="a", image=given, num_frames=bucket.frames, num_inference_steps=1, output_type="latent")
    assert torch.equal(ours, seen[0][0])


# The checkpoint


def test_a_step_distilled_checkpoint_is_refused_by_name(
    model: TinyModel, family_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = family_recipe("hunyuan15")
    open_family(load_recipe(recipe))
    folder = Path(shutil.copytree(model.folder, tmp_path / "model"))
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_meanflow": True}))
    with pytest.raises(UserError, match=r"step-distilled checkpoint \(use_meanflow\)"):
        open_family(load_recipe(recipe, [f"model.path={folder}"]))


@pytest.mark.parametrize("guidance, scale", [(None, 6.0), (3.5, 3.5), (1.0, 1.0)])
def test_a_prompts_guidance_is_the_guiders(model: TinyModel, guidance: float | None, scale: float) -> None:
    """None leaves the checkpoint's own; at 1 there is no unconditional call."""
    (guider,) = model.family.prompt_components(Prompt(text="a", guidance=guidance)).values()
    assert isinstance(guider, type(model.pipeline().guider))
    assert guider.guidance_scale == scale
    assert guider.num_conditions == (1 if scale == 1 else 2)
